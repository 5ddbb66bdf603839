"""What an agent refuses of a round whose sum a committee opens, whoever asks for it."""

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from client_agent.attempts import Attempt
from client_agent.committees import Committees
from client_agent.keys import EpochSecrets
from client_agent.session import is_fatal
from client_agent.state import AgentState, CertifiedSetsFile
from shelora.additive.parameters import DEFAULT, INSECURE_TOY, SMALL
from shelora.committee.context import COMMON_START, RoundContext, result_digest
from shelora.committee.dealing import shown_to
from shelora.committee.rules import CommitteeRule, committee_rule
from shelora.committee.statements import Signer, StatementKind
from shelora.errors import DomainError, Reason
from shelora.federation import ProtectionSpec, RoundSpec
from shelora.lora.layout import Matrix
from shelora.lora.noise import ClientNoise
from shelora.obfuscation import Obfuscation, epoch_secret_id
from shelora.strategies.complete import STRATEGY
from shelora.strategies.port import RoundTerms
from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.unit.committee.rounds import World, context_of

SECRET = bytes(range(32))
SECRETS = EpochSecrets(epoch=1, obfuscation=Obfuscation(SECRET, 1), key_id=epoch_secret_id(SECRET))
COHORT = tuple(f"ward-{index}" for index in range(5))


@dataclass(frozen=True)
class Model:
    matrices = (Matrix("query", 8, 12),)
    tensors = ()


LAYOUT = STRATEGY.layout(Model(), ProtectionSpec(mode="complete"), RoundTerms(key_id=b"", max_rank=2))
CONTEXT = RoundContext(
    federation_id="clinic",
    instance="00000001",
    round_id="clinic.00000001.4",
    kind="TRAIN",
    round_number=2,
    attempt=1,
    epoch=1,
    layout_digest=LAYOUT.digest,
    parameters=DEFAULT,
    cohort=COHORT,
    most_contributors=5,
    rule=committee_rule(5),
    min_updates=3,
    most_weight=100,
)


def committees(client_id: str = "ward-1", **calls) -> Committees:
    unused = SimpleNamespace(**calls)
    return Committees(
        "clinic",
        client_id,
        RoundSpec(min_updates=3, clients=5),
        calls=unused,
        state=unused,
        identity=unused,
        worker=unused,
    )


def asked(**changes) -> pb.RoundRef:
    message = CONTEXT.to_proto()
    for name, value in changes.items():
        if name == "cohort":
            message.ClearField(name)
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return pb.RoundRef(round_id=CONTEXT.round_id, attempt=1, epoch=1, context=message)


def test_a_round_as_promised_is_worked_out_and_its_committee_is_nobodys_word():
    attempt = committees().attempt(asked(), LAYOUT, SECRETS)
    assert attempt.context == CONTEXT
    assert set(attempt.committee.members) == set(COHORT)
    other = EpochSecrets(epoch=1, obfuscation=Obfuscation(bytes(32), 1), key_id=epoch_secret_id(bytes(32)))
    assert committees().attempt(asked(), LAYOUT, other).committee != attempt.committee


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"min_updates": 2}, "opens sums of 2 updates, and the federation promised 3"),
        ({"parameters": SMALL.name}, "other parameters"),
        ({"parameters": INSECURE_TOY.name}, "for tests only"),
        ({"threshold": 1}, "must tolerate 2"),
        ({"committee_size": 4, "threshold": 2}, "not that of its cohort"),
        ({"most_contributors": 9}, "scale"),
        ({"layout_digest": bytes(32)}, "another layout"),
        ({"federation_id": "bank"}, "another federation"),
        ({"instance": "00000002"}, "another federation"),
        ({"round_id": "clinic.00000001.5"}, "another round"),
        ({"kind": "VOTE"}, "not a training round"),
        ({"epoch": 2}, "another round"),
        ({"attempt": 2}, "another round"),
        ({"cohort": [*COHORT[:1], *COHORT[2:], "x"]}, "not in its cohort"),
    ],
)
def test_a_round_that_protects_less_than_promised_halts_the_agent_and_says_why(changes, why):
    with pytest.raises(DomainError, match=why) as refused:
        committees().attempt(asked(**changes), LAYOUT, SECRETS)
    assert refused.value.reason is Reason.COMMITTEE_REFUSED
    assert is_fatal(refused.value)


def test_clients_that_sums_hide_weigh_alike():
    noise = ClientNoise(bound=4.0, clip=1.0, multiplier=1.0, honest=2)
    hidden = replace(LAYOUT, sums=replace(LAYOUT.sums, noise=noise, figures=False))
    with pytest.raises(DomainError, match="every update has weight 1") as refused:
        committees().attempt(asked(layout_digest=hidden.digest), hidden, SECRETS)
    assert refused.value.reason is Reason.COMMITTEE_REFUSED
    alike = asked(layout_digest=hidden.digest, most_weight=1)
    assert committees().attempt(alike, hidden, SECRETS).context.most_weight == 1


def test_without_the_epochs_secret_there_is_no_committee():
    with pytest.raises(DomainError) as refused:
        committees().attempt(asked(), LAYOUT, EpochSecrets.unprotected("clinic", 1))
    assert refused.value.reason is Reason.SECRET_UNAVAILABLE


