"""What servers are told beside updates: honest captures say nothing, and each planted leak is found."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from attack import beside as beside_attacks
from attack import losses, statements, told, twins
from attack.capture import beside, commands, written
from attack.stage import Client, Scene
from coordinator.keys import Keys
from coordinator.records import Statement
from services.aggregation.keys import RoundKeys
from shelora.additive.codec import decode
from shelora.additive.parameters import DEFAULT
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SecretKey
from shelora.additive.wire import ShardShape, summand_planes
from shelora.committee import dealer
from shelora.committee.sealing import TAG_BYTES
from shelora.v1 import committee_pb2 as pb
from shelora.v1 import coordinator_pb2
from tests.unit.committee.rounds import FEDERATION, World, context_of

KEYS, SCOPE = Keys(), (FEDERATION, "00000001", 1)
CLIENTS = ("ward-000", "ward-001", "ward-002", "ward-003")
REPORT = {"example_count": 40, "train_loss": 1.5, "train_s": 2.0}


def hset(key, **fields):
    pairs = (word for field, value in fields.items() for word in (field.encode(), value))
    return written([b"HSET", key.encode(), *pairs])


def performance(log, *, sealed=False):
    texts = ("maria tested positive for hepatitis and starts therapy",)
    clients = [SimpleNamespace(name=name, texts=texts) for name in CLIENTS]
    return SimpleNamespace(scene=SimpleNamespace(clients=clients, sealed=sealed), beside=log, rounds=[])


def stored(world):
    """What the coordinator stores of a round with a committee, to its end."""
    checks = world.collect().check()
    certificate = world.certify(world.verdict(checks).contributors)
    answers = dict(zip(world.members, world.release(certificate), strict=True))
    opening = coordinator_pb2.GetOpeningResponse(context=world.context.to_proto())
    log = written([b"SET", KEYS.opening(FEDERATION, "00").encode(), opening.SerializeToString()])
    for name, member in world.members.items():
        of = {"views": b"0" * 64 + member.key.SerializeToString()}
        of |= {"checks": member.check().SerializeToString(), "answers": answers[name].SerializeToString()}
        log += b"".join(statement(kind, name, content) for kind, content in of.items())
    return log + dealt(world)


def statement(kind, client, content):
    return hset(KEYS.statements(*SCOPE, Statement(kind)), **{client: content})


def dealt(world):
    log = b""
    for name, one in world.dealt.items():
        log += hset(KEYS.dealings(*SCOPE), **{name: one.dealing.SerializeToString()})
        for place, share in enumerate(one.shares):
            content = pb.DealtShare(share=share, path=[bytes(32)] * 2).SerializeToString()
            log += hset(KEYS.shares(*SCOPE, place), **{name: content})
    return log


@pytest.fixture
def world():
    return World(context_of(len(CLIENTS)))


def test_an_honest_committee_states_what_it_must(world):
    found = statements.exposure(performance(stored(world)))
    assert (found.readable, found.repeated, found.surplus) == (0, 0, 0)
    size = len(world.members)
    assert (found.shares, found.statements) == (4 * size, 3 * size + 4 * (1 + size))


def test_shares_that_are_not_sealed_are_read(world, monkeypatch):
    log = stored(world)
    monkeypatch.setattr(dealer, "seal_share", lambda *given: given[-1] + bytes(TAG_BYTES))
    bare = World(world.context, seed=1).collect()
    found = statements.exposure(performance(log + dealt(bare)))
    assert found.readable == 0.5, "those dealt anew, beside the others"


def test_a_key_that_seals_to_all_is_found(world, monkeypatch):
    one = dealer.new_exchange_key(Csprng.fresh())
    monkeypatch.setattr(dealer, "new_exchange_key", lambda _: one)
    found = statements.exposure(performance(stored(world)))
    assert found.repeated > 0
    assert (found.readable, found.surplus) == (0, 0)


@pytest.mark.parametrize("kind", ["checks", "answers"])
def test_a_statement_with_a_share_beside_it_is_found(world, kind):
    log, name = stored(world), next(iter(world.members))
    signed = pb.Signed.FromString(
        world.members[name].check().SerializeToString()
        if kind == "checks"
        else next(o.content for o in told.told(performance(log)) if o.place.endswith(kind))
    )
    signed.content += b"\x7a\x04\x00\x01\x02\x03"  # field 15, that nobody knows
    found = statements.exposure(performance(log + statement(kind, name, signed.SerializeToString())))
    assert found.surplus > 0


def test_an_answer_in_the_clear_has_another_length(world):
    log, name = stored(world), next(iter(world.members))
    answer = pb.Answer(position=1, sealed=bytes(2 * world.context.shares))
    signed = pb.Signed(content=answer.SerializeToString()).SerializeToString()
    assert statements.exposure(performance(log + statement("answers", name, signed))).surplus > 0


def test_without_an_opened_sum_there_is_nothing_to_look_into():
    assert statements.exposure(performance(b"")) is None


def commits(**more):
    """Each client's commit; `more` are further numbers, by client, of its report."""
    log = b""
    for place, name in enumerate(CLIENTS):
        report = REPORT | {key: values[place] for key, values in more.items()}
        update = json.dumps({"client_id": name, "rank": 4, "scaling": 1.0, "norm": 0.0, "report": report})
        log += hset(KEYS.commits(*SCOPE), **{name: f"{place} {'0' * 64} {update}".encode()})
    return log


