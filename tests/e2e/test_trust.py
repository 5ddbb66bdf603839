"""What servers, their disks and one colluding agent hold of another agent, during and after a round of real processes.

Servers are processes of their own; every command that Redis wrote is copied from its append-only file while they run.
The agents are the real ones and share this process, so that what one of them holds in memory can be taken, and what
another one holds is known to compare with. `tests/simulation/test_trust.py` does the same without processes.
"""

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from google.protobuf.message import DecodeError

import client_agent.committees
from attack.capture import Round, Tap, commands, replayed
from attack.insiders import opened_update
from client_agent.drawing import seed_of
from client_agent.keys import EpochSecrets
from load.learner import MATRICES, _values
from services.key_authority.custody import read_vault
from services.key_authority.sealer import SealingKey
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SecretKey, SumOpener
from shelora.additive.wire import sum_header, summand_planes
from shelora.cli.cluster import LocalCluster
from shelora.committee.context import RoundContext
from shelora.committee.dealer import Dealer
from shelora.committee.dealing import COMBINATIONS, read_dealing, share_bytes
from shelora.committee.field import PRIME, decode_values, signed
from shelora.committee.holding import Inspector
from shelora.committee.member import Member
from shelora.committee.sealing import open_share
from shelora.committee.shamir import PackedSharing
from shelora.errors import DomainError
from shelora.lora.codec import decode_update
from shelora.lora.sums import SKETCHES_KIND
from shelora.v1 import committee_pb2
from tests.insiders.lab import Lab

MEMBERS = ("clinic", "bank", "spy", "ward")
"""As many as T = 1 is for: one of them colludes."""
SPY, VICTIM = "spy", "ward"
NEAR = 0.01
"""Of a value's bound."""
CHANCE = 0.2
"""Most of the values that a wrong key may give right: honest values are small, and noise is even over all of them."""
NEEDLE = 12
"""Coefficients of a secret that are searched for in a row, 56 bits: each is drawn with a deviation of 6.4."""


