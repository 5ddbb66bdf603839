"""The operator's command line, as a person uses it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

SHELORA = [sys.executable, "-m", "shelora.cli.main"]
REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_S = 180
FOLDER = "local [v2]"
"""Of the cluster: rich would take the brackets for markup."""


def started(folder: Path, stack: ExitStack) -> subprocess.Popen[str]:
    """`shelora up`, in a folder that has packages of its own named as ours; stopped with the stack."""
    home = folder / "home"
    for name in ("coordinator", "services", "client_agent"):
        (home / name).mkdir(parents=True, exist_ok=True)
        (home / name / "__init__.py").write_text("raise ImportError('somebody else wrote this one')\n")
    process = subprocess.Popen(
        [*SHELORA, "up", "--any-ports", "--folder", str(folder / FOLDER), "--workers", "1"],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    stack.enter_context(process)
    stack.callback(process.terminate)
    return process


def until_it_serves(process: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (folder / FOLDER / "cluster.json").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def up(tmp_path: Path, hangup_is_heard: None) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts `shelora up` in the test's own folder."""
    with ExitStack() as stack:
        yield lambda: started(tmp_path, stack)


@pytest.fixture
def running_up(tmp_path: Path, up: Callable[[], subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """`shelora up` in the test's own folder, ready to serve."""
    process = up()
    until_it_serves(process, tmp_path)
    return process


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a `shelora up` runs for all tests that leave it in order."""
    folder = tmp_path_factory.mktemp("shared")
    with ExitStack() as stack:
        until_it_serves(started(folder, stack), folder)
        yield folder


def addresses(folder: Path) -> dict:
    return json.loads((folder / FOLDER / "cluster.json").read_text())


def shelora(
    *arguments: str, at: dict, columns: int = 160, **environment: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "SHELORA_COORDINATOR": at["coordinator"],
        "SHELORA_KEY_AUTHORITY": at["key_authority"],
        "SHELORA_IDENTITY": at["operator_identity"],
        "COLUMNS": str(columns),
        **environment,
    }
    return subprocess.run(
        [*SHELORA, *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP], ids=["ctrl-c", "terminal-closed"])
def test_up_stops_every_process_it_started(running_up, tmp_path, stop):
    started = psutil.Process(running_up.pid).children(recursive=True)
    assert len(started) >= 4
    running_up.send_signal(stop)
    running_up.send_signal(stop)  # closing a terminal sends two
    output, _ = running_up.communicate(timeout=60)
    assert running_up.returncode == 0, output
    assert "starting key-authority\n" in output  # progress into a pipe
    assert FOLDER in output
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
    assert not (tmp_path / FOLDER / "cluster.json").exists()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_what_a_killed_up_started_ends_in_order_before_another_starts_there(running_up, up, tmp_path):
    started = psutil.Process(running_up.pid).children(recursive=True)
    second = up()
    refused, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "CONFIGURATION_INVALID a cluster runs in" in refused
    assert f"started by process {running_up.pid}" in refused
    assert alive(started) == started
    running_up.kill()
    running_up.wait()
    third = up()
    assert third.stdout.readline().startswith("starting a cluster in")
    assert third.stdout.readline() == "waiting for the processes of a cluster that was killed\n"
    assert "starting redis" in third.stdout.readline()
    assert not alive(started)
    assert '"event": "draining"' in (tmp_path / FOLDER / "logs" / "coordinator.log").read_text()
    # A guardian can be killed as well; then the next one ends what is left.
    assert "starting key-authority" in third.stdout.readline()
    left = psutil.Process(third.pid).children(recursive=True)
    next(child for child in left if "shelora.cli.guardian" in child.cmdline()).kill()
    third.kill()
    third.wait()
    assert alive(left)
    fourth = up()
    assert fourth.stdout.readline().startswith("starting a cluster in")
    assert "starting redis" in fourth.stdout.readline()
    assert not alive(left)


def test_up_fails_with_the_log_of_a_server_that_dies(running_up, tmp_path):
    children = psutil.Process(running_up.pid).children()
    victim = next(child for child in children if "coordinator.main" in " ".join(child.cmdline()))
    victim.kill()
    output, _ = running_up.communicate(timeout=60)
    assert running_up.returncode == 1
    assert "coordinator exited with -9" in output
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_a_federation_is_created_started_shown_and_listed(cluster, tmp_path):
    at = addresses(cluster)
    created = shelora("federation", "create", "examples/reuters/federation.yaml", at=at)
    assert created.returncode == 0, created.stderr
    assert "created" in created.stdout
    again = shelora("federation", "create", "examples/reuters/federation.yaml", at=at)
    assert again.returncode == 0
    started = shelora("federation", "start", "reuters", at=at)
    assert "running" in started.stdout
    rotated = shelora("federation", "rotate", "reuters", at=at)
    assert rotated.returncode == 0, rotated.stderr
    assert "waiting for 4 agents" in shelora("federation", "show", "reuters", at=at).stdout
    assert "reuters" in shelora("status", at=at).stdout
    narrow = shelora("federation", "show", "reuters", at=at, columns=40, LC_ALL="C").stdout
    assert narrow.isascii()
    assert "waiting for 4 agents" in " ".join(narrow.split())
    assert max(map(len, narrow.splitlines())) <= 40


def test_a_federation_is_extended_stopped_exported_and_deleted_and_its_name_is_free(cluster, tmp_path):
    at, text = addresses(cluster), (REPOSITORY / "examples/reuters/federation.yaml").read_text()
    written, changed = tmp_path / "brief.yaml", tmp_path / "changed.yaml"
    written.write_text(text.replace("name: reuters", "name: brief"))
    changed.write_text(written.read_text().replace("deadline_s: 300", "deadline_s: 200"))
    create = ("federation", "create", str(written))
    shelora(*create, at=at)
    extended = shelora("federation", "extend", "brief", "--rounds", "2", at=at)
    assert extended.returncode == 0, extended.stderr
    assert "of 12" in " ".join(shelora("status", at=at).stdout.split())
    assert shelora("federation", "stop", "brief", at=at).returncode == 0
    assert "stopped" in shelora("federation", "show", "brief", "--watch", at=at).stdout
    over = shelora("federation", "extend", "brief", "--rounds", "1", at=at)
    assert over.returncode == 2
    assert "FEDERATION_CLOSED federation brief has failed and cannot go on" in over.stderr
    files = ("--to", str(tmp_path / "brief.json"), "--csv", str(tmp_path / "rounds.csv"))
    for code in (0, 2):
        assert shelora("federation", "export", "brief", *files, at=at).returncode == code
    report = ("federation", "report", "brief", "--output", str(tmp_path / "brief.html"))
    for code in (0, 2):
        assert shelora(*report, at=at).returncode == code
    assert "its operator stopped it before a round was published" in (tmp_path / "brief.html").read_text()
    exported = json.loads((tmp_path / "brief.json").read_text())["federation"]
    assert exported["failure"] == "its operator stopped it before a round was published"
    unasked = shelora("federation", "delete", "brief", at=at)
    assert unasked.returncode == 1
    assert "Nothing brings them back" in unasked.stdout
    assert "brief" in shelora("status", at=at).stdout
    deleted = shelora("federation", "delete", "brief", "--yes", at=at)
    assert deleted.returncode == 0, deleted.stderr
    assert "brief" not in shelora("status", at=at).stdout
    assert shelora("federation", "create", str(changed), at=at).returncode == 0


def test_mistakes_are_answered_with_the_reason(cluster, tmp_path):
    at = addresses(cluster)
    unknown = shelora("federation", "show", "nothing-there", at=at)
    assert unknown.returncode == 2
    assert "FEDERATION_UNKNOWN" in unknown.stderr
    wrong = tmp_path / "wrong.yaml"
    text = (REPOSITORY / "examples/reuters/federation.yaml").read_text()
    wrong.write_text(text.replace("min_updates: 3", "min_updates: 1"))
    refused = shelora("federation", "create", str(wrong), at=at)
    assert refused.returncode == 2
    assert "round.min_updates" in refused.stderr
    nobody = shelora("status", "--identity", str(tmp_path / "absent"), at=at)
    assert nobody.returncode == 2
    assert "CONFIGURATION_INVALID" in nobody.stderr
    assert "enrol first" in nobody.stderr


def test_a_token_makes_another_operator_and_only_once(cluster, tmp_path):
    at = addresses(cluster)
    token = shelora("token", "create", "--role", "operator", at=at)
    assert token.returncode == 0, token.stderr
    folder = tmp_path / "second"
    enrol = ["enroll", "--authority", at["enrolment"], "--token", token.stdout.strip(), "--identity"]
    enrolled = shelora(*enrol, str(folder), at=at)
    assert enrolled.returncode == 0, enrolled.stderr
    assert "enrolled as" in enrolled.stdout
    assert shelora("status", "--identity", str(folder), at=at).returncode == 0
    again = shelora(*enrol, str(tmp_path / "third"), at=at)
    assert again.returncode == 2
    assert "TOKEN_REFUSED" in again.stderr


def test_revoking_the_operators_says_how_they_come_back_asks_and_cuts_all_off(running_up, tmp_path):
    at = addresses(tmp_path)
    wrong = shelora("revoke", "reuters", at=at)
    assert wrong.returncode == 2
    assert "give FEDERATION and CLIENT" in wrong.stderr
    asked = shelora("revoke", "--role", "operator", at=at)
    assert asked.returncode == 1
    assert "--operator-token-file" in asked.stdout
    assert "nobody was revoked" in shelora("revocations", at=at).stdout
    revoked = shelora("revoke", "--role", "operator", "--yes", at=at)
    assert "revoked all certificates of the operator" in revoked.stdout, revoked.stderr
    refused = shelora("revocations", at=at)
    assert refused.returncode == 2
    assert "CERTIFICATE_REVOKED" in refused.stderr


def test_an_operator_that_stays_renews_its_identity_until_it_is_stopped(cluster, tmp_path):
    at = addresses(cluster)
    token, folder = tmp_path / "token", tmp_path / "operator"
    token.write_text(shelora("token", "create", "--role", "operator", at=at).stdout)
    stay = [*SHELORA, "enroll", "--stay", "--token-file", str(token), "--authority", at["enrolment"]]
    stay += ["--key-authority", at["key_authority"], "--identity", str(folder)]
    for _ in range(2):  # the second finds a valid identity, and does not need the token, which was used
        with subprocess.Popen(stay, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
            assert "enrolled as the operator" in process.stdout.readline()
            assert shelora("status", "--identity", str(folder), at=at).returncode == 0
            process.terminate()
            assert process.wait(60) == 0


def test_a_token_makes_an_agent_a_member_once(cluster, tmp_path):
    at = addresses(cluster)
    created = shelora("token", "create", "--federation", "reuters", "--client", "desk", at=at)
    assert created.returncode == 0, created.stderr
    token = created.stdout.strip()
    assert token.startswith("shelora-token-")
    enrol = [sys.executable, "-m", "client_agent.main", "enroll", "--authority", at["enrolment"]]
    enrol += ["--token", token, "--state-dir", str(tmp_path / "state")]
    first, second = (
        subprocess.run(enrol, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert "enrolled as client desk of federation reuters" in " ".join(first.stdout.split())
    assert (tmp_path / "state" / "identity" / "identity.pem").stat().st_mode & 0o777 == 0o600
    assert second.returncode == 2
    assert "TOKEN_REFUSED" in second.stderr
    nonsense = shelora("token", "create", "--role", "coordinator", at=at)
    assert nonsense.returncode == 2
    assert "names must be" in nonsense.stderr


def test_the_audit_log_of_the_local_cluster_is_verified(cluster):
    verified = shelora("audit", "verify", str(cluster / FOLDER / "key-authority"), at=addresses(cluster))
    assert verified.returncode == 0, verified.stderr
    assert "none changed" in verified.stdout
