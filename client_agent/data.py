"""Examples from files, read strictly: an error names the file, the line and the field."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Final

from client_agent.sources import invalid
from client_agent.spool import ExampleSpool
from client_agent.tables import LONGEST_RECORD, listed, quoted, read_rows

_TEXT_SETTING: Final = "data.text_field"
_LABEL_SETTING: Final = "data.label_field"
_PAIR_SETTING: Final = "data.pair_field"
LEAST_LABELS: Final = 2
_EXACT: Final = 2**53
"""Floats below are exact where they are whole numbers."""
_KINDS: Final = {
    bool: "true or false",
    str: "text",
    tuple: "an object",
    list: "a list",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class Examples:
    """Texts and, for classification, the index of each one's label."""

    texts: Sequence[str]
    labels: Sequence[int] = ()
    """As many as texts, or none (next tokens)."""
    seconds: Sequence[str] = ()
    """The second text of each pair; none if there are no pairs."""

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int]) -> "Examples":
        """These examples, in this order."""
        chosen = list(indices)
        return Examples(
            tuple(self.texts[i] for i in chosen),
            tuple(self.labels[i] for i in chosen) if self.labels else (),
            tuple(self.seconds[i] for i in chosen) if self.seconds else (),
        )

    def fingerprint(self) -> str:
        """SHA-256 in hex: equal for the same examples in the same order."""
        hashed = hashlib.sha256(repr(tuple(self.labels)).encode())
        for text in chain(self.texts, self.seconds):
            hashed.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        return hashed.hexdigest()

    def count_by_label(self, names: Sequence[str]) -> dict[str, int]:
        """Number of examples of every label, in the labels' order."""
        counts = Counter(self.labels)
        return {name: counts[index] for index, name in enumerate(names)}


def read_examples(
    path: Path,
    text_field: str,
    label_field: str,
    labels: Sequence[str],
    *,
    pair_field: str | None = None,
    cache_dir: Path | None = None,
) -> Examples:
    """Reads what the path stands for; of its fields those alone.

    Args:
        path: A file, a folder, a pattern or a saved dataset.
        text_field: Holds the text.
        label_field: Holds the class name.
        labels: Class names in order of their index; empty if examples have no label.
        pair_field: Holds a second text; None for none.
        cache_dir: Where many texts are kept, as `client_agent.spool` has it.

    Raises: DomainError DATA_INVALID naming file, line (row of a Parquet file, from 1) and field.
    """
    index = {name: position for position, name in enumerate(labels)}
    fields = {text_field: _TEXT_SETTING} | ({label_field: _LABEL_SETTING} if labels else {})
    if pair_field is not None:
        fields[pair_field] = _PAIR_SETTING
    texts, seconds = _texts(cache_dir), _texts(cache_dir)
    numbers: list[int] = []
    for place, row in read_rows(path, fields):
        texts.add(sound_text(row[text_field], text_field, place))
        if pair_field is not None:
            seconds.add(sound_text(row[pair_field], pair_field, place))
        if labels:
            numbers.append(label_index(row[label_field], label_field, index, place))
    read = Examples(texts.done(), tuple(numbers), seconds.done())
    if not read.texts:
        raise invalid(f"{path} holds no examples")
    return read


def _texts(cache_dir: Path | None) -> ExampleSpool[str]:
    return ExampleSpool(cache_dir, encode=str, decode=str)


def found_labels(path: Path, label_field: str) -> tuple[str, ...]:
    """The distinct labels of a file, sorted, at least two. Raises: DomainError DATA_INVALID."""
    rows = read_rows(path, {label_field: _LABEL_SETTING})
    return distinct_labels(path, label_field, ((place, row[label_field]) for place, row in rows))


def distinct_labels(path: Path, label_field: str, labels: Iterable[tuple[str, object]]) -> tuple[str, ...]:
    """The distinct ones, sorted, at least two. Raises: DomainError DATA_INVALID.

    Args: labels: With their places.
    """
    found = {_label_names(label, label_field, place)[0] for place, label in labels}
    if not found:
        raise invalid(f"{path} holds no examples")
    if len(found) < LEAST_LABELS:
        raise invalid(
            f"{path} holds one label in {label_field!r}, {listed(found)}, and a classifier needs two"
        )
    return tuple(sorted(found))


def place_of(path: Path, text_field: str, index: int) -> str:
    """Where the example of that index, from 0, lies in its file."""
    found = next(islice(read_rows(path, {text_field: _TEXT_SETTING}), index, None), None)
    return found[0] if found else f"{path}, example {index + 1}"  # the file was changed since it was read


def sound_text(value: object, field: str, place: str) -> str:
    """The value, if it is text that is neither empty nor torn. Raises: DomainError DATA_INVALID."""
    if not isinstance(value, str):
        raise invalid(f"{place}: field {field!r} must be text, not {kind_of_value(value)}")
    if not value.strip():
        raise invalid(f"{place}: field {field!r} is empty")
    if len(value) > LONGEST_RECORD:
        raise invalid(f"{place}: field {field!r} has more than {LONGEST_RECORD:,} characters: break it up")
    if not value.isascii() and (half := next((c for c in value if "\ud800" <= c <= "\udfff"), "")):
        raise invalid(
            f"{place}: field {field!r} holds half of a character ({half!r} of a surrogate pair): remove it"
        )
    return value


def label_index(value: object, field: str, index: Mapping[str, int], place: str) -> int:
    """The index of a class name. Raises: DomainError DATA_INVALID."""
    names = _label_names(value, field, place)
    for name in names:
        if name in index:
            return index[name]
    raise invalid(f"{place}: label {quoted(names[0])} is not one of the federation's: {listed(index)}")


def _label_names(value: object, field: str, place: str) -> tuple[str, ...]:
    """The class names that a value may stand for: pandas writes true as True, and 1 beside a null as 1.0."""
    match value:
        case str() if value.strip():
            return (value,)
        case str():
            raise invalid(f"{place}: field {field!r} is empty")
        case bool():
            return str(value).lower(), str(value)
        case int():
            return (str(value),)
        case float() if math.isfinite(value):
            whole = value.is_integer() and abs(value) < _EXACT
            return (str(int(value)), repr(value)) if whole else (repr(value),)
    raise invalid(f"{place}: field {field!r} must be a class name, not {kind_of_value(value)}")


def kind_of_value(value: object) -> str:
    """A value's kind in the words of JSON."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number" if math.isfinite(value) else "NaN or a number without bounds"
    return _KINDS.get(type(value), type(value).__name__)
