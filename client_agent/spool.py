"""Examples that are read once and looked at again and again: in memory while they are few, else in a mapped file.

The file is Arrow's stream format without a name: nobody else can open it, and it is gone when its process is, whatever
ended that. What is looked at is paged in by the operating system and paged out again, so that memory does not grow with
the data.
"""

import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, overload

import pyarrow as pa

from shelora.errors import DomainError, Reason

MEMORY_BYTES: Final = 64 * 2**20
"""Bytes of examples that are kept in memory."""
_BATCH_BYTES: Final = 2**20
_FIELD: Final = "example"

_T = TypeVar("_T")


class ExampleSpool(Generic[_T]):
    """Takes examples one after the other, then hands them out as a sequence.

    Args:
        folder: Where the file would lie; None for the system's folder of temporary files.
        encode: An example as text without lone surrogates.
        decode: The example of that text.
        memory_bytes: Bytes to keep in memory.
    """

    def __init__(
        self,
        folder: Path | None,
        encode: Callable[[_T], str],
        decode: Callable[[str], _T],
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._folder = folder if folder is not None and folder.is_dir() else None
        self._encode, self._decode = encode, decode
        self._left = memory_bytes
        self._held: list[_T] = []
        self._file: _File | None = None

    def add(self, example: _T) -> None:
        """Raises: DISK_UNAVAILABLE if there is no room for the file."""
        if self._file is not None:
            self._file.add(self._encode(example))
            return
        self._held.append(example)
        self._left -= len(self._encode(example))
        if self._left < 0:
            self._file = _File(self._folder)
            for one in self._held:
                self._file.add(self._encode(one))
            self._held.clear()

    def done(self) -> Sequence[_T]:
        """All of them, in order. Nothing is added afterwards."""
        return tuple(self._held) if self._file is None else _Mapped(self._file.column(), self._decode)


class _File:
    """A nameless file of texts."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - mapped as long as it is used
        except OSError as error:
            raise self._full(error) from error
        self._schema = pa.schema([pa.field(_FIELD, pa.large_string(), nullable=False)])
        self._writer = pa.ipc.new_stream(pa.PythonFile(self._file, mode="w"), self._schema)
        self._pending: list[str] = []
        self._bytes = 0

    def add(self, text: str) -> None:
        self._pending.append(text)
        self._bytes += len(text)
        if self._bytes >= _BATCH_BYTES:
            self._write()

    def column(self) -> Any:  # noqa: ANN401 - pyarrow is untyped
        self._write()
        try:
            self._writer.close()
            self._file.flush()
        except OSError as error:
            raise self._full(error) from error
        with self._file:  # the map keeps it open
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all().column(_FIELD)

    def _write(self) -> None:
        batch = pa.record_batch([pa.array(self._pending, pa.large_string())], schema=self._schema)
        try:
            self._writer.write_batch(batch)
        except OSError as error:
            raise self._full(error) from error
        self._pending.clear()
        self._bytes = 0

    def _full(self, error: OSError) -> DomainError:
        place = self._folder or tempfile.gettempdir()
        return DomainError(
            Reason.DISK_UNAVAILABLE,
            f"the examples do not fit in memory, and not in {place} either: {error.strerror or error}; make room, or "
            "set data.cache_dir to a folder on a larger disk",
        )


class _Mapped(Sequence[_T]):
    """Examples in a mapped file, decoded when they are asked for."""

    def __init__(self, column: Any, decode: Callable[[str], _T]) -> None:  # noqa: ANN401
        self._column, self._decode = column, decode

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[_T, ...]: ...
    def __getitem__(self, index: int | slice) -> _T | tuple[_T, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._decode(self._column[index].as_py())

    def __iter__(self) -> Iterator[_T]:
        for chunk in self._column.iterchunks():
            yield from map(self._decode, chunk.to_pylist())
