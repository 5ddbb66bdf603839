"""What evaluations tell beside accuracy."""

import math

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.evaluation import confused, evaluate, macro_f1
from client_agent.own_metrics import metrics_of
from examples.own_trainer.metrics import balanced_accuracy
from shelora.errors import DomainError, Reason
from tests.unit.client_agent.tiny import decoder


def test_macro_f1_is_the_mean_over_classes_that_occur_or_are_predicted() -> None:
    targets = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 2, 2])
    logits = torch.nn.functional.one_hot(predicted, 5).float()  # classes 3 and 4 never occur
    confusion = confused(logits, targets)
    assert confusion.shape == (5, 5)
    assert confusion.sum() == 6
    # By hand: F1 of 0: 2*2/(3+2), of 1: 2*1/(2+2), of 2: 2*1/(1+2).
    assert macro_f1(confusion) == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert macro_f1(np.zeros((2, 2), dtype=np.int64)) == 0.0


def test_a_class_that_is_never_right_counts_as_much_as_one_that_is_frequent() -> None:
    assert macro_f1(np.array([[98, 0], [2, 0]])) == pytest.approx(2 * 98 / 198 / 2)


def test_a_classifier_tells_macro_f1_and_a_decoder_perplexity(
    model, encoder, examples, llama_folder, obfuscation
):
    told = evaluate(model, encoder, examples, lambda _: None).figures
    assert set(told) == {"macro_f1"}
    language = decoder(llama_folder)
    language.initialise(obfuscation)
    found = evaluate(
        language, Encoder(language.tokenizer, 32, append_end=True), Examples(examples.texts), lambda _: None
    )
    assert found.figures == {"perplexity": pytest.approx(math.exp(found.loss))}


def test_functions_of_ones_own_see_every_prediction_and_their_figures_stand_beside_ours(
    model, encoder, examples, llama_folder, obfuscation
):
    seen = []

    def noted(predictions):
        seen.append(predictions)
        return {"macro_f1": 0.5, "seen": len(predictions.label_ids)}

    told = evaluate(model, encoder, examples, lambda _: None, [noted, balanced_accuracy])
    assert told.figures["macro_f1"] == 0.5, "theirs in place of ours"
    assert told.figures["seen"] == told.count == len(examples)
    assert seen[0].predictions.shape == (20, 2)
    assert sorted(seen[0].label_ids) == sorted(examples.labels)
    right = seen[0].predictions.argmax(axis=-1) == seen[0].label_ids
    assert right.sum() == told.correct
    assert told.figures["balanced_accuracy"] == pytest.approx(right.mean()), "both classes have ten"
    language = decoder(llama_folder)
    language.initialise(obfuscation)
    texts = Examples(examples.texts)
    told = evaluate(
        language, Encoder(language.tokenizer, 32, append_end=True), texts, lambda _: None, [noted]
    )
    assert seen[1].predictions.shape == seen[1].label_ids.shape == (told.count,)
    assert (seen[1].predictions == seen[1].label_ids).sum() == told.correct


@pytest.mark.parametrize(
    "returned", [None, 0.5, {"a b": 1.0}, {"a": "much"}, {str(i): 0.0 for i in range(51)}, ValueError("no")]
)
def test_a_function_that_fails_or_returns_no_numbers_costs_its_figures_alone(
    model, encoder, examples, returned
):
    def odd(_):
        if isinstance(returned, Exception):
            raise returned
        return returned

    own = [odd, lambda _: {"fine": 1, "nan": math.nan}]
    with capture_logs() as logs:
        told = evaluate(model, encoder, examples, lambda _: None, own)
    assert set(told.figures) == {"macro_f1", "fine"}
    assert "metric_not_computed" in [record["event"] for record in logs]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("accuracy", "name a function as module:attribute"),
        (":f", "name a function as module:attribute"),
        ("no_such_module_here:f", "cannot be loaded"),
        ("math:no_such", "cannot be loaded"),
        ("math:pi", "it is a float; name a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused_in_one_line(name, words):
    with pytest.raises(DomainError, match=words) as refused:
        metrics_of([name])
    assert refused.value.reason is Reason.CONFIGURATION_INVALID
    assert "\n" not in refused.value.message
    assert metrics_of(["math:sqrt"])