@dataclass
class Loot:
    """What is taken in the agents' process. Only what is the spy's is the attacker's to use."""

    secrets: EpochSecrets | None = None
    """The epoch's: the same for all agents; the key authority has them too."""
    context: RoundContext | None = None
    keys: dict[str, np.ndarray] = field(default_factory=dict)
    """By client, the secret of its update."""
    inspector: Inspector | None = None
    """The spy's private key as a member."""
    shares: dict[str, np.ndarray] = field(default_factory=dict)
    """By dealer, the spy's share."""
    answer_key: bytes = b""
    opened: Any = None
    during: list[str] = field(default_factory=list)
    """Servers whose memory held the victim's secret while the committee answered."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("trust")
    with LocalCluster(folder / "cluster", fixed_ports=False, workers=1) as cluster:
        yield Lab(cluster, folder)


@contextmanager
def plundered(cluster: LocalCluster) -> Iterator[Loot]:
    loot = Loot()
    from_proto, dealer, member = EpochSecrets.from_proto, Dealer.__init__, Member.__init__
    open_round, release = client_agent.committees.open_round, Member.release

    def released(*arguments: Any) -> Any:
        loot.secrets = from_proto(*arguments)
        return loot.secrets

    def dealt(self: Dealer, context: RoundContext, keys: Any, signer: Any, rng: Csprng) -> None:
        dealer(self, context, keys, signer, rng)
        loot.keys[signer.name], loot.context = self._secret.coefficients, context

    def seated(self: Member, *arguments: Any) -> None:
        member(self, *arguments)
        if self._signer.name == SPY:
            loot.inspector, loot.answer_key = self._inspector, self._answer_key

    def answered(self: Member, certificate: Any) -> Any:
        if self._signer.name == SPY:
            loot.shares = {name: held.share for name, held in self._held.items()}
            with suppress(PermissionError):  # then nothing is said of memory
                loot.during = holders(cluster, loot.keys[VICTIM])
        return release(self, certificate)

    def opened(*arguments: Any) -> Any:
        loot.opened = open_round(*arguments)
        return loot.opened

    with (
        mock.patch.object(EpochSecrets, "from_proto", released),
        mock.patch.object(Dealer, "__init__", dealt),
        mock.patch.object(Member, "__init__", seated),
        mock.patch.object(Member, "release", answered),
        mock.patch.object(client_agent.committees, "open_round", opened),
    ):
        yield loot


async def a_round(lab: Lab, mode: str) -> tuple[str, Loot, bytes]:
    """One round of a federation in that mode. Returns its name, what was taken, and what Redis wrote."""
    with Tap(lab.folder / "cluster" / "redis") as tap, plundered(lab.cluster) as loot:
        rules = {"clients": len(MEMBERS), "min_updates": len(MEMBERS), "committee_s": 300, "deadline_s": 300}
        spec = await lab.create(mode, protection={"mode": mode}, round=rules)
        async with lab.running(spec, *MEMBERS) as members:
            assert await members == ["finished"] * len(MEMBERS)
        return spec.name, loot, tap.taken()


def truth(name: str) -> dict[str, np.ndarray]:
    """What a client trained in the first round: B A by matrix."""
    rng, found = np.random.default_rng(seed_of(name, 1)), {}
    for matrix in MATRICES:
        B, A = _values(rng, matrix.out_features, 4), _values(rng, 4, matrix.in_features)
        found[matrix.name] = B.astype(np.float64) @ A
    return found


def plain(loot: Loot, key: np.ndarray, shards: Mapping[int, bytes], round_: Round) -> np.ndarray:
    """The first shard of an update under a key, whether or not it is the right one."""
    context, shape = loot.context, SKETCHES_KIND.shape(round_.layout, 0)
    summand = summand_planes(decode_update(round_.layout, 0, shards[0]).ciphertexts, shape)
    with (
        mock.patch("shelora.additive.secret.check_secret_sum"),
        mock.patch.object(SumOpener, "_check_guard"),
    ):
        opener = SumOpener(context.parameters, key, context.digest, 1, context.most_contributors)
        return opener.open(sum_header(shape, 1) + bytes(summand), shape)


def stored(log: bytes, kind: type[Any]) -> list[Any]:
    """Everything that Redis ever stored and that reads as such a message, each once."""
    found = {}
    for word in {word for command in commands(log) for word in command if len(word) > 64}:
        message = kind()
        try:
            message.ParseFromString(word)
        except DecodeError:  # most of it is something else
            continue
        found[message.SerializeToString(deterministic=True)] = message
    return list(found.values())


def shares_opened(loot: Loot, log: bytes) -> dict[tuple[str, int], np.ndarray]:
    """By dealer and position, the stored shares that the spy's key opens."""
    context, found = loot.context, {}
    sealed = {d.share.sealed for d in stored(log, committee_pb2.DealtShare)}
    sealed = {share for share in sealed if len(share) == share_bytes(context)}
    assert len(sealed) == len(MEMBERS) ** 2, "the control: every member's share of every dealer was captured"
    dealings = []
    for statement in stored(log, committee_pb2.Signed):
        try:
            dealings.append(read_dealing(context, statement.content))
        except DomainError:
            continue
    assert len(dealings) == len(MEMBERS), "the control: every dealing was captured"
    tries = [(d, n, p) for d in dealings for n in MEMBERS for p in range(1, len(MEMBERS) + 1)]
    for dealing, name, position in tries:
        for share in sealed:
            try:
                content = open_share(
                    context, name, position, dealing.ephemeral_key, loot.inspector._private, share
                )
            except DomainError:
                continue
            found[name, position] = decode_values(content, context.shares + COMBINATIONS)[: context.shares]
    return found


def guesses(loot: Loot) -> dict[str, np.ndarray]:
    """Keys that can be made of what servers and the spy hold."""
    S, own, others = loot.opened.secret_sum, loot.keys[SPY], len(MEMBERS) - 1
    obfuscation = loot.secrets.obfuscation
    known = {
        "the epoch's secret": obfuscation._secret,
        "the committee's order key": obfuscation.committee_key(),
        "the answer key": loot.answer_key,
        "the digest of the context": loot.context.digest,
    }
    drawn = {
        f"drawn from {name}": SecretKey.draw(loot.context.parameters, Csprng(seed)).coefficients
        for name, seed in known.items()
    }
    return {
        "S": S,
        "S less the spy's": S - own,
        "the spy's": own,
        "the mean of the others'": np.rint((S - own) / others).astype(np.int64),
        "the spy's share of it": signed(loot.shares[VICTIM].astype(np.int64)),
        "zero": np.zeros_like(S),
        **drawn,
    }


def needles(secret: np.ndarray) -> list[bytes]:
    """How a program may hold the beginning of a secret."""
    part = secret[:NEEDLE]
    kinds = [np.int8, np.int16, np.int32, np.int64, np.float64]
    return [*(part.astype(kind).tobytes() for kind in kinds), (part % PRIME).astype("<u2").tobytes()]


