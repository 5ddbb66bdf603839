"""Conversations from records of the four usual shapes, told apart by their fields."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from client_agent.data import kind_of_value, sound_text
from client_agent.sources import invalid
from client_agent.spool import ExampleSpool
from client_agent.tables import Record, listed, quoted, read_records

ASSISTANT: Final = "assistant"
USER: Final = "user"
_SYSTEM: Final = "system"
_ROLES: Final = {name: name for name in (_SYSTEM, USER, ASSISTANT)}
_SPEAKERS: Final = _ROLES | {"human": USER, "gpt": ASSISTANT}
"""Roles by the names that `conversations` use."""
_SHAPES: Final = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
"""The fields that make a record one of the four; `input` may come with an instruction."""
_INPUT: Final = "input"
FIELDS: Final = (*(field for shape in _SHAPES for field in shape), _INPUT)
ACCEPTED: Final = (
    'messages [{"role", "content"}], conversations [{"from", "value"}], prompt and completion, '
    "or instruction (with or without input) and output"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that end with an answer of the assistant."""

    turns: tuple[Turn, ...]
    of_messages: bool
    """Whether the record holds messages, which only the tokenizer's own template renders."""


@dataclass(frozen=True, slots=True)
class Conversations:
    """Conversations as examples."""

    conversations: Sequence[Conversation]

    def __len__(self) -> int:
        return len(self.conversations)

    def select(self, indices: Iterable[int]) -> "Conversations":
        """These examples, in this order."""
        return Conversations(tuple(self.conversations[index] for index in indices))

    def fingerprint(self) -> str:
        """SHA-256 in hex: equal for the same examples in the same order."""
        hashed = hashlib.sha256()
        for one in self.conversations:
            hashed.update(hashlib.sha256(_as_text(one).encode()).digest())
        return hashed.hexdigest()

    def count_by_label(self, names: Sequence[str]) -> Mapping[str, int]:
        """Nothing: conversations have no labels."""
        del names
        return {}


def read_conversations(path: Path, cache_dir: Path | None = None) -> Conversations:
    """Reads what the path stands for. Raises: DomainError DATA_INVALID naming file, line and field.

    Args:
        path: A file, a folder, a pattern or a saved dataset.
        cache_dir: Where many conversations are kept, as `client_agent.spool` has it.
    """
    spool = ExampleSpool(cache_dir, encode=_as_text, decode=_from_text)
    for record in read_records(path, FIELDS):
        spool.add(_conversation(record))
    read = Conversations(spool.done())
    if not read.conversations:
        raise invalid(f"{path} holds no examples")
    return read


def _as_text(one: Conversation) -> str:
    return json.dumps([one.of_messages, *([turn.role, turn.content] for turn in one.turns)])


def _from_text(text: str) -> Conversation:
    of_messages, *turns = json.loads(text)
    return Conversation(tuple(Turn(*turn) for turn in turns), of_messages)


def record_at(path: Path, index: int) -> str:
    """The place of the conversation of that index, from 0."""
    found = next(islice(read_records(path, FIELDS), index, None), None)
    return found.place if found else f"{path}, example {index + 1}"  # the file was changed since it was read


def _conversation(record: Record) -> Conversation:
    shape = _shape(record)
    values, place = record.values, record.place
    match shape:
        case ("messages" as field,):
            turns = tuple(_turns(values[field], field, ("role", "content"), _ROLES, place))
        case ("conversations" as field,):
            turns = tuple(_turns(values[field], field, ("from", "value"), _SPEAKERS, place))
        case (question, answer):
            asked = sound_text(values[question], question, place)
            more = values.get(_INPUT) if question == "instruction" else None
            if more is not None and more != "":
                asked = f"{asked}\n\n{sound_text(more, _INPUT, place)}"
            turns = (Turn(USER, asked), Turn(ASSISTANT, sound_text(values[answer], answer, place)))
    last = max((index for index, turn in enumerate(turns) if turn.role == ASSISTANT), default=-1)
    if last < 0:
        raise invalid(f"{place}: field {shape[0]!r} holds no answer of the assistant: remove the record")
    return Conversation(turns[: last + 1], of_messages=len(shape) == 1)


def _shape(record: Record) -> tuple[str, ...]:
    whole = [shape for shape in _SHAPES if all(record.values.get(field) is not None for field in shape)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        found = " and also ".join(", ".join(shape) for shape in whole)
        raise invalid(f"{record.place}: the record holds {found}: keep one of them")
    raise invalid(
        f"{record.place}: the record is not a conversation; accepted are {ACCEPTED}; fields there: "
        f"{listed(record.names)}"
    )


def _turns(
    value: object, field: str, names: tuple[str, str], roles: Mapping[str, str], place: str
) -> Iterator[Turn]:
    if not isinstance(value, list):
        raise invalid(f"{place}: field {field!r} must be a list, not {kind_of_value(value)}")
    speaker, said = names
    for index, entry in enumerate(value):
        where = f"{field}[{index}]"
        members = _members(entry, where, names, place)
        role = members[speaker]
        if not isinstance(role, str) or role not in roles:
            shown = quoted(role) if isinstance(role, str) else kind_of_value(role)
            raise invalid(
                f"{place}: {where}.{speaker} is {shown}: use {', '.join(roles)} (tools are not supported)"
            )
        if roles[role] == _SYSTEM and members[said] == "":
            continue  # as many sets have it where there is none
        yield Turn(roles[role], sound_text(members[said], f"{where}.{said}", place))


def _members(entry: object, where: str, names: tuple[str, str], place: str) -> dict[str, object]:
    if not isinstance(entry, tuple):
        raise invalid(
            f"{place}: {where} must be an object with {names[0]} and {names[1]}, not {kind_of_value(entry)}"
        )
    found: dict[str, object] = {}
    for name in names:
        values = [value for key, value in entry if key == name]
        if len(values) != 1:
            count = f"{len(values)} times" if values else "not there"
            there = listed(str(key) for key, _ in entry)
            raise invalid(f"{place}: {where}.{name} is {count}; fields there: {there}")
        found[name] = values[0]
    return found
