"""How the operator's commands end when they are refused."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from shelora.errors import DomainError
from shelora.exits import exit_code
from shelora.terminal import Terminal


@contextmanager
def reported() -> Iterator[None]:
    """Shows a DomainError as one message and exits as `shelora.exits` says."""
    try:
        yield
    except DomainError as error:
        Terminal(stderr=True).refuse(error)
        sys.exit(exit_code(error))
