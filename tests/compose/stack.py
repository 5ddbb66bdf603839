"""The cluster of deploy/compose under a name and an address of its own, driven by the command line."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.containers import ASK, PATIENCE_S, run, training, wait

FOLDER = Path(__file__).parents[2] / "deploy" / "compose"
PROJECT = "shelora-test"
ADDRESS = "127.0.0.77"
"""Ports are published here, where they meet no other cluster's."""
ROUNDS = 3
SERVERS = ("redis", "key-authority", "coordinator", "aggregation-0", "aggregation-1", "operator")
AGENTS = ("newsroom-1", "newsroom-2", "newsroom-3", "thin-uplink")


def compose_command() -> list[str] | None:
    """`docker compose`, or the program `docker-compose` of version 2 (COMPOSE names another); None without either."""
    candidates = [os.environ.get("COMPOSE", "").split(), ["docker", "compose"], ["docker-compose"]]
    for command in filter(None, candidates):
        if shutil.which(command[0]) and run(*command, "version", check=False).returncode == 0:
            return command
    return None


class Stack:
    """The project's containers."""

    def __init__(self, compose: list[str], without: tuple[str, ...] = ()) -> None:
        self._compose = [*compose, "--project-name", PROJECT, "--file", str(FOLDER / "compose.yaml")]
        small = {"DEMO_ROUNDS": str(ROUNDS), "DEMO_STEPS": "4"}
        self._environment = {**os.environ, **small, "PUBLISH": ADDRESS}
        self._without = set(without)

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(*self._compose, *arguments, check=check, env=self._environment)

    def up(self, *, demo: bool = False) -> None:
        """Starts what is not running. Does not wait for the demo's agents."""
        profile = ("--profile", "demo") if demo else ()
        services = set(self.compose(*profile, "config", "--services").stdout.split())
        self.compose(*profile, "up", "--detach", *sorted(services - self._without))

    def down(self, *options: str) -> None:
        self.compose("--profile", "demo", "down", *options)

    def container(self, service: str) -> str:
        return self.compose("--profile", "demo", "ps", "--all", "--quiet", service).stdout.strip()

    def running(self) -> dict[str, dict[str, Any]]:
        """What the engine says of every running container, by service."""
        identifiers = self.compose("--profile", "demo", "ps", "--quiet").stdout.split()
        facts = json.loads(run("docker", "inspect", *identifiers).stdout)
        return {fact["Config"]["Labels"]["com.docker.compose.service"]: fact for fact in facts}

    def state(self, service: str) -> dict[str, Any]:
        return json.loads(run("docker", "inspect", self.container(service)).stdout)[0]["State"]

    def healthy(self, service: str) -> bool:
        state = self.state(service)
        return bool(state["Running"]) and state.get("Health", {}).get("Status") == "healthy"

    def crash(self, service: str) -> None:
        """Kills the program inside with SIGKILL, as the kernel would; the engine has to start it again."""
        before = self.state(service)["StartedAt"]
        self.exec(service, "sh", "-c", "kill -9 $(cat /proc/1/task/1/children)", check=False)
        self.wait(lambda: self.state(service)["StartedAt"] != before, f"the engine starts {service} again")

    def restart(self, service: str) -> None:
        self.compose("--profile", "demo", "restart", service)

    def exec(self, service: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run("docker", "exec", self.container(service), *command, check=check)

    def once(self, *command: str, network: str = "none", volume: str = "") -> str:
        """What a command prints in a container of its own, beside the project's; a volume is mounted at /mnt."""
        image = self.running()["coordinator"]["Config"]["Image"]
        mount = ("--volume", f"{PROJECT}_{volume}:/mnt:ro") if volume else ()
        options = ("--network", network if network == "none" else f"{PROJECT}_{network}", *mount)
        return run("docker", "run", "--rm", *options, image, *command, check=False).stdout.strip()

    def federation(self) -> dict[str, Any]:
        """The demo's federation, as JSON of its message; empty while it cannot be asked for."""
        done = self.exec("operator", "python3", "-c", ASK, "reuters", check=False)
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def finished_rounds(self) -> int:
        return len(training(self.federation()))

    def wait(self, condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        wait(condition, what, self.logs, patience_s)

    def logs(self) -> str:
        states = self.compose("--profile", "demo", "ps", "--all").stdout
        return states + self.compose("--profile", "demo", "logs", "--no-color", "--tail", "15").stdout
