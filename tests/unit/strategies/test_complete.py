"""Complete mode: sketches and tensors through real additive encryption, as agents hold them in the end."""

import tracemalloc
from dataclasses import dataclass, replace

import numpy as np
import pytest

from client_agent.memory import FIXED_BYTES, update_bytes
from shelora.additive.parameters import INSECURE_TOY, STANDARD
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SecretKey
from shelora.errors import DomainError, Reason
from shelora.lora.codec import encode_update, validate_update
from shelora.lora.figures import LARGEST_LOSS, NOTHING, Figures
from shelora.lora.kinds import largest_update_bytes
from shelora.lora.layout import Matrix, Shard, SumTerms
from shelora.lora.noise import ClientNoise
from shelora.lora.restore import merged
from shelora.lora.shards import LoraFactors
from shelora.lora.sketches import Exponents
from shelora.lora.sums import SHARD_VALUES, update_of
from shelora.messages import layout_from_proto, layout_to_proto
from shelora.obfuscation import Obfuscation
from shelora.strategies import complete, she_lora
from shelora.strategies.agents.complete import COMPLETE
from shelora.strategies.agents.port import AgentContext, Summand
from shelora.strategies.port import RoundTerms
from tests.unit.strategies.runs import TENSORS, Model, SumProtection, client, sums
from tests.unit.strategies.sums import PUBLIC, SECRET, Round

OBFUSCATION = Obfuscation(bytes(range(32)), 1)


def cohort():
    return [client(seed, rank, weight) for seed, rank, weight in ((1, 1, 256), (2, 4, 128), (3, 3, 17))]


def bounded(clients):
    """Clients that know how large sketches are."""
    return [replace(c, exponents={m.name: Exponents(0, 0) for m in c.model.matrices}) for c in clients]


def normalised(clients):
    total = sum(c.weight for c in clients)
    return [replace(c, weight=c.weight / total) for c in clients]


def product(update):
    return update.Q @ update.M


def test_a_round_restores_the_weighted_sum_of_updates_of_unequal_ranks():
    clients = bounded([client(1, 1, 256), client(2, 2, 128), client(3, 1, 17), client(4, 4, 1)])
    round_ = Round(clients, SumProtection(), OBFUSCATION)
    clients.pop()  # its rank makes room for the sum of the others, which is of rank 4
    restored = merged(round_.parts(chosen=[0, 1, 2]))
    matrices, tensors = sums(normalised(clients))
    for name, wanted in matrices.items():
        found = product(restored.matrices[name])
        assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)
    for name, wanted in tensors.items():
        np.testing.assert_allclose(restored.tensors[name], wanted, atol=1e-5)
    assert restored.summed
    assert round_.clipping.clipped == 0


def test_who_is_left_out_is_not_in_the_sum_and_the_others_weigh_the_whole():
    clients = bounded(cohort())
    restored = merged(Round(clients, SumProtection(), OBFUSCATION).parts(chosen=[0, 2]))
    matrices, tensors = sums(normalised([clients[0], clients[2]]))
    for name, wanted in matrices.items():
        assert np.linalg.norm(product(restored.matrices[name]) - wanted) < 1e-3 * np.linalg.norm(wanted)
    for name, wanted in tensors.items():
        np.testing.assert_allclose(restored.tensors[name], wanted, atol=1e-5)


def test_every_agent_holds_the_same_bounds_to_the_bit_and_the_same_product():
    round_ = Round(cohort(), SumProtection(), OBFUSCATION)
    first, second = (merged(round_.parts(client=i)) for i in (0, 1))
    assert first.exponents == second.exponents
    assert first.exponents.keys() == first.matrices.keys()
    for name, update in first.matrices.items():
        np.testing.assert_array_equal(product(update), product(second.matrices[name]))


