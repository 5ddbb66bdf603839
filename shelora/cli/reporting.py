"""How the operator's commands end when they are refused."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from shelora.errors import DomainError
from shelora.terminal import Terminal


@contextmanager
def reported() -> Iterator[None]:
    """Shows a DomainError as one message and exits with 1."""
    try:
        yield
    except DomainError as error:
        Terminal(stderr=True).refuse(error)
        sys.exit(1)
