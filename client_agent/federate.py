"""Makes an agent of a script around a `transformers.Trainer`: `federate(trainer, "agent.yaml")` for `trainer.train()`.

The script's data, collator, loss, callbacks and arguments train each round. What all clients must share is the
federation's: the base model and what is adapted, steps and rates. The model is loaded as any agent loads it, so that
frozen weights and heads are the same at all of them, and takes the place of the script's own.
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, get_args

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, set_seed

from client_agent.agent import Outcome
from client_agent.config import AgentConfig, LoraSettings, TrainingSettings
from client_agent.daemon import run
from client_agent.drawing import seed_of
from client_agent.learner import Learner
from client_agent.metrics import TRAINING_STEPS
from client_agent.model import AdaptedModel
from client_agent.own_metrics import Metric
from client_agent.preparation import Prepared, load_model, rehearse
from client_agent.state import AgentState
from client_agent.survey import Survey
from client_agent.tables import listed
from client_agent.tasks.registry import task_by_labels
from client_agent.training import Report, TrainingOutcome, TrainingRun, alone, as_it_was
from shelora.configuration import invalid
from shelora.errors import DomainError
from shelora.exits import exit_code
from shelora.federation import TrainingSpec
from shelora.terminal import Terminal

_BOUNDED: Final = get_args(TrainingSettings.model_fields["optimizer"].annotation)
_LABELS: Final = "labels"
_AT_ONCE: Final = 256
_SEEDS: Final = 2**32


def federate(trainer: Trainer, config: str | Path) -> Outcome:
    """Takes part in a federation with that trainer, until it ends. Afterwards `trainer.model` is the final state.

    Call it in place of `trainer.train()`, with the agent's YAML file (client_agent/sample.yaml), whose client has
    enrolled; its sections data and training are not read. Rank and alpha are those of the script's LoraConfig, if its
    model is a PeftModel. Ends the process with exit code 2 and one line if something must be changed first.
    """
    try:
        settings = _settings(Path(config), trainer)
        return run(settings, lambda: _of(trainer))
    except DomainError as error:
        Terminal(stderr=True).refuse(error, "federate: ")
        sys.exit(exit_code(error))


def _settings(path: Path, trainer: Trainer) -> AgentConfig:
    config = AgentConfig.load(path, os.environ, absent={"data": {"train": "the-script"}})
    if isinstance(trainer.model, PeftModel):
        own = trainer.model.active_peft_config
        lora = LoraSettings(
            rank=own.r, alpha=float(own.lora_alpha), dropout=own.lora_dropout, rslora=own.use_rslora
        )
        config = config.model_copy(update={"lora": lora})
    return config


def _of(trainer: Trainer) -> Any:  # noqa: ANN401 - what `Learn` is
    def learn(config: AgentConfig, spec: TrainingSpec, state: AgentState, rounds: int) -> TrainerLearner:
        return TrainerLearner(config, spec, state, rounds, trainer)

    return learn


class TrainerLearner(Learner):
    """A learner whose rounds a script's trainer trains."""

    def __init__(
        self, config: AgentConfig, spec: TrainingSpec, state: AgentState, rounds: int, trainer: Trainer
    ) -> None:
        """Loads the model into the trainer. Raises: DomainError CONFIGURATION_INVALID, MODEL_INVALID, DATA_INVALID."""
        self._trainer = trainer
        super().__init__(config, spec, state, rounds)

    def prepare(self, config: AgentConfig, spec: TrainingSpec) -> Prepared:
        """The script's data, and the federation's model, which becomes the trainer's."""
        trainer = self._trainer
        _check(trainer)
        model = load_model(config, spec)
        if trainer.args.device.type != model.device.type:
            raise invalid(
                f"model.device: the agent's file says {model.device.type}, the script's TrainingArguments "
                f"{trainer.args.device.type}: make them agree (use_cpu, model.device)"
            )
        _check_same_targets(trainer.model, model)
        trainer.model = trainer.model_wrapped = model.module
        model.task = task_by_labels(spec.task)
        examples = ScriptData(trainer.train_dataset)
        test = ScriptData(trainer.eval_dataset) if trainer.eval_dataset is not None else None
        encoder = ScriptEncoder(trainer)
        rehearse(model, encoder.batch(examples.select([0])))
        lengths = Survey(
            lengths=np.zeros(len(examples), dtype=np.int64), limit=encoder.limit, largest_id=0, ends_cut=0
        )
        return Prepared(examples=examples, test=test, model=model, encoder=encoder, lengths=lengths)

    def fit(self, run: TrainingRun, report: Report) -> TrainingOutcome:
        """One call of the script's `train`, for the federation's steps, at its rates."""
        trainer, started = self._trainer, time.monotonic()
        watch = _Watch(run.steps, report)
        with alone(report), as_it_was(self.model), _for_a_round(trainer, run), _with(trainer, watch):
            loss = float(trainer.train().training_loss)
        trainer.model.eval()
        if not np.isfinite(loss):
            raise invalid(f"the script's training loss is {loss}: lower the learning rate or check the data")
        return TrainingOutcome(loss, time.monotonic() - started)

    def metrics(self) -> Sequence[Metric]:
        """The script's `compute_metrics`, too, where it takes classes: of tokens it would be given no logits."""
        own = self._trainer.compute_metrics
        return (*super().metrics(), *([own] if own and self.model.task.has_head else []))


