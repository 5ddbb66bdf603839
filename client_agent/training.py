"""Local training: `transformers.Trainer` over one round's batches.

What is ours is what a federation adds: batches that follow from client and round, the task's loss over all targets of
a step, rates over all rounds, work that can be stopped between two parts of a step, and random states that stay as
they were (docs/adr/0018).
"""

import gc
import math
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from client_agent.config import TrainingSettings
from client_agent.drawing import batches
from client_agent.encoding import ModelBatch
from client_agent.metrics import TRAINING_STEPS
from client_agent.model import AdaptedModel
from client_agent.moments import NONE
from client_agent.optimizer_state import noted, resume
from client_agent.packing import packed
from client_agent.tasks.port import ExampleEncoder, ExampleSet
from shelora.errors import DomainError, Reason

_Examples = TypeVar("_Examples", bound=ExampleSet)
USUAL: Final = TrainingSettings()
_INPUTS: Final = "batch"
"""The one entry of what the loop hands from the loader to the loss."""

Report = Callable[[float], None]
"""Takes the progress, 0 to 1; may raise to stop the work."""

_ALONE: Final = threading.Lock()
"""A Trainer resets accelerate's state, which all of the process share, and draws from the process' random states: two
agents of one process train one after the other."""
_LOOK_S: Final = 0.2
"""Seconds between two looks whether waiting for another agent's training is still wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """How to train in one round."""

    rates: Sequence[float]
    """The learning rate of every step."""
    batch_size: int
    """Examples a step."""
    seed: int
    """Fixes the batches and the dropout."""
    micro_batch: int = 0
    """Examples computed at once, to save memory: a step adds up their gradients. 0 for the whole batch."""
    steps_before: int = 0
    """Steps of earlier rounds, for trackers that count over all rounds."""
    settings: TrainingSettings = USUAL
    """What each client decides for itself."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.rates)


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """What training measured."""

    loss: float
    """Mean over the steps; 0 under differential privacy, which hides it."""
    seconds: float


def train(
    model: AdaptedModel,
    encoder: ExampleEncoder[_Examples],
    examples: _Examples,
    run: TrainingRun,
    report: Report,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingOutcome:
    """Updates the model's trainable parameters in place, and its moments where they are kept.

    Args:
        model: What is trained.
        encoder: Makes the batches.
        examples: All of this client's.
        run: How.
        report: Called before every step and between its parts; what it raises ends training there.
        callbacks: Of transformers, told of the loop's events; TensorBoard's and their like.

    Raises: DomainError VALUE_NOT_FINITE if the loss is NaN or infinite; DATA_INVALID if a batch has no targets.
    """
    started = time.monotonic()
    chosen = list(batches(len(examples), run.batch_size, run.steps, run.seed))
    parts = [list(parts_of(step, run.micro_batch)) for step in chosen]
    model.module.train()
    try:
        with alone(report), as_it_was(model), tempfile.TemporaryDirectory() as scratch:
            trainer = _RoundTrainer(model, run, len(parts[0]), scratch)
            trainer.load(encoder, examples, [part for step in parts for part in step])
            trainer.add_callback(_Watch(trainer, run.steps, report))
            for callback in callbacks:
                trainer.add_callback(callback)
            torch.manual_seed(run.seed)
            trainer.train()
            trainer.note_moments()
    finally:
        model.module.zero_grad(set_to_none=True)
        model.module.eval()
    return TrainingOutcome(sum(trainer.losses) / len(trainer.losses), time.monotonic() - started)


def parts_of(chosen: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The choice in parts of that size, the last perhaps smaller; 0: in one part, if there is any."""
    size = size or max(len(chosen), 1)
    return (chosen[start : start + size] for start in range(0, len(chosen), size))


def optimizer_of(model: AdaptedModel, settings: TrainingSettings) -> torch.optim.Optimizer:
    """The optimizer that transformers makes of the settings, over what is trainable; its rate is 1."""
    with _ALONE, tempfile.TemporaryDirectory() as scratch:
        arguments = _arguments(settings, 1, scratch, model.device)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    made: torch.optim.Optimizer = kind(
        [{"params": model.trainable(), "weight_decay": settings.weight_decay}], **options
    )
    return made


def cuda_devices(device: torch.device) -> list[torch.device]:
    """The devices whose random state is another than the CPU's."""
    return [device] if device.type == "cuda" else []


class _Parts(Dataset[Mapping[str, ModelBatch]]):
    """What is computed at once, encoded when it is asked for."""

    def __init__(
        self,
        encoder: ExampleEncoder[Any],
        examples: ExampleSet,
        parts: Sequence[Sequence[int]],
        *,
        packing: bool,
    ) -> None:
        self._encoder, self._examples, self._indices = encoder, examples, parts
        self._packing = packing

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Mapping[str, ModelBatch]:
        batch: Any = self._encoder.batch(self._examples.select(self._indices[index]))
        return {_INPUTS: packed(batch) if self._packing else batch}


class _RoundTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """The loop of transformers with a round's batches, rates and loss."""

    loss_is_scaled_for_ga = True  # by the targets of the whole step

    def __init__(self, adapted: AdaptedModel, run: TrainingRun, parts: int, folder: str) -> None:
        half = adapted.precision.dtype == torch.float16
        arguments = _arguments(run.settings, run.steps, folder, adapted.device, parts, half=half)
        super().__init__(model=adapted.module, args=arguments)
        self.remove_callback(PrinterCallback)
        self.losses: list[float] = []
        """By step."""
        self._adapted, self._run = adapted, run
        self._loss = 0.0

    def load(
        self, encoder: ExampleEncoder[Any], examples: ExampleSet, parts: Sequence[Sequence[int]]
    ) -> None:
        """Takes what to train on, in the order of training."""
        self.train_dataset = _Parts(encoder, examples, parts, packing=self._run.settings.packing)

    def get_train_dataloader(self) -> DataLoader[Mapping[str, ModelBatch]]:
        """The parts of all steps; nothing is shuffled here."""
        return DataLoader(self.train_dataset, batch_size=None, generator=torch.Generator())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Mapping[str, ModelBatch]], num_batches: int, device: torch.device
    ) -> tuple[list[Mapping[str, ModelBatch]], int]:
        """The parts of a step, and how many targets they have together."""
        del device
        parts = [next(epoch_iterator) for _ in range(num_batches)]
        count = sum(self._adapted.target_count(part[_INPUTS]) for part in parts)
        if not count:
            raise DomainError(
                Reason.DATA_INVALID, f"no text of step {len(self.losses) + 1} has a second token to predict"
            )
        return parts, count

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The run's rates."""
        del num_training_steps
        rates = [*self._run.rates, 0.0]  # the loop asks for one more
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rates.__getitem__)
        return self.lr_scheduler

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers makes it; it goes on from the model's moments where they are kept."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        moments = self._adapted.moments
        if self._run.settings.keeps_moments and moments.steps:
            resume(optimizer, self._adapted, moments)
        return optimizer

    def note_moments(self) -> None:
        """After training: the model holds what the optimizer came to, or nothing where it is not kept."""
        keeps = self._run.settings.keeps_moments
        self._adapted.moments = noted(self.optimizer, self._adapted) if keeps else NONE

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, ModelBatch],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - as transformers has it
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        """A part's share of the mean over all targets of the step."""
        del model, return_outputs
        logits, targets = self._adapted.predict(inputs[_INPUTS])
        smoothing = self._run.settings.label_smoothing
        return self._adapted.task.loss(logits, targets, smoothing) / (num_items_in_batch or 1)

    def training_step(
        self, model: torch.nn.Module, inputs: Mapping[str, ModelBatch], num_items_in_batch: int | None = None
    ) -> torch.Tensor:
        """Adds the part's gradient, notes its loss."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._loss += float(loss.item())
        return loss

    def floating_point_ops(self, inputs: Mapping[str, ModelBatch]) -> int:
        """Not counted."""
        del inputs
        return 0

    def close_step(self) -> None:
        """Before the optimizer's step. Raises: VALUE_NOT_FINITE."""
        value, self._loss = self._loss, 0.0
        if not math.isfinite(value):
            raise DomainError(
                Reason.VALUE_NOT_FINITE,
                f"the training loss is {value} at step {len(self.losses) + 1}; lower the learning rate or check the "
                "data",
            )
        self.losses.append(value)


