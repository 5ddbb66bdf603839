"""Rows of JSONL, CSV and Parquet files: the named fields alone, whatever else a file holds.

What cannot be read is refused with the file, the line (row of a Parquet file, from 1), the field and the remedy.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from client_agent.access import denied
from client_agent.config import unsupported_name
from shelora.errors import DomainError, Reason

Fields: TypeAlias = Mapping[str, str]
"""What to read: the setting that names a field, by the field's name in the file."""
Row: TypeAlias = tuple[str, Mapping[str, object]]
"""A row's place in words, and the value of every named field: never None, for a null is refused."""

MOST_SHOWN: Final = 20
"""Names that an error lists."""
MOST_CHARACTERS: Final = 60
"""Characters of a name or value that an error shows."""
_PARQUET_ROWS: Final = 4096
"""Rows of a Parquet file held at once."""
_LONGEST_INTEGER: Final = 300
"""Digits of an integer in JSON; more are beyond every float, and take quadratic time to convert."""
_SAMPLE_BYTES: Final = 4096
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, and the encodings they stand for."""
_PACKED: Final = (
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
"""How compressed files begin. Those of Parquet are compressed inside."""
_PARQUET: Final = b"PAR1"

csv.field_size_limit(2**31 - 1)  # texts are cut to the federation's max_tokens later


def read_rows(path: Path, fields: Fields) -> Iterator[Row]:
    """Every row, read as it is asked for. Raises: DomainError DATA_INVALID."""
    try:
        yield from _reader(path)(path, fields)
    except PermissionError as error:
        raise invalid(denied(path)) from error
    except OSError as error:
        raise invalid(f"{path} cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class Record:
    """A row of which it is not known before what fields it has."""

    place: str
    values: Mapping[str, object]
    """Of the fields that were asked for, those that it has. JSON objects inside are tuples of pairs, lists lists."""
    names: Sequence[str]
    """All of its fields."""


def read_records(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    """Every row with whatever of the fields it has, nulls too. Raises: DomainError DATA_INVALID."""
    try:
        _reader(path)
        yield from _RECORDS[path.suffix.lower()](path, fields)
    except PermissionError as error:
        raise invalid(denied(path)) from error
    except OSError as error:
        raise invalid(f"{path} cannot be read: {error.strerror or error}") from error


def invalid(message: str) -> DomainError:
    """A DATA_INVALID error."""
    return DomainError(Reason.DATA_INVALID, message)


def listed(names: Iterable[str]) -> str:
    """Names in a row for people, at most MOST_SHOWN; in quotes where something would be overlooked."""
    everything = list(names)
    shown = [
        name
        if name.isprintable() and name == name.strip() and 0 < len(name) <= MOST_CHARACTERS
        else quoted(name)
        for name in everything[:MOST_SHOWN]
    ]
    more = len(everything) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "") or "none"


def quoted(text: str) -> str:
    """The beginning of a text in quotes, without anything that a terminal would obey."""
    return repr(text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "...")


def _reader(path: Path) -> Callable[[Path, Fields], Iterator[Row]]:
    """How to read that file, judged by its name and its beginning. Raises: OSError, DATA_INVALID."""
    if why := unsupported_name(path):
        raise invalid(f"{path}: {why}")
    if path.exists() and not path.is_file():
        raise invalid(f"{path} is no file")
    with path.open("rb") as file:
        start = file.read(_SAMPLE_BYTES)
    for magic, kind in _PACKED:
        if start.startswith(magic):
            raise invalid(f"{path} is compressed with {kind}: unpack it first")
    suffix = path.suffix.lower()
    if start.startswith(_PARQUET) and suffix != ".parquet":
        raise invalid(f"{path} is a Parquet file: let its name end in .parquet")
    return _READERS[suffix]


# Text files


def _jsonl_rows(path: Path, fields: Fields) -> Iterator[Row]:
    with _opened(path, newline=None) as file:
        for number, line in enumerate(_sound_lines(path, file), start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _members(_parsed(line.rstrip("\n"), place), fields, place)


def _jsonl_records(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    with _opened(path, newline=None) as file:
        for number, line in enumerate(_sound_lines(path, file), start=1):
            if line.strip():
                place = f"{path}, line {number}"
                pairs = _parsed(line.rstrip("\n"), place)
                names = [name for name, _ in pairs]
                for field in fields:
                    if names.count(field) > 1:
                        raise invalid(f"{place}: field {field!r} occurs {names.count(field)} times: keep one")
                yield Record(place, {name: value for name, value in pairs if name in fields}, names)


def _parsed(line: str, place: str) -> tuple[tuple[str, object], ...]:
    """A JSON object as its pairs, so that repeated names are seen; lists stay lists."""
    try:
        value = json.loads(line, object_pairs_hook=tuple, parse_int=_integer)
    except json.JSONDecodeError as error:
        where = f"{place}, column {error.colno}"
        raise invalid(
            f"{where}: not valid JSON ({error.msg}); every line must hold one whole JSON object"
        ) from error
    except RecursionError as error:
        raise invalid(f"{place}: the JSON is nested too deeply") from error
    if not isinstance(value, tuple):
        raise invalid(f"{place}: must be a JSON object: one in every line, and no list around them")
    return value


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)


def _members(pairs: Sequence[tuple[str, object]], fields: Fields, place: str) -> dict[str, object]:
    row = {}
    for field, setting in fields.items():
        values = [value for name, value in pairs if name == field]
        if not values:
            there = listed(name for name, _ in pairs)
            raise invalid(f"{place}: field {field!r} is missing (set {setting}); fields there: {there}")
        if len(values) > 1:
            raise invalid(f"{place}: field {field!r} occurs {len(values)} times: keep one")
        row[field] = _known(values[0], field, place)
    return row


def _csv_rows(path: Path, fields: Fields) -> Iterator[Row]:
    with _opened(path, newline="") as file:
        records = _records(path, file)
        place, header = next(records, ("", []))
        if not header:
            return
        columns = _columns(header, fields, place)
        for place, cells in records:
            if any(cells[len(header) :]):  # a comma at the end is no cell
                raise invalid(
                    f"{place} has {len(cells)} cells, the header {len(header)}: put texts that contain commas "
                    "into double quotes"
                )
            yield place, {field: _cell(cells, index, field, place) for field, index in columns.items()}


def _csv_records(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    with _opened(path, newline="") as file:
        header = next(_records(path, file), ("", []))[1]
    if header:
        there = {field: field for field in fields if field in header}
        for place, row in _csv_rows(path, there):
            yield Record(place, row, header)


def _records(path: Path, file: TextIO) -> Iterator[tuple[str, list[str]]]:
    """Every record that is not empty, with the place of its first line."""
    reader = csv.reader(_sound_lines(path, file), strict=True)
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise invalid(
                f"{place}: its quotes do not match ({error}); inside of a quoted text write each quote twice"
            ) from error
        if cells:
            yield place, cells


def _columns(header: Sequence[str], fields: Fields, place: str) -> dict[str, int]:
    """Index of every field's column. Other columns may have any name, or none, as pandas' index has."""
    for field, setting in fields.items():
        count = header.count(field)
        if count > 1:
            raise invalid(f"{place}: {count} columns are named {field!r}: rename all but one")
        if not count:
            alone = len(header) == 1 and any(mark in header[0] for mark in ";\t|")
            hint = "; cells must be separated by commas" if alone else ""
            there = listed(header)
            raise invalid(f"{place}: no column is named {field!r} (set {setting}); columns: {there}{hint}")
    return {field: header.index(field) for field in fields}


def _cell(cells: Sequence[str], index: int, field: str, place: str) -> str:
    if index >= len(cells):
        raise invalid(f"{place} has no {field!r}: it has fewer cells than the header")
    return cells[index]


def _opened(path: Path, newline: str | None) -> TextIO:
    """The file as text: in the encoding that its byte order mark names, or in UTF-8."""
    with path.open("rb") as file:
        start = file.read(len(codecs.BOM_UTF32_LE))
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
    return path.open(encoding=encoding, errors="surrogateescape", newline=newline)


def _sound_lines(path: Path, file: TextIO) -> Iterator[str]:
    """The lines; refuses bytes that are no text, in the line that they are in."""
    number = 1
    try:
        for line in file:
            place = f"{path}, line {number}"
            if "\0" in line:
                raise invalid(f"{place} holds NUL bytes: save the file as UTF-8")
            if not line.isascii() and any("\ud800" <= character <= "\udfff" for character in line):
                raise invalid(f"{place} is not {file.encoding.upper()}: save the file as UTF-8")
            yield line
            number += 1
    except UnicodeError as error:
        raise invalid(f"{path}, line {number} or soon after, is not {file.encoding.upper()}") from error


# Parquet


def _parquet_rows(path: Path, fields: Fields) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _columns(schema.names, fields, str(path))
            for field in fields:
                _check_type(schema.field(field).type, field, path)
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(fields)):
                columns = {field: _values(batch.column(field), field, path, number) for field in fields}
                for values in zip(*columns.values(), strict=True):
                    number += 1
                    place = f"{path}, row {number}"
                    yield (
                        place,
                        {f: _known(v, f, place) for f, v in zip(columns, values, strict=True)},
                    )
    except pa.ArrowException as error:
        raise invalid(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def _parquet_records(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            there = [field for field in fields if field in names]
            _columns(names, {field: field for field in there}, str(path))
            for batch in file.iter_batches(_PARQUET_ROWS, columns=there):
                columns = [batch.column(field) for field in there]
                for index in range(batch.num_rows):
                    number += 1
                    values = {f: _as_json(c[index].as_py()) for f, c in zip(there, columns, strict=True)}
                    yield Record(f"{path}, row {number}", values, names)
    except UnicodeDecodeError as error:
        raise invalid(f"{path}, row {number} is not UTF-8") from error
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise invalid(f"{path} is not readable behind row {number}: {first_line(error)}") from error


def _as_json(value: object) -> object:
    """A list of structs as JSON has it: objects are pairs. Arrow's maps are not objects, and come as lists."""
    if isinstance(value, list):
        return [
            tuple(e.items()) if isinstance(e, dict) else list(e) if isinstance(e, tuple) else e for e in value
        ]
    return tuple(value.items()) if isinstance(value, dict) else value


