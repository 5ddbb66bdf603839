"""Sensitivity of the columns of every adapted matrix: S_j = sum_k |W_kj| * ||x_j||_2.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda, ICLR 2024), summed over the
rows of a column as SHE-LoRA (arXiv 2505.21051) does.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import nn

from client_agent.layers import squared_inputs
from client_agent.model import AdaptedModel
from client_agent.tasks.port import ExampleEncoder, ExampleSet
from client_agent.training import Report
from shelora.lora.shards import Float64

BATCH_EXAMPLES: Final = 16
_Examples = TypeVar("_Examples", bound=ExampleSet)


def sensitivity_scores(
    model: AdaptedModel, encoder: ExampleEncoder[_Examples], examples: _Examples, report: Report
) -> dict[str, Float64]:
    """Scores [in_features] of every adapted matrix by name.

    ||x_j||_2 runs over all tokens of `examples` that are not padding; of a convolution, whose columns are positions in
    its patches, over all patches. The model's state does not change.

    Args: report: Called before every batch; what it raises ends the scoring.
    """
    norms = _squared_norms(model, encoder, examples, report)
    return {name: sums * np.sqrt(norms[name]) for name, sums in model.base_weight_sums().items()}


class _Accumulator:
    """Adds up the squares of what reaches one adapted module."""

    def __init__(self, layer: nn.Module, in_features: int, device: torch.device) -> None:
        self._layer = layer
        self.squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.mask: torch.Tensor | None = None

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            x = x[self.mask]
        self.squares += squared_inputs(self._layer, x)


def _squared_norms(
    model: AdaptedModel, encoder: ExampleEncoder[_Examples], examples: _Examples, report: Report
) -> dict[str, Float64]:
    model.module.eval()
    with _accumulating(model) as sums:
        for start in range(0, len(examples), BATCH_EXAMPLES):
            report(start / len(examples))
            batch = encoder.batch(examples.select(range(start, min(start + BATCH_EXAMPLES, len(examples)))))
            mask = None if batch.mask is None else batch.mask.bool().to(model.device)
            for accumulator in sums.values():
                accumulator.mask = mask
            with torch.inference_mode():
                model.predict(batch)
    return {name: np.asarray(a.squares.cpu().numpy(), dtype=np.float64) for name, a in sums.items()}


@contextmanager
def _accumulating(model: AdaptedModel) -> Iterator[dict[str, _Accumulator]]:
    """Accumulators by matrix name, hooked to the modules while the context lasts."""
    sums = {
        m.name: _Accumulator(model.base_layer(m.name), m.in_features, model.device) for m in model.matrices
    }
    with ExitStack() as hooks:
        for name, accumulator in sums.items():
            hooks.callback(model.layers[name].register_forward_pre_hook(accumulator).remove)
        yield sums
