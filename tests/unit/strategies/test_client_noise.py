"""Client privacy in the sums of complete mode: what leaves a client, what agents make of it, what an audit finds."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta

from shelora.accounting import epsilon_of, multiplier_for
from shelora.additive.noise import noise_sampler
from shelora.additive.parameters import INSECURE_TOY
from shelora.additive.sampler import Csprng
from shelora.errors import DomainError, Reason
from shelora.lora.noise import ClientNoise
from shelora.lora.restore import merged
from shelora.lora.shards import LoraFactors
from shelora.messages import layout_from_proto, layout_to_proto
from shelora.obfuscation import Obfuscation
from shelora.strategies.agents.port import AgentContext, Summand
from shelora.strategies.port import RoundTerms
from tests.unit.strategies.runs import SumProtection, client
from tests.unit.strategies.sums import PUBLIC, SECRET, Round

OBFUSCATION = Obfuscation(bytes(range(32)), 1)
NOISE = ClientNoise(bound=2.0, clip=0.25, multiplier=1.5, honest=3)
TERMS = SumProtection(noise=NOISE)
MOST = 8


def silent(_deviation, count):
    return np.zeros(count, dtype=np.int64)


def seeded(seed):
    """Noise of a fixed stream, so that nothing here fails by chance."""
    rng = Csprng(seed.to_bytes(32, "big"))
    return lambda deviation, count: noise_sampler(deviation).sample(rng, count)


def start(rank=2, scaling=2.0):
    """What all clients hold when a round begins: of one product, whatever the client's rank."""
    return client(100, rank, 1, scaling)


def trained(begun, seed, size):
    """A client that has moved from there, in every factor and tensor, by about that much."""
    rng = np.random.default_rng(seed)

    def moved(values):
        return (values + size * rng.standard_normal(values.shape)).astype(np.float32)

    factors = {n: LoraFactors(moved(f.B), f.A) for n, f in begun.factors.items()}
    return replace(begun, factors=factors, tensors={n: moved(t) for n, t in begun.tensors.items()})


class Recorder:
    """Takes what would be encrypted."""

    def __init__(self):
        self.integers = []

    def encrypt(self, values):
        self.integers.append(np.rint(values * INSECURE_TOY.scale(MOST)).astype(np.int64))
        return b""


def layout(terms=TERMS):
    return PUBLIC.layout(start().model, terms, RoundTerms(key_id=b"", max_rank=2))


def sent(update, begun, draws, terms=TERMS, **changed):
    """The integers that leave a client, over all shards."""
    recorder = Recorder()
    fields = {
        "model": update.model,
        "obfuscation": OBFUSCATION,
        "round_number": 1,
        "summand": Summand(encryption=recorder, share=1.0, most_contributors=MOST),
        "reference": begun,
        "draws": draws,
    }
    for _ in SECRET.protect(layout(terms), update, AgentContext(**{**fields, **changed})):
        pass
    return np.concatenate(recorder.integers)


def grid():
    return NOISE.grid(INSECURE_TOY, MOST)


