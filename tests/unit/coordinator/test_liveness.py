import pytest

from coordinator.liveness import Liveness


@pytest.mark.parametrize(
    ("members", "interval_s", "patience_s"),
    [(2, 5.0, 30.0), (250, 5.0, 30.0), (251, 5.02, 30.12), (1000, 20.0, 120.0), (20_000, 400.0, 2400.0)],
)
def test_large_federations_beat_less_often_and_are_waited_for_in_proportion(members, interval_s, patience_s):
    liveness = Liveness(alive_s=30, heartbeats_per_s=50)
    assert liveness.interval_s(members) == pytest.approx(interval_s)
    assert liveness.patience_s(members) == pytest.approx(patience_s)
    assert members / liveness.interval_s(members) <= 50.001
