"""`shelora`: the operator's command line."""

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from shelora import files
from shelora.cli.audit import audit_app
from shelora.cli.cluster import Addresses, LocalCluster
from shelora.cli.page import metrics_addresses, require_dashboard
from shelora.cli.render import federation_view, federations_table, revocations_table
from shelora.cli.reporting import reported
from shelora.cli.revoking import consequences
from shelora.cli.revoking import holder as to_revoke
from shelora.cli.screen import FederationScreen
from shelora.cli.secret_files import make_secrets
from shelora.cli.supervision import interruptible
from shelora.configuration import read_secret
from shelora.errors import DomainError, Reason
from shelora.exporting import encoded, rounds_csv, write_new
from shelora.federation import FederationSpec
from shelora.levels import Level
from shelora.operator import (
    RETRY_S,
    Operator,
    create_token,
    list_revocations,
    operator,
    own_credentials,
    promised_level,
    revoke_holder,
)
from shelora.telemetry.logs import configure_logs
from shelora.terminal import CommandLine, Records, Terminal
from shelora.text import printable
from shelora.transport.address import HostPort
from shelora.transport.enrolment import MAX_TOKEN_S, keep_renewed, renewal_at
from shelora.transport.enrolment import enroll as enrolled
from shelora.transport.identity import Identity, Role
from shelora.transport.tls import Held, IdentityFolder, TlsCredentials
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import enrolment_pb2
from shelora.version import VersionOption

DEFAULT_FOLDER = Path("runs/local")
REFRESH_S = 1.0
_Result = TypeVar("_Result")

app = CommandLine(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
federation_app = typer.Typer(
    help="Create, start, watch, stop, extend, export and delete federations.", no_args_is_help=True
)
app.add_typer(federation_app, name="federation")
token_app = typer.Typer(help="Issue join tokens.", no_args_is_help=True)
app.add_typer(token_app, name="token")
app.add_typer(audit_app, name="audit")
console = Terminal()


@app.callback(
    help="Private federated LoRA fine-tuning: run a local cluster, create and watch federations. Exit codes: 0 done; "
    "1 something broke or does not answer; 2 refused, and the message says what to change."
)
def _program(version: VersionOption = None) -> None:
    """Takes the options that come before a command."""


CoordinatorOption = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        envvar="SHELORA_COORDINATOR",
        help="Coordinator's address, host:port. By default that of the local cluster in runs/local.",
    ),
]
IdentityOption = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        envvar="SHELORA_IDENTITY",
        help="Folder of the operator's key and certificate. By default that of the local cluster.",
    ),
]
KeyAuthorityOption = Annotated[
    str | None,
    typer.Option(
        "--key-authority",
        envvar="SHELORA_KEY_AUTHORITY",
        help="Key authority's address, host:port; it also renews the operator's certificate. By default that of "
        "the local cluster, unless --identity is given.",
    ),
]
NameArgument = Annotated[str, typer.Argument(help="Name of the federation.")]


@app.command()
def up(
    folder: Annotated[Path, typer.Option(help="Folder for data, logs and addresses.")] = DEFAULT_FOLDER,
    aggregation_replicas: Annotated[int, typer.Option(min=1, max=16, help="Aggregation processes.")] = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Worker processes of each; by default one a core.")
    ] = None,
    *,
    any_ports: Annotated[
        bool, typer.Option("--any-ports", help="Use free ports in place of 7099 to 7103.")
    ] = False,
) -> None:
    """Run a cluster on this machine until Ctrl-C: Valkey, key authority, coordinator, aggregation.

    State survives: a cluster started again in the same folder goes on where it stopped.
    """
    with reported(), interruptible(), ExitStack() as stack:
        with console.stages(f"starting a cluster in {folder}") as tell:
            cluster = LocalCluster(
                folder,
                fixed_ports=not any_ports,
                aggregation_replicas=aggregation_replicas,
                workers=workers,
                tell=tell,
            )
            stack.enter_context(cluster)
        _until_interrupted(cluster, folder)


@app.command()
def status(
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
) -> None:
    """Show all federations."""
    federations = _ask(lambda o: o.list(), Target.of(coordinator, identity, key_authority))
    if federations:
        console.print(federations_table(federations))
    else:
        console.say("no federations: `shelora federation create`")


