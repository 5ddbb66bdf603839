"""What servers are told beside updates: what clients report, and what they state to the committees of rounds.

Servers can read it. So under `complete` nothing of it may differ from client to client but the terms, which
docs/threat-model.md lists, and what is random. `attack.statements` looks into what committees state.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np

from attack.capture import commands
from attack.stage import Performance
from shelora.lora.shards import Float64

TERMS: Final = re.compile(
    r"""
    members\.(rank | budget | example_count | certified_ms)
    | seen\.(at_ms | progress | certificate_ends_ms)
    | seen\.(stage | reason | why)\ \(bytes\)
    | (refusals | objections | applicants | copies)\b.*
    | commits\.(ordinal | rank | scaling)
    | commits\.shards\.\d+\.total_bytes
    | commits\.report\.(example_count | train_s | encrypt_s | upload_s | upload_bytes)
    | evaluations\.(\w+_s | download_bytes)
    | client\.(partial | complete):\d+
    | round\.rank
    """,
    re.VERBOSE,
)
"""Numbers that clients tell in every mode, by name; and how long the words are in which one says what keeps it."""
OWN: Final = re.compile(r"commits\.report\.train_loss|evaluations\.(example_count|correct_count|loss)")
"""What they measured themselves, and tell where servers see factors, which say more."""
REPORTS: Final = re.compile(
    r"commits\.report\.(train_loss|example_count)"
    r"|evaluations\.((means\.)?(accuracy|loss|train_loss)|correct_count|example_count)"
)
"""What of it all follows from examples."""
SIGNED_BYTES: Final = 16
"""By how much statements that say the same may differ: signatures and certificates in DER, names."""
WORDS: Final = 4
"""Of a text, one after the other, that are no chance."""
_PRINTED: Final = re.compile(rb"[ -~]{12,}")
"""What could be text."""
_INSTANCE: Final = re.compile(r"^[0-9a-f]{8}:(\d+):")
_COMMIT: Final = re.compile(rb"^(\d+) [0-9a-f]{64} (?=\{)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One thing that servers keep of one client."""

    place: str
    """What it is, as keys name it: `commits`, `committee:checks`, `client.norm:0`."""
    sequence: int
    """Of its round; 0 for what is of no round."""
    client: str
    content: bytes


def told(performance: Performance) -> Iterator[Told]:
    """All of it, in the order in which it was stored."""
    names = {client.name for client in performance.scene.clients}
    for command in commands(performance.beside):
        match [command[0].upper(), *command[1:]]:
            case [b"HSET", key, *pairs]:
                place, sequence = _place(key)
                for field, value in zip(pairs[::2], pairs[1::2], strict=True):
                    where, _, who = place.rpartition(":")
                    word = field.decode(errors="replace")
                    if word in names:
                        yield Told(place=place, sequence=sequence, client=word, content=value)
                    elif who in names:
                        yield Told(place=f"{where}.{word}", sequence=sequence, client=who, content=value)
                    elif word.partition(":")[2] in names:
                        kind, _, who = word.partition(":")
                        yield Told(place=f"{place}.{kind}", sequence=sequence, client=who, content=value)
            case [b"SET", key, value, *_]:
                place, sequence = _place(key)
                where, _, who = place.rpartition(":")
                if who in names:
                    yield Told(place=where, sequence=sequence, client=who, content=value)
            case _:
                continue


def _place(key: bytes) -> tuple[str, int]:
    """What a key is of, and the sequence of its round."""
    _, _, place = key.decode(errors="replace").partition("}:")
    if found := _INSTANCE.match(place):
        return place[found.end() :], int(found[1])
    inside = re.search(r"\.(\d+)\}", key.decode(errors="replace"))
    return place, int(inside[1]) if inside else 0


