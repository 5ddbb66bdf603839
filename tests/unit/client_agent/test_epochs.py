"""Which secrets an agent holds, and which rounds and results it refuses."""

import pytest

from client_agent.downloads import Result
from client_agent.keyring import Keyring
from client_agent.keys import EpochSecrets
from client_agent.participation import Participation
from shelora.ckks.parameters import INSECURE_TOY
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.errors import DomainError, Reason
from shelora.federation import ProtectionSpec
from shelora.lora.layout import Matrix
from shelora.messages import layout_to_proto
from shelora.negotiation.votes import vote_layout
from shelora.obfuscation import Obfuscation
from shelora.v1 import common_pb2

KEYS = {epoch: SecretKey.generate(INSECURE_TOY) for epoch in (1, 2)}


def released(epoch: int) -> EpochSecrets:
    key = KEYS[epoch]
    return EpochSecrets(
        epoch=epoch,
        obfuscation=Obfuscation(bytes(32), epoch),
        encryptor=Encryptor(key),
        decryptor=Decryptor(key),
        key_id=key.key_id,
    )


class Releasing:
    """A session that counts how often secrets are fetched."""

    def __init__(self) -> None:
        self.fetched: list[int] = []

    async def secrets(self, epoch: int) -> EpochSecrets:
        self.fetched.append(epoch)
        return released(epoch)


def holding(session: Releasing) -> Keyring:
    me = Participation(federation_id="clinic", client_id="ward-7", budget=1.0, protection=ProtectionSpec())
    return Keyring(me, session)


def refusal(action) -> Reason:
    with pytest.raises(DomainError) as refused:
        action()
    return refused.value.reason


async def test_secrets_are_fetched_once_and_those_of_other_epochs_forgotten():
    session = Releasing()
    keyring = holding(session)
    for _ in range(2):
        await keyring.enter(1)
        await keyring.secrets(2)
    assert session.fetched == [1, 2]
    await keyring.enter(2)
    keyring.forget_others(2)
    assert list(keyring._secrets) == [2]
    assert (await keyring.secrets(1)).epoch == 1
    assert session.fetched == [1, 2, 1]


async def test_a_round_of_an_epoch_before_one_it_took_part_in_is_refused():
    keyring = holding(Releasing())
    await keyring.enter(2)
    with pytest.raises(DomainError, match="took part in epoch 2") as refused:
        await keyring.enter(1)
    assert refused.value.reason is Reason.EPOCH_RETIRED


def test_an_aggregate_under_another_key_than_its_epoch_is_not_decrypted():
    layout = vote_layout((Matrix("m", 8, 12),), INSECURE_TOY.name, KEYS[2].key_id)
    assert released(2).decryptor_for(layout) is not None
    assert refusal(lambda: released(1).decryptor_for(layout)) is Reason.SECRET_UNAVAILABLE
    assert refusal(lambda: released(1).encryptor_for(layout)) is Reason.SECRET_UNAVAILABLE


@pytest.mark.parametrize("count", [0, 1])
def test_an_aggregate_of_fewer_than_two_updates_is_refused(count):
    layout = vote_layout((Matrix("m", 8, 12),), INSECURE_TOY.name, KEYS[1].key_id)
    message = common_pb2.ResultRef(
        round_id="clinic.0.1", layout=layout_to_proto(layout), contributor_count=count, epoch=1
    )
    assert refusal(lambda: Result.from_proto(message)) is Reason.TOO_FEW_CONTRIBUTORS
