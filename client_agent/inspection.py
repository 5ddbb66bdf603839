"""`client-agent check`: what an agent would train, on what, and how much it would send."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import ValidationError
from rich.console import Group
from rich.text import Text

from client_agent.checkpoint import invalid as model_invalid
from client_agent.checkpoint import usual_targets
from client_agent.config import AgentConfig
from client_agent.learner import budget_of
from client_agent.model import AdaptedModel
from client_agent.preparation import Prepared, prepare
from client_agent.protection import expected_layout
from client_agent.sources import invalid
from client_agent.starting import Start
from client_agent.state import require_usable
from client_agent.survey import WHOLE
from client_agent.tasks.port import ExampleSet
from client_agent.tasks.registry import task_of
from shelora.configuration import explain
from shelora.federation import ProtectionSpec, TrainingSpec
from shelora.lora.kinds import kind_of
from shelora.terminal import Records

MOST_LABELS: Final = 100
"""Labels that a report lists: a column of free text, taken for labels, has a label a row."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Inspection:
    """What a check found."""

    prepared: Prepared
    encrypted: str
    """What of an update is, in a word or a share of the columns."""
    upload_bytes: int
    """Estimate of the bytes of one update if no client has a larger rank."""
    most_upload_bytes: int
    """The same if one has the largest rank that the federation and the model allow."""
    privacy: str = ""
    """What the privacy budget buys; "" without one."""


def inspect(
    config: AgentConfig, training: TrainingSpec, protection: ProtectionSpec, rounds: int | None = None
) -> Inspection:
    """Does what `run` does before it joins. Raises: DomainError DATA_INVALID, MODEL_INVALID, CONFIGURATION_INVALID.

    Args: rounds: of the federation; None if it is not asked.
    """
    require_usable(config.state_dir)
    prepared = prepare(config, training)
    model = prepared.model
    _require_bounded(model.start, protection.tensor_bound)
    held = max(min(matrix.out_features, matrix.in_features) for matrix in model.matrices)
    estimated = partial(estimated_upload_bytes, model, config.budget, protection)
    return Inspection(
        prepared=prepared,
        encrypted=protection.strategy.encrypts(config.budget),
        upload_bytes=estimated(model.rank),
        most_upload_bytes=estimated(max(model.rank, min(held, training.max_rank))),
        privacy=_privacy(config, training, prepared, rounds),
    )


def _require_bounded(start: Start, most: float) -> None:
    """Raises: MODEL_INVALID if the federation cannot carry the values that training starts from."""
    for name, value in start.tensors.items():
        if np.abs(value).max(initial=0) > most:
            raise model_invalid(
                f"model: {name} starts with values of up to {np.abs(value).max():.3g}, and the federation carries none "
                f"above {most:g} (protection.tensor_bound): ask the operator to raise it, or set model.head to new"
            )


def _privacy(config: AgentConfig, training: TrainingSpec, prepared: Prepared, rounds: int | None) -> str:
    if config.privacy is not None and rounds is None:
        return "what the budget buys depends on the federation's rounds"
    budget = budget_of(config, training, examples=len(prepared.examples), rounds=rounds or 1)
    return str(budget) if budget else ""


def guessed_training(config: AgentConfig, target_modules: Sequence[str], task: str) -> TrainingSpec:
    """A specification to check against without a coordinator: its labels are those of the training file.

    Args: target_modules: None are named: those that are usual for the model's architecture.
    Raises: DomainError DATA_INVALID, MODEL_INVALID.
    """
    fields = {
        "base_model": Path(config.model.path).name,
        "task": task,
        "labels": task_of(task).labels_found(config.data),
        "target_modules": tuple(target_modules) or usual_targets(config.model.path),
    }
    try:
        return TrainingSpec.model_validate(fields)
    except ValidationError as error:
        why = "; ".join(line.strip() for line in explain(error, TrainingSpec).splitlines())
        raise invalid(f"{config.data.train} suits no federation: {why}") from None


