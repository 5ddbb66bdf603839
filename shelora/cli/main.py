"""`shelora`: the operator's command line."""

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from shelora.cli.audit import audit_app
from shelora.cli.cluster import Addresses, LocalCluster
from shelora.cli.operator import Operator, operator
from shelora.cli.render import federation_view, federations_table
from shelora.errors import DomainError
from shelora.federation import FederationSpec
from shelora.v1 import coordinator_pb2 as pb

DEFAULT_FOLDER = Path("runs/local")
REFRESH_S = 1.0
_Result = TypeVar("_Result")

app = typer.Typer(
    help="Private federated LoRA fine-tuning: run a local cluster, create and watch federations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
federation_app = typer.Typer(help="Create, start and watch federations.", no_args_is_help=True)
app.add_typer(federation_app, name="federation")
app.add_typer(audit_app, name="audit")
console = Console()

CoordinatorOption = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        envvar="SHELORA_COORDINATOR",
        help="Coordinator's address, host:port. By default that of the local cluster in runs/local.",
    ),
]
PlaintextOption = Annotated[
    bool,
    typer.Option(
        "--allow-plaintext", help="Talk to another machine without TLS, on a protected network only."
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
        bool, typer.Option("--any-ports", help="Use free ports in place of 7100 to 7103.")
    ] = False,
) -> None:
    """Run a cluster on this machine until Ctrl-C: Valkey, key authority, coordinator, aggregation.

    State survives: a cluster started again in the same folder goes on where it stopped.
    """
    with _reported(), interruptible():
        cluster = LocalCluster(
            folder, fixed_ports=not any_ports, aggregation_replicas=aggregation_replicas, workers=workers
        )
        with console.status("starting"), cluster:
            console.print(_addresses_table(cluster.addresses, folder))
            console.print("Ctrl-C stops the cluster; its state stays in the folder.")
            _until_interrupted(cluster)


@app.command()
def status(coordinator: CoordinatorOption = None, *, allow_plaintext: PlaintextOption = False) -> None:
    """Show all federations."""
    federations = _ask(lambda o: o.list(), coordinator, allow_plaintext=allow_plaintext)
    console.print(
        federations_table(federations) if federations else "no federations: `shelora federation create`"
    )


@federation_app.command()
def create(
    specification: Annotated[Path, typer.Argument(help="YAML file, see examples/reuters/federation.yaml.")],
    coordinator: CoordinatorOption = None,
    *,
    start_now: Annotated[bool, typer.Option("--start", help="Start it too.")] = False,
    allow_plaintext: PlaintextOption = False,
) -> None:
    """Create a federation from a YAML file. Repeating it changes nothing."""

    async def work(o: Operator) -> pb.Federation:
        created = await o.create(spec.to_proto())
        return await o.start(created.federation_id) if start_now else created

    with _reported():
        spec = FederationSpec.from_yaml(specification)
    console.print(federation_view(_ask(work, coordinator, allow_plaintext=allow_plaintext)))


@federation_app.command()
def start(
    name: NameArgument, coordinator: CoordinatorOption = None, *, allow_plaintext: PlaintextOption = False
) -> None:
    """Let a federation begin as soon as enough agents have joined."""
    console.print(
        federation_view(_ask(lambda o: o.start(name), coordinator, allow_plaintext=allow_plaintext))
    )


@federation_app.command()
def show(
    name: NameArgument,
    coordinator: CoordinatorOption = None,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it until it ends.")] = False,
    allow_plaintext: PlaintextOption = False,
) -> None:
    """Show a federation: its agents, what they do, its rounds."""

    async def follow(o: Operator) -> pb.Federation:
        federation = await o.get(name)
        if not watch:
            return federation
        with Live(federation_view(federation), console=console, transient=True) as live:
            while federation.phase in {pb.PHASE_CREATED, pb.PHASE_RUNNING}:
                await asyncio.sleep(REFRESH_S)
                federation = await o.get(name)
                live.update(federation_view(federation))
        return federation

    console.print(federation_view(_ask(follow, coordinator, allow_plaintext=allow_plaintext)))


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM, and SIGINT even where a shell has it ignored, raise KeyboardInterrupt: all is stopped in order."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _reported() -> Iterator[None]:
    """Shows a DomainError as one message and exits with 1."""
    try:
        yield
    except DomainError as error:
        Console(stderr=True).print(f"[red]{error.reason}[/red] {error.message}", highlight=False)
        sys.exit(1)


def _ask(
    work: Callable[[Operator], Coroutine[Any, Any, _Result]], address: str | None, *, allow_plaintext: bool
) -> _Result:
    """Runs operator calls against a coordinator, by default that of the local cluster."""

    async def connected() -> _Result:
        target = address or Addresses.read(DEFAULT_FOLDER).coordinator
        async with operator(target, allow_plaintext=allow_plaintext) as connection:
            return await work(connection)

    with _reported():
        return asyncio.run(connected())
    raise AssertionError("unreachable: _reported exits")


def _addresses_table(addresses: Addresses, folder: Path) -> Table:
    table = Table("process", "address", "metrics", title=f"local cluster in {folder}", title_justify="left")
    metrics = addresses.metrics
    table.add_row("coordinator", addresses.coordinator, metrics.get("coordinator", ""))
    table.add_row("key authority", addresses.key_authority, metrics.get("key-authority", ""))
    for replica, address in enumerate(addresses.aggregation):
        name = f"aggregation-{replica}" if len(addresses.aggregation) > 1 else "aggregation"
        table.add_row(name, address, metrics.get(name, ""))
    table.add_row("redis", addresses.redis_url, "")
    table.add_row("agents' credential", addresses.credential_file, "")
    return table


def _until_interrupted(cluster: LocalCluster) -> None:
    try:
        while True:
            cluster.require_alive()
            time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        console.print("stopping")


if __name__ == "__main__":
    app()
