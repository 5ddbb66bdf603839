import os
import shutil

import pytest

from services.key_authority.custody import open_custody, read_root, read_vault, replace_audit_log, reseal
from services.key_authority.epochs import EpochId
from services.key_authority.sealer import SealingKey, key_id_of
from shelora import files
from shelora.audit import AuditEvent, verified
from shelora.ckks.parameters import INSECURE_TOY
from shelora.errors import DomainError, Reason

EPOCHS = [EpochId("bank", 1), EpochId("clinic", 1), EpochId("clinic", 2)]
NEW_KEY = SealingKey(bytes(range(32)))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def kept(folder, sealing_key):
    """What the vault of a used folder holds, by epoch."""
    with open_custody(folder, sealing_key) as custody:
        custody.root.load_or_create()  # as the first start does
        return {epoch: fill(custody, epoch) for epoch in EPOCHS}


def fill(custody, epoch):
    opened = custody.vault.open_epoch(epoch, INSECURE_TOY)
    custody.audit.secrets_released(epoch, "ward-7", opened.key_id)
    return opened


def read_all(folder, key):
    with open_custody(folder, key) as custody:
        return {epoch: custody.vault.read(epoch) for epoch in custody.vault.epochs()}


def refusal(folder, key):
    with pytest.raises(DomainError) as caught, open_custody(folder, key):
        pass
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
    return caught.value.message


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def sealed_files(folder):
    return sorted(folder.rglob("*.sealed"))


def audit_events(folder):
    with (folder / "audit.log").open("rb") as file:
        return [record.event for record in verified(file)]


def test_a_restart_loses_nothing_and_the_vault_keeps_its_identity(folder, sealing_key, kept):
    assert read_all(folder, sealing_key) == kept
    with open_custody(folder, sealing_key) as first:
        identity = first.identity
    with open_custody(folder, sealing_key) as second:
        assert second.identity == identity


def test_everything_is_open_to_this_user_alone_whatever_the_umask(folder, sealing_key):
    before = os.umask(0)
    try:
        with open_custody(folder, sealing_key) as custody:
            fill(custody, EPOCHS[0])
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
    assert {name for name, mode in modes.items() if mode == 0o700} == {"data", "epochs"}
    assert {mode for name, mode in modes.items() if name not in {"data", "epochs"}} == {0o600}


def test_no_secret_lies_in_the_folder_in_the_clear(folder, kept, sealing_key_file):
    stored = b"".join(content(folder).values())
    master = bytes.fromhex(sealing_key_file.read_text())
    for secret in [master, *(s.obfuscation_secret for s in kept.values())]:
        assert secret[:12] not in stored
        assert secret.hex()[:24].encode() not in stored
    for secrets in kept.values():
        for start in range(38, len(secrets.ckks_secret_key) - 24, 97):
            assert secrets.ckks_secret_key[start : start + 24] not in stored
            assert secrets.ckks_secret_key[start : start + 24].hex().encode() not in stored


def test_a_wrong_sealing_key_is_refused_with_both_identifiers_and_changes_nothing(folder, kept, sealing_key):
    before = content(folder)
    message = refusal(folder, NEW_KEY)
    assert "wrong sealing key" in message
    assert sealing_key.key_id.hex() in message
    assert NEW_KEY.key_id.hex() in message
    assert content(folder) == before


def test_a_damaged_or_missing_check_file_is_refused_and_not_made_anew(folder, kept, sealing_key):
    path = folder / "vault.sealed"
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert "restore that file from a backup" in refusal(folder, sealing_key)
    path.unlink()
    assert "vault.sealed is missing" in refusal(folder, sealing_key)
    assert not path.exists()
    path.write_bytes(original)
    assert read_all(folder, sealing_key) == kept


def test_a_missing_check_file_is_refused_even_if_only_the_log_is_left(folder, kept, sealing_key):
    for path in sealed_files(folder):
        path.unlink()
    assert "vault.sealed is missing" in refusal(folder, sealing_key)


def test_a_missing_log_is_refused(folder, kept, sealing_key):
    (folder / "audit.log").unlink()
    assert "replace-audit-log" in refusal(folder, sealing_key)


def test_a_folder_that_is_in_use_is_refused(folder, sealing_key):
    with open_custody(folder, sealing_key):
        assert "another process uses" in refusal(folder, sealing_key)
        with pytest.raises(DomainError, match="another process uses"):
            reseal(folder, sealing_key, NEW_KEY)
    read_all(folder, sealing_key)


