"""What the page says of federations, members and servers."""

import re
from pathlib import Path

import pytest
import yaml

from shelora.dashboard.alerts import FIRST_STEPS, federation_alerts, server_alerts
from shelora.dashboard.charts import Series, line_chart, sparkline
from shelora.dashboard.memory import SAMPLE_S, SAMPLES, PresenceHistory
from shelora.dashboard.model import federation_page
from shelora.dashboard.rendering import report
from shelora.dashboard.servers import Sample, parsed, redis_row, server_row
from shelora.v1 import coordinator_pb2 as pb
from tests.unit.test_render import federation


def page(said, memory=None, now_s=0.0):
    return federation_page(said, memory or PresenceHistory(), now_s)


def running(**fields):
    said = pb.Federation(federation_id="f", phase=pb.PHASE_RUNNING, now_unix_ms=10_000_000)
    said.spec.protection.mode, said.spec.round.min_updates = fields.pop("mode", "selective"), 3
    said.current.round_id, said.current.kind, said.current.number = "r1", pb.ROUND_KIND_TRAIN, 1
    said.current.state = fields.pop("state", pb.ROUND_STATE_COLLECTING)
    for name in "abc":
        said.members.add(client_id=name, idle_ms=1000, stage="training", progress=0.5)
    return said


def test_figures_that_fewer_than_min_updates_reported_are_withheld():
    said = running()
    published = said.history.add(number=1, kind=pb.ROUND_KIND_TRAIN, state=pb.ROUND_STATE_PUBLISHED)
    for name in "abc":
        published.updates.add(client_id=name, train_loss=0.5, upload_bytes=100)
    for name in "ab":
        published.evaluations.add(client_id=name, example_count=10, correct_count=9, download_bytes=50)
    shown = page(said)
    assert (shown.figures[0].train_loss, shown.figures[0].test_accuracy, shown.down) == (0.5, None, "-")
    assert shown.withheld
    published.evaluations.add(client_id="c", example_count=10, correct_count=9, download_bytes=50)
    shown = page(said)
    assert (shown.accuracy, shown.down, shown.withheld) == ("90.0%", "50 B", False)


def test_the_loss_of_the_only_agent_that_told_one_is_withheld():
    """All three sent an update, and the median of one loss was that agent's own; accuracy likewise."""
    said = running()
    published = said.history.add(number=1, kind=pb.ROUND_KIND_TRAIN, state=pb.ROUND_STATE_PUBLISHED)
    for name, loss, count in (("a", 0.5, 10), ("b", 0.0, 0), ("c", 0.0, 0)):
        published.updates.add(client_id=name, train_loss=loss, upload_bytes=100)
        published.evaluations.add(client_id=name, example_count=count, correct_count=count)
    shown = page(said)
    assert (shown.figures[0].train_loss, shown.accuracy, shown.withheld) == (None, "-", True)
    assert shown.up == "100 B"


def test_under_complete_the_newest_accuracy_that_is_known_is_shown_with_its_round():
    said = running(mode="complete")
    said.spec.protection.figures = "means"
    for number in (1, 2):
        published = said.history.add(number=number, kind=pb.ROUND_KIND_TRAIN, state=pb.ROUND_STATE_PUBLISHED)
        for name in "abc":
            published.updates.add(client_id=name, upload_bytes=100)
            report = published.evaluations.add(client_id=name, download_bytes=50)
            report.means.train_loss = 0.5
            if number == 2:
                report.means.accuracy = 0.9
    shown = page(said)
    assert (shown.accuracy, shown.down, shown.withheld) == ("90.0%, round 1", "50 B", False)
    assert [f.train_loss for f in shown.figures] == [0.5, 0.5]
    assert "next round" in shown.figures_known
    del said.history[1].evaluations[1:]
    assert page(said).accuracy == "-", "one agent's word shows nothing"


def test_nothing_is_withheld_of_a_round_that_nobody_evaluated():
    said = running()
    published = said.history.add(number=1, kind=pb.ROUND_KIND_TRAIN, state=pb.ROUND_STATE_PUBLISHED)
    for name in "abc":
        published.updates.add(client_id=name, train_loss=0.5, upload_bytes=100)
    assert not page(said).withheld


