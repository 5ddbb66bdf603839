"""`client-agent check`: what an agent would train, on what, and how much it would send."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.console import Group
from rich.text import Text

from client_agent.checkpoint import usual_targets
from client_agent.config import AgentConfig
from client_agent.learner import budget_of
from client_agent.model import AdaptedModel
from client_agent.preparation import Prepared, prepare
from client_agent.protection import expected_layout
from client_agent.survey import WHOLE
from client_agent.tables import invalid
from client_agent.tasks.port import ExampleSet
from client_agent.tasks.registry import task_of
from shelora.configuration import explain
from shelora.federation import ProtectionSpec, TrainingSpec
from shelora.lora.kinds import kind_of
from shelora.terminal import Records


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """What a check found."""

    prepared: Prepared
    upload_bytes: int
    """Estimate of the bytes of one update."""
    privacy: str = ""
    """What the privacy budget buys; "" without one."""


def inspect(
    config: AgentConfig, training: TrainingSpec, protection: ProtectionSpec, rounds: int | None = None
) -> Inspection:
    """Does what `run` does before it joins. Raises: DomainError DATA_INVALID, MODEL_INVALID, CONFIGURATION_INVALID.

    Args: rounds: of the federation; None if it is not asked.
    """
    prepared = prepare(config, training)
    upload_bytes = estimated_upload_bytes(prepared.model, config.budget, protection)
    if config.privacy is not None and rounds is None:
        return Inspection(prepared, upload_bytes, "what the budget buys depends on the federation's rounds")
    budget = budget_of(config, training, examples=len(prepared.examples), rounds=rounds or 1)
    return Inspection(prepared, upload_bytes, str(budget) if budget else "")


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


def estimated_upload_bytes(model: AdaptedModel, budget: float, protection: ProtectionSpec) -> int:
    """Bytes of one update if the budget's share of every matrix is encrypted; the plan may spread it otherwise."""
    layout = expected_layout(model, budget, protection)
    return sum(kind_of(shard).update_bytes(layout, shard, model.rank) for shard in layout.shards)


def report(config: AgentConfig, training: TrainingSpec, found: Inspection) -> Group:
    """Tables for a terminal, one example as the model sees it, and what else one should know."""
    return Group(
        _examples_table(training, found.prepared),
        _tokens_table(training, found.prepared),
        _model_table(config, found),
        *(Text(f"note: {note}") for note in found.prepared.model.notes),
    )


def _examples_table(training: TrainingSpec, found: Prepared) -> Records:
    table = Records("label", "train", "test", title="Examples", numbers=["train", "test"], lines=True)
    test = _counts(found.test, training.labels)
    for name, count in _counts(found.examples, training.labels).items():
        table.add(name, f"{count:,}", f"{test[name]:,}" if found.test else "-")
    return table


def _tokens_table(training: TrainingSpec, found: Prepared) -> Records:
    lengths = found.lengths
    table = Records("tokens", "", title="Training examples in tokens", sentences=[""], lines=True)
    for percentile, length in lengths.percentiles().items():
        table.add("longest" if percentile == WHOLE else f"{percentile} % have at most", f"{length:,}")
    reason = "by the federation" if lengths.limit == training.max_tokens else "as the model takes no more"
    table.add("cut to", f"{lengths.limit:,} {reason}")
    table.add("cut", f"{lengths.cut:,} of {len(found.examples):,} ({lengths.cut / len(found.examples):.1%})")
    if lengths.ends_cut:
        table.add("whose answer is cut", f"{lengths.ends_cut:,}; the others lose the beginning of the prompt")
    for name, text in found.encoder.shown(found.examples).items():
        table.add(name, text)
    return table


def _counts(examples: ExampleSet | None, labels: Sequence[str]) -> Mapping[str, int]:
    return {} if examples is None else {**examples.count_by_label(labels), "all": len(examples)}


def _model_table(config: AgentConfig, found: Inspection) -> Records:
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
    table.add("columns encrypted", f"{config.budget:.2%}")
    table.add("upload a round, about", f"{found.upload_bytes / 1e6:,.2f} MB")
    table.add("privacy", found.privacy or "none: updates may tell what is in single examples")
    if found.privacy and found.prepared.test:
        table.add(
            "outside of it", "the test examples: how many of them are right is reported after each round"
        )
    return table