def numbers(performance: Performance) -> dict[str, dict[tuple[str, int], float]]:
    """By client every number that servers keep of it, by name and round; of what is no number, its length.

    Without what committees state: that differs by who is a member.
    """
    found: dict[str, dict[tuple[str, int], float]] = {c.name: {} for c in performance.scene.clients}
    for one in told(performance):
        if one.place.startswith("committee:"):
            continue
        for name, value in _numbers(one):
            found[one.client][name, one.sequence] = value
    return found


def _numbers(one: Told) -> Iterator[tuple[str, float]]:
    content, ordinal = one.content, _COMMIT.match(one.content)
    if ordinal:
        yield f"{one.place}.ordinal", float(ordinal[1])
        content = content[ordinal.end() :]
    try:
        yield from _leaves(json.loads(content), one.place)
    except ValueError:
        yield f"{one.place} (bytes)", float(len(content))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, float]]:  # noqa: ANN401 - JSON
    match value:
        case bool():
            yield name, float(value)
        case int() | float():
            yield name, float(value)
        case str():
            yield f"{name} (bytes)", float(len(value))
        case dict():
            for key, inner in value.items():
                yield from _leaves(inner, f"{name}.{key}")
        case list():
            for index, inner in enumerate(value):
                yield from _leaves(inner, f"{name}.{index}")
        case _:
            return


def differing(performance: Performance) -> list[str]:
    """Names of what differs from client to client, of numbers and of lengths that are more than a signature's."""
    found: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for of in numbers(performance).values():
        for place, value in of.items():
            found[place].append(value)
    return sorted(
        {name for (name, _), values in found.items() if np.ptp(values) > _tolerated(name)},
    )


def _tolerated(name: str) -> int:
    return SIGNED_BYTES if name.endswith("(bytes)") else 0


def unexpected(performance: Performance) -> list[str]:
    """Those that are no terms; under `complete`, what a client measured itself is none."""
    expected = (TERMS,) if performance.scene.sealed else (TERMS, OWN)
    return [name for name in differing(performance) if not any(e.fullmatch(name) for e in expected)]


def reported(performance: Performance) -> Float64:
    """What reports tell of examples, [clients, n], each number over all clients at mean 0 and deviation 1."""
    of = numbers(performance)
    names = sorted({place for found in of.values() for place in found if REPORTS.fullmatch(place[0])})
    table = np.array([[of[c.name].get(name, 0.0) for name in names] for c in performance.scene.clients])
    differ = table[:, np.ptp(table, axis=0) > 0]  # a deviation of equal numbers may be a rounding error
    told_apart: Float64 = (differ - differ.mean(axis=0)) / differ.std(axis=0)
    return told_apart


def losses(performance: Performance) -> dict[str, float]:
    """By client the mean loss that it reported of its first training round; 0 where it told none."""
    first = min((o.sequence for o in told(performance) if _trained(o)), default=0)
    of = numbers(performance)
    return {name: found.get(("commits.report.train_loss", first), 0.0) for name, found in of.items()}


def _trained(one: Told) -> bool:
    """Whether it is a commit to a training round; a vote's has the weight 1 and the rank 1."""
    if one.place != "commits":
        return False
    update = json.loads(_COMMIT.sub(b"", one.content))
    return bool(
        (update["rank"], update["report"]["example_count"], update["report"]["train_loss"]) != (1, 1, 0)
    )


def in_clear(performance: Performance) -> float:
    """Share of the clients' texts of which four words stand, as they are, in anything that servers stored."""
    updates = (update.content for round_ in performance.rounds for update in round_.updates)
    stored = b"\0".join(chain.from_iterable(map(_PRINTED.findall, chain([performance.beside], updates))))
    stored = stored.lower()
    texts = [text for client in performance.scene.clients for text in client.texts]
    return float(np.mean([any(run in stored for run in _runs(text)) for text in texts]))


def _runs(text: str) -> Iterator[bytes]:
    words = text.lower().split()
    return (" ".join(words[i : i + WORDS]).encode() for i in range(max(len(words) - WORDS + 1, 1)))
