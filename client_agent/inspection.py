"""`client-agent check`: what an agent would train, on what, and how much it would send."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group

from client_agent.checkpoint import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from client_agent.config import AgentConfig
from client_agent.data import Examples, found_labels
from client_agent.learner import load_model, read_data
from client_agent.model import AdaptedModel
from client_agent.protection import expected_layout
from shelora.federation import ProtectionSpec, TrainingSpec
from shelora.lora.kinds import kind_of
from shelora.terminal import Records


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """What a check found."""

    examples: Examples
    test: Examples | None
    model: AdaptedModel
    upload_bytes: int
    """Estimate of the bytes of one update."""


def inspect(config: AgentConfig, training: TrainingSpec, protection: ProtectionSpec) -> Inspection:
    """Reads the data and loads the model. Raises: DomainError DATA_INVALID, MODEL_INVALID."""
    examples, test = read_data(config, training)
    model = load_model(config, training)
    return Inspection(examples, test, model, estimated_upload_bytes(model, config.budget, protection))


def guessed_training(config: AgentConfig, target_modules: Sequence[str], *, causal_lm: bool) -> TrainingSpec:
    """A specification to check against without a coordinator: its labels are those of the training file."""
    labels = () if causal_lm else found_labels(config.data.train, config.data.label_field)
    return TrainingSpec(
        base_model=config.model.path,
        task=CAUSAL_LM if causal_lm else SEQUENCE_CLASSIFICATION,
        labels=labels,
        target_modules=tuple(target_modules),
    )


def estimated_upload_bytes(model: AdaptedModel, budget: float, protection: ProtectionSpec) -> int:
    """Bytes of one update if the budget's share of every matrix is encrypted; the plan may spread it otherwise."""
    layout = expected_layout(model, budget, protection)
    return sum(kind_of(shard).update_bytes(layout, shard, model.rank) for shard in layout.shards)


def report(config: AgentConfig, training: TrainingSpec, found: Inspection) -> Group:
    """Tables for a terminal."""
    return Group(_examples_table(training, found), _model_table(config, found))


def _examples_table(training: TrainingSpec, found: Inspection) -> Records:
    table = Records("label", "train", "test", title="Examples", numbers=["train", "test"], lines=True)
    test = _counts(found.test, training.labels)
    for name, count in _counts(found.examples, training.labels).items():
        table.add(name, f"{count:,}", f"{test[name]:,}" if found.test else "-")
    return table


def _counts(examples: Examples | None, labels: Sequence[str]) -> Mapping[str, int]:
    return {} if examples is None else {**examples.count_by_label(labels), "all": len(examples)}


def _model_table(config: AgentConfig, found: Inspection) -> Records:
    model = found.model
    table = Records("model", "", title="Model", sentences=[""], lines=True)
    shapes = sorted({(m.out_features, m.in_features) for m in model.matrices})
    table.add("adapted matrices", f"{len(model.matrices)}")
    table.add("their shapes", ", ".join(f"{out} x {in_}" for out, in_ in shapes))
    table.add("tensors trained whole", ", ".join(t.name for t in model.tensors) or "none")
    table.add("rank", f"{model.rank}")
    table.add("trainable parameters", f"{model.trainable_count:,}")
    table.add("device", model.device.type)
    table.add("columns encrypted", f"{config.budget:.2%}")
    table.add("upload a round, about", f"{found.upload_bytes / 1e6:,.2f} MB")
    return table
