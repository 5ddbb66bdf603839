"""What evaluations tell beside accuracy."""

import math

import numpy as np
import pytest
import torch

from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.evaluation import confused, evaluate, macro_f1
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
