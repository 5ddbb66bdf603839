"""Prepares the demo under compose: what each agent needs goes into its volume, then the federation is started.

    python -m examples.reuters.containers

An agent's volume gets its examples, its configuration and, unless it is a member already, a token; the agent enrols
itself with it. Repeating this changes nothing.
"""

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
import yaml

from examples.reuters.assets import MINILM, REUTERS
from examples.reuters.cohort import (
    AGENTS,
    AgentProfile,
    Protection,
    agent_config,
    federation_spec,
    write_data,
)
from shelora import files
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.operator import create_token, operator, own_credentials
from shelora.terminal import Terminal
from shelora.transport.identity import Role
from shelora.transport.tls import Credentials, IdentityFolder

TOKEN: Final = "token"  # noqa: S105 - a file name
METRICS_PORT: Final = 9464

console = Terminal()


@dataclass(frozen=True)
class Servers:
    """Where they are, `host:port` each."""

    coordinator: str
    aggregation: tuple[str, ...]
    key_authority: str


def main(
    *,
    coordinator: Annotated[str, typer.Option(envvar="SHELORA_COORDINATOR", help="host:port")],
    key_authority: Annotated[str, typer.Option(envvar="SHELORA_KEY_AUTHORITY", help="host:port")],
    identity: Annotated[
        Path, typer.Option(envvar="SHELORA_IDENTITY", help="Folder of the operator's identity.")
    ],
    aggregation: Annotated[list[str], typer.Option(help="Aggregation replica, host:port; repeat for more.")],
    assets: Annotated[Path, typer.Option(help="Folder with model and data.")] = Path("/opt/demo"),
    agents: Annotated[Path, typer.Option(help="Folder with a subfolder for each agent.")] = Path("/agents"),
    rounds: Annotated[int, typer.Option(min=1, help="Training rounds.")] = 6,
    local_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps a round.")] = 16,
) -> None:
    """Give every agent of the demo its examples, configuration and token, and start the federation."""
    servers = Servers(coordinator, tuple(aggregation), key_authority)
    spec = federation_spec(Protection.COMPLETE)
    spec = spec.model_copy(
        update={
            "round": spec.round.model_copy(update={"rounds": rounds}),
            "training": spec.training.model_copy(update={"local_steps": local_steps}),
        }
    )
    try:
        write_data(assets / REUTERS.target, agents)
        for profile in AGENTS:
            write_configuration(servers, profile, agents / profile.name, assets / MINILM.target)
        started = asyncio.run(admit_and_start(servers, spec, identity, agents))
    except DomainError as error:
        console.refuse(error)
        sys.exit(1)
    what = f"started, with {len(AGENTS)} agents and {rounds} rounds" if started else "has ended already"
    console.say(f"{spec.name}: {what}")


def write_configuration(servers: Servers, profile: AgentProfile, home: Path, model: Path) -> None:
    """The agent's YAML file: that of the local demo, with logs for machines and metrics on a port that is known."""
    config = agent_config(servers, profile, model) | {
        "metrics_port": METRICS_PORT,
        "metrics_host": "0.0.0.0",  # noqa: S104 - Prometheus is another container
        "log": {"json_lines": True},
    }
    (home / "agent.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


async def admit_and_start(servers: Servers, spec: FederationSpec, identity: Path, agents: Path) -> bool:
    """Issues the tokens that are missing; creates and starts the federation. False if it has ended already."""
    credentials = await own_credentials(identity, servers.key_authority)
    for profile in AGENTS:
        await leave_token(servers.key_authority, credentials, spec.name, agents / profile.name)
    async with operator(servers.coordinator, credentials) as connection:
        await connection.create(spec.to_proto())
        try:
            await connection.start(spec.name)
        except DomainError as error:
            if error.reason is not Reason.FEDERATION_CLOSED:
                raise
            return False
    return True


async def leave_token(key_authority: str, credentials: Credentials, federation: str, home: Path) -> None:
    """A token for the agent of that folder, unless it has enrolled."""
    if IdentityFolder(home / "state" / "identity").exists():
        return
    created = await create_token(
        key_authority, credentials, Role.CLIENT, federation=federation, client=home.name
    )
    files.replace(home / TOKEN, created.token.encode() + b"\n")


if __name__ == "__main__":
    os.umask(0o077)
    typer.run(main)
