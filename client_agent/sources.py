"""The files that `data.train` or `data.test` stands for, and how each is opened."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import zstandard

from client_agent.config import is_pattern, suffix_of, unsupported_name
from shelora.errors import DomainError, Reason
from shelora.text import printable

SAMPLE_BYTES: Final = 4096
_PIECE_BYTES: Final = 2**10
"""Packed bytes unpacked at once: they may stand for 30 000 times as many."""
PARQUET: Final = b"PAR1"
_STATE: Final = "state.json"
_SPLITS: Final = "dataset_dict.json"
_INFO: Final = "dataset_info.json"
_ZIP: Final = b"PK\x03\x04"


def invalid(message: str) -> DomainError:
    """A DATA_INVALID error, in one line whatever is in the names of files."""
    return DomainError(Reason.DATA_INVALID, printable(message))


class _Zstd(io.RawIOBase):
    """Unpacks frames one after the other. zstandard's own reader takes a file that is cut for one that ends there."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - as io has it
        while not self._ready:
            packed = self._file.read(_PIECE_BYTES)
            if not packed:
                if not self._frame.eof:
                    raise EOFError("it ends too soon")
                return 0
            self._ready = b"".join(self._unpacked(packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _unpacked(self, packed: bytes) -> Iterator[bytes]:
        while packed:
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            yield self._frame.decompress(packed)
            packed = self._frame.unused_data if self._frame.eof else b""


_PACKED: Final[Mapping[bytes, tuple[str, Callable[[IO[bytes]], Any]]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ": ("xz", lzma.LZMAFile),
    b"\x28\xb5\x2f\xfd": ("zstd", lambda file: io.BufferedReader(_Zstd(file))),
}
"""How compressed files begin, and what unpacks them. Those of Parquet are compressed inside."""
_BROKEN: Final = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile)


def files_of(path: Path) -> list[Path]:
    """The file itself; the shards of a folder or a pattern, in order of their names; a saved dataset's.

    Raises: OSError; DATA_INVALID if there is none.
    """
    if is_pattern(path) and not path.exists():
        named = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        found = sorted(p for p in named if p.is_file() and not p.name.startswith("."))
        if not found:
            raise invalid(f"{path}: no file has such a name")
        return found
    if not path.is_dir():
        if path.exists() and not path.is_file():
            raise invalid(f"{path} is a device, a pipe or a socket: copy what it holds into a file")
        return [path]
    if (path / _SPLITS).is_file():
        raise invalid(f"{path} is a saved dataset of several splits: name the folder of one of them")
    if (path / _STATE).is_file() and (path / _INFO).is_file():
        return _saved(path)
    found = sorted(p for p in path.rglob("*") if p.is_file() and _is_shard(p, path))
    if not found:
        raise invalid(f"{path} holds no file that can be read: {unsupported_name(Path('a.b'))}")
    return found


def format_of(path: Path) -> str:
    """The suffix that names the format: `.jsonl` of `a.jsonl.gz`. Raises: OSError, DATA_INVALID."""
    suffix, packed = suffix_of(path)
    if suffix == ".arrow":
        return suffix
    if why := unsupported_name(path):
        raise invalid(f"{path}: {why}")
    with path.open("rb") as file:
        start = file.read(SAMPLE_BYTES)
    if start.startswith(_ZIP):
        raise invalid(f"{path} is an archive (zip): unpack it first")
    if packed and not _packing(start) and start:
        raise invalid(f"{path} is not compressed, although its name says so: rename it")
    if start.startswith(PARQUET) and suffix != ".parquet":
        raise invalid(f"{path} is a Parquet file: let its name end in .parquet")
    return suffix


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked. Raises: OSError; DATA_INVALID while they are read, if they cannot be unpacked."""
    with path.open("rb") as file:
        packing = _packing(file.read(SAMPLE_BYTES))
        file.seek(0)
        if packing is None:
            yield file
            return
        kind, unpack = packing
        try:
            with unpack(file) as unpacked:
                yield unpacked
        except _BROKEN as error:
            raise invalid(f"{path} cannot be unpacked with {kind}: {error}: is it whole?") from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise invalid(f"{path} cannot be unpacked with {kind}: {error}") from error


def _packing(start: bytes) -> tuple[str, Callable[[IO[bytes]], Any]] | None:
    return next((how for magic, how in _PACKED.items() if start.startswith(magic)), None)


def _is_shard(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return not hidden and bool(suffix_of(path)[0]) and not unsupported_name(path)


def _saved(folder: Path) -> list[Path]:
    """The files of what `Dataset.save_to_disk` wrote."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise invalid(f"{folder / _STATE} is not that of a saved dataset: save it again") from error
