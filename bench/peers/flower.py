"""Flower's deployment engine on the plan's work: a SuperLink, and a SuperNode a client; all settings as they come."""

import shutil
import time
from pathlib import Path
from typing import Final

from bench.peers.outcome import SERVERS, Outcome, Times, noted
from bench.peers.peer import Certificates, Home, at_home, certified, free_port, listens
from bench.peers.plan import Plan
from bench.peers.usage import sampled
from bench.peers.wire import counted

_PROJECT: Final = """\
[project]
name = "peer"
version = "1.0.0"
dependencies = []

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "peer"

[tool.flwr.app.components]
serverapp = "flower_server:app"
clientapp = "flower_client:app"

[tool.flwr.app.config]
clients = {clients}
rounds = {rounds}
initial = "{initial}"
"""
_CONNECTION: Final = """\
[superlink]
default = "here"

[superlink.here]
address = "{address}"
{security}
"""


def run(plan: Plan, venv: Path, folder: Path, *, tls: bool) -> Outcome:
    """Runs the app in a folder that holds the clients' data, with Flower from a virtual environment.

    Raises: DomainError: a process failed; its logs are in the folder.
    """
    with at_home(folder, venv, plan) as home, counted() as wire, sampled() as usage:
        keys = certified(folder) if tls else None
        _write_app(home, plan)
        address = f"127.0.0.1:{free_port()}"
        _write_connection(home, address, keys)
        began = time.time()
        host, port = address.split(":")
        link = home.start("superlink", "flower-superlink", "--host", host, "--port", port, *_serving(keys))
        usage.add(SERVERS, link.pid)
        home.wait_until(lambda: listens(address), "Flower's SuperLink")
        for name in plan.clients:
            node = home.start(
                name,
                "flower-supernode",
                *("--superlink", wire.front(address), "--port", str(free_port())),
                *("--node-config", f'name="{name}"'),
                *_calling(keys),
            )
            usage.add(name, node.pid)
        home.output("flwr", "run", str(folder / "app"), "here", "--stream")
        ended = time.time()
        usage.sample()
        trained, accuracy = noted(Path(plan.notes), plan.clients)
        return Outcome.of(
            system="Flower",
            version=home.version("flwr"),
            protection="none, TLS" if tls else "none, plaintext",
            times=Times(began=began, ended=ended, trained=trained),
            usage=usage,
            clients=plan.clients,
            bytes_up=wire.up,
            bytes_down=wire.down,
            accuracy=accuracy,
        )


def _write_app(home: Home, plan: Plan) -> None:
    app = home.folder / "app"
    app.mkdir()
    for name in ("flower_client.py", "flower_server.py", "work.py"):
        shutil.copy(home.folder / "apps" / name, app)
    text = _PROJECT.format(clients=len(plan.clients), rounds=plan.rounds, initial=plan.initial)
    (app / "pyproject.toml").write_text(text, encoding="utf-8")


def _write_connection(home: Home, address: str, keys: Certificates | None) -> None:
    """Where `flwr run` finds the SuperLink."""
    folder = home.folder / "flwr"
    folder.mkdir()
    security = f'root-certificates = "{keys.authority}"' if keys else "insecure = true"
    text = _CONNECTION.format(address=address, security=security)
    (folder / "config.toml").write_text(text, encoding="utf-8")


def _serving(keys: Certificates | None) -> list[str]:
    offline = ["--disable-runtime-dependency-installation"]
    if keys is None:
        return ["--insecure", *offline]
    return [
        *("--ssl-certfile", str(keys.certificate)),
        *("--ssl-keyfile", str(keys.key)),
        *("--ssl-ca-certfile", str(keys.authority)),
        *offline,
    ]


def _calling(keys: Certificates | None) -> list[str]:
    return ["--insecure"] if keys is None else ["--root-certificates", str(keys.authority)]
