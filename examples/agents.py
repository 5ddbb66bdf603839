"""What the YAML file of an agent says in every demo."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

HOME: Final = "agents"
"""Folder of a run with one for every agent."""


class Servers(Protocol):
    """Where agents reach the servers, `host:port` each."""

    @property
    def coordinator(self) -> str: ...
    @property
    def aggregation(self) -> Sequence[str]: ...
    @property
    def key_authority(self) -> str: ...


class Nowhere:
    """The servers of an agent's file that trains alone."""

    coordinator = key_authority = "127.0.0.1:1"
    aggregation = ("127.0.0.1:1",)


def agent_file(
    servers: Servers, *, federation: str, name: str, model: Path, protection: str = "complete"
) -> dict[str, Any]:
    """Its content but for data and adapter; paths are relative to it."""
    return {
        "federation": federation,
        "client_id": name,
        "coordinator": servers.coordinator,
        "aggregation": list(servers.aggregation),
        "key_authority": servers.key_authority,
        "state_dir": "state",
        "model": {"path": str(model.absolute()), "device": "cpu"},
        "protection": {"accept": [protection]},
        "resources": {"threads": 1},
        "metrics_port": 0,
    }