class ScriptData:
    """Examples of a script's dataset."""

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int] | None = None) -> None:
        self._dataset = dataset
        self._indices = range(len(dataset)) if indices is None else indices  # type: ignore[arg-type]  # `_check`

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Any]:
        return (self._dataset[index] for index in self._indices)

    def select(self, indices: Iterable[int]) -> Self:
        """These examples, in this order."""
        return type(self)(self._dataset, [self._indices[index] for index in indices])

    def fingerprint(self) -> str:
        """SHA-256 of every example's fields."""
        digest = hashlib.sha256()
        for one in self:
            for name, value in sorted(dict(one).items()):
                array = np.asarray(value)
                kind = f"{name} {array.dtype} {array.shape}"
                digest.update(hashlib.sha256(kind.encode()).digest())
                digest.update(repr(value).encode() if array.dtype == object else array.tobytes())
        return digest.hexdigest()

    def count_by_label(self, names: Sequence[str]) -> Mapping[str, int]:
        """Nothing: what a label is called, the script alone knows."""
        del names
        return {}


@dataclass(frozen=True, slots=True, eq=False)
class ScriptBatch:
    """What a script's collator makes of some examples."""

    inputs: Mapping[str, torch.Tensor]
    targets: torch.Tensor
    """As the script has labels: of examples, or of tokens, those that are not learnt -100."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def next_targets(self) -> torch.Tensor:
        """Its labels, where they are of tokens."""
        return self.targets

    @property
    def mask(self) -> torch.Tensor | None:
        """[examples, tokens]: what is not padding."""
        return self.inputs.get("attention_mask")

    @property
    def described(self) -> str:
        """One of its examples, for people."""
        return f"an example of the script's ({', '.join(self.inputs)})"

    def to(self, device: torch.device) -> "ScriptBatch":
        """The same batch on a device."""
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        return ScriptBatch(moved, self.targets.to(device))

    def only(self, index: int) -> "ScriptBatch":
        """The batch of that example alone."""
        one = slice(index, index + 1)
        return ScriptBatch({name: value[one] for name, value in self.inputs.items()}, self.targets[one])


class ScriptEncoder:
    """A script's collator. It encodes nothing: its dataset has."""

    limit = 0
    at_once = _AT_ONCE

    def __init__(self, trainer: Trainer) -> None:
        self._collate = trainer._get_collator_with_removed_columns(trainer.data_collator)  # noqa: SLF001

    def encoded(self, examples: ScriptData) -> list["_Item"]:
        """Every example."""
        return [_Item(one) for one in examples]

    def collated(self, encoded: Sequence["_Item"]) -> ScriptBatch:
        """One batch. Raises: CONFIGURATION_INVALID if the collator makes no labels."""
        made = dict(self._collate([item.fields for item in encoded]))
        if _LABELS not in made:
            raise invalid(
                f"the script's data collator makes no {_LABELS}, but {listed(made)}: add them to its examples"
            )
        targets = made.pop(_LABELS)
        return ScriptBatch(made, targets)

    def batch(self, examples: ScriptData) -> ScriptBatch:
        """The batch of these examples."""
        return self.collated(self.encoded(examples))

    def shown(self, examples: ScriptData) -> Mapping[str, str]:
        """Nothing for people: the script knows."""
        del examples
        return {}