def after(restored, clients, scale=1.0):
    """Clients that made a result their own: cut to their rank, the rest frozen; trained by `scale` - 1."""
    made = []
    for c in clients:
        factors, frozen = {}, {}
        for name, update in restored.matrices.items():
            left, values, right = np.linalg.svd(product(update), full_matrices=False)
            root, r, s = np.sqrt(values), c.model.rank, c.model.scaling
            factors[name] = LoraFactors(
                (scale * left[:, :r] * root[:r] / s).astype(np.float32),
                (root[:r, None] * right[:r]).astype(np.float32),
            )
            frozen[name] = LoraFactors(
                (left[:, r:] * root[r:]).astype(np.float32), (root[r:, None] * right[r:]).astype(np.float32)
            )
        made.append(Sending(c.model, c.weight, factors, restored.tensors, frozen, restored.exponents))
    return made


@dataclass(frozen=True)
class Sending:
    model: Model
    weight: float
    factors: dict
    tensors: dict
    frozen: dict
    exponents: dict


def test_a_round_in_which_nobody_moves_leaves_the_global_model_as_it_is_whatever_the_ranks():
    """The control: without the frozen part what lies beyond rank 1 shrinks by the weight of that client."""
    clients = cohort()
    before = merged(Round(clients, SumProtection(), OBFUSCATION).parts())
    still = after(before, clients)
    again = merged(Round(still, SumProtection(), OBFUSCATION, number=2).parts())
    thrown = merged(
        Round([replace(c, frozen={}) for c in still], SumProtection(), OBFUSCATION, number=2).parts()
    )
    for name, update in before.matrices.items():
        size = np.linalg.norm(product(update))
        assert np.linalg.norm(product(again.matrices[name]) - product(update)) < 1e-3 * size
        assert np.linalg.norm(product(thrown.matrices[name]) - product(update)) > 0.05 * size


def test_a_zero_round_is_zero_and_keeps_the_first_bounds():
    clients = [
        replace(c, factors={n: LoraFactors(0 * f.B, f.A) for n, f in c.factors.items()}) for c in cohort()
    ]
    restored = merged(Round(clients, SumProtection(), OBFUSCATION).parts())
    for update in restored.matrices.values():
        assert np.abs(product(update)).max(initial=0) < 1e-5


def test_an_update_beyond_its_bounds_is_clipped_and_counted():
    clients = cohort()
    small = {m.name: Exponents(-36, -36) for m in clients[0].model.matrices}
    clients = [Sending(c.model, c.weight, c.factors, c.tensors, {}, small) for c in clients]
    round_ = Round(clients, SumProtection(), OBFUSCATION)
    assert round_.clipping.clipped > 0
    assert round_.clipping.matrices == set(small)


def test_agents_that_disagree_on_bounds_are_noticed_and_nothing_is_applied():
    clients = [Sending(c.model, c.weight, c.factors, c.tensors, {}, {}) for c in cohort()]
    clients[1] = replace(
        clients[1], exponents={m.name: Exponents(-80, -80) for m in clients[0].model.matrices}
    )
    with pytest.raises(DomainError) as refused:
        merged(Round(clients, SumProtection(), OBFUSCATION).parts())
    assert refused.value.reason is Reason.SUM_UNREADABLE


def test_one_summand_encrypts_one_update():
    round_ = Round(cohort(), SumProtection(), OBFUSCATION)
    with pytest.raises(DomainError) as refused:
        list(SECRET.protect(round_.layout, round_.clients[0], round_.context(round_.clients[0])))
    assert refused.value.reason is Reason.SECRET_UNAVAILABLE


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], Reason.SHAPE_MISMATCH),
        (lambda data: data + b"\0", Reason.SHAPE_MISMATCH),
        (lambda data: b"", Reason.SHAPE_MISMATCH),
        (lambda data: data[:8] + bytes(32) + data[40:], Reason.CIPHERTEXT_FOREIGN_PARAMETERS),
        (lambda data: data[:40] + b"\7\0\0\0" + data[44:], Reason.CIPHERTEXT_WRONG_SHAPE),
        (lambda data: b"XXXX" + data[4:], Reason.CIPHERTEXT_MALFORMED),
    ],
    ids=["short", "long", "empty", "foreign profile", "another shard", "no magic"],
)
def test_servers_refuse_by_name_a_shard_that_is_not_of_its_layout(damage, reason):
    round_ = Round(cohort(), SumProtection(), OBFUSCATION)
    good = next(iter(SECRET.protect(round_.layout, round_.clients[0], _fresh(round_)))).ciphertexts
    data = encode_update(round_.layout, update_of(0, damage(bytes(good))))
    with pytest.raises(DomainError) as refused:
        validate_update(round_.layout, 0, data)
    assert refused.value.reason is reason