def test_numbers_that_differ_are_terms_or_unexpected():
    assert told.differing(performance(commits())) == ["commits.ordinal"]
    usual = performance(commits(train_loss=[1.0, 2.0, 3.0, 4.0], train_s=[1, 2, 3, 4]))
    assert told.unexpected(usual) == []
    slow = b'{"stage": "idle", "reason": "STORE_FULL", "why": "there is no room for this update"}'
    kept = hset(KEYS.refusals(*SCOPE), **{CLIENTS[1]: slow}) + hset(
        KEYS.copies(FEDERATION), **{CLIENTS[1]: b"7"}
    )
    seen = b"".join(
        written([b"SET", KEYS.sighting(FEDERATION, name).encode(), words])
        for name, words in zip(CLIENTS, [slow, b'{"why": ""}', slow, slow], strict=True)
    )
    assert told.unexpected(performance(commits() + kept + seen)) == [], "a slow machine is no leak"
    assert told.losses(usual) == dict(zip(CLIENTS, [1.0, 2.0, 3.0, 4.0], strict=True))
    assert told.reported(usual).shape == (4, 1)


def evaluations(sequence=1, **of):
    """Each client's evaluation of a result, by field."""
    return b"".join(
        hset(KEYS.evaluations(FEDERATION, "00000001", sequence), **{name: json.dumps(told).encode()})
        for place, name in enumerate(CLIENTS)
        for told in [{key: values[place] for key, values in of.items()}]
    )


def test_what_a_client_measured_itself_is_no_term_of_complete():
    own = commits(train_loss=[1.0, 2.0, 3.0, 4.0]) + evaluations(
        correct_count=[1, 2, 3, 4], loss=[1.0, 0.5, 0.2, 0.1], example_count=[10, 10, 10, 11]
    )
    assert told.unexpected(performance(own)) == []
    assert told.unexpected(performance(own, sealed=True)) == [
        "commits.report.train_loss",
        "evaluations.correct_count",
        "evaluations.example_count",
        "evaluations.loss",
    ]
    means = evaluations(
        means=[{"accuracy": 0.7313, "loss": 1.1, "train_loss": None}] * 4, evaluate_s=[1, 2, 3, 4]
    )
    assert told.unexpected(performance(commits() + means, sealed=True)) == []
    assert told.reported(performance(commits() + means)).shape == (4, 0)


@pytest.mark.parametrize(("reports", "leaks"), [("means", False), ("own", True)])
def test_labels_by_what_is_reported_are_gated_under_complete(reports, leaks):
    """20 branches whose accuracy follows from their main label: their own accuracies are a leak, their mean is none."""
    names = [f"ward-{place:03}" for place in range(20)]
    labels = [("a", "b")[place % 2] for place in range(20)]
    clients = tuple(
        Client(name=n, texts=("x",), labels=(label,)) for n, label in zip(names, labels, strict=True)
    )
    scene = Scene(
        name=FEDERATION,
        task="sequence-classification",
        mode="complete",
        clients=clients,
        steps=5,
        batch=8,
        rounds=2,
        max_tokens=32,
        learning_rate=0.01,
        classes=("a", "b"),
        modules=("query",),
    )
    told_of = {
        "means": lambda _: {"means": {"accuracy": 0.75, "loss": 0.4, "train_loss": 0.3}},
        "own": lambda label: {"correct_count": 9 if label == "a" else 6, "example_count": 10},
    }[reports]
    key = KEYS.evaluations(FEDERATION, "00000001", 1)
    log = b"".join(
        hset(key, **{name: json.dumps(told_of(label)).encode()})
        for name, label in zip(names, labels, strict=True)
    )
    found = beside_attacks.labels_by_reports(
        SimpleNamespace(scene=scene, beside=log, rounds=[SimpleNamespace(digest="")])
    )
    assert found.no_better_than_chance
    assert found.can_leak
    assert bool(found.problems()) == leaks