def test_a_vault_in_use_can_be_read(folder, sealing_key, kept):
    with open_custody(folder, sealing_key):
        vault = read_vault(folder, sealing_key)
        assert {epoch: vault.read(epoch) for epoch in vault.epochs()} == kept


def test_a_folder_open_to_other_users_is_refused_with_the_remedy(folder, sealing_key):
    folder.mkdir(mode=0o755)
    assert f"chmod 700 {folder}" in refusal(folder, sealing_key)


def test_a_file_of_another_vault_is_refused_where_it_is_read(folder, tmp_path, sealing_key, kept):
    with open_custody(tmp_path / "other", sealing_key) as other:
        fill(other, EPOCHS[0])
    shutil.copy(tmp_path / "other" / "epochs" / "bank.1.sealed", folder / "epochs")
    with open_custody(folder, sealing_key) as custody:
        with pytest.raises(DomainError, match="another epoch, federation, vault"):
            custody.vault.read(EPOCHS[0])
        assert custody.vault.read(EPOCHS[1]) == kept[EPOCHS[1]]


def test_what_a_crash_left_half_made_is_removed(folder, sealing_key, kept):
    drafts = [folder / ".vault.sealed.00.draft", folder / "epochs" / ".clinic.3.sealed.00.draft"]
    for draft in drafts:
        draft.write_bytes(b"half")
    assert read_all(folder, sealing_key) == kept
    assert not any(draft.exists() for draft in drafts)


@pytest.mark.parametrize("step", range(3))
def test_a_first_start_that_a_crash_interrupts_is_made_good_by_the_next(
    folder, sealing_key, monkeypatch, step
):
    class Crash(BaseException):
        pass

    names = ["replace", "create", "sync_folder"]

    def crash(*_):
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(files, names[step], crash)
        with pytest.raises(Crash), open_custody(folder, sealing_key):
            pass
    with open_custody(folder, sealing_key) as custody:
        fill(custody, EPOCHS[0])
    assert len(read_all(folder, sealing_key)) == 1


def test_a_copy_of_the_folder_is_a_backup_with_its_key_and_nothing_without(
    folder, tmp_path, sealing_key, kept
):
    with open_custody(folder, sealing_key) as custody:  # a copy of a folder in use
        shutil.copytree(folder, tmp_path / "backup")
        fill(custody, EpochId("clinic", 3))
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "backup", folder)
    assert "wrong sealing key" in refusal(folder, NEW_KEY)
    assert read_all(folder, sealing_key) == kept


def test_a_copy_with_half_a_record_at_its_end_is_a_backup_too(folder, tmp_path, sealing_key, kept):
    log = folder / "audit.log"
    log.write_bytes(log.read_bytes()[:-20])
    assert read_all(folder, sealing_key) == kept
    assert audit_events(folder)[-1] is AuditEvent.TAIL_REPAIRED


def test_resealing_changes_the_key_of_everything_and_the_content_of_nothing(folder, sealing_key, kept):
    assert reseal(folder, sealing_key, NEW_KEY) == 5
    assert {key_id_of(path.read_bytes()) for path in sealed_files(folder)} == {NEW_KEY.key_id}
    assert "wrong sealing key" in refusal(folder, sealing_key)
    assert read_all(folder, NEW_KEY) == kept
    assert audit_events(folder)[-1] is AuditEvent.RESEALED


def test_the_root_of_the_certificate_authority_is_sealed_and_resealed_with_the_rest(
    folder, sealing_key, kept
):
    root = read_root(folder, sealing_key)
    assert reseal(folder, sealing_key, NEW_KEY) == 5
    assert "wrong sealing key" in refusal(folder, sealing_key)
    with open_custody(folder, NEW_KEY) as custody:
        assert custody.root.load_or_create().certificate == root.certificate
    assert read_root(folder, NEW_KEY).pin == root.pin


def test_resealing_again_changes_nothing(folder, sealing_key, kept):
    reseal(folder, sealing_key, NEW_KEY)
    before = content(folder)
    assert reseal(folder, sealing_key, NEW_KEY) == 0
    assert content(folder) == before


