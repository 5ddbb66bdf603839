from pathlib import Path

import numpy as np
import pytest
import torch

from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.model import AdaptedModel
from client_agent.scoring import sensitivity_scores
from shelora.obfuscation import Obfuscation
from tests.unit.client_agent.tiny import classifier


def ignore(_fraction: float) -> None:
    pass


def test_scores_agree_with_the_formula_computed_directly(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    """S_j = sum_k |W_kj| * ||x_j||_2, one example at a time without any padding."""
    scores = sensitivity_scores(model, encoder, examples, ignore)
    for matrix in model.matrices:
        layer = model.layers[matrix.name]
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(
            lambda _m, inputs, seen=seen: seen.append(inputs[0].detach()[0])
        )
        with torch.inference_mode():
            for i in range(len(examples)):
                model.predict(encoder.batch(examples.select([i])))
        hook.remove()
        x = torch.cat(seen).double().numpy()
        weight = layer.get_base_layer().weight.detach().double().numpy()
        expected = np.abs(weight).sum(axis=0) * np.sqrt((x**2).sum(axis=0))
        np.testing.assert_allclose(scores[matrix.name], expected, rtol=1e-4)
        assert scores[matrix.name].dtype == np.float64


def test_scoring_leaves_no_hooks_behind_even_if_it_is_stopped(
    model: AdaptedModel, encoder: Encoder, examples: Examples
) -> None:
    def stop(_fraction: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        sensitivity_scores(model, encoder, examples, stop)
    assert not any(layer._forward_pre_hooks for layer in model.layers.values())


def test_a_module_that_sees_one_vector_an_example_is_scored_too(
    bert_folder: Path, obfuscation: Obfuscation, examples: Examples
) -> None:
    model = classifier(bert_folder, targets=("pooler.dense",))
    model.initialise(obfuscation)
    scores = sensitivity_scores(model, Encoder(model.tokenizer, 32, append_end=False), examples, ignore)
    assert scores["bert.pooler.dense"].shape == (32,)
    assert (scores["bert.pooler.dense"] > 0).all()
