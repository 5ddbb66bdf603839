"""The key authority's process: its command line and its composition."""

from functools import partial
from pathlib import Path
from typing import Annotated

import structlog
import typer

from services.key_authority import commands
from services.key_authority.authority import Authority
from services.key_authority.credential import AgentCredential
from services.key_authority.custody import open_custody
from services.key_authority.servicer import SERVICE_NAME, register
from services.key_authority.settings import KeyAuthoritySettings
from services.shell import flags
from services.shell.process import run_process
from services.shell.server import serve

_HELP = """
Makes the keys of each epoch of a federation, keeps them, and gives them to agents that show the credential.

It never decrypts and never sees an update. Run it apart from the coordinator and the aggregation, which must not
read its folder: whoever has these keys can decrypt every update of the epoch.

First make the key that seals the folder, and keep a copy of it apart from the folder's backups:

\b
    shelora-key-authority make-sealing-key sealing.key

Then make the credential, and give the same file to every agent:

\b
    (umask 077; openssl rand -hex 32 > agent.credential)

Then:

\b
    shelora-key-authority --listen 127.0.0.1:7001 \\
        --data-dir keys --sealing-key-file sealing.key \\
        --agent-credential-file agent.credential

Every option can also be set in the environment: --data-dir as SHELORA_KEY_AUTHORITY_DATA_DIR, and so on.

Exit codes: 0 after SIGTERM or SIGINT, 2 if the configuration is refused, 1 for any other failure.
"""

_log = structlog.get_logger(__name__)

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode=None)


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
    agent_credential_file: Annotated[
        Path | None, typer.Option(help="File with the agents' credential, readable by this user alone.")
    ] = None,
    allow_insecure_parameters: Annotated[
        bool | None,
        typer.Option("--allow-insecure-parameters", help="Accept toy parameters. For tests only."),
    ] = None,
    listen: flags.Listen = None,
    allow_plaintext: flags.AllowPlaintext = None,
    metrics_host: flags.MetricsHost = None,
    metrics_port: flags.MetricsPort = None,
    log_level: flags.LogLevel = None,
    log_json: flags.LogJson = None,
    shutdown_grace_s: flags.ShutdownGrace = None,
    ready_file: flags.ReadyFile = None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    load = partial(
        KeyAuthoritySettings.load,
        data_dir=data_dir,
        sealing_key_file=sealing_key_file,
        agent_credential_file=agent_credential_file,
        allow_insecure_parameters=allow_insecure_parameters,
        listen=listen,
        allow_plaintext=allow_plaintext,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        log_level=log_level,
        log_json=log_json,
        shutdown_grace_s=shutdown_grace_s,
        ready_file=ready_file,
    )
    run_process("key-authority", load, run)


async def run(settings: KeyAuthoritySettings) -> None:
    """Composes the key authority and serves until it is told to stop.

    Raises: DomainError CONFIGURATION_INVALID if the credential, the sealing key, the folder or the address is refused.
    """
    credential = AgentCredential.from_file(settings.agent_credential_file)
    with open_custody(settings.data_dir, settings.read_sealing_key()) as custody:
        _log.info("custody_opened", vault_id=custody.identity, audit_head=custody.audit.head)
        authority = Authority(
            custody.vault, custody.audit, credential, allow_insecure=settings.allow_insecure_parameters
        )
        await serve(settings, service_names=[SERVICE_NAME], register=partial(register, authority))


commands.add_to(app)

if __name__ == "__main__":
    app()
