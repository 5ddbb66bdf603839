import resource
import subprocess
import sys

from services.common.process import OPEN_FILES


def test_a_server_asks_for_as_many_connections_as_it_may_have():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    program = (
        "import resource; from services.common.process import allow_many_connections\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "allow_many_connections()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(done.stdout) == (OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES))
