"""The attacks of `make attack` on messages of small real federations: a change that opens a leak turns red here."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import structlog

from attack import beside, captures, experiments
from attack.public import Public
from attack.stage import Client, Scene, Stage
from client_agent.making import Maker
from shelora.additive.secret import SecretKey
from tests.attack.tiny import TEXT, save_tiny_llama

TEXTS = (
    "maria tested positive and starts therapy next week at the clinic",
    "password for the vault is blue canyon seven",
    "transfer money to account seven before noon on friday",
)
DRAWN = [" ".join(np.random.default_rng(i).choice(TEXT.split(), 9, replace=False)) for i in range(18)]
BATCHES, OUTSIDERS = (DRAWN[:4], DRAWN[4:8], DRAWN[8:12]), DRAWN[12:]
"""Fifteen members and 36 others: enough that an AUC can exceed chance by more than is taken for chance."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with Stage(tmp_path_factory.mktemp("attack")) as stage:
        yield stage
    structlog.reset_defaults()


def scene(mode, name, clear_bits=16):
    return Scene(
        name=f"attacked-{name}",
        task="causal-lm",
        mode=mode,
        clients=tuple(
            Client(name=f"c{i}", texts=tuple(texts), rank=16, data="tiny")
            for i, texts in enumerate([*([text] for text in TEXTS), *BATCHES])
        ),
        steps=1,
        batch=4,
        rounds=1,
        max_tokens=32,
        learning_rate=0.002,
        modules=("q_proj", "v_proj"),
        clear_bits=clear_bits,
    )


def test_text_and_membership_come_back_from_selective_as_it_was_published(stage, model, tmp_path):
    performed = stage.perform(scene("selective", "published", 32), model)
    captures.save(performed, tmp_path)
    performance = captures.load(performed.scene, tmp_path)  # what is attacked later is the same
    public, single = Public(performance.scene, model), performance.scene.clients[: len(TEXTS)]

    (text,) = experiments.decoded(performance, public, single, control=True)
    assert text.figures["exact"] == 1, (
        "the attack that the threat model tells of does not work any more: mend it"
    )
    opened = experiments.spanned(performance, public, single, "colluding client", control=True)
    assert opened.problems() == [], "the initial A is the colluding client's to know: the control"


def test_membership_comes_back_from_16_bits_and_text_does_not(stage, model):
    performance = stage.perform(scene("selective", "selective"), model)
    public, clients = Public(performance.scene, model), performance.scene.clients

    member = experiments.membership(performance, public, clients, OUTSIDERS, control=True)
    assert member.problems() == []
    would_be_a_leak = replace(member, no_better_than_chance=True)
    assert would_be_a_leak.problems(), "the control of the test below: so much is more than chance"
    (text,) = experiments.decoded(performance, public, clients[: len(TEXTS)])
    assert text.figures["exact"] == 0
    assert beside.membership_by_loss(performance, public, clients, OUTSIDERS, control=True).problems() == []
    assert beside.recorded(performance).problems() == [], "norms are in the clear: the control"


def test_nothing_comes_back_from_complete(stage, model):
    performance = stage.perform(scene("complete", "complete"), model)
    public, clients = Public(performance.scene, model), performance.scene.clients

    member = experiments.membership(performance, public, clients, OUTSIDERS)
    (text,) = experiments.decoded(performance, public, clients[: len(TEXTS)])
    opened = experiments.spanned(
        performance, public, clients[: len(TEXTS)], "colluding client", control=False
    )
    assert member.problems() == text.problems() == opened.problems() == []
    assert text.figures["exact"] == 0
    assert "all it stored" in member.attacker, "nothing travelled in the clear"
    told = [
        beside.membership_by_loss(performance, public, clients, OUTSIDERS),
        beside.recorded(performance),
        *beside.stated(performance),
    ]
    assert [row.problems() for row in told] == [[]] * 4
    assert {row.attack for row in told if row.can_leak} == {row.attack for row in told}, "each can fail"


def test_an_agent_that_reports_a_loss_of_its_own_is_found(stage, model, monkeypatch):
    """The control of what `recorded` says of complete: agents that tell their own training loss, as they once did."""
    usual = Maker.train

    def telling(self, train, plan, attempt, base, activity):
        made = usual(self, train, plan, attempt, base, activity)
        trained = self._learner.train(train.round.number, activity, attempt.variant)
        return replace(made, note=replace(made.note, train_loss=trained.loss))

    monkeypatch.setattr(Maker, "train", telling)
    performance = stage.perform(scene("complete", "telling"), model)
    assert any("unexpected numbers" in problem for problem in beside.recorded(performance).problems())


def test_a_cipher_that_hides_nothing_is_found(stage, model, monkeypatch):
    """The control of the test above: the same federation, whose secrets are all zero."""
    zero = classmethod(lambda cls, parameters, _: cls(parameters, np.zeros(parameters.degree, np.int64)))
    monkeypatch.setattr(SecretKey, "draw", zero)
    performance = stage.perform(scene("complete", "broken"), model)
    public, clients = Public(performance.scene, model), performance.scene.clients
    member = experiments.membership(performance, public, clients, OUTSIDERS)
    assert member.problems(), member
