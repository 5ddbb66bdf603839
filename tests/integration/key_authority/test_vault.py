import concurrent.futures
import errno
import os
import stat
import subprocess
import sys
import threading

import pytest

from services.key_authority.epochs import EpochId, EpochKeys, from_bytes, to_bytes
from services.key_authority.sealer import Sealer, SealingKey
from services.key_authority.vault import Vault
from shelora.ckks.parameters import INSECURE_TOY, STANDARD
from shelora.ckks.secret import SecretKey
from shelora.errors import DomainError, Reason

EPOCH = EpochId("clinic", 1)
SEALER = Sealer(SealingKey(bytes(range(32))))
IDENTITY = "5e" * 16
SECRETS = EpochKeys(
    parameters="standard", key_id=bytes(16), ckks_secret_key=b"the CKKS key", obfuscation_secret=b"x" * 32
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "epochs"


@pytest.fixture
def vault(folder):
    return opened_vault(folder)


def opened_vault(folder):
    return Vault(folder, SEALER, IDENTITY)


def refusal(action):
    with pytest.raises(DomainError) as caught:
        action()
    return caught.value


def test_a_new_epoch_has_a_usable_key_and_a_secret_of_32_bytes(vault):
    opened = vault.open_epoch(EPOCH, STANDARD)
    assert opened.parameters == STANDARD.name
    assert SecretKey.from_bytes(STANDARD, opened.ckks_secret_key).key_id == opened.key_id
    assert len(opened.key_id) == 16
    assert len(opened.obfuscation_secret) == 32


def test_a_restart_loses_nothing(vault, folder):
    opened = vault.open_epoch(EPOCH, INSECURE_TOY)
    restarted = opened_vault(folder)
    assert restarted.read(EPOCH) == opened
    assert restarted.open_epoch(EPOCH, INSECURE_TOY) == opened


def test_every_epoch_has_keys_of_its_own(vault):
    ids = [EPOCH, EpochId("clinic", 2), EpochId("clinic-1", 1), EpochId("clini", 1)]
    opened = [vault.open_epoch(epoch_id, INSECURE_TOY) for epoch_id in ids]
    assert len({secrets.key_id for secrets in opened}) == len(ids)
    assert len({secrets.obfuscation_secret for secrets in opened}) == len(ids)
    assert [vault.read(epoch_id) for epoch_id in ids] == opened


def test_another_profile_for_an_open_epoch_is_refused(vault):
    opened = vault.open_epoch(EPOCH, INSECURE_TOY)
    assert refusal(lambda: vault.open_epoch(EPOCH, STANDARD)).reason is Reason.INVALID_ARGUMENT
    assert vault.read(EPOCH) == opened


def test_an_epoch_that_was_not_opened_is_unknown(vault):
    assert refusal(lambda: vault.read(EPOCH)).reason is Reason.FEDERATION_UNKNOWN


def test_no_other_user_can_read_keys(vault, folder):
    before = os.umask(0)
    try:
        vault.open_epoch(EPOCH, INSECURE_TOY)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600]


def test_a_folder_open_to_other_users_is_refused_with_the_remedy(folder):
    folder.mkdir(mode=0o750)
    error = refusal(lambda: opened_vault(folder))
    assert error.reason is Reason.CONFIGURATION_INVALID
    assert f"chmod 700 {folder}" in error.message


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(lambda: opened_vault(tmp_path / "file" / "epochs")).reason is Reason.CONFIGURATION_INVALID


@pytest.mark.parametrize("other", [EpochId("clinic", 2), EpochId("clinic-1", 1), EpochId("bank", 1)])
def test_a_file_of_another_epoch_or_federation_is_noticed(vault, folder, other):
    vault.open_epoch(EPOCH, INSECURE_TOY)
    (folder / "clinic.1.sealed").rename(folder / f"{other.federation_id}.{other.epoch}.sealed")
    error = refusal(lambda: vault.read(other))
    assert error.reason is Reason.SECRET_UNAVAILABLE
    assert f"{other} cannot be read" in error.message
    assert "of another epoch" in error.message


def test_a_file_of_another_vault_under_the_same_key_is_noticed(vault, folder):
    vault.open_epoch(EPOCH, INSECURE_TOY)
    other = Vault(folder, SEALER, "6f" * 16)
    assert "another epoch, federation, vault" in refusal(lambda: other.read(EPOCH)).message


def test_the_next_epoch_is_opened_while_those_before_stay_readable(vault, folder):
    opened = {n: vault.open_epoch(EpochId("clinic", n), INSECURE_TOY) for n in (1, 2, 10)}
    vault.open_epoch(EpochId("bank", 1), INSECURE_TOY)
    (folder / "notes.txt").write_text("not an epoch")
    (folder / ".clinic.3.sealed.00.draft").write_bytes(b"half")
    assert vault.epochs() == [EpochId("bank", 1), *(EpochId("clinic", n) for n in opened)]
    assert {n: vault.read(EpochId("clinic", n)) for n in opened} == opened


def test_contents_of_a_newer_format_are_refused_without_showing_them():
    newer = to_bytes(SECRETS).replace(b'"format":1', b'"format":2')
    error = refusal(lambda: from_bytes(newer))
    assert error.reason is Reason.SECRET_UNAVAILABLE
    assert error.__cause__ is None
    assert SECRETS.obfuscation_secret.hex() not in str(error)
    assert from_bytes(to_bytes(SECRETS)) == SECRETS


