"""Draws one round as its coordinator and agents logged it: who did what when.

    python -m tools.trace runs/demo/complete/cluster/logs 4 docs/images/trace.svg

Reads the logs that `shelora up` and the demo leave of processes on one machine, which share a clock.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from shelora.rounds import RoundState

mpl.use("Agg")

COORDINATOR: Final = "coordinator"
COLOURS: Final = {
    "opens the last sum, judges it, evaluates": "#c7a252",
    "trains": "#4c78a8",
    "encrypts, uploads, deals": "#b3485a",
    "waits for others": "#e6e6e6",
    "works for the committee": "#2e7d4f",
}
EVALUATES, TRAINS, SENDS, WAITS, SERVES = COLOURS
STATES: Final = {
    RoundState.SELECTING: "#f2f2f2",
    RoundState.KEYING: "#d9c5e5",
    RoundState.COLLECTING: "#dce6f2",
    RoundState.CERTIFYING: "#bfe3cb",
    RoundState.AGGREGATING: "#f4d6c6",
    RoundState.PUBLISHED: "#f2f2f2",
}
MARGIN_S: Final = 0.05
"""Around the closing of the round, in its own panel."""
_LINE: Final = re.compile(r"^(?P<time>\S+Z) \[\w+ *\] (?P<event>\w+) ")
_FIELD: Final = re.compile(r"(\w+)=('[^']*'|\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What somebody did for some time, Unix seconds."""

    who: str
    what: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a log."""

    at: float
    event: str
    fields: dict[str, str]


def spans(folder: Path, number: int) -> list[Span]:
    """What coordinator and agents did in that round of the logs' only federation.

    Raises: ValueError: they say nothing of it.
    """
    found = [*_states(_read(folder / f"{COORDINATOR}.log"), number)]
    for path in sorted(folder.glob("*.log")):
        found += _agent(path.stem, _read(path), number)
    if len({span.who for span in found}) < 2:
        raise ValueError(f"{folder}: no log tells of round {number}, or of an agent in it")
    return found


def _read(path: Path) -> list[_Line]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in map(_line, lines) if line]


def _line(text: str) -> _Line | None:
    if text.startswith("{"):
        fields: dict[str, Any] = json.loads(text)
        return _Line(_seconds(fields.get("timestamp", "")), fields.get("event", ""), fields)
    match = _LINE.match(text)
    if match is None:
        return None
    return _Line(_seconds(match["time"]), match["event"], dict(_FIELD.findall(text)))


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp() if time else 0.0


def _of_round(identifier: str, number: int) -> bool:
    return identifier.rpartition(".")[2] == str(number)


def _states(lines: Sequence[_Line], number: int) -> Iterator[Span]:
    """The states that the coordinator's round went through."""
    told = [x for x in lines if "state" in x.fields and _of_round(x.fields.get("round_id", ""), number)]
    own = [next(same) for _, same in groupby(told, key=lambda line: line.fields["state"])]
    for line, after in zip(own, [*own[1:], None], strict=True):
        end = after.at if after else line.at + MARGIN_S
        yield Span(who=COORDINATOR, what=line.fields["state"], begin=line.at, end=end)


def _agent(name: str, lines: Sequence[_Line], number: int) -> Iterator[Span]:
    """An agent's time from its assignment to the next one, less what it served the committee meanwhile."""
    assigned = [x for x in lines if x.event == "assigned"]
    work = [x for x in assigned if x.fields.get("work") in {"train", "finish"}]
    begins = [x for x in work if _of_round(x.fields["assignment_id"], number)]
    if not begins:
        return
    begin = begins[-1].at
    after = next((x.at for x in work if x.at > begin), lines[-1].at)
    steps = {x.event: x.at for x in lines if begin < x.at <= after}
    marks = [begin]
    for event, what in (("evaluated", EVALUATES), ("trained", TRAINS), ("update_committed", SENDS)):
        if event in steps and steps[event] > marks[-1]:
            yield Span(who=name, what=what, begin=marks[-1], end=steps[event])
            marks.append(steps[event])
    yield Span(who=name, what=WAITS, begin=marks[-1], end=after)
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        if line.event == "assigned" and line.fields.get("work") == "serve" and marks[-1] <= line.at <= after:
            end = min(following.at if following else line.at, line.at + MARGIN_S)
            yield Span(who=name, what=SERVES, begin=line.at, end=end)


def draw(found: Sequence[Span], number: int, path: Path) -> None:
    """Two panels: the whole round, and from its last update to its result."""
    states = {span.what: span for span in found if span.who == COORDINATOR}
    first, closing = min(span.begin for span in found), states[RoundState.CERTIFYING].begin
    last = max(span.end for span in found)
    published = states[RoundState.PUBLISHED].begin
    who = sorted({span.who for span in found}, key=lambda name: (name == COORDINATOR, name))
    figure, panels = plt.subplots(2, 1, figsize=(10, 5.6), layout="constrained", height_ratios=(1, 1))
    for axes, begin, end, title in (
        (panels[0], first, last, f"round {number}, whole"),
        (
            panels[1],
            closing - 3 * MARGIN_S,
            published + 2 * MARGIN_S,
            "from its last update to its published sum",
        ),
    ):
        for span in found:
            _bar(axes, span, who.index(span.who), begin, end)
        axes.set(
            xlim=(0, end - begin), yticks=range(len(who)), yticklabels=who, title=title, xlabel="seconds"
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    handles = [Patch(color=colour, label=what) for what, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _bar(axes: Any, span: Span, row: int, begin: float, end: float) -> None:  # noqa: ANN401 - matplotlib's Axes
    left, right = max(span.begin, begin) - begin, min(span.end, end) - begin
    if right <= left:
        return
    colour = COLOURS.get(span.what) or STATES[RoundState(span.what)]
    axes.barh(row, right - left, left=left, color=colour, height=0.62)
    if span.who == COORDINATOR and right - left > (end - begin) * len(span.what) / 90:
        axes.text((left + right) / 2, row, span.what.lower(), ha="center", va="center", fontsize=8)


def main(arguments: Sequence[str]) -> int:
    """Draws; exit code 2 if the arguments are no logs, number and picture."""
    try:
        folder, number, path = Path(arguments[0]), int(arguments[1]), Path(arguments[2])
        draw(spans(folder, number), number, path)
    except (IndexError, ValueError, OSError) as error:
        print(f"python -m tools.trace LOGS ROUND PICTURE: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
