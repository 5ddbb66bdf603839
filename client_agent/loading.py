"""Whether packages with native code load on this device: a build for another processor kills the process."""

import atexit
import gc
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from shelora.errors import DomainError, Reason

NATIVE: Final = ("numpy", "pyarrow", "tenseal", "torch")
"""Each may lack a build for some processors, or need libraries that are not there."""


def check_loading(packages: Sequence[str] = NATIVE) -> None:
    """Loads each in a process of its own. Raises: DomainError PACKAGE_UNUSABLE, with what killed it."""
    for package in packages:
        command = [sys.executable, "-c", f"import {package}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own arguments
        if done.returncode:
            raise unusable(package, _cause(done.returncode, done.stderr))


def require_temporary_folder() -> None:
    """Torch wants one as it is loaded, and examples that are many. Raises: DISK_UNAVAILABLE, with the remedy."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise DomainError(
            Reason.DISK_UNAVAILABLE,
            "no folder for temporary files can be written (TMPDIR, /tmp, /var/tmp, the current folder): make room, or "
            "set TMPDIR to a folder that can",
        ) from error


@contextmanager
def uncollected() -> Iterator[None]:
    """Turns the garbage collector off while torch and transformers are imported, and at exit.

    They make hundreds of thousands of objects that live as long as the process. Collections would visit all of them
    again and again, a fifth of the time of the import, and once more before the interpreter exits, for a second.
    """
    atexit.register(gc.freeze)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def unusable(package: str, why: str) -> DomainError:
    """PACKAGE_UNUSABLE, with the remedy."""
    return DomainError(
        Reason.PACKAGE_UNUSABLE,
        f"{package} cannot be loaded on this device: {why}; install the agent anew with a build of {package} for this "
        "processor, with all libraries that it needs (deploy/edge/README.md)",
    )


def _cause(code: int, stderr: str) -> str:
    """The signal it died of (SIGILL: the processor lacks an instruction), or the last line of its traceback."""
    if code < 0:
        return f"loading it ends with {signal.Signals(-code).name}"
    return (stderr.strip().splitlines() or [f"exit code {code}"])[-1]
