from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from client_agent import link, session
from client_agent.progress import Progress
from shelora.errors import DomainError, Reason
from shelora.telemetry.outages import LONGEST_S, Outage
from shelora.transport.tls import IdentityFolder
from shelora.v1 import coordinator_pb2 as pb
from tests.identities import TestAuthority, client

AWAY = DomainError(Reason.STORE_UNAVAILABLE, "nobody answers")
DAY_S = 86_400


def told(outage: Outage, clock: SimpleNamespace, seconds: int, every_s: int) -> list[dict[str, Any]]:
    """What is told of attempts that fail for some time."""
    with structlog.testing.capture_logs() as logs:
        for _ in range(0, seconds, every_s):
            outage.failed(AWAY)
            clock.now_s += every_s
    return logs


@pytest.fixture
def clock() -> SimpleNamespace:
    return SimpleNamespace(now_s=1_000.0)


@pytest.fixture
def outage(clock: SimpleNamespace) -> Outage:
    return Outage(structlog.get_logger(), "away", "back", lambda: clock.now_s)


def test_a_day_of_failures_is_told_in_few_lines_that_say_how_long_it_lasts(
    outage: Outage, clock: SimpleNamespace
):
    logs = told(outage, clock, DAY_S, every_s=5)
    assert [log["lasts_s"] for log in logs[:5]] == [0, 300, 900, 2_100, 4_500]
    assert len(logs) < 30
    assert all(log["lasts_s"] - before["lasts_s"] <= LONGEST_S for before, log in pairwise(logs))
    assert logs[0] | {"event": "away", "log_level": "warning", "reason": Reason.STORE_UNAVAILABLE} == logs[0]


def test_the_end_is_told_once_and_the_next_outage_from_its_beginning(outage: Outage, clock: SimpleNamespace):
    told(outage, clock, 400, every_s=5)
    with structlog.testing.capture_logs() as logs:
        outage.ended()
        outage.ended()
    assert [(log["event"], log["lasted_s"]) for log in logs] == [("back", 400)]
    assert [log["lasts_s"] for log in told(outage, clock, 100, every_s=5)] == [0]


def test_another_reason_is_told_at_once(outage: Outage, clock: SimpleNamespace):
    told(outage, clock, 100, every_s=5)
    with structlog.testing.capture_logs() as logs:
        outage.failed(DomainError(Reason.STORE_FULL, "full"))
        outage.failed(DomainError(Reason.STORE_FULL, "full"))
    assert [log["reason"] for log in logs] == [Reason.STORE_FULL]


async def test_an_agent_offline_says_so_once_with_what_it_does_and_until_when_it_may_come_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    identity = IdentityFolder(TestAuthority(tmp_path).enrolled(client()))
    address = "127.0.0.1:1"
    config = SimpleNamespace(
        coordinator=address, key_authority=address, federation="f", client_id="a", identity=identity
    )
    answers = iter([AWAY] * 20)

    async def call(*_arguments: object, **_limits: float) -> pb.HeartbeatResponse:
        for refusal in answers:
            raise refusal
        return pb.HeartbeatResponse(next_ms=7_000)

    monkeypatch.setattr(link, "call", call)
    talking = session.Session(config, None)
    with structlog.testing.capture_logs() as logs:
        for _ in range(20):
            with pytest.raises(DomainError):
                await talking.heartbeat(Progress())
        assert await talking.heartbeat(Progress()) == 7.0
    await talking.close()
    assert [log["event"] for log in logs] == ["offline", "online"]
    assert f"{identity.read().facts.expires:%Y-%m-%dT%H:%M}" in logs[0]["certificate_valid_until"]
    assert "tries again" in logs[0]["then"]
