"""Named arrays as bytes: what workers that share a shard tell each other. numpy's own format, without pickle."""

import io
from collections.abc import Mapping
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from shelora.errors import DomainError, Reason

Arrays = Mapping[str, NDArray[Any]]


def pack(arrays: Arrays) -> bytes:
    """The arrays as one string of bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(data: bytes) -> dict[str, NDArray[Any]]:
    """What `pack` was given. Raises SHARD_MALFORMED for anything else."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, BadZipFile, KeyError, NotImplementedError) as error:
        raise DomainError(
            Reason.SHARD_MALFORMED, "what another worker stored of a sum cannot be read"
        ) from error


def found(arrays: Arrays, name: str) -> NDArray[Any]:
    """The array of that name. Raises SHARD_MALFORMED if there is none."""
    try:
        return arrays[name]
    except KeyError:
        raise DomainError(Reason.SHARD_MALFORMED, f"a partial sum lacks {name!r}") from None


def taken(arrays: Arrays, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The array of that name. Raises SHARD_MALFORMED; SHAPE_MISMATCH unless it is float64 of that shape, finite."""
    array = found(arrays, name)
    if array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
        raise DomainError(Reason.SHAPE_MISMATCH, f"{name!r} of a partial sum is not float64 of shape {shape}")
    return array
