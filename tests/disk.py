"""A disk that is full, as far as a process without privileges can be made to see one."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Real writes of this process fail beyond `size` bytes of a file, the last one short, with EFBIG for ENOSPC.

    That goes for what it prints, too, which pytest keeps in a file: capture its logs inside.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
