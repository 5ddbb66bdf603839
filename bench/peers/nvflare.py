"""NVFLARE on the plan's work: a provisioned server and a provisioned client each; all settings as they come."""

import re
import secrets
import time
from pathlib import Path
from typing import Any, Final

import yaml

from bench.peers.outcome import SERVERS, Outcome, Times, evaluated, noted
from bench.peers.peer import PRINTED, Home, at_home, free_port, listens
from bench.peers.plan import Plan
from bench.peers.usage import sampled
from bench.peers.wire import counted
from shelora.errors import DomainError, Reason

TRIES: Final = 20
PAUSE_S: Final = 3.0
_PROJECT: Final = "peers"
_STORE: Final = "/tmp/nvflare"  # noqa: S108 - theirs
"""Where its server keeps jobs, whichever run they are of; here each run has its own."""
_ORGANISATION: Final = "peers"
_ADMIN: Final = "admin@example.org"
_ENDED: Final = "terminal state"
"""What NVFLARE says of a job that ended otherwise than it should."""
_JOB: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BUILDERS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("workspace.WorkspaceBuilder", {"template_file": ["master_template.yml"]}),
    ("static_file.StaticFileBuilder", {"config_folder": "config"}),
    ("cert.CertBuilder", {}),
    ("signature.SignatureBuilder", {}),
)


def run(plan: Plan, venv: Path, folder: Path, *, tls: bool) -> Outcome:
    """Runs the job in a folder that holds the clients' data, with NVFLARE from a virtual environment.

    Raises: DomainError: a process failed; its logs are in the folder.
    """
    with at_home(folder, venv, plan) as home, counted() as wire, sampled() as usage:
        address = f"127.0.0.1:{free_port()}"
        port = int(address.rpartition(":")[2])
        kits = _provisioned(home, _project(plan, port, int(wire.front(address).rpartition(":")[2]), tls=tls))
        home.output("python", str(folder / "apps" / "nvflare_job.py"), str(folder / "job"))
        began = time.time()
        server = home.start("server", "python", *_command("server", kits / "localhost"))
        usage.add(SERVERS, server.pid)
        home.wait_until(lambda: listens(address), "NVFLARE's server")
        for name in plan.clients:
            client = home.start(name, "python", *_command("client", kits / name, f"uid={name}"))
            usage.add(name, client.pid)
        _until_done(home, kits / _ADMIN, folder / "job" / "peer", plan)
        ended = time.time()
        usage.sample()
        trained, accuracy = noted(Path(plan.notes), plan.clients)
        return Outcome.of(
            system="NVFLARE",
            version=home.version("nvflare"),
            protection="none, mutual TLS" if tls else "none, plaintext",
            times=Times(began=began, ended=ended, trained=trained),
            usage=usage,
            clients=plan.clients,
            bytes_up=wire.up,
            bytes_down=wire.down,
            accuracy=accuracy,
        )


def _project(plan: Plan, port: int, front: int, *, tls: bool) -> dict[str, Any]:
    """What NVFLARE provisions; clients reach the server by the front."""
    security = "mtls" if tls else "clear"
    reached = {"host": "localhost", "port": front}
    clients = [
        {"name": name, "type": "client", "org": _ORGANISATION, "connect_to": reached} for name in plan.clients
    ]
    server = {"name": "localhost", "type": "server", "org": _ORGANISATION, "fed_learn_port": port}
    admin = {"name": _ADMIN, "type": "admin", "org": _ORGANISATION, "role": "project_admin"}
    return {
        "api_version": 3,
        "name": _PROJECT,
        "description": _PROJECT,
        "connection_security": security,
        "participants": [server, *clients, admin],
        "builders": [
            {"path": f"nvflare.lighter.impl.{path}", "args": options} for path, options in _BUILDERS
        ],
    }


def _provisioned(home: Home, project: dict[str, Any]) -> Path:
    """The folder of all kits."""
    path = home.folder / "project.yml"
    path.write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
    workspace = home.folder / "workspace"
    home.output("nvflare", "provision", "--project-file", str(path), "--workspace", str(workspace), "--force")
    kits = workspace / _PROJECT / "prod_00"
    local = kits / "localhost" / "local"
    usual = (local / "resources.json.default").read_text(encoding="utf-8")
    (local / "resources.json").write_text(usual.replace(_STORE, str(home.folder / "store")), encoding="utf-8")
    return kits


def _command(kind: str, kit: Path, *options: str) -> list[str]:
    """As the kit's start script has it, without the loop that starts it again."""
    (kit / "transfer").mkdir(exist_ok=True)
    return [
        *(
            "-u",
            "-m",
            f"nvflare.private.fed.app.{kind}.{kind}_train",
            "-m",
            str(kit),
            "-s",
            f"fed_{kind}.json",
        ),
        *("--set", *options, "secure_train=true", "config_folder=config", f"org={_ORGANISATION}"),
    ]


def _until_done(home: Home, admin: Path, job: Path, plan: Plan) -> None:
    """Submits the job and waits for its end.

    On a busy machine NVFLARE 2.9 called a job failed whose server had logged that all was finished: what counts is
    whether every client has evaluated the last mean.
    """
    kit = ("--startup-kit", str(admin))
    told = _insisted(home, "submit", "--job-folder", str(job), "--submit-token", secrets.token_hex(8), *kit)
    found = _JOB.search(told)
    if found is None:
        raise DomainError(Reason.INTERNAL, f"nvflare job submit named no job:\n{told[-PRINTED:]}")
    try:
        _insisted(home, "wait", found[0], "--interval", "1", *kit)
    except DomainError as error:
        if _ENDED not in error.message or not evaluated(Path(plan.notes), plan.clients, plan.rounds):
            raise


def _insisted(home: Home, *arguments: str) -> str:
    """What `nvflare job` prints; tried again, as a server that was just started does not answer everybody at once."""
    for _ in range(TRIES - 1):
        try:
            return home.output("nvflare", "job", *arguments)
        except DomainError as error:
            home.require_alive()
            if _ENDED in error.message:
                raise
            time.sleep(PAUSE_S)
    return home.output("nvflare", "job", *arguments)