def test_one_member_does_not_move_the_accuracy_of_all():
    """With twice the others' examples, all wrong, one of three halved it."""
    said = running()
    published = said.history.add(number=1, kind=pb.ROUND_KIND_TRAIN, state=pb.ROUND_STATE_PUBLISHED)
    for name, count, right in (("a", 100, 90), ("b", 100, 92), ("c", 10**9, 0)):
        published.evaluations.add(client_id=name, example_count=count, correct_count=right)
    assert page(said).accuracy == "90.0%"


def test_a_report_shows_no_figure_where_one_is_withheld():
    said = running()
    published = said.history.add(number=1, kind=pb.ROUND_KIND_TRAIN, state=pb.ROUND_STATE_PUBLISHED)
    published.updates.add(client_id="a", train_loss=0.5, upload_bytes=100, train_s=71.0, encrypt_s=71.0)
    published.evaluations.add(client_id="a", example_count=10, correct_count=9, decrypt_s=71.0)
    row = re.search('<tr><th scope="row">1</th>.*?</tr>', report(said))[0]
    assert re.findall("<td>(.*?)</td>", row) == ["-", "-", "-", "-", "-", "-", "0.00 s", "-"]


def test_times_that_no_calendar_has_are_shown_as_unknown():
    """A server's answer with one could not be shown at all."""
    said = running()
    said.now_unix_ms = said.members[0].copy_refused_unix_ms = 2**62
    assert "last at an unknown time" in page(said).members[0].troubles[0]
    assert "as of an unknown time" in report(said)


def test_an_update_is_said_with_its_size_and_since_when():
    said, memory = running(), PresenceHistory()
    memory.note(said, 100.0)
    said.current.updates.add(client_id="a", upload_bytes=2_300_000)
    memory.note(said, 110.0)
    rows = {row.name: row.activity for row in page(said, memory, 150.0).members}
    assert rows["a"] == "update sent, 2.3 MB, 40 s ago"
    assert rows["b"] == "training, 50%"


def test_when_an_update_was_there_before_the_page_no_time_is_made_up():
    said, memory = running(), PresenceHistory()
    said.current.updates.add(client_id="a", upload_bytes=2_300_000)
    memory.note(said, 110.0)
    assert page(said, memory, 150.0).members[0].activity == "update sent, 2.3 MB"


def test_a_member_that_died_is_not_shown_at_work():
    said = running()
    said.members[1].idle_ms = 61_000
    said.members[2].MergeFrom(pb.Member(stage="finished", idle_ms=61_000, progress=1))
    assert {row.name: row.dot for row in page(said).members} == {"a": "ok", "b": "bad", "c": "bad"}
    said.phase = pb.PHASE_FINISHED
    rows = {row.name: row for row in page(said).members}
    assert (rows["b"].activity, rows["c"].activity) == ("silent since training, 50%", "finished")
    assert rows["b"].dot == "gone"
    said.members[1].stage = ""
    assert {row.name: row.activity for row in page(said).members}["b"] == "silent"


def test_a_members_certificate_is_shown_with_its_end():
    said = running()
    now_ms, hour_ms = said.now_unix_ms, 3_600_000
    for member, ends_ms in zip(said.members, (now_ms + 18 * hour_ms, now_ms - 120_000, 0), strict=True):
        member.certificate_ends_unix_ms = ends_ms
    rows = {row.name: (row.certificate, row.ending) for row in page(said).members}
    assert rows == {"a": ("in 18 h", False), "b": ("2 min ago", True), "c": ("-", False)}


def test_refusals_and_give_ups_are_told_apart():
    said = running()
    said.current.dropped.add(client_id="a", reason="NORM_TOO_LARGE", why="lower alpha")
    said.current.dropped.add(client_id="b", reason="MEMORY_UNAVAILABLE", why="no memory", gave_up=True)
    shown = page(said)
    rows = {row.name: row.activity for row in shown.members}
    assert (rows["a"], rows["b"]) == ("update refused: NORM_TOO_LARGE", "gave up: MEMORY_UNAVAILABLE")
    assert ("1", "b", "gave up: MEMORY_UNAVAILABLE", "no memory") in shown.remarks


