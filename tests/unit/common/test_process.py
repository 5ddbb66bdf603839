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


def ended(thread: str) -> subprocess.CompletedProcess[str]:
    """A server process to its end, whose cancelled work is still at `thread` then."""
    program = (
        "import asyncio, threading, time\n"
        "from services.common.process import run_process\n"
        "from services.common.settings import ServerSettings\n"
        "async def main(settings):\n"
        "    begun = threading.Event()\n"
        f"    work = asyncio.create_task(asyncio.to_thread(lambda: (begun.set(), {thread})))\n"
        "    while not begun.is_set():\n"
        "        await asyncio.sleep(0.01)\n"
        "    work.cancel()\n"
        "run_process('coordinator', lambda: ServerSettings(listen='127.0.0.1:0', log_json=True), main)\n"
        "print('returned')"
    )
    return subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120
    )


def test_a_server_ends_although_a_name_is_still_being_resolved():
    """Without a name server that takes longer than the grace: a coordinator without Redis was killed (137)."""
    done = ended("time.sleep(600)")
    assert done.returncode == 0, done.stderr
    assert "threads_left" in done.stdout + done.stderr
    assert "returned" not in done.stdout


def test_a_server_waits_for_threads_that_end():
    done = ended("(time.sleep(0.2), print('whole', flush=True))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["whole", "returned"]


def test_every_server_leaves_no_core_dump():
    done = ended(
        "print('limits', __import__('resource').getrlimit(__import__('resource').RLIMIT_CORE), flush=True)"
    )
    assert "limits (0, 0)" in done.stdout, done.stderr
