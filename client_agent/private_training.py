"""DP-SGD: training that reveals little about any one example (Abadi et al., CCS 2016), with Opacus.

Every step takes each example with probability q, by itself (Poisson sampling); scales each one's gradient, over all
trainable parameters together, down to a norm C; adds up; adds normal noise of standard deviation σC to every value;
divides by the expected batch size. The optimizer sees the noisy gradients alone, so it costs no privacy. Nothing else
depends on the examples: no error, no length of the work, and no loss is computed from them.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer

from client_agent.encoding import ModelBatch
from client_agent.metrics import TRAINING_STEPS
from client_agent.model import AdaptedModel
from client_agent.noise import Randomness
from client_agent.privacy import Mechanism
from client_agent.tables import first_line
from client_agent.tasks.port import ExampleEncoder, ExampleSet
from client_agent.training import (
    Report,
    TrainingOutcome,
    TrainingRun,
    cuda_devices,
    optimizer_of,
    parts_of,
)
from shelora.errors import DomainError, Reason

TOLERANCE: Final = 1e-3
"""Largest difference of a parameter's gradient, computed beside another example's, relative to its norm."""
ROUNDING: Final = 1e-5
"""The same relative to the norm of all parameters' gradients together."""


def train_privately(
    model: AdaptedModel,
    encoder: ExampleEncoder[Any],
    examples: ExampleSet,
    run: TrainingRun,
    mechanism: Mechanism,
    report: Report,
    randomness: Randomness | None = None,
) -> TrainingOutcome:
    """Updates the model's trainable parameters in place. The loss of the outcome is 0: it is not looked at.

    Args:
        model: What is trained.
        encoder: Makes the batches.
        examples: All of this client's.
        run: Its seed is not used, because nobody may predict batches, dropout and noise.
        mechanism: How a step hides an example.
        report: As in `client_agent.training.train`.
        randomness: For tests.
    """
    started = time.monotonic()
    randomness = randomness or Randomness()
    optimizer = NoisyOptimizer(
        optimizer_of(model, run.settings),
        mechanism,
        expected_batch_size=mechanism.sample_rate * len(examples),
        randomness=randomness,
    )
    model.module.train()
    try:
        with torch.random.fork_rng(devices=cuda_devices(model.device)), gradients_by_example(model):
            torch.manual_seed(randomness.seed())
            for step, rate in enumerate(run.rates):
                report(step / run.steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                chosen = poisson_sample(len(examples), mechanism.sample_rate, randomness)
                parts = [encoder.batch(examples.select(part)) for part in parts_of(chosen, run.micro_batch)]
                private_step(model, parts, optimizer)
                TRAINING_STEPS.inc()
    finally:
        model.module.eval()
    return TrainingOutcome(0.0, time.monotonic() - started)


def poisson_sample(count: int, rate: float, randomness: Randomness) -> list[int]:
    """Indices below `count`, each taken with probability `rate` whatever becomes of the others; perhaps none."""
    return [int(index) for index in np.flatnonzero(randomness.uniform(count) < rate)]


def private_step(model: AdaptedModel, parts: Sequence[ModelBatch], optimizer: DPOptimizer) -> None:
    """One step of the optimizer. Its batch comes in parts, to save memory; no parts are an empty batch: noise alone."""
    for number, part in enumerate(parts or [None], start=1):
        optimizer.zero_grad(set_to_none=True)
        if part is None:
            for parameter in model.trainable():
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        else:
            compute_gradients(model, part)
        optimizer.signal_skip_step(do_skip=number < len(parts))
        optimizer.step()


def compute_gradients(model: AdaptedModel, part: ModelBatch) -> None:
    """Leaves every example's gradient in `grad_sample` [examples, ...] of the parameters, zero if it is not finite.

    An example's loss is the mean over its own targets: none, of a text of one token, give a gradient of zero.
    """
    model.losses(part).sum().backward()  # type: ignore[no-untyped-call]
    samples = [parameter.grad_sample for parameter in model.trainable()]  # type: ignore[attr-defined]
    finite = torch.stack([s.flatten(1).isfinite().all(dim=1) for s in samples]).all(dim=0)
    if not finite.all():
        for sample in samples:
            sample[~finite] = 0.0


class NoisyOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is untyped
    """Opacus' optimizer with noise from `Randomness`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        mechanism: Mechanism,
        *,
        expected_batch_size: float,
        randomness: Randomness,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.max_gradient_norm,
            expected_batch_size=expected_batch_size,
        )
        self._randomness = randomness

    def add_noise(self) -> None:
        """Puts the clipped sum with its noise into every parameter's gradient; added in float64, then rounded."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            drawn = torch.from_numpy(self._randomness.normal(parameter.numel())).view(parameter.shape)
            noisy = parameter.summed_grad.double() + deviation * drawn.to(parameter.device)
            parameter.grad = noisy.to(parameter.dtype)


@contextmanager
def gradients_by_example(model: AdaptedModel) -> Iterator[None]:
    """While it lasts, a backward pass in training mode leaves each example's gradient. Raises: MODEL_INVALID."""
    try:
        hooks = GradSampleHooks(model.module, loss_reduction="sum", strict=True)
    except NotImplementedError as error:
        raise _unsupported(first_line(error)) from error
    try:
        with warnings.catch_warnings():
            # Embeddings are frozen, so nothing before the first adapted layer takes gradients; its outputs do.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield
    finally:
        hooks.cleanup()


def rehearse_privately(model: AdaptedModel, batch: ModelBatch) -> None:
    """Sees that each example's gradient is that of the example alone. The model's state does not change.

    Args: batch: of two examples.
    Raises: MODEL_INVALID for layers whose gradients cannot be told apart by example, or that mix examples.
    """
    alone = [_gradients_alone(model, batch.only(index)) for index in range(len(batch))]
    with gradients_by_example(model):
        _train_adapted_layers_only(model)
        try:
            compute_gradients(model, batch)
            found = [parameter.grad_sample for parameter in model.trainable()]  # type: ignore[attr-defined]
        except Exception as error:  # Opacus and torch raise many kinds, by the layer that they meet
            raise _unsupported(first_line(error)) from error
        finally:
            model.module.eval()
            _forget_gradients(model)
    for index, expected in enumerate(alone):
        if any(len(g) != len(alone) for g in found) or _differ([g[index] for g in found], expected):
            raise _unsupported("an example's gradient depends on what else is in its batch")


def _gradients_alone(model: AdaptedModel, batch: ModelBatch) -> list[torch.Tensor]:
    """The gradient of one example by plain backpropagation, by parameter."""
    model.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.trainable()]
    _forget_gradients(model)
    return gradients


def _train_adapted_layers_only(model: AdaptedModel) -> None:
    """Training mode where Opacus looks at it, and nowhere else: no dropout."""
    for module in model.module.modules():
        module.training = any(p.requires_grad for p in module.parameters(recurse=False))


def _forget_gradients(model: AdaptedModel) -> None:
    for parameter in model.trainable():
        parameter.grad = None


def _differ(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether a parameter's gradient is another than expected, by more than rounding; NaN is."""
    rounding = ROUNDING * torch.stack([gradient.norm() for gradient in expected]).norm()
    return not all(
        bool((one - other).norm() <= TOLERANCE * other.norm() + rounding)
        for one, other in zip(found, expected, strict=True)
    )


def _unsupported(why: str) -> DomainError:
    return DomainError(
        Reason.MODEL_INVALID,
        f"privacy: this model's gradients cannot be told apart by example ({why}); train another model, ask the "
        "operator for other target_modules, or remove the section privacy",
    )
