"""Questions with answers, divided among the agents by topic.

They lie in the wheel of chatterbot-corpus (BSD licence), whose authors wrote them for chat bots: not all answers are
right, and that does not matter here. A question that is tested is not among those that are trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from examples.reuters.assets import Wheel

CORPUS: Final = Wheel(
    requirement="chatterbot-corpus==1.3.3",
    prefix="chatterbot_corpus/data/english/",
    files={
        "ai.yml": "620a65787a56641db4a03e1419a7578e813967218cf6721e3ea4ef90844916aa",
        "coding.yml": "1726a8900a82ee32dad559809564f9ae97df9c52f42a8f1fcde84b1d54b1d260",
        "psychology.yml": "5047c211d35f715af4fbc3398f111135e99d34afcd0905a661c40bdeb1413a58",
        "trivia.yml": "3a9de77e6d82803d1ea3eba48cf6543c884908f4c4f50501fed69f88112994dc",
    },
    target="chatterbot-corpus",
)
TOPICS: Final[Mapping[str, Sequence[str]]] = {
    "workshop": ("coding",),
    "quiz-club": ("trivia",),
    "companion": ("ai", "psychology"),
}
"""The files that each agent has."""
MOST: Final = 160
"""Pairs that an agent has at most, training and test together: no topic outweighs the others."""
HELD_OUT: Final = 8
"""One question in so many is tested."""


@dataclass(frozen=True)
class Pair:
    """A question and its answer."""

    question: str
    answer: str


def read_topic(folder: Path, names: Sequence[str]) -> list[Pair]:
    """The pairs of these files, each once, in their order."""
    pairs: dict[Pair, None] = {}
    for name in names:
        content = yaml.safe_load((folder / f"{name}.yml").read_text(encoding="utf-8"))
        for turns in content["conversations"]:
            if len(turns) == 2 and all(isinstance(turn, str) and turn.strip() for turn in turns):
                pairs[Pair(*(turn.strip() for turn in turns))] = None
    return list(pairs)


def divided(pairs: Sequence[Pair], held_out: int = HELD_OUT) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs to test on, one question in `held_out`; they have no question in common."""
    questions = list(dict.fromkeys(pair.question for pair in pairs))
    tested = set(questions[held_out - 1 :: held_out])
    return (
        [pair for pair in pairs if pair.question not in tested],
        [pair for pair in pairs if pair.question in tested],
    )


def write_agents(source: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """Writes to each agent's folder `train.jsonl`, of its topic, and `test.jsonl`, its share of all topics' tests; to
    `folder` the test of all. Returns training and test examples by agent.
    """
    topics = {agent: divided(read_topic(source, names)[:MOST]) for agent, names in TOPICS.items()}
    tests = [pair for _, test in topics.values() for pair in test]
    write_jsonl(tests, folder / "test.jsonl")
    counts = {}
    for position, (agent, (train, _)) in enumerate(topics.items()):
        share = tests[position :: len(TOPICS)]
        write_jsonl(train, folder / agent / "train.jsonl")
        write_jsonl(share, folder / agent / "test.jsonl")
        counts[agent] = len(train), len(share)
    return counts


def write_jsonl(pairs: Sequence[Pair], path: Path) -> None:
    """One conversation a line, as `messages`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for pair in pairs:
        turns = [{"role": "user", "content": pair.question}, {"role": "assistant", "content": pair.answer}]
        lines.append(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