def _fresh(round_):
    encryption = SecretKey.draw(INSECURE_TOY, Csprng.fresh()).encryption(bytes(32), 8, Csprng.fresh())
    return round_.context(round_.clients[0], summand=Summand(encryption=encryption, share=1.0))


def test_a_layout_of_complete_mode_crosses_the_wire_and_names_no_key_tier_or_column():
    layout = PUBLIC.layout(Model(4, 2.0), SumProtection(), RoundTerms(key_id=b"k" * 16, max_rank=4))
    again = layout_from_proto(layout_to_proto(layout))
    assert again == layout
    assert again.digest == layout.digest
    assert (layout.key_id, layout.tiers, layout.encrypts) == (b"", (), False)
    assert layout.sums == SumTerms(profile="insecure-toy", sketch_columns=6, sketch_rows=6)
    assert replace(layout, sums=replace(layout.sums, sketch_columns=4)).digest != layout.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda layout: replace(layout, sums=None),
        lambda layout: replace(layout, sums=replace(layout.sums, sketch_columns=4)),
        lambda layout: replace(layout, sums=replace(layout.sums, profile="small")),
        lambda layout: replace(layout, shards=(Shard((0, 1)), Shard(tensors=(0, 1)))),
        lambda layout: she_lora.STRATEGY.layout(
            Model(4, 2.0), SumProtection(), RoundTerms(key_id=bytes(16), max_rank=4)
        ),
        lambda layout: replace(layout, max_rank=3, sums=layout.sums),
    ],
    ids=["no terms", "fewer columns", "fewer bits", "clear shards", "selective", "smaller rank"],
)
def test_an_agent_takes_part_under_no_other_layout(change):
    model = Model(4, 2.0)
    layout = PUBLIC.layout(model, SumProtection(), RoundTerms(key_id=b"", max_rank=4))
    SECRET.check(layout, model, SumProtection(), None, 1.0)
    with pytest.raises(DomainError) as refused:
        SECRET.check(change(layout), model, SumProtection(), None, 1.0)
    assert refused.value.reason is Reason.LAYOUT_MISMATCH


def test_shards_are_bounded_and_so_is_what_an_update_takes():
    matrices = tuple(Matrix(f"layer.{i}", 4096, 4096) for i in range(12))
    layout = complete.STRATEGY.layout(
        Model(16, 2.0, matrices, ()), SumProtection(), RoundTerms(key_id=b"", max_rank=16)
    )
    values = [sum(4096 * (21 + 21) + 30**2 + 2 for _ in s.matrices) for s in layout.shards]
    assert max(values) <= SHARD_VALUES
    assert [len(s.matrices) for s in layout.shards] == [6, 6]
    bytes_a_value = STANDARD.kept_bits // 8
    assert max(largest_update_bytes(layout)) < bytes_a_value * SHARD_VALUES + 2**17


def test_both_halves_have_one_name():
    assert COMPLETE.name == complete.STRATEGY.name == "complete"


def test_protecting_an_update_takes_the_memory_of_a_shard_however_many_there_are(monkeypatch):
    """Peak bytes over those of the largest shard's values, for 3 and for 12 shards."""
    monkeypatch.setattr("shelora.lora.sums.SHARD_VALUES", 10_000)
    peaks = {}
    for count in (3, 12):
        matrices = tuple(Matrix(f"layer.{i}", 256, 256) for i in range(count))
        model, rng = Model(8, 2.0, matrices, ()), np.random.default_rng(0)
        factors = {
            m.name: LoraFactors(
                rng.standard_normal((256, 8)).astype(np.float32),
                rng.standard_normal((8, 256)).astype(np.float32),
            )
            for m in matrices
        }
        sender = Sending(model, 1, factors, {}, {}, {m.name: Exponents(32, 32) for m in matrices})
        layout = PUBLIC.layout(model, SumProtection(), RoundTerms(key_id=b"", max_rank=8))
        assert len(layout.shards) == count
        encryption = SecretKey.draw(INSECURE_TOY, Csprng.fresh()).encryption(bytes(32), 8, Csprng.fresh())
        context = AgentContext(
            model=model, obfuscation=OBFUSCATION, summand=Summand(encryption=encryption, share=1.0)
        )
        tracemalloc.start()
        for _ in SECRET.protect(layout, sender, context):
            pass
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[12] < 1.2 * peaks[3]
    assert peaks[12] <= update_bytes(layout, 8) + FIXED_BYTES