def memory_of(pid: int) -> Iterator[bytes]:
    """What a process has written to its memory, region by region. Raises: PermissionError."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in maps.read().splitlines():
            place, rights, *_ = line.split()
            if rights.startswith("rw"):
                first, last = (int(end, 16) for end in place.split("-"))
                memory.seek(first)
                try:
                    yield memory.read(last - first)
                except OSError:  # a region that is no memory, or is gone
                    continue


def is_held(pid: int, secret: np.ndarray) -> bool:
    return any(needle in region for region in memory_of(pid) for needle in needles(secret))


def servers(cluster: LocalCluster) -> dict[int, str]:
    """Every process of every server, workers included, by its id."""
    leaders = {process.popen.pid: process.name for process in cluster.processes}
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            leader = os.getsid(int(entry.name))
        except (ValueError, ProcessLookupError):
            continue
        if leader in leaders:
            found[int(entry.name)] = leaders[leader]
    return found


def holders(cluster: LocalCluster, secret: np.ndarray) -> list[str]:
    """Servers that hold a secret in memory."""
    return sorted(name for pid, name in servers(cluster).items() if is_held(pid, secret))


@pytest.fixture(scope="module")
def complete(lab: Lab) -> tuple[str, Loot, bytes]:
    return asyncio.run(a_round(lab, "complete"))


def test_servers_and_an_agent_decrypt_the_sum_of_the_others_and_no_update(complete):
    name, loot, log = complete
    (round_,) = replayed(log, name)
    assert round_.clients() == sorted(MEMBERS)
    update = round_.of(VICTIM)
    real = plain(loot, loot.keys[VICTIM], update, round_)
    assert np.abs(real).max() <= 1.001, "the control: under its own key the captured update opens"
    for what, key in guesses(loot).items():
        near = np.mean(np.abs(plain(loot, key, update, round_) - real) < NEAR)
        assert near < CHANCE, f"{what} opens the victim's update"
    np.testing.assert_array_equal(loot.opened.secret_sum, sum(loot.keys.values()))
    rest = sum(plain(loot, loot.keys[n], round_.of(n), round_) for n in MEMBERS if n != SPY)
    own = plain(loot, loot.keys[SPY], round_.of(SPY), round_)
    everyone = sum(plain(loot, loot.keys[n], round_.of(n), round_) for n in MEMBERS)
    np.testing.assert_allclose(everyone - own, rest, atol=1e-6, err_msg="what they do learn")


def test_of_all_stored_shares_a_members_key_opens_its_own_and_one_share_tells_nothing(complete):
    _, loot, log = complete
    opened = shares_opened(loot, log)
    position = loot.inspector._position
    assert set(opened) == {(name, position) for name in MEMBERS}
    share = opened[VICTIM, position]
    np.testing.assert_array_equal(share, loot.shares[VICTIM])
    with pytest.raises(DomainError):
        PackedSharing(loot.context.rule).open([position], share[None].astype(np.int64), Csprng.fresh())


def test_neither_redis_nor_a_disk_holds_a_clients_secret_and_the_key_authority_has_no_key(lab, complete):
    _, loot, log = complete
    folder = lab.folder / "cluster"
    vault = read_vault(folder / "key-authority", SealingKey.from_file(folder / "sealing-key"))
    held = [vault.read(epoch) for epoch in vault.epochs()]
    assert held
    assert all(secrets.ckks_secret_key == b"" for secrets in held)
    assert loot.secrets.decryptor is None
    files = [path for path in (folder, lab.folder / "clients") for path in path.rglob("*") if path.is_file()]
    found = [path.read_bytes() for path in files]
    assert any(b"finished" in content for content in found), "the control: logs are among them"
    for content in (log, *found):
        assert not any(needle in content for needle in needles(loot.keys[VICTIM]))


def test_no_servers_memory_holds_a_clients_secret(lab, complete):
    _, loot, _ = complete
    try:
        held = holders(lab.cluster, loot.keys[VICTIM])
    except PermissionError:
        pytest.skip("this user may not read the memory of other processes")
    assert is_held(os.getpid(), loot.keys[VICTIM]), "the control: the agents' own process does"
    assert loot.during == held == []


def test_under_selective_the_same_loot_decrypts_everyone(lab):
    """The control: every agent has the one key, as in the paper. docs/threat-model.md says so."""
    name, loot, log = asyncio.run(a_round(lab, "selective"))
    (round_,) = (found for found in replayed(log, name) if found.layout.matrices)
    factors = opened_update(round_, VICTIM, loot.secrets)
    real = truth(VICTIM)
    assert set(factors) == set(real)
    for matrix, product in real.items():
        found = factors[matrix].B @ factors[matrix].A
        # B travels in 16 bits by default: 0.3 % of the largest entry.
        np.testing.assert_allclose(found, product, atol=0.02 * np.abs(product).max())
