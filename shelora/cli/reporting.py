"""How the operator's commands end when they are refused."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from shelora.errors import DomainError


@contextmanager
def reported() -> Iterator[None]:
    """Shows a DomainError as one message and exits with 1."""
    try:
        yield
    except DomainError as error:
        Console(stderr=True).print(
            f"[red]{error.reason}[/red] {error.message}", highlight=False, soft_wrap=True
        )
        sys.exit(1)
