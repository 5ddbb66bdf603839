"""Keeps the memory of a process that holds keys out of core dumps and out of other processes of its user.

A crash would leave the keys on a disk, or with a crash reporter; a debugger of the same user could read them. Python
cannot wipe keys, so this is what can be done. Root can read them all the same.
"""

import ctypes
import resource
import sys
from typing import Final

import structlog

_PR_SET_DUMPABLE: Final = 4
"""From linux/prctl.h. Also makes `/proc/PID/mem` and ptrace root's alone."""

_log = structlog.get_logger(__name__)


def keep_memory_private() -> None:
    """For this process and what it forks; a program that it executes must call it again. Never raises."""
    try:
        _give_up_dumps()
    except (OSError, ValueError, AttributeError) as error:
        _log.warning("memory_not_private", why=str(error))


def _give_up_dumps() -> None:
    """For good: a process cannot take this back."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError("prctl refused")
