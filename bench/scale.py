"""`python -m bench.scale llama-7b`: what a round costs at the shapes of large models. `make bench SHAPES=llama-7b`.

One layer runs whole, with every byte on disk; the model's other layers have the same shapes, so bytes and seconds are
times their number, and memory is not: a role holds a shard at a time. Four clients' updates are made; where more
contribute, servers read these in turn. Every role runs in one process, whose growth is measured apart for each.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Final, Protocol

import typer
from rich.console import Console
from rich.progress import track

from bench import complete, ours
from bench.memory import grown, in_new_process
from bench.shapes import MODELS, Layer
from bench.workload import Cost
from shelora.ckks.parameters import STANDARD
from shelora.ckks.secret import Encryptor, SecretKey
from shelora.lora.aggregate import aggregate_shard
from shelora.lora.kind import Contribution
from shelora.lora.layout import CLEAR_BITS, Layout
from shelora.v1.committee_pb2 import Opening

SENDERS: Final = 4
"""Clients whose updates are made."""
MOST_SELECTIVE: Final = 16
"""Contributions that servers aggregate under `selective`; more are scaled up, each costs what these cost."""
_HEADINGS: Final = (
    "mode", "rank", "clients", "parameters", "factors", "up, a client", "down", "a client protects", "restores",
    "servers aggregate", "largest shard", "memory: protecting", "restoring", "aggregating",
)  # fmt: skip
app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A mode at one rank and number of contributors: a whole model's round."""

    mode: str
    rank: int
    contributors: int
    parameters: str
    """Name of the parameter set."""
    plain_bytes: int
    """Factors in float32."""
    up: int
    down: int
    protect_s: float
    """CPU of one client."""
    restore_s: float | None
    """CPU of one client; None where it was not measured: it does not depend on the number of contributors."""
    aggregate_s: float
    """CPU of all servers."""
    largest_shard: int
    protect_memory: int
    """Most bytes beyond what the process had before."""
    restore_memory: int | None
    aggregate_memory: int


class Way(Protocol):
    """A mode in one round of one layer."""

    layout: Layout

    def sent(self, client: int) -> Iterator[bytes]:
        """The shards of a client's update."""
        ...

    def contributions(self) -> Sequence[Contribution]:
        """What servers aggregate; names are those of SENDERS clients, in turn."""
        ...

    def opens(self) -> bool:
        """Whether what opens the result is there; the committee's work."""
        ...

    def restored(self, results: Iterable[bytes]) -> Iterator[object]:
        """What a client makes of the result, part by part."""
        ...

    def beside(self) -> tuple[int, int]:
        """Bytes up and down beside shards, once a model."""
        ...


class CompleteWay:
    """Encrypted sums of sketches. The committee's keys, dealings and openings are counted where all clients deal."""

    def __init__(self, layer: Layer) -> None:
        self._round = complete.Round(layer, 1)
        self._layer, self.layout = layer, self._round.layout
        self._opening: Opening | None = None

    def sent(self, client: int) -> Iterator[bytes]:
        """As of `Way`."""
        return self._round.protected(
            client, complete.Trained(factors=complete.LazyFactors(self._layer, client))
        )

    def contributions(self) -> Sequence[Contribution]:
        """As of `Way`."""
        return [Contribution(str(client), 1.0) for client in range(self._layer.clients)]

    def opens(self) -> bool:
        """As of `Way`: takes the dealings of all."""
        if self._layer.clients <= SENDERS:
            self._opening = self._round.decided()
        return self._opening is not None

    def restored(self, results: Iterable[bytes]) -> Iterator[object]:
        """As of `Way`."""
        assert self._opening is not None
        return self._round.restored(results, self._opening)

    def beside(self) -> tuple[int, int]:
        """As of `Way`."""
        keys = sum(statement.ByteSize() for statement in self._round.statements)
        return next(iter(self._round.dealt.values())).ByteSize(), keys


class SelectiveWay:
    """SHE-LoRA: a share of the columns of A under CKKS, the rest in 16 bits."""

    def __init__(self, layer: Layer, budget: float) -> None:
        self._key = SecretKey.generate(STANDARD)
        self._round = ours.Round(layer, self._key, budget, CLEAR_BITS[0])
        self._layer, self.layout = layer, self._round.layout

    def sent(self, client: int) -> Iterator[bytes]:
        """As of `Way`."""
        return self._round.sent(complete.LazyFactors(self._layer, client), Encryptor(self._key))

    def contributions(self) -> Sequence[Contribution]:
        """As of `Way`."""
        count = min(self._layer.clients, MOST_SELECTIVE)
        return [Contribution(str(client), 1 / count, self._layer.scaling) for client in range(count)]

    def opens(self) -> bool:
        """As of `Way`: every client has the key."""
        return True

    def restored(self, results: Iterable[bytes]) -> Iterator[object]:
        """As of `Way`."""
        return self._round.restored(results)

    def beside(self) -> tuple[int, int]:
        """As of `Way`."""
        return 0, 0


WAYS: Final[Mapping[str, Callable[[Layer], Way]]] = {
    "complete": CompleteWay,
    "selective, 1%": partial(SelectiveWay, budget=0.01),
    "selective, 100%": partial(SelectiveWay, budget=1.0),
}