def test_a_members_row_keeps_what_became_of_its_earlier_updates():
    said = running()
    for number, reason in enumerate(("DIGEST_MISMATCH", "NORM_TOO_LARGE", "NORM_OUTLIER"), start=1):
        ended = said.history.add(number=number, kind=pb.ROUND_KIND_TRAIN, state=pb.ROUND_STATE_PUBLISHED)
        ended.dropped.add(client_id="a", reason=reason, why="lower alpha")
    said.history[-1].objections.add(client_id="a", why="the sum is too long")
    said.current.dropped.add(client_id="a", reason="NORM_TOO_LARGE", why="lower alpha")
    rows = {row.name: row for row in page(said).members}
    newest = ("round 3: NORM_OUTLIER", "round 3: objects to the result", "round 2: NORM_TOO_LARGE")
    assert (rows["a"].refusals, rows["b"].refusals) == (newest, ())
    assert rows["a"].activity == "update refused: NORM_TOO_LARGE"
    assert newest[0] in report(said)


@pytest.mark.parametrize(
    ("mode", "state", "stages"),
    [
        ("selective", pb.ROUND_STATE_COLLECTING, "selecting:done collecting:now aggregating:next"),
        ("selective", pb.ROUND_STATE_ABANDONED, "selecting:lost collecting:lost aggregating:lost"),
        (
            "complete",
            pb.ROUND_STATE_CERTIFYING,
            "selecting:done keying:done collecting:done certifying:now aggregating:next",
        ),
        (
            "complete",
            pb.ROUND_STATE_PUBLISHED,
            "selecting:done keying:done collecting:done certifying:done aggregating:done",
        ),
    ],
)
def test_a_round_has_the_stages_of_its_mode(mode, state, stages):
    (row,) = page(running(mode=mode, state=state)).rounds
    assert " ".join(f"{stage.name}:{stage.status}" for stage in row.stages) == stages


def test_who_sits_on_the_committee_is_shown_beside_its_name():
    said = running(mode="complete", state=pb.ROUND_STATE_KEYING)
    assert "committee" not in page(said).rounds[0].updates, "nobody has a seat yet"
    said.current.committee.extend("cb")
    shown = page(said)
    assert {row.name: row.in_committee for row in shown.members} == {"a": False, "b": True, "c": True}
    assert shown.rounds[0].updates.endswith("committee of 2")


def test_privacy_is_said_in_the_strategys_words():
    plain, selective, complete = (page(running(mode=m)) for m in ("none", "selective", "complete"))
    assert "Everything" in plain.servers_see
    assert "B" in selective.servers_see
    assert (plain.committee, selective.committee, complete.committee) == (False, False, True)
    assert "rotate" not in plain.actions
    assert "rotate" in selective.actions


def test_a_connection_is_remembered_sample_by_sample_and_bounded():
    said, memory = running(), PresenceHistory()
    for step in range(2 * SAMPLES):
        said.members[0].idle_ms = 120_000 if step == 2 * SAMPLES - 1 else 10
        memory.note(said, step * SAMPLE_S)
    heard = memory.heard("f", "a")
    assert len(heard) == SAMPLES
    assert (heard[-1], heard[-2]) == (False, True)
    assert "connected 98%" in sparkline(heard, "a")
    memory.keep([])
    assert memory.heard("f", "a") == ()


def test_members_in_trouble_come_first():
    said = running()
    said.members[2].reason, said.members[2].why = "DATA_INVALID", "row 3"
    first = page(said).members[0]
    assert (first.name, first.troubles) == ("c", ("DATA_INVALID: row 3",))


def test_charts_are_read_aloud_and_escape_their_words():
    one = Series(name="<b>", values=[0.5, None, 0.75], words=["50%", "", "75%"], kind="a")
    text = str(line_chart('Test "x"', [1, 2, 3], [one], unit="%"))
    assert 'aria-label="Test &#34;x&#34; by round: &lt;b&gt; 75% in round 3"' in text
    assert text.count("<circle") == 2
    assert "<b>" not in text
    assert "style" not in text


@pytest.mark.parametrize(
    "values", [[0.0], [5.0], [1e-9, 1e9], [-3.0, -3.0], [0.1 + i / 1000 for i in range(300)]]
)
def test_charts_of_any_values_stay_in_their_frame(values):
    rounds = list(range(1, len(values) + 1))
    text = str(line_chart("t", rounds, [Series(name="n", values=values, words=[""] * len(values), kind="a")]))
    places = [float(y) for y in re.findall(r'cy="([-\d.]+)"', text)]
    assert len(places) == len(values)
    assert all(0 <= y <= 200 for y in places)


