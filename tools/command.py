"""The command line of a tool that writes files, or verifies that they are what it would write."""

import sys
from collections.abc import Callable
from typing import NoReturn


def write_or_verify(usage: str | None, write: Callable[[], None], differing: Callable[[], str]) -> NoReturn:
    """Ends the process: 0, or 1 if files differ.

    Args:
        usage: Printed for any other command line.
        write: Replaces the files.
        differing: What is wrong with them and what to do, "" for nothing.
    """
    match sys.argv[1:]:
        case ["write"]:
            write()
            sys.exit(0)
        case ["verify"]:
            wrong = differing()
            sys.exit(wrong or 0)
        case _:
            sys.exit(usage)
