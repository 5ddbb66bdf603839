"""In processes of their own: what is taken cannot be given back."""

import subprocess
import sys

import pytest

NOBODY = 65534

CHILD = """
import ctypes, os, resource, sys
from shelora.ckks.evaluator import Evaluator
from shelora.ckks.parameters import INSECURE_TOY
from shelora.ckks.secret import SecretKey
from shelora.private_memory import keep_memory_private

if sys.argv[1] == "private":
    keep_memory_private()
assert resource.getrlimit(resource.RLIMIT_CORE) == ((0, 0) if sys.argv[1] == "private" else (4096, 4096))
if os.getuid() == 0:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    ctypes.CDLL(None).prctl(4, int(sys.argv[1] != "private"), 0, 0, 0)  # changing the user has reset it
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)
SecretKey.generate(INSECURE_TOY)  # SEAL reads its files by /proc/self/fd, which must go on
pid = os.fork()
if pid == 0:
    os.abort()
_, status = os.waitpid(pid, 0)
print(os.WCOREDUMP(status))
""".replace("NOBODY", str(NOBODY))


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(("mode", "dumpable"), [("open", "1"), ("private", "0")])
def test_a_process_with_keys_leaves_no_core_and_goes_on(mode, dumpable):
    """`open` is the control: without it the process can be dumped."""
    limited = ["prlimit", "--core=4096:4096", sys.executable, "-c", CHILD, mode]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    shown, dumped = done.stdout.split()
    assert shown == dumpable
    if mode == "private":
        assert dumped == "False"
