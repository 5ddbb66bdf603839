"""Whether all that servers hold after a real round, with one colluding agent's secrets, gives another agent's update.

Under `selective` it does, as every agent has the same key: that is the control, and what docs/threat-model.md says.
Under `complete` it does not; what they get is the sum of the others, which any agent can work out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest

import client_agent.committees
from client_agent.keys import EpochSecrets
from coordinator.records import LayoutRecord
from services.aggregation.keys import PREFIX
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SumOpener
from shelora.additive.wire import sum_header, summand_planes
from shelora.ckks.wire import decode_block
from shelora.committee.context import RoundContext
from shelora.committee.dealer import Dealer
from shelora.committee.member import Member
from shelora.committee.shamir import PackedSharing
from shelora.errors import DomainError
from shelora.lora.codec import decode_update
from shelora.lora.layout import Layout
from shelora.lora.products import KIND as PRODUCTS_KIND
from shelora.lora.sums import SKETCHES_KIND
from shelora.rounds import RoundState
from tests.simulation.cluster import Size
from tests.simulation.observer import Observer
from tests.simulation.simulation import Schedule, run

SPY, VICTIM = "agent-1", "agent-2"


@dataclass
class Loot:
    """What servers stored in the first round, and what agents held in memory."""

    updates: dict[str, bytes] = field(default_factory=dict)
    """By client, its first shard as aggregation stored it."""
    layout: Layout | None = None
    secrets: EpochSecrets | None = None
    """The epoch's, which the key authority has, and every agent."""
    keys: dict[str, np.ndarray] = field(default_factory=dict)
    """By client, its secret of the round: only its own is a spy's to use."""
    context: RoundContext | None = None
    opened: Any = None
    shares: dict[str, np.ndarray] = field(default_factory=dict)
    """By dealer, the spy's share."""


@contextmanager
def plundered() -> Iterator[Loot]:  # noqa: C901 - five places to look at
    loot = Loot()
    look, from_proto, dealer = Observer._look_at_round, EpochSecrets.from_proto, Dealer.__init__
    open_round, release = client_agent.committees.open_round, Member.release

    def looked(self: Observer, record: Any) -> None:
        look(self, record)
        if record.round.state is RoundState.AGGREGATING and record.round.kind == "TRAIN" and not loot.updates:
            key = self._keys.layout(self._federation_id, record.layout_digest)
            loot.layout = LayoutRecord.model_validate_json(self._valkey.value(key)).layout()
            for key in self._valkey.keys(f"{PREFIX}*"):
                name = key.decode().removeprefix(PREFIX)
                if ":update:" in name and name.startswith(f"{{{record.round.round_id}}}"):
                    client, shard = name.partition(":update:")[2].split(":")[:2]
                    if shard == "0":
                        loot.updates[client] = self._valkey.value(key)

    def released(message: Any, *rest: Any) -> Any:
        loot.secrets = from_proto(message, *rest)
        return loot.secrets

    def dealt(self: Dealer, context: RoundContext, keys: Any, signer: Any, rng: Csprng) -> None:
        dealer(self, context, keys, signer, rng)
        if context.round_number == 1:
            loot.keys[signer.name] = self._secret.coefficients
            loot.context = context

    def opened(*arguments: Any) -> Any:
        found = open_round(*arguments)
        loot.opened = loot.opened or found
        return found

    def answered(self: Member, certificate: Any) -> Any:
        if self._signer.name == SPY and self.context.round_number == 1:
            loot.shares = {name: held.share for name, held in self._held.items()}
        return release(self, certificate)

    with (
        mock.patch.object(Observer, "_look_at_round", looked),
        mock.patch.object(EpochSecrets, "from_proto", released),
        mock.patch.object(Dealer, "__init__", dealt),
        mock.patch.object(client_agent.committees, "open_round", opened),
        mock.patch.object(Member, "release", answered),
    ):
        yield loot


def plain(loot: Loot, key: np.ndarray, data: bytes) -> np.ndarray:
    """A summand decrypted under a key, without a look at whether it is the right one."""
    context, layout = loot.context, loot.layout
    shape = SKETCHES_KIND.shape(layout, 0)
    summand = summand_planes(decode_update(layout, 0, data).ciphertexts, shape)
    with (
        mock.patch("shelora.additive.secret.check_secret_sum"),
        mock.patch.object(SumOpener, "_check_guard"),
    ):
        opener = SumOpener(context.parameters, key, context.digest, 1, context.most_contributors)
        return opener.open(sum_header(shape, 1) + bytes(summand), shape)


def test_under_selective_the_key_that_all_agents_share_decrypts_everyone():
    with plundered() as loot:
        report = run(Schedule(0, Size(3, 1, negotiation="sealed"), ()))
    assert not report.violation, report.violation
    content = decode_update(loot.layout, 0, loot.updates["agent-1"])  # which encrypts all columns
    shape = PRODUCTS_KIND.update_block_shape(loot.layout, content)
    rows = loot.secrets.decryptor.decrypt(decode_block(content.ciphertexts, shape), 4)
    marks = np.sort(np.abs(rows).ravel())
    np.testing.assert_allclose(marks[-1], 0.5, atol=1e-4, err_msg="the mark that the victim set in A")
    np.testing.assert_allclose(marks[:-1], 0, atol=1e-4)


def test_under_complete_servers_and_an_agent_decrypt_the_sum_of_the_others_and_no_update():
    with plundered() as loot:
        report = run(Schedule(0, Size(5, 1, complete=True), ()))
    assert not report.violation, report.violation
    assert set(loot.updates) == set(loot.keys) == set(loot.opened.contributors)
    assert loot.secrets.decryptor is None, "no key decrypts"
    truth = plain(loot, loot.keys[VICTIM], loot.updates[VICTIM])
    assert np.abs(truth).max() <= 1.001, "the control: under its own key it opens"
    S, own = loot.opened.secret_sum, loot.keys[SPY]
    np.testing.assert_array_equal(S, sum(loot.keys.values()))
    guesses = {
        "S": S,
        "S less the spy's": S - own,
        "the spy's": own,
        "the mean of the others'": np.rint((S - own) / (len(loot.keys) - 1)).astype(np.int64),
        "zero": np.zeros_like(S),
    }
    for name, guess in guesses.items():
        found = plain(loot, guess, loot.updates[VICTIM])
        near = np.mean(np.abs(found - truth) < 0.01)
        assert near < 0.2, f"{name} opens the victim's update"
    sharing = PackedSharing(loot.context.rule)
    with pytest.raises(DomainError):
        sharing.open([1], loot.shares[VICTIM][None].astype(np.int64), Csprng.fresh())
    others = sum(plain(loot, loot.keys[n], loot.updates[n]) for n in loot.keys if n != SPY)
    rest = sum(plain(loot, loot.keys[n], loot.updates[n]) for n in loot.keys) - plain(
        loot, own, loot.updates[SPY]
    )
    np.testing.assert_allclose(others, rest, atol=1e-6)
