"""The key authority's process: its command line and its composition."""

import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

import structlog
import typer

from services.common import flags
from services.common.process import run_process
from services.common.revocations import Revocations
from services.common.server import Service, StrangersPort, serve
from services.key_authority import commands
from services.key_authority.authority import Authority
from services.key_authority.ca import Issuer
from services.key_authority.custody import Custody, open_custody
from services.key_authority.enrolment import Enrolments
from services.key_authority.register import Grant
from services.key_authority.revoking import Revoker
from services.key_authority.servicer import SERVICE_NAMES, register, register_enrolment
from services.key_authority.settings import KeyAuthoritySettings
from shelora import files
from shelora.errors import DomainError, Reason
from shelora.terminal import CommandLine
from shelora.transport.enrolment import certify, keep_renewed
from shelora.transport.identity import Identity, Role
from shelora.transport.tls import IdentityInMemory, TlsCredentials
from shelora.version import VersionOption

_HELP = """
Makes the keys of each epoch of a federation, keeps them, and gives them to the federation's clients. It is also
the certificate authority: everyone else enrols here and shows its certificate in every connection.

It never decrypts and never sees an update. Run it apart from the coordinator and the aggregation, which must not
read its folder: anyone who has these keys can decrypt every update of the epoch.

First make the key that seals the folder, and keep a copy of it apart from the folder's backups:

\b
    shelora-key-authority make-sealing-key sealing.key

Then:

\b
    shelora-key-authority --listen 10.0.0.2:7102 --enrolment-listen 10.0.0.2:7099 \\
        --name keys.example.org --data-dir keys --sealing-key-file sealing.key \\
        --operator-token-file operator.token

Then enrol yourself with the token in that file, and issue tokens for everyone else:

\b
    shelora enroll --token-file operator.token --authority keys.example.org:7099 --identity operator
    shelora token create --role aggregation --name agg.example.org

Every option can also be set in the environment: --data-dir as SHELORA_KEY_AUTHORITY_DATA_DIR, and so on.

Exit codes: 0 after SIGTERM or SIGINT, 2 if the configuration is refused, 1 for any other failure.
"""

_log = structlog.get_logger(__name__)

app = CommandLine(add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode=None)


@app.callback(help=_HELP, invoke_without_command=True)
def main(
    context: typer.Context,
    *,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the keys, made if missing. Back it up.")
    ] = None,
    sealing_key_file: Annotated[
        Path | None, typer.Option(help="File with the sealing key, readable by this user alone.")
    ] = None,
    enrolment_listen: Annotated[
        str | None,
        typer.Option(help="Address to enrol at; asks callers for no certificate.", metavar="HOST:PORT"),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--name", help="DNS name or address that others reach it at; repeat for more."),
    ] = None,
    certificate_lifetime_s: Annotated[
        int | None, typer.Option(help="Seconds that certificates are valid; a day by default.")
    ] = None,
    operator_token_file: Annotated[
        Path | None, typer.Option(help="Leaves a token in this file at every start, to enrol an operator.")
    ] = None,
    allow_insecure_parameters: Annotated[
        bool | None,
        typer.Option("--allow-insecure-parameters", help="Accept toy parameters. For tests only."),
    ] = None,
    listen: flags.Listen = None,
    metrics_host: flags.MetricsHost = None,
    metrics_port: flags.MetricsPort = None,
    health_listen: flags.HealthListen = None,
    log_level: flags.LogLevel = None,
    log_json: flags.LogJson = None,
    shutdown_grace_s: flags.ShutdownGrace = None,
    calls_per_s: flags.CallsPerS = None,
    concurrent_calls: flags.ConcurrentCalls = None,
    upload_bytes_per_s: flags.UploadBytesPerS = None,
    ready_file: flags.ReadyFile = None,
    version: VersionOption = None,  # noqa: ARG001 - its callback prints it
) -> None:
    if context.invoked_subcommand is not None:
        return
    load = partial(
        KeyAuthoritySettings.load,
        data_dir=data_dir,
        sealing_key_file=sealing_key_file,
        enrolment_listen=enrolment_listen,
        names=names or None,
        certificate_lifetime_s=certificate_lifetime_s,
        operator_token_file=operator_token_file,
        allow_insecure_parameters=allow_insecure_parameters,
        listen=listen,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        health_listen=health_listen,
        log_level=log_level,
        log_json=log_json,
        shutdown_grace_s=shutdown_grace_s,
        calls_per_s=calls_per_s,
        concurrent_calls=concurrent_calls,
        upload_bytes_per_s=upload_bytes_per_s,
        ready_file=ready_file,
    )
    run_process("key-authority", load, run)


async def run(settings: KeyAuthoritySettings) -> None:
    """Composes the key authority and serves until a signal stops it.

    Raises: DomainError CONFIGURATION_INVALID if the sealing key, the folder, a name or an address is refused.
    """
    with open_custody(settings.data_dir, settings.read_sealing_key()) as custody:
        _log.info("custody_opened", vault_id=custody.identity, audit_head=custody.audit.head)
        await _serve(settings, custody)


async def _serve(settings: KeyAuthoritySettings, custody: Custody) -> None:
    insecure = settings.allow_insecure_parameters
    revocations = Revocations(known=True)
    authority = Authority(custody.vault, custody.audit, revocations, allow_insecure=insecure)
    lifetime = timedelta(seconds=settings.certificate_lifetime_s)
    issuer = Issuer(custody.root.load_or_create(), lifetime)
    workloads = [workload.read() for workload in settings.workloads]
    enrolments = Enrolments(custody.register, issuer, _now_ms, workloads=workloads)
    revoker = Revoker(custody.register, custody.audit, revocations, _now_ms)
    await revoker.load()
    own = IdentityInMemory()
    obtain = partial(_own_certificate, issuer, settings.names)
    await certify(own, issuer.root.certificate, obtain)
    await _leave_operator_token(enrolments, settings.operator_token_file)
    await serve(
        settings,
        Service(
            names=SERVICE_NAMES,
            register=partial(register, authority, enrolments, revoker),
            background=[partial(keep_renewed, own, obtain), authority.list_repeats],
            enrolment=StrangersPort(
                settings.enrolment_listen,
                TlsCredentials(own, anonymous_clients=True),
                partial(register_enrolment, enrolments, revoker),
            ),
            on_denied=authority.denied,
        ),
        credentials=TlsCredentials(own),
        revocations=revocations,
    )


async def _own_certificate(issuer: Issuer, names: tuple[str, ...], request: bytes) -> bytes:
    return issuer.issue(request, Identity(Role.KEY_AUTHORITY), names)


async def _leave_operator_token(enrolments: Enrolments, path: Path | None) -> None:
    """A token for those who may read the file; in its place only once it is whole."""
    if path is None:
        return
    token, _ = await enrolments.create_token(Grant(role=Role.OPERATOR))
    try:
        files.replace(path, token.encoded.encode() + b"\n")
    except OSError as error:
        raise DomainError(
            Reason.CONFIGURATION_INVALID, f"operator_token_file: {path} cannot be written: {error.strerror}"
        ) from error


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


commands.add_to(app)

if __name__ == "__main__":
    app()