class _Watch(TrainerCallback):  # type: ignore[misc]  # as above
    """Reports progress, from where the work may be stopped, and looks at the loss."""

    def __init__(self, trainer: _RoundTrainer, steps: int, report: Report) -> None:
        self._trainer, self._steps, self._report = trainer, steps, report
        self._parts = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - as transformers has it
        self._parts = 0
        self._tell()

    def on_substep_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        self._parts += 1
        self._tell()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        self._trainer.close_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        TRAINING_STEPS.inc()

    def _tell(self) -> None:
        done = len(self._trainer.losses) + self._parts / self._trainer.args.gradient_accumulation_steps
        self._report(done / self._steps)


def _arguments(
    settings: TrainingSettings,
    steps: int,
    folder: str,
    device: torch.device,
    parts: int = 1,
    *,
    half: bool = False,
) -> TrainingArguments:
    """For transformers, on one device. The rate of 1 is what the schedule's rates are factors of; in half precision
    losses are scaled so that small gradients are not lost.
    """
    made = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        gradient_accumulation_steps=parts,
        learning_rate=1.0,
        optim=settings.optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        fp16=half,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
        logging_nan_inf_filter=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if made.n_gpu > 1:  # or transformers would spread each batch over all of them
        made._n_gpu = 1  # noqa: SLF001 - as its own Trainer does where a model must stay on one
    return made


@contextmanager
def alone(report: Report) -> Iterator[None]:
    """Waits until no other agent of this process trains; what the report raises ends the wait."""
    while not _ALONE.acquire(timeout=_LOOK_S):
        report(0.0)
    try:
        yield
    finally:
        _ALONE.release()


@contextmanager
def as_it_was(model: AdaptedModel) -> Iterator[None]:
    """Keeps what a Trainer changes beside the weights: random states of the process, and the model's use of a cache.

    It collects garbage when it begins, which takes 0.2 s of the hundreds of thousands of objects that torch and
    transformers are; those are frozen meanwhile.
    """
    configuration = model.configuration
    cached = getattr(configuration, "use_cache", None)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - transformers seeds it
    gc.freeze()
    try:
        with torch.random.fork_rng(devices=cuda_devices(model.device)):
            yield
    finally:
        gc.unfreeze()
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if cached is not None:
            configuration.use_cache = cached
