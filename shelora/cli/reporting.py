"""How the operator's commands end when they are refused."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from shelora.errors import DomainError, Reason
from shelora.exits import exit_code
from shelora.terminal import Terminal


@contextmanager
def reported() -> Iterator[None]:
    """Shows a DomainError as one message and exits as `shelora.exits` says; so it does where a named file fails."""
    try:
        yield
    except DomainError as error:
        _end(error)
    except OSError as error:
        if error.filename is None:
            raise
        _end(DomainError(Reason.CONFIGURATION_INVALID, f"{error.filename}: {error.strerror}"))


def _end(error: DomainError) -> NoReturn:
    Terminal(stderr=True).refuse(error)
    sys.exit(exit_code(error))