@pytest.mark.parametrize("done", range(6))
def test_an_interrupted_resealing_is_refused_at_start_and_finished_by_repeating_it(
    folder, sealing_key, kept, monkeypatch, done
):
    class Crash(BaseException):
        pass

    left = iter(range(done))
    replace = files.replace

    def crash(path, blob):
        if next(left, None) is None:
            raise Crash
        replace(path, blob)

    with monkeypatch.context() as patched:
        patched.setattr(files, "replace", crash)
        if done < 5:
            with pytest.raises(Crash):
                reseal(folder, sealing_key, NEW_KEY)
        else:
            reseal(folder, sealing_key, NEW_KEY)
    if 0 < done < 5:
        for key in (sealing_key, NEW_KEY):
            assert "shelora-key-authority reseal" in refusal(folder, key)
    assert reseal(folder, sealing_key, NEW_KEY) == 5 - done
    assert read_all(folder, NEW_KEY) == kept


def test_resealing_with_keys_that_do_not_fit_changes_nothing(folder, sealing_key, kept):
    before = content(folder)
    with pytest.raises(DomainError, match="wrong sealing key"):
        reseal(folder, SealingKey(bytes(32)), NEW_KEY)
    assert content(folder) == before


def test_resealing_names_a_file_that_does_not_open_and_can_be_repeated(folder, sealing_key, kept):
    path = folder / "epochs" / "clinic.1.sealed"
    original = path.read_bytes()
    path.write_bytes(original[:-1])
    with pytest.raises(DomainError, match=r"clinic\.1\.sealed is damaged"):
        reseal(folder, sealing_key, NEW_KEY)
    path.write_bytes(original)
    reseal(folder, sealing_key, NEW_KEY)
    assert read_all(folder, NEW_KEY) == kept


def test_resealing_a_folder_that_is_not_there_makes_none(folder, sealing_key):
    with pytest.raises(DomainError, match="No such file"):
        reseal(folder, sealing_key, NEW_KEY)
    assert not folder.exists()


@pytest.mark.parametrize("damaged", [b"not a record\n", b"", None])
def test_a_damaged_or_lost_log_can_be_replaced_and_the_new_one_says_so(folder, sealing_key, kept, damaged):
    log = folder / "audit.log"
    if damaged is None:
        log.unlink()
    else:
        log.write_bytes(damaged)
    refusal(folder, sealing_key)
    aside = replace_audit_log(folder, sealing_key)
    assert aside.read_bytes() == (damaged or b"")
    assert read_all(folder, sealing_key) == kept
    with log.open("rb") as file:
        assert next(verified(file)).follows is not None


def test_a_log_that_holds_is_not_replaced(folder, sealing_key, kept):
    before = content(folder)
    with pytest.raises(DomainError, match="no reason to replace it"):
        replace_audit_log(folder, sealing_key)
    assert content(folder) == before


def test_a_lost_root_is_refused_by_name_and_no_other_takes_its_place(folder, sealing_key, kept):
    """A new authority was made silently, and nobody was known any more."""
    root = folder / "authority" / "root.sealed"
    blob = root.read_bytes()
    root.unlink()
    with open_custody(folder, sealing_key) as custody, pytest.raises(DomainError) as caught:
        custody.root.load_or_create()
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
    assert "root.sealed is missing, but" in caught.value.message
    assert not root.exists()
    root.write_bytes(blob)
    with open_custody(folder, sealing_key) as custody:
        custody.root.load_or_create()


def test_a_first_start_that_ended_before_its_root_makes_it(folder, sealing_key):
    with open_custody(folder, sealing_key):
        pass
    with open_custody(folder, sealing_key) as custody:
        custody.root.load_or_create()


def test_a_bit_flipped_in_a_file_of_one_federation_takes_that_federation_only(folder, sealing_key, kept):
    """In whatever byte: in those of the key's name it stopped the whole authority."""
    damaged, *whole = kept
    path = folder / "epochs" / f"{damaged.federation_id}.{damaged.epoch}.sealed"
    blob = path.read_bytes()
    for at in [*range(64), len(blob) // 2, len(blob) - 1]:
        path.write_bytes(blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :])
        with open_custody(folder, sealing_key) as custody:
            assert {epoch: custody.vault.read(epoch) for epoch in whole} == {e: kept[e] for e in whole}
            with pytest.raises(DomainError) as caught:
                custody.vault.read(damaged)
        assert caught.value.reason is Reason.SECRET_UNAVAILABLE, at
        assert str(damaged) in caught.value.message
