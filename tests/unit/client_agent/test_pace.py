import pytest

from client_agent.agent import HEARTBEAT_S, LATEST_HEARTBEAT_S, SOONEST_HEARTBEAT_S, until_next_s


@pytest.mark.parametrize(
    ("asked_s", "wait_s"),
    [(0.0, HEARTBEAT_S), (20.0, 20.0), (0.001, SOONEST_HEARTBEAT_S), (4e6, LATEST_HEARTBEAT_S)],
)
def test_heartbeats_come_as_asked_for_within_reason(asked_s, wait_s):
    assert until_next_s(asked_s) == wait_s