def estimated_upload_bytes(
    model: AdaptedModel, budget: float, protection: ProtectionSpec, max_rank: int
) -> int:
    """Bytes of one update if the budget's share of every matrix is encrypted; the plan may spread it otherwise.

    Args: max_rank: Largest rank of a client.
    """
    layout = expected_layout(model, budget, protection, max_rank)
    return sum(kind_of(shard).update_bytes(layout, shard, model.rank) for shard in layout.shards)


def report(training: TrainingSpec, found: Inspection) -> Group:
    """Tables for a terminal, one example as the model sees it, and what else one should know."""
    return Group(
        _examples_table(training, found.prepared),
        _tokens_table(training, found.prepared),
        _model_table(found),
        *(Text(f"note: {note}") for note in found.prepared.model.notes),
    )


def _examples_table(training: TrainingSpec, found: Prepared) -> Records:
    table = Records("label", "train", "test", title="Examples", numbers=["train", "test"], lines=True)
    test = _counts(found.test, training.labels)
    counts = _counts(found.examples, training.labels)
    *labels, everything = counts
    more = len(labels) - MOST_LABELS
    for name in (*labels[:MOST_LABELS], *([f"and {more:,} more labels"] if more > 0 else []), everything):
        table.add(
            name, f"{counts[name]:,}" if name in counts else "", f"{test[name]:,}" if found.test else "-"
        )
    return table


def _tokens_table(training: TrainingSpec, found: Prepared) -> Records:
    lengths = found.lengths
    unit = lengths.unit
    table = Records(unit, "", title=f"Training examples in {unit}", sentences=[""], lines=True)
    for percentile, length in lengths.percentiles().items():
        table.add("longest" if percentile == WHOLE else f"{percentile} % have at most", f"{length:,}")
    if lengths.is_cut_anywhere:
        reason = (
            "by the federation" if lengths.limit == training.max_tokens else "because the model takes no more"
        )
        share = lengths.cut / len(found.examples)
        table.add("cut to", f"{lengths.limit:,} {reason}")
        table.add("cut", f"{lengths.cut:,} of {len(found.examples):,} ({share:.1%})")
    if lengths.ends_cut:
        table.add("whose answer is cut", f"{lengths.ends_cut:,}; the others lose the beginning of the prompt")
    for name, text in found.encoder.shown(found.examples).items():
        table.add(name, text)
    return table


def _counts(examples: ExampleSet | None, labels: Sequence[str]) -> Mapping[str, int]:
    return {} if examples is None else {**examples.count_by_label(labels), "all": len(examples)}


def _model_table(found: Inspection) -> Records:
    model = found.prepared.model
    table = Records("model", "", title="Model", sentences=[""], lines=True)
    shapes = sorted({(m.out_features, m.in_features) for m in model.matrices})
    table.add("adapted matrices", f"{len(model.matrices)}")
    table.add("their shapes", ", ".join(f"{out} x {in_}" for out, in_ in shapes))
    table.add("could be adapted", ", ".join(f"{name} x {count}" for name, count in model.adaptable.items()))
    table.add("tensors trained whole", ", ".join(t.name for t in model.tensors) or "none")
    table.add("rank", f"{model.rank}")
    table.add("trainable parameters", f"{model.trainable_count:,}")
    table.add("device", model.device.type)
    table.add("base model held in", str(model.precision))
    table.add("encrypted", found.encrypted)
    table.add("upload a round, about", f"{found.upload_bytes / 1e6:,.2f} MB")
    if found.most_upload_bytes > found.upload_bytes:
        table.add(
            "at most", f"{found.most_upload_bytes / 1e6:,.2f} MB, where another client's rank is larger"
        )
    table.add("privacy", found.privacy or "none: updates may reveal what is in single examples")
    if found.privacy and found.prepared.test:
        table.add("not covered", "the test examples: how many of them are right is reported after each round")
    return table