def units(one, other):
    """The difference in units of the grid, squared norm."""
    difference = one - other
    assert not (difference % grid().step).any()
    return sum(int(v) ** 2 for v in difference // grid().step)


@pytest.mark.parametrize("size", [1e-4, 0.01, 0.1, 100.0, math.nan])
def test_what_leaves_two_clients_that_differ_in_their_data_alone_is_within_the_clip(size):
    begun = start()
    moved, other, unmoved = trained(begun, 1, size), trained(begun, 2, 5 * size), begun
    of_one, of_other, of_none = (sent(u, begun, seeded(7)) for u in (moved, other, unmoved))
    assert units(of_one, of_none) <= grid().clip ** 2
    assert units(of_one, of_other) <= 4 * grid().clip ** 2
    if size >= 0.1:  # the control: much is cut to just the clip, and not to nothing
        assert units(of_one, of_none) > (0.95 * grid().clip) ** 2
    if math.isnan(size):  # an update that is none is sent as no change: its absence would tell
        assert units(of_one, of_none) == 0


def test_every_value_has_noise_that_nobody_predicts():
    begun = start()
    plain = sent(begun, begun, silent)
    noisy = [
        sent(begun, begun, draws) - plain
        for draws in (seeded(1), AgentContext.__dataclass_fields__["draws"].default)
    ]
    for drawn in noisy:
        assert np.count_nonzero(drawn) > 0.99 * len(drawn)
        assert drawn.std() / grid().step == pytest.approx(grid().deviation, rel=0.2)
    again = sent(begun, begun, AgentContext.__dataclass_fields__["draws"].default) - plain
    assert not np.array_equal(again, noisy[1])


def cohort(count, size=0.02, draws=None):
    begun = start()
    clients = [trained(begun, seed, size) for seed in range(count)]
    return Round(
        clients,
        TERMS,
        OBFUSCATION,
        most=MOST,
        references={id(c): begun for c in clients},
        draws={id(c): draws(i) if draws else silent for i, c in enumerate(clients)},
    ), begun


def opened_values(round_, chosen):
    """All values of the mean, in their natural size, through real encryption."""
    opened, span = round_.opened(chosen), NOISE.grid(INSECURE_TOY, MOST).span
    shapes = {kind.name: kind for kind in _kinds()}
    found = [
        opened.opener.open(
            content.ciphertexts,
            shapes[round_.layout.shards[content.shard].kind].shape(round_.layout, content.shard),
        )
        for content in round_.contents(chosen)
    ]
    return np.concatenate(found) / opened.shares * span


def _kinds():
    from shelora.lora.sums import SKETCHES_KIND, SUMS_KIND  # noqa: PLC0415

    return SKETCHES_KIND, SUMS_KIND


@pytest.mark.parametrize(
    ("present", "cheats"), [([0, 1, 2, 3], 1), ([1, 2, 4, 5], 1), ([0, 1, 2, 3, 4, 5], 3)]
)
def test_the_sum_has_the_stated_noise_though_some_left_and_some_cheat(present, cheats):
    """Of at least four clients one may leave its noise out: three honest ones suffice, whoever has left."""
    silent_ones = set(present[:cheats])
    noisy, _ = cohort(6, draws=lambda i: silent if i in silent_ones else seeded(20 + i))
    quiet, _ = cohort(6)
    noise = len(present) * (opened_values(noisy, present) - opened_values(quiet, present))
    wanted = NOISE.multiplier * NOISE.clip
    honest = len(present) - cheats
    assert honest >= NOISE.honest
    spread = math.sqrt(2 / len(noise))
    assert noise.var() == pytest.approx(wanted**2 * honest / NOISE.honest, rel=4 * spread + 0.01)
    assert noise.var() > wanted**2 * (1 - 4 * spread)


def test_without_its_noise_a_round_is_the_mean_of_what_clients_changed():
    """The control: what is lost to grid, cut and encryption is small, and too long a change is shortened."""
    round_, begun = cohort(4, size=0.002)
    restored = merged(round_.parts())
    assert restored.noisy
    assert restored.summed
    for name, value in begun.tensors.items():
        mean = np.mean([c.tensors[name] for c in round_.clients], axis=0)
        assert np.abs(restored.tensors[name] - mean).max() < 2e-3
        assert np.abs(restored.tensors[name] - value).max() > 0
    far, begun = cohort(4, size=10.0)
    restored = merged(far.parts())
    moved = math.sqrt(sum(float(np.sum((restored.tensors[n] - v) ** 2)) for n, v in begun.tensors.items()))
    assert 0 < moved <= NOISE.clip


def test_a_hostile_member_moves_the_result_no_farther_than_honest_ones_and_their_noise():
    def loud(_deviation, count):
        return np.full(count, 10 * NOISE.grid(INSECURE_TOY, MOST).deviation, dtype=np.int64)

    calm, begun = cohort(4, draws=seeded)
    attacked, _ = cohort(4, draws=lambda i: seeded(i) if i else loud)
    attacked.references = {id(c): begun for c in attacked.clients}

    def moved(round_):
        restored = merged(round_.parts(client=1))
        return math.sqrt(sum(float(np.sum((restored.tensors[n] - v) ** 2)) for n, v in begun.tensors.items()))

    limit = (
        NOISE.clip + calm_deviation(4) * (math.sqrt(sum(v.size for v in begun.tensors.values())) + 12) * 1.01
    )
    assert moved(calm) < limit
    assert moved(attacked) <= limit
    attacked.references = {}
    assert moved(attacked) > 1.2 * limit  # the control


def calm_deviation(contributors):
    return NOISE.deviation / math.sqrt(contributors)


def test_a_result_says_nothing_of_who_holds_it_and_who_missed_the_round_takes_it_as_it_is():
    round_, _ = cohort(4, draws=seeded)
    one, other = merged(round_.parts(client=0)), merged(round_.parts(client=1))
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor, other.tensors[name])
    round_.references = {}
    missed = merged(round_.parts(client=2))
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor, missed.tensors[name])


