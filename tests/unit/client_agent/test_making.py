"""What an update says of itself."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from client_agent import making
from client_agent.attempts import Attempt
from client_agent.learning import Evaluation, Trained
from client_agent.making import LEAST_EXAMPLES, Maker, figures_of
from client_agent.measured import Measured
from client_agent.participation import Participation, Tools
from client_agent.progress import Activity
from shelora.federation import ProtectionSpec, TrainingSpec
from shelora.lora.figures import NOTHING, Figures
from shelora.lora.layout import Layout
from shelora.v1 import coordinator_pb2 as pb
from tests.unit.client_agent.test_committees import CONTEXT, LAYOUT, SECRETS, Model, asked, committees

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


@pytest.fixture
def told(monkeypatch, tmp_path):
    """What a client tells in the sum of an attempt at a round that begins from the result clinic.1.3."""
    shown = []
    monkeypatch.setattr(making, "spool_update", lambda *_, context, **__: shown.append(context.figures))
    trained = Trained(weights=None, loss=1.5, seconds=1.0)
    model = SimpleNamespace(rank=2, scaling=1.0, matrices=Model.matrices, tensors=())
    learner = SimpleNamespace(
        model=model, examples=range(100), train=lambda *_: trained, base=None, privacy=""
    )
    me = Participation(
        federation_id="clinic",
        client_id="ward-1",
        budget=1.0,
        protection=ProtectionSpec(mode="complete"),
        examples_a_round=LEAST_EXAMPLES,
    )
    state = SimpleNamespace(measured=Measured(tmp_path))
    maker = Maker(
        me, Tools(session=None, replicas=None, state=state, learner=learner, worker=None), None, None
    )
    base = Evaluation(count=4, correct=3, loss=0.5, seconds=1.0)

    def tell(attempt: Attempt, layout: Layout = LAYOUT) -> Figures:
        number = attempt.context.round_number
        ref = pb.RoundRef(number=number, round_id=attempt.round_id)
        train = pb.Train(round=ref, base={"round_id": "clinic.1.3"})
        made = maker.train(train, None, attempt, base, Activity())
        dealer = SimpleNamespace(context=attempt.context, encryption=None)
        maker.protect(number, made, layout, None, SECRETS, dealer, Activity())
        return shown[-1]

    return tell


def test_of_two_sums_that_a_server_gives_one_rounds_name_one_holds_a_clients_figures(told):
    """Attack: the second has another number, so that its committee signs a second set, without one client."""
    first, second = (
        committees().attempt(asked(**changed), LAYOUT, SECRETS) for changed in ({}, {"round_number": 3})
    )
    assert first.round_id == second.round_id
    assert told(first) == Figures(accuracy=0.75, loss=0.5, train_loss=1.5)
    assert told(second) == NOTHING
    renamed = replace(second.context, round_id="clinic.00000001.5")
    assert told(replace(second, context=renamed)) == NOTHING


def test_a_sum_that_holds_no_figures_takes_none_from_another_one(told):
    attempt = committees().attempt(asked(), LAYOUT, SECRETS)
    before = replace(LAYOUT, sums=replace(LAYOUT.sums, figures=False))
    assert told(replace(attempt, context=replace(CONTEXT, round_number=3)), before) == NOTHING
    assert told(attempt) != NOTHING


def test_a_client_tells_its_figures_again_if_the_same_committee_opens_one_sum_of_both_attempts(told):
    again = replace(CONTEXT, attempt=2, round_id="clinic.00000001.5")
    first = committees().attempt(asked(), LAYOUT, SECRETS)
    assert told(first) == told(replace(first, context=again)) != NOTHING