def measure(layer: Layer, mode: str) -> Row:
    """Runs a mode on one layer in a new process."""
    return in_new_process(_measured, layer, mode)


def _measured(layer: Layer, mode: str) -> Row:
    with TemporaryDirectory() as name:
        return _Run(Path(name), layer, WAYS[mode](layer)).row(mode)


class _Run:
    """One layer's round, on disk."""

    def __init__(self, folder: Path, layer: Layer, way: Way) -> None:
        self._folder, self._layer, self._way = folder, layer, way
        self._shards = range(len(way.layout.shards))
        self._costs = {role: Cost() for role in ("protect", "aggregate", "restore")}

    def row(self, mode: str) -> Row:
        """Every role, one after the other."""
        layer, layers, costs = self._layer, MODELS[self._layer.model].layers, self._costs
        memory = {"protect": grown(partial(self._protect, 0, costs["protect"]))}
        for client in range(1, SENDERS):
            self._protect(client, Cost())
        used = self._way.contributions()
        memory["aggregate"] = grown(partial(self._aggregate, used))
        restores = self._way.opens()
        if restores:
            memory["restore"] = grown(self._restore)
        more_up, more_down = self._way.beside()
        return Row(
            mode=mode,
            rank=layer.rank,
            contributors=layer.clients,
            parameters=self._way.layout.sums.profile
            if self._way.layout.sums
            else self._way.layout.parameters,
            plain_bytes=layers * layer.plain_bytes,
            up=layers * self._size("update-*-0") + more_up,
            down=layers * self._size("result-*") + more_down,
            protect_s=layers * costs["protect"].cpu_s,
            restore_s=layers * costs["restore"].cpu_s if restores else None,
            aggregate_s=layers * costs["aggregate"].cpu_s * layer.clients / len(used),
            largest_shard=max(path.stat().st_size for path in self._folder.iterdir()),
            protect_memory=memory["protect"],
            restore_memory=memory.get("restore"),
            aggregate_memory=memory["aggregate"],
        )

    def _size(self, pattern: str) -> int:
        return sum(path.stat().st_size for path in self._folder.glob(pattern))

    def _protect(self, client: int, cost: Cost) -> None:
        with cost.measured():
            for index, data in enumerate(self._way.sent(client)):
                self._update(index, client).write_bytes(data)

    def _aggregate(self, members: Sequence[Contribution]) -> None:
        with self._costs["aggregate"].measured():
            for index in self._shards:
                data = aggregate_shard(self._way.layout, index, members, partial(self._load, index))
                self._result(index).write_bytes(data)

    def _restore(self) -> None:
        with self._costs["restore"].measured():
            results = (self._result(index).read_bytes() for index in self._shards)
            for _ in self._way.restored(results):
                pass

    def _load(self, index: int, client: str) -> bytes:
        return self._update(index, int(client) % SENDERS).read_bytes()

    def _update(self, index: int, client: int) -> Path:
        return self._folder / f"update-{index}-{client}"

    def _result(self, index: int) -> Path:
        return self._folder / f"result-{index}"


@app.command()
def scale(
    shapes: Annotated[list[str], typer.Argument(help=f"Models: {', '.join(MODELS)}.")],
    rank: Annotated[list[int], typer.Option(min=1, help="Ranks of all clients.")] = [8, 64],  # noqa: B006
    contributors: Annotated[list[int], typer.Option(min=2, help="Clients of the round.")] = [4, 1000],  # noqa: B006
    mode: Annotated[list[str], typer.Option(help=f"Modes: {'; '.join(WAYS)}.")] = list(WAYS),  # noqa: B006
    output: Annotated[Path, typer.Option(help="Folder of scale-MODEL.json.")] = Path("runs/bench"),
) -> None:
    """Measures a round at the shapes of large models, mode by mode."""
    for given, known in ((shapes, MODELS), (mode, WAYS)):
        if unknown := sorted(set(given) - set(known)):
            raise typer.BadParameter(f"{', '.join(unknown)}: use {', '.join(known)}")
    console = Console(stderr=True)
    for model in shapes:
        grid = list(itertools.product(mode, rank, contributors))
        rows: list[Row] = []
        path = output / f"scale-{model}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, r, count in track(grid, description=model, console=console):
            rows.append(measure(Layer(model=model, rank=r, clients=count, budget=0.01), name))
            path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
        print(table(model, rows))
        print(f"\nSummary: {path}")


def table(model: str, rows: Iterable[Row]) -> str:
    """A row a line, in Markdown."""
    lines = [
        f"**{model}**: {MODELS[model].layers} layers, every linear map ({MODELS[model].source})",
        "",
        _line(_HEADINGS),
        _line(["---", *["---:"] * (len(_HEADINGS) - 1)]),
    ]
    for row in rows:
        memory = (row.largest_shard, row.protect_memory, row.restore_memory, row.aggregate_memory)
        cells = (
            row.mode,
            str(row.rank),
            f"{row.contributors:,}",
            row.parameters,
            *map(_megabytes, (row.plain_bytes, row.up, row.down)),
            *map(_seconds, (row.protect_s, row.restore_s, row.aggregate_s)),
            *map(_megabytes, memory),
        )
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f} MB"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.1f} s" if value < 100 else f"{value:,.0f} s"


if __name__ == "__main__":
    app()
