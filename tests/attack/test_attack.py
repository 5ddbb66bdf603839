"""The attacks of `make attack` on messages of small real federations: a change that opens a leak turns red here."""

import logging

import pytest
import structlog

from attack import experiments, insiders
from attack.capture import Tap
from attack.public import Public
from attack.stage import SETTINGS, Client, Scene, perform
from shelora.cli.cluster import LocalCluster
from tests.attack.tiny import save_tiny_llama

TEXTS = (
    "maria tested positive and starts therapy next week at the clinic",
    "password for the vault is blue canyon seven",
    "transfer money to account seven before noon on friday",
)
OUTSIDERS = (
    "shares of apex will fall after recall notice next monday morning",
    "patient reports chest pain since tuesday night",
    "merger closes on friday and board has not been told yet",
    "they fall in north red vault before we reports",
    "a green canyon is told to patient on monday",
    "week of therapy for apex board has been positive",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    folder = tmp_path_factory.mktemp("attack")
    cluster = LocalCluster(folder / "cluster", fixed_ports=False, workers=1, settings=SETTINGS)
    with cluster, Tap(folder / "cluster" / "redis") as tap:
        yield lambda scene, model: perform(cluster, tap, scene, model, folder)
    structlog.reset_defaults()


def scene(mode, name, clear_bits=16):
    return Scene(
        name=f"attacked-{name}",
        task="causal-lm",
        mode=mode,
        clients=tuple(
            Client(name=f"c{i}", texts=(text,), rank=16, data="tiny") for i, text in enumerate(TEXTS)
        ),
        steps=1,
        batch=1,
        rounds=1,
        max_tokens=32,
        learning_rate=0.002,
        modules=("q_proj", "v_proj"),
        clear_bits=clear_bits,
    )


def test_text_and_membership_come_back_from_selective_as_it_was_published(stage, model):
    performance = stage(scene("selective", "published", 32), model)
    public = Public(performance.scene, model)

    (text,) = experiments.decoded(performance, public, control=True)
    assert text.figures["exact"] == 1, (
        "the attack that the threat model tells of does not work any more: mend it"
    )
    secrets = insiders.secrets_of(performance, "c0")
    opened = experiments.spanned(performance, public, secrets, "colluding client", control=True)
    assert opened.problems() == [], "one client's key opens every update of selective: the control"


def test_membership_comes_back_from_16_bits_and_text_does_not(stage, model):
    performance = stage(scene("selective", "selective"), model)
    public = Public(performance.scene, model)

    member = experiments.membership(performance, public, OUTSIDERS, control=True)
    assert member.problems() == []
    (text,) = experiments.decoded(performance, public)
    assert text.figures["exact"] == 0


def test_nothing_comes_back_from_complete(stage, model):
    performance = stage(scene("complete", "complete"), model)
    public = Public(performance.scene, model)

    member = experiments.membership(performance, public, OUTSIDERS)
    (text,) = experiments.decoded(performance, public)
    assert member.problems() == text.problems() == []
    assert text.figures["exact"] == 0
    assert "all it stored" in member.attacker, "nothing travelled in the clear"
