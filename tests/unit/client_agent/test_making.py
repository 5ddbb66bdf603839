"""What an update says of itself."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from client_agent import making
from client_agent.learning import Evaluation, Trained
from client_agent.making import LEAST_EXAMPLES, Made, Maker, figures_of
from client_agent.measured import Measured
from client_agent.participation import Participation, Tools
from shelora.federation import ProtectionSpec, TrainingSpec
from shelora.lora.figures import NOTHING, Figures
from shelora.v1 import coordinator_pb2 as pb
from tests.unit.client_agent.notes import NOTE

EXACT = 2.7182818


@pytest.mark.parametrize(
    ("mode", "examples", "told", "summed"),
    [
        ("none", 1, EXACT, None),
        ("selective", 1, EXACT, None),
        ("complete", LEAST_EXAMPLES - 1, 0.0, None),
        ("complete", LEAST_EXAMPLES, 0.0, EXACT),
    ],
)
def test_where_nothing_else_is_seen_no_loss_is_told_and_none_of_few_examples_goes_into_the_sum(
    mode, examples, told, summed
):
    """The coordinator told members of batches of one and of four by it, AUC 1.00 and 0.95."""
    model = SimpleNamespace(rank=4, scaling=1.0)
    trained = Trained(weights=None, loss=EXACT, seconds=1.0)
    learner = SimpleNamespace(model=model, examples=range(100), train=lambda *_: trained)
    me = Participation(
        federation_id="clinic",
        client_id="ward-7",
        budget=1.0,
        protection=ProtectionSpec(mode=mode),
        examples_a_round=examples,
    )
    tools = Tools(session=None, replicas=None, state=None, learner=learner, worker=None)
    round_ = pb.Train(round=pb.RoundRef(number=1, round_id="clinic.1.7"))
    made = Maker(me, tools, None, None).train(round_, None, None, None, None)
    assert made.note.train_loss == told
    assert mode != "complete" or made.figures == Figures(train_loss=summed)
    assert made.base == "clinic.1.initial"


def test_a_client_tells_in_sums_how_good_the_rounds_base_is_on_its_test_examples_and_no_secret_loss():
    base = Evaluation(count=4, correct=3, loss=0.5, seconds=1.0)
    assert figures_of(base, 0.0, LEAST_EXAMPLES) == Figures(accuracy=0.75, loss=0.5), (
        "0 is what differential privacy tells"
    )
    assert figures_of(replace(base, count=0), 1.0, LEAST_EXAMPLES) == Figures(train_loss=1.0)


@pytest.mark.parametrize(
    ("recipe", "examples", "seen"),
    [
        ({"local_steps": 1, "batch_size": 4}, 100, 4),
        ({"local_steps": 50, "batch_size": 4}, 100, 100),
        ({"local_steps": 50, "batch_size": 4, "local_epochs": 0.1}, 100, 12),
    ],
)
def test_examples_of_a_round_are_those_of_its_steps(recipe, examples, seen):
    assert TrainingSpec(base_model="m", labels=("a", "b"), **recipe).seen(examples) == seen


def test_an_update_is_sealed_with_the_figures_of_its_base_in_one_round_alone(tmp_path, monkeypatch):
    """Attack: an attempt without one client. The means of both attempts would differ by that client's figures."""
    sealed = []

    def kept(*_, context, **__):
        sealed.append(context.figures)

    @dataclass(frozen=True)
    class Known:
        figures: Figures = NOTHING

    monkeypatch.setattr(making, "spool_update", kept)
    monkeypatch.setattr(making, "round_context", lambda *_: Known())
    monkeypatch.setattr(making, "summing", lambda known, *_: known)
    state = SimpleNamespace(measured=Measured(tmp_path))
    learner = SimpleNamespace(model=None, base=None, privacy="")
    tools = Tools(session=None, replicas=None, state=state, learner=learner, worker=None)
    me = Participation(
        federation_id="clinic", client_id="ward-7", budget=1.0, protection=ProtectionSpec(mode="complete")
    )
    maker, dealer = Maker(me, tools, None, None), SimpleNamespace(context=SimpleNamespace(most_weight=1))
    own = Figures(accuracy=0.9, loss=0.3, train_loss=0.4)
    for round_id, base, figures in (("r.2", "r.1", True), ("r.3", "r.1", True), ("r.4", "r.3", False)):
        made = Made(note=replace(NOTE, round_id=round_id), weights=None, base=base, figures=own)
        layout = SimpleNamespace(digest=b"", sums=SimpleNamespace(figures=figures))
        maker.protect(1, made, layout, None, None, dealer, None)
    assert sealed == [own, NOTHING, NOTHING], "the last of a layout that holds none"
    assert "told_in" not in Measured(tmp_path).results().get("r.3", {})