@pytest.mark.parametrize(
    ("leak", "name"),
    [
        (commits(labels=[[3, 1], [2, 2], [1, 3], [0, 4]]), "commits.report.labels.0"),
        (commits(note=["", "", "", "all of it is of one label"]), "commits.report.note (bytes)"),
        (
            hset(KEYS.members(FEDERATION), **{CLIENTS[0]: b'{"median": 1}', CLIENTS[1]: b'{"median": 2}'}),
            "members.median",
        ),
        (
            b"".join(
                hset(RoundKeys("clinic.00000001.1").client(name), **{"norm:0": b"%d" % place})
                for place, name in enumerate(CLIENTS)
            ),
            "client.norm:0",
        ),
    ],
)
def test_a_histogram_a_note_or_a_clear_norm_is_found(leak, name):
    assert name in told.unexpected(performance(commits() + leak))


def test_texts_are_found_wherever_they_stand():
    assert told.in_clear(performance(commits())) == 0
    said = b'{"why": "cannot encode: Maria tested positive for hepatitis"}'
    log = written([b"SET", KEYS.sighting(FEDERATION, CLIENTS[0]).encode(), said])
    assert told.in_clear(performance(commits() + log)) == 1


def test_what_is_beside_updates_is_kept_of_one_federation_without_their_bytes():
    keys = RoundKeys(f"{FEDERATION}.00000001.1")
    kept = [commits(), hset(keys.client(CLIENTS[0]), **{"norm:0": b"0"})]
    left = [
        hset(KEYS.members("other"), **{CLIENTS[0]: b"{}"}),
        written([b"SET", keys.update(CLIENTS[0], 0, bytes(32)).encode(), b"an update"]),
        written([b"APPEND", keys.partial(CLIENTS[0], 0).encode(), b"a piece"]),
        written([b"SELECT", b"0"]),
    ]
    assert beside(b"".join([kept[0], *left, kept[1]]), FEDERATION) == b"".join(kept)
    assert list(commands(written([b"SET", b"a", b""]))) == [[b"SET", b"a", b""]]


class Public:
    """Losses are as long as the text; a text has as many targets as words."""

    def loss(self, text):
        return len(text) / 7

    def ids(self, text):
        return [0, *text.split()]


TEXTS = tuple(
    " ".join("ab"[i % 2 :] * (i * i % 11 + 1) for i in range(n, n + 3)) + "x" * n for n in range(16)
)


@pytest.mark.parametrize("size", [1, 4])
def test_the_mean_loss_of_few_texts_names_them(size):
    public, batch = Public(), TEXTS[3 : 3 + size]
    targets = [len(text.split()) for text in batch]
    mean = sum(n * public.loss(t) for n, t in zip(targets, batch, strict=True)) / sum(targets)
    scene = SimpleNamespace(steps=1, clients=[SimpleNamespace(name="a")], batch_of=lambda _: size)
    found = losses.scores(public, scene, {"a": mean}, TEXTS)["a"]
    assert {text for text, score in found.items() if score == max(found.values())} >= set(batch)
    told_nothing = losses.scores(public, scene, {"a": 0.0}, TEXTS)["a"]
    assert len(set(told_nothing.values())) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_two_updates_under_one_key_are_told_from_others(shared):
    rng = np.random.default_rng(0)
    shape, found = ShardShape(DEFAULT, 0, 2 * DEFAULT.degree), []
    keys = [SecretKey.draw(DEFAULT, Csprng.fresh()) for _ in range(3)]
    if shared:
        keys[1] = SecretKey(DEFAULT, keys[0].coefficients)
    for key in keys:
        sent = key.encryption(bytes(32), 8, Csprng.fresh()).encrypt(rng.uniform(-1, 1, 2 * DEFAULT.degree))
        kept = decode(DEFAULT, summand_planes(sent, shape), shape.coefficients)
        found.append(kept / 2.0**DEFAULT.kept_bits)
    share, values, pairs = twins.largest(found)
    assert (values, pairs) == (2 * DEFAULT.degree, 3)
    assert share > 0.99 if shared else abs(share - twins.SMALL) < 0.1  # 15 standard errors
