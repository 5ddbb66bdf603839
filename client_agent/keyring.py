"""Which epochs' secrets this agent holds, and which rounds it refuses for their epoch."""

from client_agent.keys import EpochSecrets
from client_agent.participation import Participation
from client_agent.session import Session
from shelora.errors import DomainError, Reason


class Keyring:
    """Secrets of the epochs that the newest assignment needs, at most two; others are forgotten."""

    def __init__(self, me: Participation, session: Session) -> None:
        self._me = me
        self._session = session
        self._secrets: dict[int, EpochSecrets] = {}
        self._newest_epoch = 0

    async def secrets(self, epoch: int) -> EpochSecrets:
        """The secrets of an epoch, fetched once. A strategy without keys has none."""
        if epoch not in self._secrets:
            self._secrets[epoch] = (
                EpochSecrets.unprotected(self._me.federation_id, epoch)
                if not self._me.protection.strategy.needs_keys
                else await self._session.secrets(epoch)
            )
        return self._secrets[epoch]

    async def enter(self, epoch: int) -> EpochSecrets:
        """The secrets of the epoch that a round is in.

        Raises: EPOCH_RETIRED if a later one has begun: who was revoked since knows the secrets of this one.
        """
        if epoch < self._newest_epoch:
            raise DomainError(
                Reason.EPOCH_RETIRED,
                f"a round in epoch {epoch} is refused: this agent took part in epoch {self._newest_epoch}",
            )
        secrets = await self.secrets(epoch)
        self._newest_epoch = epoch
        return secrets

    def forget_others(self, epoch: int) -> None:
        """Forgets the secrets of other epochs; what they are needed for again would be fetched again."""
        self._secrets = {known: secrets for known, secrets in self._secrets.items() if known == epoch}
