"""What an agent trains with, read and tried out before it joins: `check`, `doctor` and `run` find the same."""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Final

import torch

from client_agent.checkpoint import invalid, load_checkpoint
from client_agent.config import AgentConfig
from client_agent.encoding import ModelBatch, tokenizing
from client_agent.model import AdaptedModel, choose_device
from client_agent.own_metrics import metrics_of
from client_agent.packing import require_packable
from client_agent.precision import choose_precision
from client_agent.reporting import require_trackers
from client_agent.samples import Sampler
from client_agent.starting import start_of
from client_agent.survey import Survey
from client_agent.tables import first_line
from client_agent.targets import Narrowed
from client_agent.tasks.port import ExampleEncoder, ExampleSet
from client_agent.tasks.registry import task_of
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec

_PROBED_TOKENS: Final = 16
"""Tokens that show whether a model sees what comes later."""
_CAUSAL_TOLERANCE: Final = 1e-4
"""Largest change of logits, relative to the largest of them, that is rounding in float32; in smaller types, four units
in the last place.
"""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Prepared:
    """Everything that training needs, and fits together."""

    examples: ExampleSet
    test: ExampleSet | None
    model: AdaptedModel
    encoder: ExampleEncoder[Any]
    """Of those examples."""
    lengths: Survey
    """Of the training examples."""


def prepare(config: AgentConfig, spec: TrainingSpec) -> Prepared:
    """Reads the data, loads the model, tokenizes every text, and computes the gradient of the longest example.

    Raises: DomainError DATA_INVALID, MODEL_INVALID, MEMORY_UNAVAILABLE, CONFIGURATION_INVALID.
    """
    require_trackers(config.training.report_to)
    metrics_of(config.metrics)
    data = config.data.model_copy(update={"cache_dir": config.cache_dir})
    task = task_of(spec.task)
    examples = task.read(data.train, data, spec)
    test = task.read(data.test, data, spec) if data.test is not None else None
    model = load_model(config, spec)
    _check_padding(model)
    _check_checkpointing(model, config)
    with tokenizing():
        encoder = task.encoder(model.tokenizer, min(spec.max_tokens, model.most_positions), spec)
        lengths = task.survey(data.train, data, examples, encoder)
        _check_vocabulary(model, lengths)
        if data.test is not None and test is not None:
            _check_vocabulary(model, task.survey(data.test, data, test, encoder))
        Sampler(config.samples, model, encoder)
        longest = encoder.batch(examples.select([lengths.longest]))
    rehearse(model, longest)
    pair = examples.select([lengths.longest, (lengths.longest + 1) % len(examples)])
    if config.training.packing:
        require_packable(model, encoder.batch(pair))
    if config.privacy is not None:
        _rehearse_privately(model, encoder.batch(pair))
    return Prepared(examples=examples, test=test, model=model, encoder=encoder, lengths=lengths)


def _rehearse_privately(model: AdaptedModel, pair: ModelBatch) -> None:
    """Raises: CONFIGURATION_INVALID without Opacus; MODEL_INVALID for a model that it cannot train."""
    if importlib.util.find_spec("opacus") is None:
        raise DomainError(
            Reason.CONFIGURATION_INVALID,
            "privacy: needs the package opacus, which is not installed: pip install 'shelora[agent,privacy]'",
        )
    from client_agent.private_training import rehearse_privately  # noqa: PLC0415 - an extra of its own

    rehearse_privately(model, pair)


def load_model(config: AgentConfig, spec: TrainingSpec) -> AdaptedModel:
    """The adapted model. Raises: DomainError MODEL_INVALID, CONFIGURATION_INVALID."""
    device = choose_device(config.model.device)
    precision = choose_precision(config.model, config.training, device)
    checkpoint = load_checkpoint(config.model.path, spec.task, spec.labels, as_stored=not precision.is_full)
    return AdaptedModel(
        checkpoint,
        task=spec.task,
        target_modules=spec.target_modules,
        lora=config.lora,
        device=device,
        narrowed=Narrowed(spec.target_layers, spec.target_pattern, spec.modules_to_save),
        precision=precision,
        start=start_of(config.model.adapter, config.model.head, checkpoint, spec.labels),
    )


def _check_padding(model: AdaptedModel) -> None:
    """Raises: MODEL_INVALID for a token that was added and never embedded: the first padded batch would fail."""
    pad = getattr(model.tokenizer, "pad_token_id", None)  # images are not padded
    if pad is not None and pad >= model.vocabulary:
        raise invalid(
            f"model.path: the tokenizer pads with token {pad}, and the model knows {model.vocabulary:,} tokens: set "
            "pad_token in tokenizer_config.json to one that the model knows, such as its eos_token"
        )


def _check_checkpointing(model: AdaptedModel, config: AgentConfig) -> None:
    """Raises: CONFIGURATION_INVALID where transformers cannot compute activations twice, as of ResNet and its like."""
    if config.training.gradient_checkpointing and not model.checkpoints:
        raise DomainError(
            Reason.CONFIGURATION_INVALID,
            f"training.gradient_checkpointing: {model.configuration.model_type} models do not support it: set it to "
            "false; a smaller resources.micro_batch saves memory, too",
        )


def _check_vocabulary(model: AdaptedModel, lengths: Survey) -> None:
    if lengths.largest_id >= model.vocabulary:
        raise invalid(
            f"model.path: the tokenizer gives token {lengths.largest_id}, and the model knows {model.vocabulary:,} "
            "tokens: take the tokenizer that belongs to the model"
        )


def rehearse(model: AdaptedModel, batch: ModelBatch) -> None:
    """Computes a loss and its gradient once; the model's state does not change."""
    try:
        if model.task.predicts_next:
            _check_causal(model, batch)
        logits, targets = model.predict(batch)
        loss = model.task.loss(logits, targets) / len(targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        value = float(loss.item())
    except DomainError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise DomainError(
            Reason.MEMORY_UNAVAILABLE, f"one example does not fit: {first_line(error)}"
        ) from error
    except Exception as error:  # a model can make torch raise anything
        raise invalid(f"the model cannot be trained on {batch.described}: {first_line(error)}") from error
    finally:
        for parameter in model.trainable():
            parameter.grad = None
    if not math.isfinite(value):
        raise invalid(f"the model's loss is {value} before any training: are its weights damaged?")


def _check_causal(model: AdaptedModel, batch: ModelBatch) -> None:
    """Raises: MODEL_INVALID if the last token changes what is predicted before it."""
    ids = batch.inputs["input_ids"][:, :_PROBED_TOKENS]
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % model.vocabulary
    with torch.inference_mode():  # side by side: quantized layers treat what is computed at once alike
        first, second = model.logits(torch.cat([ids, other]))[:, :-1].chunk(2)
    tolerance = max(_CAUSAL_TOLERANCE, 4 * torch.finfo(model.precision.dtype).eps)
    if (first - second).abs().max() > tolerance * first.abs().max():
        raise invalid(
            f"the model sees the tokens that it is to predict, as an encoder does: take a decoder for "
            f"{model.task.name}, or ask for a federation with task sequence-classification"
        )
