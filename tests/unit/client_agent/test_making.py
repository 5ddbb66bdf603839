"""What an update says of itself."""

from types import SimpleNamespace

import pytest

from client_agent.learning import Trained
from client_agent.making import LEAST_EXAMPLES, Maker, loss_told
from client_agent.participation import Participation, Tools
from shelora.federation import ProtectionSpec, TrainingSpec

EXACT = 2.7182818


@pytest.mark.parametrize(
    ("mode", "examples", "told"),
    [
        ("none", 1, EXACT),
        ("selective", 1, EXACT),
        ("complete", LEAST_EXAMPLES - 1, 0.0),
        ("complete", LEAST_EXAMPLES, 2.72),
    ],
)
def test_where_nothing_else_is_seen_a_mean_loss_of_few_examples_is_not_told_and_no_digits_that_name_them(
    mode, examples, told
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
    round_ = SimpleNamespace(round=SimpleNamespace(number=1, round_id="r"))
    note, _ = Maker(me, tools, None, None).train(round_, None, None, None)
    assert note.train_loss == told


def test_a_loss_is_told_in_hundredths():
    assert loss_told(1.23456, LEAST_EXAMPLES) == 1.23


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
