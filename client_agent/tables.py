"""Rows of JSON, CSV, Parquet and Arrow files: the named fields alone, whatever else a file holds.

What cannot be read is refused with the file, the line (row of a Parquet file, from 1), the field and the remedy.
"""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from client_agent.access import denied
from client_agent.config import suffix_of
from client_agent.sources import files_of, format_of, invalid, opened

Fields: TypeAlias = Mapping[str, str]
"""What to read: the setting that names a field, by the field's name in the file."""
_Pairs: TypeAlias = tuple[tuple[str, object], ...]
"""A JSON object, so that repeated names are seen."""
Row: TypeAlias = tuple[str, Mapping[str, object]]
"""A row's place in words, and the value of every named field: never None, for a null is refused."""

MOST_SHOWN: Final = 20
"""Names that an error lists."""
MOST_CHARACTERS: Final = 60
"""Characters of a name or value that an error shows."""
_ARROW_ROWS: Final = 64
"""Rows of a Parquet file held at once."""
_PIECE: Final = 2**16
"""Characters read at once where lines say nothing."""
LONGEST_RECORD: Final = 2**24
"""Characters of one record, so of one text: what is longer has no line breaks, a quote that nobody closed, or is made
to fill the memory."""
_LONGEST_INTEGER: Final = 300
"""Digits of an integer in JSON; more are beyond every float, and take quadratic time to convert."""
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, and the encodings they stand for."""
csv.field_size_limit(LONGEST_RECORD)  # texts are cut to the federation's max_tokens later
_BLANKS: Final = re.compile(r"\s*")


def read_rows(path: Path, fields: Fields) -> Iterator[Row]:
    """Every row of the files that the path stands for, read as it is asked for. Raises: DomainError DATA_INVALID."""
    for file in _files(path):
        with _readable(file):
            yield from _READERS[format_of(file)](file, fields)


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
    for file in _files(path):
        with _readable(file):
            yield from _RECORDS[format_of(file)](file, fields)


def _files(path: Path) -> list[Path]:
    with _readable(path):
        return files_of(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise invalid(denied(error.filename or path)) from error
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else first_line(error)
        raise invalid(f"{path} cannot be read: {why}") from error


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


# Text files


def _json_rows(path: Path, fields: Fields) -> Iterator[Row]:
    for place, pairs in _objects(path):
        yield place, _members(pairs, fields, place)


def _json_records(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    for place, pairs in _objects(path):
        names = [name for name, _ in pairs]
        for field in fields:
            if names.count(field) > 1:
                raise invalid(f"{place}: field {field!r} occurs {names.count(field)} times: keep one")
        yield Record(place, {name: value for name, value in pairs if name in fields}, names)


def _objects(path: Path) -> Iterator[tuple[str, _Pairs]]:
    """The JSON objects of a file with their places: one a line, or, in .json, those of one list."""
    if suffix_of(path)[0] == ".json" and _begins_list(path):
        with _opened(path, newline=None) as file:
            yield from _Listed(path, _sound(path, file, iter(lambda: file.read(_PIECE), ""))).objects()
        return
    with _opened(path, newline=None) as file:
        lines = _Lines(path, file)
        for line in lines:
            if line.strip():
                yield lines.place, _parsed(line.rstrip("\n"), lines.place)
            lines.begin()


def _begins_list(path: Path) -> bool:
    with _opened(path, newline=None) as file:
        while piece := file.read(_PIECE):
            if piece.strip():
                return piece.lstrip().startswith("[")
    return False


class _Listed:
    """The objects of one list of JSON, read as they are asked for, however the list is broken into lines."""

    def __init__(self, path: Path, pieces: Iterator[str]) -> None:
        self._path, self._pieces = path, pieces
        self._decoder = json.JSONDecoder(object_pairs_hook=tuple, parse_int=_integer)
        self._text, self._at = "", 0
        self._line = 1

    def objects(self) -> Iterator[tuple[str, _Pairs]]:
        """Each with its place. Raises: DATA_INVALID."""
        self._peek()
        self._move(1)
        while self._peek() != "]":
            place = self._place
            value = self._value()
            if not isinstance(value, tuple):
                raise invalid(f"{place}: the file's list must hold only JSON objects")
            yield place, value
            if self._peek() not in {",", "]"}:
                raise invalid(f"{self._place}: a comma or the list's end must follow here")
            if self._peek() == ",":
                self._move(1)
        self._move(1)
        if self._peek():
            raise invalid(f"{self._place}: something follows the end of the list")

    @property
    def _place(self) -> str:
        return f"{self._path}, line {self._line}"

    def _peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            if blanks := _BLANKS.match(self._text, self._at):
                self._move(blanks.end() - self._at)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _value(self) -> object:
        """The value that begins here. Doubles what it has read until the value is whole."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                left = len(self._text) - self._at
                while len(self._text) - self._at <= 2 * left and self._more():
                    pass
                if left == len(self._text) - self._at or left > LONGEST_RECORD:
                    raise invalid(
                        f"{self._place}: not valid JSON ({error.msg}) in the record that begins there"
                    ) from error
            except RecursionError as error:
                raise invalid(f"{self._place}: the JSON is nested too deeply") from error
            else:
                self._move(end - self._at)
                return value

    def _move(self, count: int) -> None:
        self._line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def _more(self) -> bool:
        piece = next(self._pieces, "")
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)