@federation_app.command()
def create(
    specification: Annotated[Path, typer.Argument(help="YAML file, see examples/reuters/federation.yaml.")],
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
    *,
    start_now: Annotated[bool, typer.Option("--start", help="Start it too.")] = False,
) -> None:
    """Create a federation from a YAML file. Repeating it changes nothing."""

    async def work(o: Operator) -> pb.Federation:
        created = await o.create(spec.to_proto())
        return await o.start(created.federation_id) if start_now else created

    with reported():
        spec = FederationSpec.from_yaml(specification)
    console.print(federation_view(_ask(work, Target.of(coordinator, identity, key_authority))))


@federation_app.command()
def start(
    name: NameArgument,
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
) -> None:
    """Let a federation begin as soon as enough agents have joined."""
    target = Target.of(coordinator, identity, key_authority)
    console.print(federation_view(_ask(lambda o: o.start(name), target)))


@federation_app.command()
def rotate(
    name: NameArgument,
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
) -> None:
    """Replace a federation's keys after the round in progress: it votes anew and goes on with the next epoch's."""
    target = Target.of(coordinator, identity, key_authority)
    console.print(federation_view(_ask(lambda o: o.rotate(name), target)))


@federation_app.command()
def stop(
    name: NameArgument,
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
) -> None:
    """End a federation with its newest result.

    The round in progress is abandoned, unless it is being aggregated already. Agents apply the newest result, save the
    adapter and finish; without any result the federation has failed. `extend` lets a stopped federation go on.
    """
    target = Target.of(coordinator, identity, key_authority)
    console.print(federation_view(_ask(lambda o: o.stop(name), target)))


@federation_app.command()
def extend(
    name: NameArgument,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Training rounds to add.")],
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
) -> None:
    """Add training rounds to a federation that runs, has finished or was stopped.

    One that has finished goes on from its result as soon as its agents are started again; it can while aggregation
    keeps that result (result_ttl_days). One that has failed cannot go on: create another one.
    """
    target = Target.of(coordinator, identity, key_authority)
    console.print(federation_view(_ask(lambda o: o.extend(name, rounds), target)))


