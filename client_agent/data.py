"""Examples from files, read strictly: whoever's file is wrong learns the file, the line and the field."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from client_agent.access import denied
from shelora.errors import DomainError, Reason

_PARQUET_ROWS = 4096
"""Rows of a Parquet file held at once."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Texts and, for classification, the index of each one's label."""

    texts: tuple[str, ...]
    labels: tuple[int, ...] = ()
    """As many as texts, or none (causal-lm)."""

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int]) -> "Examples":
        """These examples, in this order."""
        chosen = list(indices)
        return Examples(
            tuple(self.texts[i] for i in chosen), tuple(self.labels[i] for i in chosen) if self.labels else ()
        )

    def fingerprint(self) -> str:
        """SHA-256 in hex: equal for the same examples in the same order."""
        hashed = hashlib.sha256(repr(self.labels).encode())
        for text in self.texts:
            hashed.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        return hashed.hexdigest()

    def count_by_label(self, names: Sequence[str]) -> dict[str, int]:
        """Number of examples of every label, in the labels' order."""
        counts = Counter(self.labels)
        return {name: counts[index] for index, name in enumerate(names)}


def read_examples(path: Path, text_field: str, label_field: str, labels: Sequence[str]) -> Examples:
    """Reads a .jsonl, .csv or .parquet file.

    Args: labels: Class names in order of their index; empty if examples have no label.
    Raises: DomainError DATA_INVALID naming file, line (row of a Parquet file, from 1) and field.
    """
    index = {name: position for position, name in enumerate(labels)}
    texts: list[str] = []
    numbers: list[int] = []
    for place, row in _rows(path):
        texts.append(_text(row, text_field, place))
        if labels:
            numbers.append(_label(row, label_field, index, place))
    if not texts:
        raise invalid(f"{path} holds no examples")
    return Examples(tuple(texts), tuple(numbers))


def found_labels(path: Path, label_field: str) -> tuple[str, ...]:
    """The distinct labels of a file, sorted. Raises: DomainError DATA_INVALID."""
    return tuple(sorted({_label_name(row, label_field, place) for place, row in _rows(path)}))


def invalid(message: str) -> DomainError:
    """A DATA_INVALID error."""
    return DomainError(Reason.DATA_INVALID, message)


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Every row with its place in words. Raises: DomainError DATA_INVALID."""
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise invalid(f"{path}: the file name must end in one of {', '.join(readers)}")
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise invalid(f"{path} is not UTF-8 at byte {error.start}") from error
    except PermissionError as error:
        raise invalid(denied(path)) from error
    except OSError as error:
        raise invalid(f"{path} cannot be read: {error.strerror or error}") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                raise invalid(f"{place}, column {error.colno}: not valid JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise invalid(f"{place}: must be a JSON object")
            yield place, row


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True, restkey="")
        try:
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if "" in row:
                    raise invalid(
                        f"{place}: more fields than the header names; quote texts that contain commas"
                    )
                yield place, row
        except csv.Error as error:
            raise invalid(f"{path}, line {reader.line_num}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pa.ArrowException as error:
        raise invalid(f"{path} is not a readable Parquet file: {error}") from error


def _text(row: Mapping[str, object], field: str, place: str) -> str:
    value = _field(row, field, place, "data.text_field")
    if not isinstance(value, str):
        raise invalid(f"{place}: field {field!r} must be text, not {type(value).__name__}")
    if not value.strip():
        raise invalid(f"{place}: field {field!r} is empty")
    return value


def _label(row: Mapping[str, object], field: str, index: Mapping[str, int], place: str) -> int:
    name = _label_name(row, field, place)
    if name not in index:
        known = ", ".join(index)
        raise invalid(f"{place}: label {name!r} is not one of the federation's: {known}")
    return index[name]


def _label_name(row: Mapping[str, object], field: str, place: str) -> str:
    value = _field(row, field, place, "data.label_field")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise invalid(f"{place}: field {field!r} must be a class name, not {type(value).__name__}")
    return str(value)


def _field(row: Mapping[str, object], field: str, place: str, setting: str) -> object:
    value = row.get(field)
    if value is None:
        there = ", ".join(map(str, row)) or "none"
        raise invalid(f"{place}: field {field!r} is missing (set {setting}); fields there: {there}")
    return value