def test_a_damaged_file_is_never_overwritten_and_its_error_shows_no_secret(vault, folder):
    opened = vault.open_epoch(EPOCH, INSECURE_TOY)
    path = folder / "clinic.1.sealed"
    damaged = path.read_bytes()[:-1]
    path.write_bytes(damaged)
    for action in (lambda: vault.read(EPOCH), lambda: opened_vault(folder).open_epoch(EPOCH, INSECURE_TOY)):
        error = refusal(action)
        assert error.reason is Reason.SECRET_UNAVAILABLE
        assert error.__cause__ is None
        assert opened.obfuscation_secret.hex() not in str(error)
    assert path.read_bytes() == damaged


def test_concurrent_threads_get_the_same_keys_and_leave_one_file(vault, folder):
    count = 8
    together = threading.Barrier(count)

    def open_together(_number):
        together.wait()
        return vault.open_epoch(EPOCH, INSECURE_TOY)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        opened = list(pool.map(open_together, range(count)))
    assert len({secrets.key_id for secrets in opened}) == 1
    assert [path.name for path in folder.iterdir()] == ["clinic.1.sealed"]


_OPENING_PROCESS = """
import sys
from pathlib import Path
from services.key_authority.epochs import EpochId
from services.key_authority.vault import Vault
from shelora.ckks.parameters import INSECURE_TOY
from services.key_authority.sealer import Sealer, SealingKey
vault = Vault(Path(sys.argv[1]), Sealer(SealingKey(bytes(range(32)))), "5e" * 16)
print("ready", flush=True)
sys.stdin.readline()
print(*(vault.open_epoch(EpochId("clinic", epoch), INSECURE_TOY).key_id.hex() for epoch in range(1, 21)))
"""


def test_two_processes_get_the_same_keys(folder):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _OPENING_PROCESS, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    first, second = (process.communicate()[0].split() for process in processes)
    assert first == second
    assert len(set(first)) == 20


def test_a_writer_that_comes_second_takes_over_the_keys_of_the_first(vault, folder, monkeypatch):
    first = opened_vault(folder).open_epoch(EPOCH, INSECURE_TOY)
    found = iter([None])  # as if the first writer had finished just after the second looked
    monkeypatch.setattr(vault, "_find", lambda epoch_id: next(found, opened_vault(folder).read(epoch_id)))
    assert vault.open_epoch(EPOCH, INSECURE_TOY) == first


def test_a_full_disk_is_named_and_leaves_nothing_behind(vault, folder, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        error = refusal(lambda: vault.open_epoch(EPOCH, INSECURE_TOY))
    assert error.reason is Reason.STORE_UNAVAILABLE
    assert "No space left" in error.message
    assert list(folder.iterdir()) == []
    vault.open_epoch(EPOCH, INSECURE_TOY)


@pytest.mark.parametrize(
    ("federation_id", "epoch"),
    [
        ("", 1),
        ("a" * 65, 1),
        ("Clinic", 1),
        ("../up", 1),
        ("a.b", 1),
        ("a\n", 1),
        ("ä", 1),
        ("a", 0),
        ("a", -1),
    ],
)
def test_an_invalid_name_of_an_epoch_is_refused(federation_id, epoch):
    assert refusal(lambda: EpochId(federation_id, epoch)).reason is Reason.INVALID_ARGUMENT


def test_the_repr_of_secrets_shows_none():
    shown = repr(
        EpochKeys(
            parameters="standard",
            key_id=bytes(16),
            ckks_secret_key=b"THE-KEY",
            obfuscation_secret=b"THE-SECRET",
        )
    )
    assert "THE" not in shown


def test_a_retired_epoch_is_refused_by_name_and_its_keys_are_gone(vault):
    for epoch in (1, 2, 3):
        vault.open_epoch(EpochId("clinic", epoch), STANDARD)
    vault.open_epoch(EpochId("bank", 1), STANDARD)
    kept = vault.read(EpochId("clinic", 3))
    for _ in range(2):
        assert vault.retire(EpochId("clinic", 3)) == [EpochId("clinic", 1), EpochId("clinic", 2)]
    for epoch in (1, 2):
        for refused in (
            lambda: vault.read(EpochId("clinic", epoch)),  # noqa: B023 - called in this turn
            lambda: vault.open_epoch(EpochId("clinic", epoch), STANDARD),  # noqa: B023
        ):
            with pytest.raises(DomainError, match="is over, and its keys are destroyed") as caught:
                refused()
            assert caught.value.reason is Reason.EPOCH_RETIRED
    assert vault.read(EpochId("clinic", 3)) == kept
    assert vault.epochs() == [EpochId("bank", 1), EpochId("clinic", 3)]


def test_a_crash_between_mark_and_deletion_leaves_a_retired_epoch_that_a_repeat_deletes(vault, folder):
    vault.open_epoch(EpochId("clinic", 1), STANDARD)
    (folder / "clinic.1.retired").touch(mode=0o600)
    with pytest.raises(DomainError, match="is over"):
        vault.read(EpochId("clinic", 1))
    assert vault.retire(EpochId("clinic", 2)) == [EpochId("clinic", 1)]
    assert [path.name for path in folder.iterdir()] == ["clinic.1.retired"]


@pytest.mark.parametrize("epoch", [1, 2])
def test_keys_that_are_made_while_their_epoch_retires_are_not_kept(vault, folder, monkeypatch, epoch):
    """The coordinator gave up waiting for them, and its operator stopped the federation (schedule 302109)."""
    create = vault._create

    def late(*arguments):
        vault.retire(EpochId("clinic", 3))
        create(*arguments)

    monkeypatch.setattr(vault, "_create", late)
    vault.open_epoch(EpochId("bank", 1), STANDARD)
    vault.open_epoch(EpochId("clinic", 3), STANDARD)
    assert (
        refusal(lambda: vault.open_epoch(EpochId("clinic", epoch), STANDARD)).reason is Reason.EPOCH_RETIRED
    )
    assert vault.epochs() == [EpochId("bank", 1), EpochId("clinic", 3)], "of others, and later ones"