def _parsed(line: str, place: str) -> _Pairs:
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
            if any(cells[len(header) :]):  # a comma at the end is not a cell
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
    tabs = suffix_of(path)[0] == ".tsv"
    lines = _Lines(path, file)
    reader = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    while True:
        place = lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise invalid(
                f"{place}: its quotes do not match ({error}); separate cells by {'tabs' if tabs else 'commas'}, and "
                "inside of a quoted text write each quote twice"
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


@contextmanager
def _opened(path: Path, newline: str | None) -> Iterator[TextIO]:
    """The file as text, unpacked: in the encoding that its byte order mark names, or in UTF-8."""
    with opened(path) as file:
        start = file.read(len(codecs.BOM_UTF32_LE))
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
    with (
        opened(path) as file,
        io.TextIOWrapper(file, encoding=encoding, errors="surrogateescape", newline=newline) as text,
    ):
        yield text


class _Lines:
    """The lines of a file, in records of one or more; refuses a record that is too long before it is read whole."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path = path
        self._pieces = _sound(path, file, iter(lambda: file.readline(LONGEST_RECORD + 1), ""))
        self._read, self._characters = 0, 0
        self.place = self.begin()

    def begin(self) -> str:
        """Says that a record begins with the next line; its place."""
        self.place, self._characters = f"{self._path}, line {self._read + 1}", 0
        return self.place

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Raises: DATA_INVALID."""
        line = next(self._pieces)
        self._read += 1
        self._characters += len(line)
        if self._characters > LONGEST_RECORD:
            raise invalid(
                f"{self.place}: the record that begins there has more than {LONGEST_RECORD:,} characters: break its "
                "text up, or close its quotes"
            )
        return line


def _sound(path: Path, file: TextIO, pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of the file, such as its lines; refuses bytes that are not text, in the line that they are in."""
    number = 1
    try:
        for piece in pieces:
            torn = not piece.isascii() and any("\ud800" <= character <= "\udfff" for character in piece)
            if torn or "\0" in piece:
                bad = next(i for i, c in enumerate(piece) if c == "\0" or "\ud800" <= c <= "\udfff")
                place = f"{path}, line {number + piece.count(chr(10), 0, bad)}"
                why = "holds NUL bytes" if piece[bad] == "\0" else f"is not {file.encoding.upper()}"
                raise invalid(f"{place} {why}: save the file as UTF-8")
            yield piece
            number += piece.count("\n")
    except UnicodeError as error:
        raise invalid(f"{path}, line {number} or soon after, is not {file.encoding.upper()}") from error


# Parquet and Arrow


@contextmanager
def _columns_of(path: Path) -> Iterator[tuple[Any, Callable[[Sequence[str]], Iterator[Any]]]]:
    """The schema, and what gives batches of some columns. Raises: DATA_INVALID, also while they are looked at."""
    try:
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path) as file:
                yield file.schema_arrow, lambda names: file.iter_batches(_ARROW_ROWS, columns=list(names))
            return
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            yield stream.schema, lambda names: (batch.select(list(names)) for batch in stream)
    except (
        pa.ArrowException,
        ValueError,
        OverflowError,
        KeyError,
    ) as error:  # of names that are no UTF-8, too
        raise invalid(f"{path} is not a readable {_kind(path)} file: {first_line(error)}") from error


def _kind(path: Path) -> str:
    return "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"


def _arrow_rows(path: Path, fields: Fields) -> Iterator[Row]:
    number = 0
    with _columns_of(path) as (schema, batches):
        _columns(schema.names, fields, str(path))
        for field in fields:
            _check_type(schema.field(field).type, field, path)
        for batch in batches(list(fields)):
            columns = {field: _values(batch.column(field), field, path, number) for field in fields}
            for values in zip(*columns.values(), strict=True):
                number += 1
                place = f"{path}, row {number}"
                yield place, {f: _known(v, f, place) for f, v in zip(columns, values, strict=True)}


def _arrow_records(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    number = 0
    with _columns_of(path) as (schema, batches):
        names = schema.names
        there = [field for field in fields if field in names]
        _columns(names, {field: field for field in there}, str(path))
        for batch in batches(there):
            columns = [batch.column(field) for field in there]
            for index in range(batch.num_rows):
                number += 1
                with _sound_row(path, number):
                    values = {f: _as_json(c[index].as_py()) for f, c in zip(there, columns, strict=True)}
                yield Record(f"{path}, row {number}", values, names)


@contextmanager
def _sound_row(path: Path, number: int) -> Iterator[None]:
    """What is not a value of its type is found when it is looked at."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise invalid(f"{path}, row {number} is not UTF-8") from error
    except (ValueError, OverflowError) as error:
        raise invalid(f"{path}, row {number} is not readable: {first_line(error)}") from error


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


_READERS: Final = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _arrow_rows,
    ".arrow": _arrow_rows,
}
_RECORDS: Final = {
    ".jsonl": _json_records,
    ".json": _json_records,
    ".csv": _csv_records,
    ".tsv": _csv_records,
    ".parquet": _arrow_records,
    ".arrow": _arrow_records,
}
