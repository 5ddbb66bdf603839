"""What an agent keeps of its evaluations and of the means that sums told."""

import json

import pytest

from client_agent.applying import means_told
from client_agent.learning import Evaluation
from client_agent.measured import FILE, Measured
from examples.measured import with_own_figures
from shelora.lora.figures import NOTHING, Figures
from shelora.v1 import coordinator_pb2 as pb

OWN = Evaluation(count=10, correct=9, loss=0.25, seconds=1.0, figures={"macro_f1": 0.8})
MEANS = Figures(accuracy=0.7, loss=0.5, train_loss=None)


def test_what_was_measured_and_told_of_a_result_is_there_after_a_restart(tmp_path):
    measured = Measured(tmp_path)
    assert measured.newest() is None
    measured.note_means("clinic.1.4", 1, MEANS)
    measured.note_own("clinic.1.4", 1, OWN)
    again = Measured(tmp_path)
    assert again.means("clinic.1.4") == MEANS
    assert again.means("clinic.1.5") is None
    own = {"count": 10, "correct": 9, "loss": 0.25, "figures": {"macro_f1": 0.8}}
    assert again.newest() == own
    assert again.results()["clinic.1.4"]["number"] == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"results": 3}',
        '{"results": {"r": 3}}',
        '{"results": {"r": {"means": {"accuracy": "x"}}}}',
        '{"results": {"r": {"means": {"accuracy": NaN}}}}',
        '{"results": {"r": {"means": {"odd": 1}}}}',
    ],
)
def test_a_damaged_file_tells_nothing_and_is_written_anew(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    measured = Measured(tmp_path)
    assert measured.means("r") is None
    measured.note_own("r", 2, OWN)
    measured.note_means("r", 2, MEANS)
    assert measured.means("r") == MEANS
    assert json.loads((tmp_path / FILE).read_text())["format"] == 1


def test_a_client_tells_of_one_result_in_one_sum_also_after_a_restart(tmp_path):
    """Attack: a round is repeated without one client; the difference of both means would be that client's own."""
    own = Figures(accuracy=0.9, loss=0.3, train_loss=0.4)
    assert Measured(tmp_path).once("clinic.1.4", "5", own) == own
    again = Measured(tmp_path)
    assert again.once("clinic.1.4", "5", own) == own, "the same sum, protected anew"
    assert again.once("clinic.1.4", "6", own) == NOTHING
    assert again.once("clinic.1.6", "7", own) == own, "another result"
    again.note_own("clinic.1.4", 1, OWN)
    assert again.once("clinic.1.4", "8", own) == NOTHING


def test_the_coordinator_is_told_means_in_digits_that_people_read():
    told = means_told(Figures(accuracy=0.123456, loss=1.23456, train_loss=1.23456))
    assert (told.accuracy, told.loss, told.train_loss) == (0.1235, 1.235, 1.23)
    nothing = means_told(NOTHING)
    assert not any(nothing.HasField(name) for name in ("accuracy", "loss", "train_loss"))


def test_who_has_all_folders_sees_each_agents_own_figures(tmp_path):
    for agent in ("a", "b"):
        (tmp_path / agent).mkdir()
    Measured(tmp_path / "a").note_own("clinic.1.4", 1, OWN)
    federation = pb.Federation()
    summary = federation.history.add(round_id="clinic.1.4")
    summary.evaluations.add(client_id="b", decrypt_s=2.0)
    told = with_own_figures(federation, {name: tmp_path / name for name in ("a", "b", "gone")})
    assert [(e.client_id, e.example_count, e.correct_count) for e in told.history[0].evaluations] == [
        ("b", 0, 0),
        ("a", 10, 9),
    ]
    assert len(federation.history[0].evaluations) == 1