TELLING = SumProtection(mean_figures=True)
MEASURED = [
    Figures(accuracy=0.9, loss=0.3, train_loss=0.5),
    Figures(accuracy=0.6, loss=0.9, train_loss=1.5),
    NOTHING,
]


def telling(figures):
    clients = [replace(c, weight=256) for c in bounded(cohort())]
    return Round(clients, TELLING, OBFUSCATION, figures=dict(zip(map(id, clients), figures, strict=True)))


@pytest.mark.parametrize("tensors", [TENSORS, ()])
def test_a_sum_holds_the_means_of_what_clients_measured_and_the_model_is_what_it_is_without(tensors):
    clients = [replace(c, weight=256, model=replace(c.model, tensors=tensors)) for c in bounded(cohort())]
    figures = dict(zip(map(id, clients), MEASURED, strict=True))
    with_, without = (
        Round(clients, terms, OBFUSCATION, figures=figures) for terms in (TELLING, SumProtection())
    )
    restored, context = with_.restored()
    (found,) = context.means
    assert found.accuracy == pytest.approx(0.75, abs=1e-4)
    assert found.loss == pytest.approx(0.6, abs=3e-3)
    assert found.train_loss == pytest.approx(1.0, abs=3e-3)
    plain, context = without.restored()
    assert context.means == []
    assert restored.tensors.keys() == plain.tensors.keys()
    for name, value in plain.tensors.items():
        np.testing.assert_allclose(restored.tensors[name], value, atol=1e-4)
    for name, update in plain.matrices.items():
        wanted = product(update)
        assert np.linalg.norm(product(restored.matrices[name]) - wanted) < 1e-2 * np.linalg.norm(wanted)
    sent = [sum(map(len, round_.updates[0])) for round_ in (with_, without)]
    assert 0 <= sent[0] - sent[1] <= 400, "some values in a shard that is there anyway"


def test_wrong_figures_of_one_member_make_no_result_unreadable_and_tell_nothing_impossible():
    """A member that puts the largest values in: the result is restored, and no mean leaves its range."""
    liar = Figures(accuracy=1.0, loss=1e9, train_loss=-1e9)
    restored, context = telling([*MEASURED[:2], liar]).restored()
    (found,) = context.means
    assert 0 <= found.accuracy <= 1
    assert abs(found.loss) <= LARGEST_LOSS
    assert restored.matrices


def test_a_layout_without_figures_is_refused_where_they_are_promised_and_the_other_way_round():
    model = client(1, 2, 1).model
    round_ = RoundTerms(key_id=b"", max_rank=2)
    for asked, promised in ((TELLING, SumProtection()), (SumProtection(), TELLING)):
        with pytest.raises(DomainError, match="not that of this model's encrypted sums"):
            SECRET.check(PUBLIC.layout(model, asked, round_), model, promised, None, 0.0)


def test_a_layout_says_that_it_has_figures_and_one_without_has_the_digest_it_always_had():
    model, round_ = client(1, 2, 1).model, RoundTerms(key_id=b"", max_rank=2)
    told, plain = (PUBLIC.layout(model, terms, round_) for terms in (TELLING, SumProtection()))
    assert told.digest != plain.digest
    for layout in (told, plain):
        assert layout_from_proto(layout_to_proto(layout)) == layout
    assert not layout_to_proto(plain).sums.HasField("figures")
    hidden = SumProtection(
        mean_figures=True, noise=ClientNoise(bound=1.0, clip=1.0, multiplier=1.0, honest=3)
    )
    assert not PUBLIC.layout(model, hidden, round_).sums.figures
