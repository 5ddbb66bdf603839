"""The register is believed as a whole or not at all, and a token serves one key, whatever fails."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.key_authority.custody import open_custody, read_register, reseal
from services.key_authority.register import Grant, Redeemed, Register
from services.key_authority.sealer import Binding, SealingKey
from shelora.errors import DomainError, Reason
from shelora.transport.identity import Identity, Role
from tests.identities import SEALER, VAULT

TOKEN, OTHER = b"t" * 32, b"o" * 32
KEY, IMPOSTOR = b"k" * 32, b"i" * 32
CLIENT = Grant(role=Role.CLIENT, federation_id="clinic", client_id="ward-7")
NOW, LATER = 1_000, 2_000
NEW_KEY = SealingKey(bytes(range(1, 33)))
BINDING = Binding(purpose="register of tokens and clients", vault=VAULT)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "register.sealed"


def opened(path):
    return Register(path, SEALER, VAULT)


@pytest.fixture
def register(path):
    register = opened(path)
    register.add(TOKEN, CLIENT, NOW, LATER)
    return register


def refusal(action, *arguments):
    with pytest.raises(DomainError) as caught:
        action(*arguments)
    return caught.value


def test_what_was_answered_survives_a_restart(path, register):
    redeemed = register.redeem(TOKEN, KEY, "", NOW)
    assert redeemed == Redeemed(Identity(Role.CLIENT, "clinic", "ward-7"), (), NOW)
    restarted = opened(path)
    assert restarted.redeem(TOKEN, KEY, "", NOW) == redeemed
    assert refusal(restarted.redeem, TOKEN, IMPOSTOR, "", NOW).reason is Reason.TOKEN_REFUSED
    assert (restarted.tokens, restarted.clients) == (1, 1)


def test_neither_names_nor_hashes_lie_in_the_file_in_the_clear(path, register):
    register.redeem(TOKEN, KEY, "", NOW)
    blob = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    for secret in (b"ward-7", b"clinic", TOKEN, KEY, KEY.hex().encode()):
        assert secret not in blob


def test_of_many_threads_with_a_key_each_one_is_served(register):
    def redeemed(number):
        try:
            return register.redeem(TOKEN, bytes([number]) * 32, "", NOW)
        except DomainError as error:
            return error.reason

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(redeemed, range(8)))
    assert outcomes.count(Reason.TOKEN_REFUSED) == 7


def test_expired_tokens_are_forgotten_a_day_later(register):
    day = 24 * 3600 * 1000
    register.add(OTHER, CLIENT, LATER + day, LATER + 2 * day)
    assert register.tokens == 2
    register.add(b"n" * 32, CLIENT, LATER + day + 1, LATER + 2 * day)
    assert register.tokens == 2
    assert refusal(register.redeem, TOKEN, KEY, "", NOW).reason is Reason.TOKEN_REFUSED


@pytest.mark.parametrize("at", [0, 30, 60, 90, -1])
def test_a_changed_byte_is_refused_and_left_as_it_is(path, register, at):
    blob = bytearray(path.read_bytes())
    blob[at] ^= 1
    path.write_bytes(blob)
    error = refusal(opened, path)
    assert error.reason is Reason.CONFIGURATION_INVALID
    assert str(path) in error.message
    assert "Restore it from a backup" in error.message
    assert path.read_bytes() == bytes(blob)


@pytest.mark.parametrize(
    "content",
    [b"", b"nothing", b'{"format":2,"tokens":{},"clients":[]}', b'{"format":1,"tokens":{"a":1}}'],
)
def test_what_is_sealed_by_a_newer_version_is_refused_not_guessed(path, content):
    path.write_bytes(SEALER.seal(BINDING, content))
    assert "this version does not read" in refusal(opened, path).message


def test_a_register_made_without_the_sealing_key_or_for_another_vault_is_refused(path, tmp_path, register):
    strange = Register(tmp_path / "strange.sealed", SEALER, "af" * 16)
    strange.add(OTHER, CLIENT, NOW, LATER)
    shutil.copy(tmp_path / "strange.sealed", path)
    assert "another epoch, federation, vault or kind" in refusal(opened, path).message
    path.write_bytes(b"SQLite format 3\0" + bytes(200))
    assert "not a sealed file" in refusal(opened, path).message


def test_a_file_exchanged_under_a_running_authority_enters_no_token(path, tmp_path, register):
    elsewhere = Register(tmp_path / "elsewhere.sealed", SEALER, VAULT)
    elsewhere.add(OTHER, CLIENT, NOW, LATER)
    shutil.copy(tmp_path / "elsewhere.sealed", path)
    assert refusal(register.redeem, OTHER, KEY, "", NOW).reason is Reason.TOKEN_REFUSED
    register.redeem(TOKEN, KEY, "", NOW)
    assert refusal(opened(path).redeem, TOKEN, IMPOSTOR, "", NOW).reason is Reason.TOKEN_REFUSED


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_fails_consumes_no_token(path, register, monkeypatch, failing):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, full)
        error = refusal(register.redeem, TOKEN, KEY, "", NOW)
        assert error.reason is Reason.STORE_UNAVAILABLE
    assert list(path.parent.iterdir()) == [path]
    assert register.redeem(TOKEN, IMPOSTOR, "", NOW)
    assert opened(path).redeem(TOKEN, IMPOSTOR, "", NOW)


def test_a_register_is_in_the_folders_backups_and_resealed_with_the_rest(tmp_path, sealing_key):
    folder = tmp_path / "data"
    with open_custody(folder, sealing_key) as custody:
        custody.register.add(TOKEN, CLIENT, NOW, LATER)
        custody.register.redeem(TOKEN, KEY, "", NOW)
        shutil.copytree(folder, tmp_path / "backup")  # of a folder in use
        assert read_register(folder, sealing_key).clients == 1
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "backup", folder)
    assert reseal(folder, sealing_key, NEW_KEY) == 2
    with open_custody(folder, NEW_KEY) as custody:
        assert refusal(custody.register.redeem, TOKEN, IMPOSTOR, "", NOW).reason is Reason.TOKEN_REFUSED
        assert custody.register.redeem(TOKEN, KEY, "", NOW)


def test_a_folder_with_a_register_it_cannot_open_is_not_served(tmp_path, sealing_key):
    folder = tmp_path / "data"
    with open_custody(folder, sealing_key) as custody:
        custody.register.add(TOKEN, CLIENT, NOW, LATER)
    path = folder / "register.sealed"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DomainError, match=r"register\.sealed is damaged"), open_custody(folder, sealing_key):
        pass
    assert "damaged" in refusal(read_register, folder, sealing_key).message