def test_attempts_share_an_update_only_if_the_same_committee_decides_about_the_same_draw():
    def variant(**changes) -> str:
        fields = {name: getattr(CONTEXT, name) for name in CONTEXT.__dataclass_fields__} | changes
        context = RoundContext(**fields)
        committee = context.committee(SECRETS.obfuscation.committee_key())
        return Attempt(context, committee, b"").variant

    again = variant(attempt=2, round_id="clinic.00000001.5")
    assert again == variant()
    others = [
        variant(round_number=3),
        variant(instance="00000002", round_id="clinic.00000002.4"),
        variant(cohort=COHORT[:4], most_contributors=4, rule=CommitteeRule(4, 1, 1)),
        variant(epoch=2),
    ]
    assert len({variant(), *others}) == 5


def test_a_round_that_starts_from_another_result_is_refused(tmp_path: Path):
    mine, other = (result_digest("clinic.00000001.3", [shard]) for shard in (b"\1" * 32, b"\2" * 32))
    committees().attempt(asked(start=mine), LAYOUT, SECRETS, mine)
    for start in (other, COMMON_START):
        with pytest.raises(DomainError, match="starts from another result") as refused:
            committees().attempt(asked(start=start), LAYOUT, SECRETS, mine)
        assert refused.value.reason is Reason.COMMITTEE_REFUSED
    state = AgentState(tmp_path / "state")
    state.require_result("clinic.00000001.3", mine)
    state.note_result("clinic.00000001.3", mine)
    state.require_result("clinic.00000001.3", mine)
    state.require_result("clinic.00000001.4", other)
    with pytest.raises(DomainError, match="another result of clinic"):
        state.require_result("clinic.00000001.3", other)


async def test_a_member_that_lost_its_key_says_so_and_does_nothing_else():
    left = []

    async def leave(round_id: str) -> None:
        left.append(round_id)

    serve = pb.Serve(round=asked(), step=pb.Serve.STEP_SIGN, proposed=b"any")
    await committees(leave=leave).serve(serve)
    assert left == [CONTEXT.round_id]


async def test_a_member_that_left_its_committee_deals_on_when_its_round_is_tried_again():
    """Simulation seed 1432: it stated that it is not a member, was refused for that, and ended."""
    said = []

    async def post(_round_id: str, _order: object, key: object) -> None:
        said.append("key" if key else "no key")
        raise DomainError(Reason.STATEMENT_REWRITTEN, "another key, before its restart")

    async def leave(_round_id: str) -> None:
        said.append("left")

    convening = committees("ward-1", post_key=post, leave=leave)
    attempt = convening.attempt(asked(), LAYOUT, SECRETS)
    convening._member = lambda _: SimpleNamespace(key="signed", forget=lambda: None)
    await convening.join(attempt)
    await convening.join(attempt)
    assert said == ["key", "left"]


async def test_an_opening_of_another_result_is_refused():
    async def opening(_: str, *, has_keys: bool) -> pb.GetOpeningResponse:
        return pb.GetOpeningResponse(context=CONTEXT.to_proto())

    result = common_pb2.ResultRef(round_id="clinic.00000001.9", epoch=1, contributor_count=5)
    with pytest.raises(DomainError, match="opens another result"):
        await committees(opening=opening).opened(result, LAYOUT, SECRETS)


def test_certified_sets_outlive_the_process_and_a_damaged_file_is_not_an_empty_one(tmp_path: Path):
    path = tmp_path / "certified.json"
    CertifiedSetsFile(path).note("00000001", "TRAIN", 1, b"\1" * 32)
    CertifiedSetsFile(path).note("00000001", "TRAIN", 2, b"\2" * 32)
    again = CertifiedSetsFile(path)
    assert again.certified("00000001", "TRAIN", 1) == b"\1" * 32
    assert again.certified("00000001", "TRAIN", 2) == b"\2" * 32
    assert again.certified("00000002", "TRAIN", 1) is None
    for damage in (b"", b"{}", path.read_bytes()[:-9], b'{"format": 2, "sets": {}}'):
        path.write_bytes(damage)
        for use in (
            lambda: again.certified("00000001", "TRAIN", 1),
            lambda: again.note("00000001", "TRAIN", 3, bytes(32)),
        ):
            with pytest.raises(DomainError) as refused:
                use()
            assert refused.value.reason is Reason.CONFIGURATION_INVALID


def test_a_noted_set_is_never_replaced(tmp_path: Path):
    notes = CertifiedSetsFile(tmp_path / "certified.json")
    for _ in range(2):
        notes.note("00000001", "TRAIN", 1, b"\1" * 32)
    with pytest.raises(DomainError) as refused:
        notes.note("00000001", "TRAIN", 1, b"\2" * 32)
    assert refused.value.reason is Reason.ROUND_SPENT
    assert notes.certified("00000001", "TRAIN", 1) == b"\1" * 32


def test_a_set_and_the_name_of_its_file_are_on_disk_before_it_is_signed(tmp_path: Path):
    world = World(context_of(3)).collect()
    name = world.committee.members[0]
    member = world.member(name)
    member._notes = CertifiedSetsFile(tmp_path / "certified.json")
    for dealer in world.dealt:
        shown = shown_to(world.context, world.dealt[dealer], world.members[name].position)
        world.members[name].receive(dealer, shown, world.keys)
    member._held = world.members[name]._held
    done, sync, sign = [], os.fsync, Signer.sign

    def synced(descriptor: int) -> None:
        sync(descriptor)
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def signed(*arguments: object) -> object:
        done.append(str(arguments[1]))
        return sign(*arguments)

    with mock.patch.object(os, "fsync", synced), mock.patch.object(Signer, "sign", signed):
        member.certify(world.context.cohort)
    assert done == [StatementKind.CHECK, "file", "folder", StatementKind.SET]
    assert member._notes.certified("00000001", "TRAIN", 1)
