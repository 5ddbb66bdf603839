"""Learning rates over all rounds: the same at every client, never above what bounds are made of."""

import pytest

from client_agent.schedule import Schedule
from shelora.federation import TrainingSpec


def schedule(rounds: int = 4, **fields: object) -> Schedule:
    spec = {"base_model": "tiny", "labels": ("a", "b"), "local_steps": 5, "learning_rate": 0.1} | fields
    return Schedule(TrainingSpec.model_validate(spec), rounds)


def all_rates(made: Schedule, rounds: int = 4) -> list[float]:
    return [rate for number in range(1, rounds + 1) for rate in made.rates(number, 5)]


def test_without_settings_the_rate_is_constant_and_decays_by_round():
    assert all_rates(schedule()) == [0.1] * 20
    decayed = all_rates(schedule(learning_rate_decay=0.5))
    assert decayed == pytest.approx([0.1 * 0.5 ** (step // 5) for step in range(20)])


def test_a_warm_up_reaches_over_rounds():
    rates = all_rates(schedule(warmup_steps=8))
    assert rates == pytest.approx([0.1 * min(1.0, step / 8) for step in range(20)])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_schedule_falls_over_all_rounds_and_what_follows_still_trains(name):
    rates = all_rates(schedule(learning_rate_schedule=name, warmup_steps=4), rounds=6)
    assert max(rates) == rates[4] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.05)  # halfway down
    assert min(rates[20:]) == rates[-1] >= 0.001


def test_the_way_of_a_round_is_the_sum_of_its_rates():
    made = schedule(learning_rate_schedule="cosine", warmup_steps=3)
    assert made.travel(2) == pytest.approx(sum(made.rates(2, 5)))
    assert made.travel(1) <= 0.1 * 5


def test_epochs_are_at_most_the_rounds_steps():
    spec = TrainingSpec(base_model="tiny", labels=("a", "b"), local_steps=20, batch_size=16, local_epochs=1.5)
    assert [spec.steps(examples) for examples in (1, 16, 100, 213, 214, 10_000)] == [1, 2, 10, 20, 20, 20]
    assert spec.model_copy(update={"local_epochs": 0.0}).steps(1) == 20