@pytest.mark.parametrize(
    "changed",
    [
        {"reference": None},
        {"summand": Summand(encryption=Recorder(), share=0.5, most_contributors=MOST)},
    ],
    ids=["no start", "another weight"],
)
def test_nothing_leaves_without_a_start_or_under_another_weight(changed):
    with pytest.raises(DomainError) as refused:
        sent(start(), start(), silent, **changed)
    assert refused.value.reason is Reason.SECRET_UNAVAILABLE


@pytest.mark.parametrize(
    "noise",
    [
        None,
        replace(NOISE, multiplier=0.5),
        replace(NOISE, clip=0.5),
        replace(NOISE, honest=4),
        replace(NOISE, bound=1.0),
    ],
)
def test_a_server_cannot_change_the_noise_that_the_federation_promised(noise):
    """The layout's digest is in the context that everyone signs: who is told otherwise is in no sum with the others."""
    honest, other = layout(), layout(replace(TERMS, noise=noise))
    assert other.digest != honest.digest
    SECRET.check(honest, start().model, TERMS, None, 1.0)
    with pytest.raises(DomainError) as refused:
        SECRET.check(other, start().model, TERMS, None, 1.0)
    assert refused.value.reason is Reason.LAYOUT_MISMATCH


def test_the_noise_crosses_the_wire_and_a_layout_without_has_the_digest_it_always_had():
    honest = layout()
    assert layout_from_proto(layout_to_proto(honest)) == honest
    plain = layout(replace(TERMS, noise=None))
    assert layout_from_proto(layout_to_proto(plain)) == plain
    assert '"noise"' not in str(plain.sums)
    hostile = layout_to_proto(honest)
    hostile.sums.noise.multiplier = math.nan
    with pytest.raises(DomainError, match="multiplier"):
        layout_from_proto(hostile)


def test_an_audit_with_a_canary_finds_less_than_the_accountant_admits_and_all_of_it_without_noise():
    """A lower bound of epsilon from how well sums with and without one client's change are told apart.

    Jagielski, Ullman and Oprea (NeurIPS 2020), with Clopper and Pearson's bounds, as at the agent. The attacker knows
    the sum but for the change and the noise of three honest clients, and looks along the change: the best there is.
    """
    begun, trials, delta = start(), 500, 1e-2
    canary = trained(begun, 5, 10.0)
    plain, changed = (sent(update, begun, silent) for update in (begun, canary))
    along = (changed - plain).astype(float)
    draws = [seeded(50 + i) for i in range(NOISE.honest)]
    # What leaves is this with noise added: so it need not be made anew for every trial.
    once = grid().step * seeded(1)(grid().deviation, len(plain))
    assert not (sent(canary, begun, seeded(1))[:100] - changed[:100] - once[:100]).any()

    def seen(sum_, noises):
        drawn = sum(draw(grid().deviation, len(plain)) for draw in noises)
        return float(np.dot(along, sum_ + grid().step * drawn - plain))

    def found(noises):
        with_it = np.array([seen(changed, noises) for _ in range(trials)])
        without_it = np.array([seen(plain, noises) for _ in range(trials)])
        threshold = np.median(np.concatenate([with_it[::2], without_it[::2]]))
        hits, alarms = (with_it[1::2] > threshold).sum(), (without_it[1::2] > threshold).sum()
        count = trials // 2
        least_hits = beta.ppf(0.025, hits, count - hits + 1) if hits else 0.0
        most_alarms = beta.ppf(0.975, alarms + 1, count - alarms) if alarms < count else 1.0
        return max(0.0, math.log(max(least_hits - delta, 1e-12) / most_alarms))

    admitted = epsilon_of([NOISE.multiplier], delta)
    assert 0.05 * admitted < found(draws) < admitted
    assert found([silent]) > admitted


def test_noise_for_a_promise_keeps_it_through_the_grid():
    multiplier = multiplier_for(8.0, 1e-5, 6)
    kept = replace(NOISE, multiplier=multiplier).grid(INSECURE_TOY, MOST)
    real = kept.deviation * math.sqrt(NOISE.honest) / kept.clip
    assert epsilon_of([real] * 6, 1e-5) <= 8.0