def _check_type(kind: Any, field: str, path: Path) -> None:  # noqa: ANN401 - pyarrow is untyped
    """Refuses what is neither text nor number; nulls are named by their row."""
    types = pa.types
    inner = kind.value_type if types.is_dictionary(kind) else kind
    plain = (types.is_string, types.is_large_string, types.is_string_view)
    scalar = (types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    if not any(test(inner) for test in (*plain, *scalar)):
        raise invalid(f"{path}: column {field!r} holds {kind}: store it as text")


def _values(column: Any, field: str, path: Path, before: int) -> list[object]:  # noqa: ANN401 - pyarrow is untyped
    """A batch's values. Arrow reads texts without a look at their bytes, so they may be no UTF-8."""
    try:
        values: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        for number, value in enumerate(column, start=before + 1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise invalid(f"{path}, row {number}: {field!r} is not UTF-8") from error
        raise
    return values


def _known(value: object, field: str, place: str) -> object:
    if value is None:
        raise invalid(f"{place}: {field!r} is null")
    return value


def first_line(error: BaseException) -> str:
    """What an exception says first, with its kind where that is but a name."""
    said, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if said.endswith(":") and more:
        said = f"{said} {more[0]}"
    return said if " " in said else f"{type(error).__name__} {said}".strip()


_READERS: Final = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
_RECORDS: Final = {".jsonl": _jsonl_records, ".csv": _csv_records, ".parquet": _parquet_records}
