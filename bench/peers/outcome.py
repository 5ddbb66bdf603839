"""What a run came to, and the table of all runs."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from bench.peers.usage import Usage

SERVERS: Final = "servers"
_KILOBYTE: Final = 1e3
_MEGABYTE: Final = 1e6


@dataclass(frozen=True, slots=True)
class Span:
    """A client's training in one round, Unix seconds."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """When things happened, the same way in every system."""

    began: float
    """Of the command that starts the servers, Unix seconds."""
    ended: float
    """When all clients were done."""
    trained: Mapping[int, Sequence[Span]]
    """Of all clients, by round."""

    @property
    def start_s(self) -> float:
        """From the command to the first step of training."""
        return min(span.began for span in self.trained[1]) - self.began

    @property
    def overhead_s(self) -> float:
        """Of a round beyond training: from the last client's last step in a round to its last one in the next, without
        the longest training in between; mean over rounds. 0 with a single round.
        """
        numbers = sorted(self.trained)
        last = {number: max(span.ended for span in self.trained[number]) for number in numbers}
        beyond = [
            last[number] - last[before] - max(span.seconds for span in self.trained[number])
            for before, number in itertools.pairwise(numbers)
        ]
        return sum(beyond) / len(beyond) if beyond else 0.0

    @property
    def training_s(self) -> float:
        """The longest training of a round, mean over rounds."""
        longest = [max(span.seconds for span in spans) for spans in self.trained.values()]
        return sum(longest) / len(longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A row of the table."""

    system: str
    version: str
    protection: str
    rounds: int
    wall_s: float
    start_s: float
    training_s: float
    overhead_s: float
    up: float
    """Bytes of a client and round, all that travelled divided by them: messages, what surrounds them, TLS."""
    down: float
    server_bytes: int
    """Most resident memory of all servers together."""
    client_bytes: int
    """Of the client that took most."""
    server_cpu_s: float
    client_cpu_s: float
    """Mean of the clients."""
    accuracy: float
    """Of the last mean, on all test examples."""

    @classmethod
    def of(
        cls,
        *,
        system: str,
        version: str,
        protection: str,
        times: Times,
        usage: Usage,
        clients: Sequence[str],
        bytes_up: int,
        bytes_down: int,
        accuracy: float,
    ) -> Self:
        """From what was sampled: roles are SERVERS and the clients' names."""
        servers, spent = usage.spent(SERVERS), [usage.spent(client) for client in clients]
        messages = len(times.trained) * len(clients)
        return cls(
            system=system,
            version=version,
            protection=protection,
            rounds=len(times.trained),
            wall_s=times.ended - times.began,
            start_s=times.start_s,
            training_s=times.training_s,
            overhead_s=times.overhead_s,
            up=bytes_up / messages,
            down=bytes_down / messages,
            server_bytes=servers.peak_bytes,
            client_bytes=max(one.peak_bytes for one in spent),
            server_cpu_s=servers.cpu_s,
            client_cpu_s=sum(one.cpu_s for one in spent) / len(spent),
            accuracy=accuracy,
        )

    def write(self, folder: Path) -> Path:
        """As JSON. Returns the file."""
        path = folder / "outcome.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


_HEADINGS: Final = (
    "system", "protection", "wall", "to the first step", "training, a round", "beyond it, a round",
    "up, a client and round", "down", "memory of servers", "of a client", "CPU of servers", "of a client", "accuracy",
)  # fmt: skip


def table(outcomes: Iterable[Outcome]) -> str:
    """In Markdown."""
    lines = [_row(_HEADINGS), _row(["---"] * 2 + ["---:"] * (len(_HEADINGS) - 2))]
    for one in outcomes:
        cells = (
            f"{one.system} {one.version}",
            one.protection,
            f"{one.wall_s:.0f} s",
            f"{one.start_s:.0f} s",
            f"{one.training_s:.1f} s",
            f"{one.overhead_s:.1f} s",
            f"{one.up / _KILOBYTE:,.0f} kB",
            f"{one.down / _KILOBYTE:,.0f} kB",
            f"{one.server_bytes / _MEGABYTE:,.0f} MB",
            f"{one.client_bytes / _MEGABYTE:,.0f} MB",
            f"{one.server_cpu_s:.0f} s",
            f"{one.client_cpu_s:.0f} s",
            f"{one.accuracy:.1%}",
        )
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def noted(folder: Path, clients: Sequence[str]) -> tuple[dict[int, list[Span]], float]:
    """What peers' clients noted (`apps/work.py`): their training by round, and the accuracy after the last one."""
    trained: dict[int, list[Span]] = {}
    count = right = 0
    for client in clients:
        notes = _notes(folder, client)
        for note in notes:
            if "training" in note:
                trained.setdefault(note["training"], []).append(Span(note["began"], note["ended"]))
        last = [note for note in notes if "evaluating" in note][-1]
        count, right = count + last["count"], right + last["right"]
    return trained, right / count


def evaluated(folder: Path, clients: Sequence[str], number: int) -> bool:
    """Whether every client has noted that it evaluated that round's mean."""
    return all(any(note.get("evaluating") == number for note in _notes(folder, client)) for client in clients)


def _notes(folder: Path, client: str) -> list[dict[str, Any]]:
    path = folder / f"{client}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
