"""Draws the state machines of a round from their tables, or verifies that the pictures in docs/ are those.

python -m tools.diagrams write|verify
"""

from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Final

from shelora.rounds import COMMITTEE_TRANSITIONS, TRANSITIONS, Event, RoundState, Transitions
from tools.command import write_or_verify

IMAGES: Final = Path("docs/images")
MACHINES: Final = {"round.svg": TRANSITIONS, "round-committee.svg": COMMITTEE_TRANSITIONS}
WIDTH, HEIGHT, GAP, DROP = 122, 34, 84, 92
_STYLE: Final = """
rect{fill:#fff;stroke:#333}
rect.end{fill:#eee;stroke-width:2}
text{font:12px sans-serif;text-anchor:middle;fill:#111}
text.event{font-size:11px;fill:#555}
path{stroke:#333;fill:none;marker-end:url(#arrow)}
path.side{stroke-dasharray:4 3}
path.tip{fill:#333;stroke:none;marker-end:none}
"""


def path_of(transitions: Transitions) -> list[tuple[RoundState, Event]]:
    """The states from the first one on, each with the event that leads to the next; ABANDON apart.

    Raises: ValueError if the table is no path with a way to ABANDONED from each of its states.
    """
    steps = {
        origin: (event, target)
        for (origin, event), target in transitions.items()
        if event is not Event.ABANDON
    }
    path: list[tuple[RoundState, Event]] = []
    state = RoundState.SELECTING
    while state in steps:
        event, target = steps.pop(state)
        path.append((state, event))
        state = target
    left = {origin for (origin, event), target in transitions.items() if event is Event.ABANDON}
    ends = {target for (_, event), target in transitions.items() if event is Event.ABANDON}
    is_path = not steps and state is RoundState.PUBLISHED and len(transitions) == len(path) + len(left)
    if not is_path or left != {origin for origin, _ in path} or ends != {RoundState.ABANDONED}:
        raise ValueError("the table is no longer a path: draw it otherwise")
    return path


def drawn(transitions: Transitions) -> str:
    """The picture: the path from left to right, and below where every state but the last may end."""
    path = path_of(transitions)
    states = [*(state for state, _ in path), RoundState.PUBLISHED]
    left = [10 + i * (WIDTH + GAP) for i in range(len(states))]
    middle = (left[0] + left[-2] + WIDTH) / 2
    parts = [_box(x, 24, state) for x, state in zip(left, states, strict=True)]
    parts.append(_box(middle - WIDTH / 2, 24 + DROP, RoundState.ABANDONED))
    for (start, end), (_, event) in zip(pairwise(left), path, strict=True):
        parts.append(_arrow(f"M{start + WIDTH} 41 H{end - 3}"))
        parts.append(_word(start + WIDTH + GAP / 2, 35, event))
    for x in left[:-1]:
        foot = middle + (x + WIDTH / 2 - middle) * WIDTH / (2 * (left[-1] - left[0]))
        parts.append(_arrow(f"M{x + WIDTH / 2:g} {24 + HEIGHT} L{foot:g} {24 + DROP - 3}", side=True))
    parts.append(_word(middle + WIDTH / 2 + 40, 24 + DROP + 21, Event.ABANDON))
    width, height = left[-1] + WIDTH + 10, 24 + DROP + HEIGHT + 10
    arrow = '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    tip = '<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker>'
    defs = f"<defs><style>{_STYLE}</style>{arrow}{tip}</defs>"
    ground = f'<rect width="{width}" height="{height}" style="fill:#fff;stroke:none"/>'
    return "\n".join([head, defs, ground, *parts, "</svg>", ""])


def _box(x: float, y: float, state: RoundState) -> str:
    end = ' class="end"' if state in {RoundState.PUBLISHED, RoundState.ABANDONED} else ""
    text = f'<text x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2 + 4:g}">{escape(state)}</text>'
    return f'<rect{end} x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>{text}'


def _arrow(course: str, *, side: bool = False) -> str:
    kind = ' class="side"' if side else ""
    return f'<path{kind} d="{course}"/>'


def _word(x: float, y: float, event: Event) -> str:
    return f'<text class="event" x="{x:g}" y="{y:g}">{escape(event)}</text>'


def write() -> None:
    """Replaces the pictures."""
    for name, transitions in MACHINES.items():
        (IMAGES / name).write_text(drawn(transitions), encoding="utf-8")


def differing() -> str:
    """Which pictures are others, in words; "" for none."""
    wrong = [
        name
        for name, table in MACHINES.items()
        if (IMAGES / name).read_text(encoding="utf-8") != drawn(table)
    ]
    return f"not drawn from the tables: {', '.join(wrong)}; run `make diagrams`" if wrong else ""


if __name__ == "__main__":
    write_or_verify(__doc__, write, differing)