@dataclass(frozen=True, slots=True)
class _Item:
    fields: Mapping[str, Any]

    @property
    def ids(self) -> Sequence[int]:
        """What it is as long as."""
        ids: Sequence[int] = self.fields.get("input_ids", ())
        return ids


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Reports progress, from where the work may be stopped."""

    def __init__(self, steps: int, report: Report) -> None:
        self._steps, self._report = steps, report

    def on_step_begin(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ANN401 - as there
        self._report(state.global_step / self._steps)

    def on_substep_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ANN401
        self._report(state.global_step / self._steps)

    def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        TRAINING_STEPS.inc()


def _check(trainer: Trainer) -> None:
    """Raises: CONFIGURATION_INVALID for what a federation cannot use."""
    arguments = trainer.args
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise invalid(
            "Trainer(optimizers=...): the federation sets the rates: leave it out, and name one in optim"
        )
    if str(getattr(arguments.optim, "value", arguments.optim)) not in _BOUNDED:
        raise invalid(
            f"TrainingArguments(optim={arguments.optim}): it may move a value by more than a learning rate a step, "
            f"which is taken for an attack: take one of {', '.join(_BOUNDED)}"
        )
    if arguments.deepspeed or arguments.fsdp:
        raise invalid(
            "TrainingArguments: deepspeed and fsdp spread a model that must be whole: leave them out"
        )
    if arguments.n_gpu > 1 or arguments.world_size > 1:
        raise invalid(
            "the script would train on several GPUs or in several processes, and an agent has one device: start it "
            "with python, and set CUDA_VISIBLE_DEVICES to one GPU"
        )
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name)
        if name == "eval_dataset" and dataset is None:
            continue
        if dataset is None or isinstance(dataset, IterableDataset | dict) or not len(dataset):
            raise invalid(f"Trainer({name}=...): give one dataset of a known, positive length")


def _check_same_targets(scripted: Any, model: AdaptedModel) -> None:  # noqa: ANN401 - any model
    """Raises: CONFIGURATION_INVALID if the script's LoRA is on other matrices than the federation's."""
    if not isinstance(scripted, PeftModel):
        return
    prefix = "base_model.model."
    own = {n.removeprefix(prefix) for n, module in scripted.named_modules() if hasattr(module, "lora_A")}
    theirs = {matrix.name for matrix in model.matrices}
    if own != theirs:
        raise invalid(
            f"LoraConfig(target_modules=...): the script adapts other matrices than the federation, such as "
            f"{listed(sorted(own ^ theirs))}: use the federation's target_modules"
        )


@contextmanager
def _for_a_round(trainer: Trainer, run: TrainingRun) -> Iterator[None]:
    """The script's arguments with the federation's steps, rates and seed; checkpoints would lie unsealed on disk."""
    changed = {
        "max_steps": run.steps,
        "learning_rate": 1.0,
        "seed": run.seed % _SEEDS,
        "data_seed": seed_of(run.seed, "data") % _SEEDS,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
    }
    before = {name: getattr(trainer.args, name) for name in changed}
    rates = [*run.rates, 0.0]  # the loop asks for one more

    def scheduler(num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ANN401 - as transformers has it
        del num_training_steps
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or trainer.optimizer, rates.__getitem__
        )
        return trainer.lr_scheduler

    trainer.create_scheduler = scheduler
    try:
        for name, value in changed.items():
            setattr(trainer.args, name, value)
        set_seed(run.seed % _SEEDS)
        yield
    finally:
        for name, value in before.items():
            setattr(trainer.args, name, value)
        del trainer.create_scheduler
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.model.zero_grad(set_to_none=True)


@contextmanager
def _with(trainer: Trainer, callback: TrainerCallback) -> Iterator[None]:
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)