@federation_app.command()
def delete(
    name: NameArgument,
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a federation for good: its members, rounds, reports and results, and all its keys.

    Agents that still run get notice and halt; they keep the adapters they have saved. Certificates of its clients stay
    valid for a federation of the same name until they expire: `shelora revoke` ends that. The name can be given again.
    """
    target = Target.of(coordinator, identity, key_authority)
    if not yes:
        console.say(
            f"This deletes federation {name}: members, rounds, reports, results, keys. Nothing brings them back; "
            f"`shelora federation export {name} --to FILE` keeps what is known of it, agents keep their adapters."
        )
        typer.confirm("Delete it?", abort=True)
    _ask(lambda o: o.delete(name), target)
    console.say(f"deleted federation {name}")


@federation_app.command()
def export(
    name: NameArgument,
    to: Annotated[Path, typer.Option("--to", help="JSON file to make.")],
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Make a CSV file of the training rounds as well.")
    ] = None,
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
) -> None:
    """Write specification, members, rounds and reports of a federation to a JSON file.

    The model is not in it: operators hold no key. An agent has the adapter in its STATE_DIR/adapter, after every round;
    `client-agent export` copies it.
    """
    federation = _ask(lambda o: o.get(name), Target.of(coordinator, identity, key_authority))
    with reported():
        write_new(to, encoded(federation))
        if csv is not None:
            write_new(csv, rounds_csv(federation))
    console.say(f"wrote {to}" + (f" and {csv}" if csv else ""))


@federation_app.command("report")
def federation_report(
    name: NameArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file to make; by default NAME.html.")
    ] = None,
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
) -> None:
    """Write one HTML file with curves, members, bytes, settings and privacy of a federation, to keep or to send.

    It needs nothing else to be read: no network, no scripts. Its figures are medians over agents.
    """
    with reported():
        require_dashboard()
    from shelora.dashboard.rendering import report  # noqa: PLC0415 - needs packages that are optional

    federation = _ask(lambda o: o.get(name), Target.of(coordinator, identity, key_authority))
    path = output or Path(f"{federation.federation_id}.html")
    with reported():
        write_new(path, report(federation))
    console.say(f"wrote {path}")


@federation_app.command()
def show(
    name: NameArgument,
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it until it ends.")] = False,
) -> None:
    """Show a federation: its agents, what they do, its rounds."""

    async def follow(o: Operator) -> pb.Federation:
        federation = await o.get(name)
        if not watch:
            return federation
        with FederationScreen(console, transient=True) as screen:
            screen.show(federation)
            while federation.phase in {pb.PHASE_CREATED, pb.PHASE_RUNNING}:
                await asyncio.sleep(REFRESH_S)
                federation = await o.get(name, federation.history)
                screen.show(federation)
        return federation

    console.print(federation_view(_ask(follow, Target.of(coordinator, identity, key_authority))))


@app.command()
def dashboard(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 for a free one.")] = 0,
    listen: Annotated[
        str,
        typer.Option(
            help="Address to listen on. For a container whose port is published on the host's 127.0.0.1 under the same "
            "number, and nowhere else: the page has no TLS.",
        ),
    ] = "127.0.0.1",
    address_file: Annotated[
        Path | None,
        typer.Option(
            help="File that gets the address, for this user alone to read, in place of a line on screen."
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=HOST:PORT",
            help="Metrics address of a server, to show its load; repeat for more. The local cluster's are known.",
        ),
    ] = None,
    enrolment: Annotated[
        str | None,
        typer.Option(
            help="Enrolment address of the key authority as devices reach it, host:port, to show them."
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
) -> None:
    """Serve a page with all federations to a browser on this machine, until Ctrl-C.

    It shows them live, creates, starts, stops, extends and deletes them, issues tokens and revokes clients: with the
    operator's certificate, so with the same rights as these commands. The address that is printed admits anyone who has
    it; it is new at every start.
    """
    with reported():
        require_dashboard()
    from shelora.dashboard.serving import Reach, serve  # noqa: PLC0415 - needs packages that are optional

    target = Target.of(coordinator, identity, key_authority)
    with reported():
        reach = Reach(
            coordinator=target.coordinator,
            identity=target.identity,
            key_authority=target.key_authority,
            enrolment=enrolment or target.enrolment,
            metrics={**target.metrics, **metrics_addresses(metrics or [])},
        )
    configure_logs("operator", json=not sys.stderr.isatty())
    with reported(), suppress(KeyboardInterrupt), interruptible():
        asyncio.run(serve(reach, port, partial(_tell_address, address_file), listen))


def _tell_address(file: Path | None, address: str) -> None:
    if file is not None:
        files.replace(file, f"{address}\n".encode())
        console.say(
            f"The page is open until this process ends. Its address is in {file}; it admits anyone who has it."
        )
        return
    console.say("The page is open on this machine until Ctrl-C. This address admits anyone who has it:")
    print(address, flush=True)  # noqa: T201 - never wrapped


@token_app.command("create")
def token_create(
    federation: Annotated[str, typer.Option(help="Federation of the client.")] = "",
    client: Annotated[
        str, typer.Option(help="Name of the client. Without it, the client chooses a new name.")
    ] = "",
    role: Annotated[Role, typer.Option(help="client, coordinator, aggregation or operator.")] = Role.CLIENT,
    name: Annotated[
        list[str] | None,
        typer.Option(help="DNS name or address a server is reached at; repeat for more."),
    ] = None,
    expires_in: Annotated[
        float,
        typer.Option(min=0.01, max=MAX_TOKEN_S / 3600, metavar="HOURS", help="Hours the token may be used."),
    ] = 24.0,
    promise: Annotated[
        Level | None,
        typer.Option(
            help="Least protection that the client is promised. Its certificate carries the promise, and it leaves a "
            "federation that offers less. By default what the federation has now, as the coordinator says; complete if "
            "there is none of that name yet.",
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
) -> None:
    """Issue a token that enrols one newcomer, once. Prints only the token on standard output."""

    async def work(target: Target) -> str:
        credentials = await own_credentials(target.identity, target.key_authority)
        level = promise
        if level is None and role is Role.CLIENT and target.coordinator:
            level = await promised_level(target.coordinator, credentials, federation)
            print(f"promises {level} protection (--promise)", file=sys.stderr)  # noqa: T201
        created = await create_token(
            target.require_key_authority(),
            credentials,
            role,
            federation=federation,
            client=client,
            names=tuple(name or ()),
            expires_in=timedelta(hours=expires_in),
            promise=level,
        )
        return created.token

    with reported():
        token = asyncio.run(work(Target.of(coordinator, identity, key_authority)))
        print(printable(token))  # noqa: T201 - for pipes, never wrapped


@app.command()
def revoke(
    federation: Annotated[str | None, typer.Argument(help="Name of the client's federation.")] = None,
    client: Annotated[str | None, typer.Argument(help="Name of the client.")] = None,
    role: Annotated[
        Role, typer.Option(help="operator, coordinator or aggregation: all of them, in place of a client.")
    ] = Role.CLIENT,
    identity: IdentityOption = None,
    key_authority: KeyAuthorityOption = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before a whole role is revoked.")] = False,
) -> None:
    """Revoke certificates: of a client, or of a role. Within seconds no server admits them any more.

    A client's running calls end, its update of the round in progress is not counted, and the federation goes on
    without it, with new keys from the next round on. To let it in again, issue a token that names it and enrol it anew.

    Operators, and servers of a kind, have no names of their own: --role revokes all of them, and those that are still
    trusted are certified anew. The command says how, and asks, before it does anything.
    """

    async def work(target: Target, holder: Identity) -> None:
        credentials = await own_credentials(target.identity, target.key_authority)
        await revoke_holder(target.require_key_authority(), credentials, holder)

    with reported():
        holder = to_revoke(role, federation, client)
        target = Target.of(None, identity, key_authority)
        if role is not Role.CLIENT:
            console.say(consequences(role))
            if not yes:
                typer.confirm("Revoke them?", abort=True)
        asyncio.run(work(target, holder))
    whom = holder if role is Role.CLIENT else f"all certificates of {holder} issued so far"
    console.say(f"revoked {whom}")


@app.command()
def revocations(identity: IdentityOption = None, key_authority: KeyAuthorityOption = None) -> None:
    """Show whose certificates were revoked, and when."""

    async def work(target: Target) -> list[enrolment_pb2.Revocation]:
        credentials = await own_credentials(target.identity, target.key_authority)
        return await list_revocations(target.require_key_authority(), credentials)

    with reported():
        found = asyncio.run(work(Target.of(None, identity, key_authority)))
    if found:
        console.print(revocations_table(found))
    else:
        console.say("nobody was revoked")


@app.command()
def enroll(
    *,
    authority: Annotated[str, typer.Option(help="Enrolment address of the key authority, host:port.")],
    identity: Annotated[Path, typer.Option(help="Folder for the key and the certificate.")],
    token: Annotated[str | None, typer.Option(envvar="SHELORA_TOKEN", help="Join token.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File that holds it instead.")] = None,
    key_authority: Annotated[
        str | None, typer.Option(envvar="SHELORA_KEY_AUTHORITY", help="Where --stay renews, host:port.")
    ] = None,
    stay: Annotated[
        bool,
        typer.Option("--stay", help="Keep an identity that is valid, and renew it until stopped."),
    ] = False,
) -> None:
    """Exchange a token for a certificate, for an operator or a server. Agents use `client-agent enroll`."""
    folder = IdentityFolder(identity)

    async def work() -> Held:
        return await enrolled(_token(token, token_file), authority, identity, retry_s=RETRY_S)

    with reported():
        held = (_still_valid(folder) if stay else None) or asyncio.run(work())
        facts = held.facts
        console.say(
            f"enrolled as {facts.identity}; the certificate in {identity} is valid until "
            f"{facts.expires:%Y-%m-%d %H:%M} UTC"
        )
        if stay:
            _renew_until_stopped(folder, key_authority)


@app.command()
def secrets(
    folder: Annotated[Path, typer.Argument(help="Folder with a subfolder for everyone who needs some.")],
) -> None:
    """Make the secrets of a cluster in containers. Repeating it changes nothing. Prints names, never secrets."""
    with reported():
        made = make_secrets(folder)
    for path in made:
        console.say(f"made {path}")
    console.say(f"{len(made)} secrets made; {folder} is complete")


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the operator's calls go, and who makes them: what was given, the rest from the local cluster."""

    coordinator: str
    identity: Path
    key_authority: str | None
    enrolment: str = ""
    """Where tokens are exchanged; "" if it is not known."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Prometheus address by server, of a local cluster."""

    @classmethod
    def of(cls, coordinator: str | None, identity: Path | None, key_authority: str | None) -> "Target":
        """Raises no error of its own: exits as `reported` does if an address is none, or no local cluster runs."""
        with reported():
            for address in filter(None, (coordinator, key_authority)):
                HostPort.parse(address)
        if identity is not None and (coordinator or key_authority):
            return cls(coordinator=coordinator or "", identity=identity, key_authority=key_authority)
        with reported():
            local = Addresses.read(DEFAULT_FOLDER)
        own = identity or Path(local.operator_identity)
        return cls(
            coordinator=coordinator or local.coordinator,
            identity=own,
            key_authority=key_authority or local.key_authority,
            enrolment=local.enrolment,
            metrics=local.metrics,
        )

    def require_key_authority(self) -> str:
        """Raises CONFIGURATION_INVALID if it is not known."""
        if self.key_authority is None:
            raise DomainError(Reason.CONFIGURATION_INVALID, "give --key-authority host:port")
        return self.key_authority


def _token(token: str | None, file: Path | None) -> str:
    if token is not None:
        return token
    if file is None:
        raise DomainError(Reason.CONFIGURATION_INVALID, "give --token or --token-file")
    return read_secret(file, "token_file:").strip()


def _still_valid(folder: IdentityFolder) -> Held | None:
    try:
        return folder.read_valid()
    except DomainError:
        return None


def _renew_until_stopped(folder: IdentityFolder, key_authority: str | None) -> None:
    """Keeps the certificate in `folder` valid until SIGTERM or SIGINT."""
    if key_authority is None:
        raise DomainError(Reason.CONFIGURATION_INVALID, "--stay needs --key-authority host:port")
    configure_logs("operator", json=not sys.stderr.isatty())
    with suppress(KeyboardInterrupt), interruptible():
        asyncio.run(keep_renewed(folder, renewal_at(key_authority, TlsCredentials(folder))))


def _ask(work: Callable[[Operator], Coroutine[Any, Any, _Result]], target: Target) -> _Result:
    """Runs operator calls against a coordinator."""

    async def connected() -> _Result:
        credentials = await own_credentials(target.identity, target.key_authority)
        async with operator(target.coordinator, credentials) as connection:
            return await work(connection)

    with reported():
        return asyncio.run(connected())
    raise AssertionError("unreachable: reported exits")


def _addresses_table(addresses: Addresses, folder: Path) -> Records:
    table = Records("process", "address", "metrics", title=f"local cluster in {folder}", lines=True)
    metrics = addresses.metrics
    table.add("coordinator", addresses.coordinator, metrics.get("coordinator", ""))
    table.add("key authority", addresses.key_authority, metrics.get("key-authority", ""))
    for replica, address in enumerate(addresses.aggregation):
        name = f"aggregation-{replica}" if len(addresses.aggregation) > 1 else "aggregation"
        table.add(name, address, metrics.get(name, ""))
    table.add("redis", addresses.redis_url, "")
    table.add("enrolment", addresses.enrolment, "")
    table.add("operator's identity", addresses.operator_identity, "")
    return table


def _until_interrupted(cluster: LocalCluster, folder: Path) -> None:
    try:
        console.print(_addresses_table(cluster.addresses, folder))
        console.say(cluster.trust)
        console.say("Ctrl-C stops the cluster; its state stays in the folder.")
        while True:
            cluster.require_alive()
            cluster.renew_operator()
            time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        with suppress(OSError):  # the terminal may be gone
            console.say("stopping")


if __name__ == "__main__":
    app()