METRICS = """
process_cpu_seconds_total {cpu}
process_resident_memory_bytes 1e8
process_start_time_seconds 1000
process_open_fds 90
process_max_fds 100
shelora_rpc_total{{method="A",status="OK"}} {calls}
shelora_rpc_total{{method="B",status="OK"}} {calls}
shelora_redis_used_bytes 9e8
shelora_redis_limit_bytes 1e9
shelora_aggregation_queue_count 9
shelora_aggregation_workers_count 2
shelora_certificate_expiry_timestamp_seconds 2100
"""


def test_the_load_of_servers_is_what_their_metrics_say():
    before, now = (
        parsed(METRICS.format(cpu=c, calls=n), at) for c, n, at in ((1, 10, 1990.0), (6, 30, 2000.0))
    )
    row = server_row("aggregation", "h:1", now, before)
    assert (row.cpu, row.memory, row.calls) == ("50% of a core", "100.0 MB", "4.0 a second")
    assert row.note == "9 shards wait, 2 workers, up 17 min"
    assert redis_row({"c": now}).note == "90% of 1.0 GB"
    assert server_row("gone", "h:1", None, now).up is False
    names = {alert.name for alert in server_alerts({"a": now, "gone": None})}
    assert names == {
        "SheloraServerDown",
        "SheloraCertificateExpires",
        "SheloraOpenFiles",
        "SheloraRedisFull",
        "SheloraShardQueueLong",
    }
    assert server_alerts({"idle": Sample(0.0)}) == []


def test_what_a_federation_suffers_from_is_an_alert():
    said = running()
    assert federation_alerts([said]) == []
    for member in said.members[:2]:
        member.idle_ms = 10**6
    for number in (1, 2):
        lost = said.history.add(
            state=pb.ROUND_STATE_ABANDONED, reason="TOO_FEW_UPDATES", ended_unix_ms=9_999_000
        )
        lost.dropped.extend([pb.DroppedUpdate(client_id="a", reason="NORM_OUTLIER")] * (1 + number))
    names = [alert.name for alert in federation_alerts([said])]
    assert names == ["SheloraMembersSilent", "SheloraRoundsAbandoned", "SheloraUpdatesRefused"]


def test_first_steps_are_those_of_the_alerts_for_prometheus():
    rules = yaml.safe_load(Path("deploy/observability/alerts.yaml").read_text())
    books = {r["alert"]: r["annotations"]["runbook"] for g in rules["groups"] for r in g["rules"]}
    assert {name: books[name] for name in FIRST_STEPS} == FIRST_STEPS


def test_a_report_needs_nothing_else():
    text = report(federation())
    assert "<svg" in text
    assert not re.search(r"<script|<link|\ssrc=|https?://(?!www\.w3\.org)|url\(", text)
    assert "default-src 'none'; style-src 'sha256-" in text
    assert "<dt>clients</dt><dd>2</dd>" in text


def test_what_was_taken_back_is_said_on_the_page_and_in_the_report():
    said = running(mode="complete", state=pb.ROUND_STATE_COLLECTING)
    for sequence, number, state, reason in (
        (1, 1, pb.ROUND_STATE_PUBLISHED, ""),
        (2, 2, pb.ROUND_STATE_PUBLISHED, ""),
        (3, 3, pb.ROUND_STATE_ABANDONED, "SUM_UNREADABLE"),
    ):
        said.history.add(
            sequence=sequence, number=number, kind=pb.ROUND_KIND_TRAIN, state=state, reason=reason, attempt=1
        )
    said.current.sequence, said.current.number, said.current.attempt = 4, 2, 2
    said.sits_out = "b"
    shown = page(said)
    assert shown.taken_back.endswith("could not open them: round 2")
    assert shown.sitting_out.startswith("b sits out: ")
    assert [(row.name, row.state) for row in shown.rounds] == [
        ("round 2, attempt 2", "collecting updates"),
        ("round 3", "abandoned"),
        ("round 2", "published, then taken back"),
        ("round 1", "published"),
    ]
    assert [figures.number for figures in shown.figures] == [1]
    assert all(words in report(said) for words in (shown.taken_back, shown.sitting_out))
