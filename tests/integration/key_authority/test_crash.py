"""kill -9, at every write and at any moment: the folder stays usable and nothing that was answered is missing."""

import random
import subprocess
import sys

import pytest

from services.key_authority.custody import open_custody
from services.key_authority.epochs import EpochId
from services.key_authority.sealer import SealingKey
from shelora.audit import AuditEvent, verified
from shelora.ckks.parameters import INSECURE_TOY
from shelora.errors import DomainError

KEY = SealingKey(bytes(range(32)))
NEW_KEY = SealingKey(bytes(range(1, 33)))

_PROGRAM = """
import itertools, os, signal, sys, traceback
from pathlib import Path
from services.key_authority.custody import open_custody, reseal
from services.key_authority.epochs import EpochId
from services.key_authority.register import Grant
from services.key_authority.sealer import SealingKey
from shelora.ckks.parameters import INSECURE_TOY
from shelora.transport.identity import Role

old, new = SealingKey(bytes(range(32))), SealingKey(bytes(range(1, 33)))

def work(folder, epochs):
    with open_custody(folder, old) as custody:
        for epoch in range(1, epochs + 1):
            epoch_id = EpochId("clinic", epoch)
            opened = custody.vault.open_epoch(epoch_id, INSECURE_TOY)
            custody.audit.secrets_released(epoch_id, "ward-7", opened.key_id)
            print(epoch, opened.key_id.hex(), flush=True)

def admit(folder, tokens):
    with open_custody(folder, old) as custody:
        for number in range(tokens):
            grant = Grant(role=Role.CLIENT, federation_id="clinic", client_id=f"ward-{number}")
            custody.register.add(bytes([number]) * 32, grant, 0, 10)
            custody.register.redeem(bytes([number]) * 32, b"k" * 32, "", 0)
            print(number, "admitted", flush=True)

def die_in_call(number):
    left = itertools.count(number, -1)

    def dying(action, tear=None):
        def step(*arguments, **options):
            if next(left) == 0:
                if tear:
                    tear(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return action(*arguments, **options)
        return step

    write = os.pwrite
    os.pwrite = dying(write, lambda fd, data, at: write(fd, data[: len(data) // 2], at))
    for name in ("fsync", "ftruncate", "link", "rename", "replace", "unlink"):
        setattr(os, name, dying(getattr(os, name)))

def in_a_child(action, folder):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.dup2(os.open(f"{folder}.answered", os.O_WRONLY | os.O_CREAT, 0o600), 1)
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def in_every_call(root, before, action, after):
    for number in itertools.count():
        folder = root / str(number)
        before(folder)
        code = in_a_child(lambda: (die_in_call(number), action(folder)), folder)
        assert code in {0, -9}, code
        after(folder)
        if code == 0:
            return

root = Path(sys.argv[1])
"""


def run(program, root):
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM + program, str(root)], capture_output=True, text=True, check=False
    )


def folders(root):
    """Every folder that a program used, with what it had answered by then."""
    found = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: int(path.name))
    return [
        (path, dict(line.split() for line in path.with_suffix(".answered").read_text().splitlines()))
        for path in found
    ]


def assert_sound(folder, answered, key=KEY):
    """The folder opens, holds every answered epoch, lists every answered release, and can be used on."""
    with open_custody(folder, key) as custody:
        for epoch, key_id in answered.items():
            assert custody.vault.read(EpochId("clinic", int(epoch))).key_id.hex() == key_id
        for epoch_id in custody.vault.epochs():
            opened = custody.vault.open_epoch(epoch_id, INSECURE_TOY)
            custody.audit.secrets_released(epoch_id, "after", opened.key_id)
        assert not [path for path in folder.rglob("*") if path.name.endswith(".draft")]
    with (folder / "audit.log").open("rb") as file:
        records = list(verified(file))
    released = {str(r.epoch): r.key_id for r in records if r.event is AuditEvent.SECRETS_RELEASED}
    assert released.items() >= answered.items()
    opened = [r.epoch for r in records if r.event is AuditEvent.EPOCH_OPENED]
    assert len(opened) == len(set(opened)) == len(released)


def test_death_in_any_system_call_of_opening_and_releasing_loses_nothing(tmp_path):
    done = run("in_every_call(root, lambda _: None, lambda f: work(f, 2), lambda _: None)", tmp_path)
    assert done.returncode == 0, done.stderr
    used = folders(tmp_path)
    for folder, answered in used:
        assert_sound(folder, answered)
    assert len(used) > 20
    assert {len(answered) for _, answered in used} == {0, 1, 2}


def test_death_in_any_system_call_of_resealing_is_made_good_by_repeating_it(tmp_path):
    done = run(
        "again = lambda f: reseal(f, old, new)\n"
        "in_every_call(root, lambda f: in_a_child(lambda: work(f, 2), f), again, again)",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    used = folders(tmp_path)
    for folder, answered in used:
        assert len(answered) == 2
        assert_sound(folder, answered, NEW_KEY)
    assert len(used) > 10


def test_death_in_any_system_call_of_enrolling_serves_every_token_to_one_key(tmp_path):
    done = run("in_every_call(root, lambda _: None, lambda f: admit(f, 2), lambda _: None)", tmp_path)
    assert done.returncode == 0, done.stderr
    used = folders(tmp_path)
    for folder, answered in used:
        with open_custody(folder, KEY) as custody:
            for number in answered:
                with pytest.raises(DomainError, match="was used"):
                    custody.register.redeem(bytes([int(number)]) * 32, b"i" * 32, "", 0)
    assert len(used) > 15
    assert {len(answered) for _, answered in used} == {0, 1, 2}


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_from_outside_at_any_moment_loses_nothing(tmp_path, seed):
    answered, folder = {}, tmp_path / "data"
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM + "work(root, 10**6)", str(folder)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(random.Random(seed).randrange(1, 60)):
        epoch, key_id = process.stdout.readline().split()
        answered[epoch] = key_id
    process.kill()
    rest, _ = process.communicate()
    answered |= dict(line.split() for line in rest.splitlines(keepends=True) if line.endswith("\n"))
    assert_sound(folder, answered)


def test_a_killed_process_does_not_keep_the_folder_locked(tmp_path):
    folder = tmp_path / "data"
    done = run("custody = open_custody(root, old); custody.__enter__(); os.kill(os.getpid(), 9)", folder)
    assert done.returncode == -9
    assert (folder / "lock").exists()
    assert_sound(folder, {})
