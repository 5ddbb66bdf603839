import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.key_authority.sealer import (
    Binding,
    SealBrokenError,
    Sealer,
    SealingKey,
    WrongSealingKeyError,
    key_id_of,
)
from shelora.errors import DomainError, Reason

KEY = SealingKey(bytes(range(32)))
SEALER = Sealer(KEY)
OTHER = Sealer(SealingKey(bytes(range(1, 33))))
BINDING = Binding(purpose="epoch secrets", vault="5e" * 16, federation_id="clinic", epoch=1)
CONTENT = b"the CKKS key and the obfuscation secret"
BLOB = SEALER.seal(BINDING, CONTENT)
GOLDEN = (
    "5348534c0193920846767e7af9efa0950706a4562706443db3af658874961dd76a4572ebe9546e6b917e8ec5c289da46"
    "33af8e05350041000d65706f636820736563726574730020356535653565356535653565356535653565356535653565"
    "35653565356535650006636c696e69630000000000000001f7012abcfff13a7e69f4148ace37f455c24f69a9c803"
)
GOLDEN_KEY_ID = "93920846767e7af9efa0950706a45627"

texts = st.text(max_size=20)
bindings = st.builds(Binding, purpose=texts, vault=texts, federation_id=texts, epoch=st.integers(0, 2**32))


@given(bindings, st.binary(max_size=300))
def test_what_was_sealed_opens_as_what_it_is(binding, content):
    blob = SEALER.seal(binding, content)
    assert SEALER.open(binding, blob) == content
    assert OTHER.open(binding, SEALER.resealed(blob, OTHER)) == content


@given(bindings, bindings)
def test_no_two_bindings_have_one_encoding(first, second):
    assert (first.encoded() == second.encoded()) == (first == second)


@pytest.mark.parametrize("position", range(len(BLOB)))
def test_a_change_of_any_byte_is_noticed(position):
    for change in (1, 0x80, 0xFF):
        changed = bytearray(BLOB)
        changed[position] ^= change
        with pytest.raises((SealBrokenError, WrongSealingKeyError)):
            SEALER.open(BINDING, bytes(changed))
        with pytest.raises((SealBrokenError, WrongSealingKeyError)):
            SEALER.resealed(bytes(changed), OTHER)


def test_a_blob_cut_short_anywhere_or_made_longer_is_noticed():
    for blob in [BLOB[:length] for length in range(len(BLOB))] + [BLOB + b"\0", BLOB + BLOB]:
        with pytest.raises(SealBrokenError):
            SEALER.open(BINDING, blob)


@given(st.binary(max_size=400))
def test_bytes_that_were_never_sealed_are_refused(content):
    for blob in (content, BLOB[:5] + content, BLOB[:55] + content):
        with pytest.raises((SealBrokenError, WrongSealingKeyError)):
            SEALER.open(BINDING, blob)


@pytest.mark.parametrize(
    "binding",
    [
        Binding(purpose="epoch secrets", vault="5e" * 16, federation_id="clinic", epoch=2),
        Binding(purpose="epoch secrets", vault="5e" * 16, federation_id="bank", epoch=1),
        Binding(purpose="epoch secrets", vault="6f" * 16, federation_id="clinic", epoch=1),
        Binding(purpose="certificate authority", vault="5e" * 16, federation_id="clinic", epoch=1),
        Binding(purpose="epoch secrets", vault="5e" * 16 + "clinic", federation_id="", epoch=1),
    ],
)
def test_a_blob_opens_as_nothing_else(binding):
    with pytest.raises(SealBrokenError, match="of another epoch, federation, vault or kind"):
        SEALER.open(binding, BLOB)
    forged = BLOB.replace(BINDING.encoded(), binding.encoded())
    with pytest.raises(SealBrokenError):
        SEALER.open(binding, forged)


def test_a_wrong_key_is_told_apart_from_damage_and_both_keys_are_named():
    with pytest.raises(WrongSealingKeyError) as caught:
        OTHER.open(BINDING, BLOB)
    assert caught.value.reason is Reason.SECRET_UNAVAILABLE
    assert caught.value.needed == SEALER.key_id == key_id_of(BLOB)
    assert SEALER.key_id.hex() in caught.value.message
    assert OTHER.key_id.hex() in caught.value.message


def test_a_blob_whose_header_claims_another_key_does_not_open_under_it():
    claimed = BLOB.replace(SEALER.key_id, OTHER.key_id)
    with pytest.raises(SealBrokenError, match="damaged"):
        OTHER.open(BINDING, claimed)


def test_a_newer_format_is_named():
    with pytest.raises(SealBrokenError, match="format 2"):
        SEALER.open(BINDING, BLOB[:4] + b"\x02" + BLOB[5:])


def test_sealing_twice_gives_nothing_in_common_beyond_the_header():
    first, second = SEALER.seal(BINDING, bytes(64)), SEALER.seal(BINDING, bytes(64))
    assert first[:21] == second[:21]
    assert first[21:53] != second[21:53]
    assert first[-80:] != second[-80:]
    assert CONTENT[:12] not in BLOB


def test_the_format_is_what_version_1_always_was():
    """A blob from the day the format was made: it must open for ever."""
    blob = bytes.fromhex(GOLDEN)
    assert (
        SEALER.open(Binding(purpose="epoch secrets", vault="5e" * 16, federation_id="clinic", epoch=1), blob)
        == b"golden"
    )
    assert key_id_of(blob).hex() == GOLDEN_KEY_ID


def test_no_repr_shows_a_key():
    for shown in (repr(KEY), repr(SEALER)):
        assert KEY.key_id.hex() in shown
        assert bytes(range(32)).hex() not in shown
        assert repr(bytes(range(32)))[2:20] not in shown


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_key_file_open_to_other_users_is_refused_with_the_remedy(sealing_key_file, mode):
    sealing_key_file.chmod(mode)
    with pytest.raises(DomainError, match=f"chmod 600 {sealing_key_file}") as caught:
        SealingKey.from_file(sealing_key_file)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID


@pytest.mark.parametrize(
    "content", ["", "ab" * 31, "ab" * 33, "AB" * 32, "g" * 64, "ab" * 16 + " " + "ab" * 16]
)
def test_a_key_that_is_not_64_hexadecimal_digits_is_refused_with_the_remedy(sealing_key_file, content):
    sealing_key_file.write_text(content)
    with pytest.raises(DomainError, match="make-sealing-key") as caught:
        SealingKey.from_file(sealing_key_file)
    assert not content or content not in caught.value.message
