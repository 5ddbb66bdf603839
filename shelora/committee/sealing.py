"""Sealing between clients: X25519, HKDF-SHA256, ChaCha20-Poly1305 for shares; AES-256-GCM for answers."""

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shelora.additive.sampler import Csprng
from shelora.committee.context import RoundContext
from shelora.errors import DomainError, Reason

TAG_BYTES: Final = 16
NONCE_BYTES: Final = 12

_SHARE_DOMAIN: Final = b"shelora/committee/v1/share"
_ANSWER_DOMAIN: Final = b"shelora/committee/v1/answer"
_ZERO_NONCE: Final = bytes(NONCE_BYTES)
"""A key of `_share_key` seals one share only."""


def new_exchange_key(rng: Csprng) -> X25519PrivateKey:
    """A fresh X25519 key."""
    return X25519PrivateKey.from_private_bytes(rng.bytes(32))


def seal_share(
    context: RoundContext,
    dealer: str,
    position: int,
    ephemeral: X25519PrivateKey,
    member: bytes,
    share: bytes,
) -> bytes:
    """A share for the member at a position, 16 bytes longer than the share.

    Args: ephemeral: The dealer's, of this dealing alone. member: The member's public key, 32 bytes.
    Raises: DomainError(COMMITTEE_REFUSED): the public key is of small order.
    """
    info = _share_info(context, dealer, position)
    public = ephemeral.public_key().public_bytes_raw()
    key = _share_key(_agreed(ephemeral, member), public + member, info)
    return ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, share, info)


def open_share(
    context: RoundContext,
    dealer: str,
    position: int,
    ephemeral: bytes,
    member: X25519PrivateKey,
    sealed: bytes,
) -> bytes:
    """What `seal_share` sealed. Raises: DomainError(DEALING_REFUSED): it is not for this member, dealer and context."""
    info = _share_info(context, dealer, position)
    try:
        public = member.public_key().public_bytes_raw()
        key = _share_key(_agreed(member, ephemeral), ephemeral + public, info)
        return ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, sealed, info)
    except (DomainError, InvalidTag):
        raise DomainError(Reason.DEALING_REFUSED, f"the share of {dealer} does not open") from None


def seal_answer(answer_key: bytes, set_digest: bytes, position: int, answer: bytes, rng: Csprng) -> bytes:
    """A member's answer for all who have the epoch's answer key, 28 bytes longer. Args: answer_key: 32 bytes."""
    nonce = rng.bytes(NONCE_BYTES)
    return nonce + AESGCM(answer_key).encrypt(nonce, answer, _answer_info(set_digest, position))


def open_answer(answer_key: bytes, set_digest: bytes, position: int, sealed: bytes) -> bytes:
    """What `seal_answer` sealed. Raises: DomainError(ANSWERS_REFUSED): it is not for this key, set and position."""
    try:
        nonce, body = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        return AESGCM(answer_key).decrypt(nonce, body, _answer_info(set_digest, position))
    except (InvalidTag, ValueError):
        raise DomainError(Reason.ANSWERS_REFUSED, f"the answer of member {position} does not open") from None


def _agreed(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise DomainError(Reason.COMMITTEE_REFUSED, "an X25519 key is of small order or malformed") from None


def _share_key(agreed: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, info).derive(agreed)


def _share_info(context: RoundContext, dealer: str, position: int) -> bytes:
    return _SHARE_DOMAIN + context.digest + bytes([position]) + dealer.encode()


def _answer_info(set_digest: bytes, position: int) -> bytes:
    return _ANSWER_DOMAIN + set_digest + bytes([position])
