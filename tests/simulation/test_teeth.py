"""The simulation notices rules that are taken away from the product; `--sabotage` has more, which take longer."""

import pytest

from tests.simulation.sabotage import SABOTAGES
from tests.simulation.simulation import Schedule, run

MOST = 20
"""Schedules within which each is found; most are in the first."""


@pytest.mark.parametrize("name", [name for name, sabotage in SABOTAGES.items() if sabotage.quick])
def test_a_rule_taken_away_is_noticed(name):
    sabotage = SABOTAGES[name]
    with sabotage.work():
        found = any(run(Schedule.of(seed, *sabotage.kinds)).violation for seed in range(MOST))
    assert found, f"{name} was not noticed in {MOST} schedules"
