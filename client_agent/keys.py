"""The secrets of one epoch, in memory only."""

from dataclasses import dataclass

from shelora.ckks.parameters import profile
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.errors import DomainError, Reason
from shelora.lora.layout import Layout
from shelora.obfuscation import Obfuscation, epoch_secret_id
from shelora.v1 import key_authority_pb2 as pb


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class EpochSecrets:
    """What the key authority releases to agents. Its `repr` shows no secret."""

    epoch: int
    obfuscation: Obfuscation
    encryptor: Encryptor | None = None
    decryptor: Decryptor | None = None
    key_id: bytes = b""
    """Public identifier of the CKKS key, or without one of the obfuscation secret, 16 bytes; empty without secrets."""

    @property
    def secret(self) -> bool:
        """Whether these are secrets at all, and not the public values of protection "none"."""
        return bool(self.key_id)

    @classmethod
    def from_proto(cls, epoch: int, message: pb.GetEpochSecretsResponse) -> "EpochSecrets":
        """Raises: DomainError SECRET_UNAVAILABLE if the key authority sent something else than secrets."""
        obfuscation = Obfuscation(message.obfuscation_secret, epoch)
        if not message.parameters:
            _require_announced(epoch_secret_id(message.obfuscation_secret), message)
            return cls(epoch=epoch, obfuscation=obfuscation, key_id=message.key_id)
        key = SecretKey.from_bytes(profile(message.parameters), message.ckks_secret_key)
        _require_announced(key.key_id, message)
        return cls(
            epoch=epoch,
            obfuscation=obfuscation,
            encryptor=Encryptor(key),
            decryptor=Decryptor(key),
            key_id=key.key_id,
        )

    @classmethod
    def unprotected(cls, federation_id: str, epoch: int) -> "EpochSecrets":
        """For protection "none": no key, and initial factors that all agents agree on but that are not secret."""
        return cls(epoch=epoch, obfuscation=Obfuscation.public(f"unprotected/{federation_id}", epoch))

    def encryptor_for(self, layout: Layout) -> Encryptor | None:
        """The encryptor, or None if the layout encrypts nothing. Raises: SECRET_UNAVAILABLE for another key."""
        return self.encryptor if self._opens(layout) else None

    def decryptor_for(self, layout: Layout) -> Decryptor | None:
        """The decryptor, or None if the layout encrypts nothing. Raises: SECRET_UNAVAILABLE for another key."""
        return self.decryptor if self._opens(layout) else None

    def _opens(self, layout: Layout) -> bool:
        if layout.encrypts and layout.key_id != self.key_id:
            raise DomainError(Reason.SECRET_UNAVAILABLE, "the layout is under another key than this epoch's")
        return layout.encrypts


def _require_announced(key_id: bytes, message: pb.GetEpochSecretsResponse) -> None:
    if key_id != message.key_id:
        raise DomainError(Reason.SECRET_UNAVAILABLE, "the key authority sent another key than it announced")
