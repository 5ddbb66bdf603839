"""The picture of a round is what its processes logged."""

from pathlib import Path

import pytest

from shelora.rounds import RoundState
from tools.trace import COLOURS, COORDINATOR, EVALUATES, SENDS, SERVES, STATES, TRAINS, WAITS, main, spans

STATES_LOGGED = ("SELECTING", "KEYING", "COLLECTING", "CERTIFYING", "AGGREGATING", "PUBLISHED")


def agent_lines(round_: int, minute: int) -> list[str]:
    def line(second: float, event: str, fields: str) -> str:
        return f"2026-11-30T10:{minute:02}:{second:09.6f}Z [info     ] {event:30} [client_agent.x] {fields}"

    return [
        line(1, "assigned", f"assignment_id=train/news.e6.{round_} client_id=a work=train"),
        line(3, "evaluated", f"client_id=a count=128 round=news.e6.{round_ - 1}"),
        line(9, "trained", f"loss=0.5 round_number={round_}"),
        line(9.5, "update_committed", f"round=news.e6.{round_}"),
        line(9.6, "waiting", "why='the update is committed; waiting for the other agents'"),
        line(20, "assigned", f"assignment_id=serve/news.e6.{round_}/check work=serve"),
        line(20.01, "waiting", "why='the updates are being aggregated'"),
    ]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    states = [
        f'{{"round_id": "news.e6.{number}", "state": "{state}", "event": "x", '
        f'"timestamp": "2026-11-30T10:0{number}:{second:02}.5Z"}}'
        for number in (3, 4)
        for second, state in enumerate(STATES_LOGGED)
    ]
    (tmp_path / "coordinator.log").write_text("\n".join([*states, "no line of a log", ""]))
    (tmp_path / "bank.log").write_text("\n".join(agent_lines(3, 3) + agent_lines(4, 4)))
    (tmp_path / "redis.log").write_text("1:M 30 Nov 2026 * Ready to accept connections\n")
    return tmp_path


def test_an_agents_time_is_told_from_its_assignment_to_the_next(logs: Path) -> None:
    told = [(s.what, round(s.end - s.begin, 2)) for s in spans(logs, 3) if s.who == "bank"]
    assert told == [(EVALUATES, 2.0), (TRAINS, 6.0), (SENDS, 0.5), (WAITS, 51.5), (SERVES, 0.01)]


def test_the_coordinators_states_follow_each_other(logs: Path) -> None:
    states = [s for s in spans(logs, 4) if s.who == COORDINATOR]
    assert tuple(s.what for s in states) == STATES_LOGGED
    assert all(round(s.end - s.begin, 3) == 1.0 for s in states[:-1])


def test_every_state_but_an_abandoned_one_has_a_colour() -> None:
    assert set(RoundState) - STATES.keys() == {RoundState.ABANDONED}
    assert len({*STATES.values()} & {*COLOURS.values()}) == 0


def test_the_picture_is_drawn_and_what_is_not_there_is_said(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = logs / "round.svg"
    assert main([str(logs), "4", str(picture)]) == 0
    assert "<svg" in picture.read_text()
    for arguments in ([], [str(logs), "four", "x.svg"], [str(logs), "9", "x.svg"], ["nowhere", "1", "x.svg"]):
        assert main(arguments) == 2
        assert "python -m tools.trace LOGS ROUND PICTURE" in capsys.readouterr().err
