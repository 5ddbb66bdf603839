"""The model card of an adapter: from what, on what, how good, and how to load it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from client_agent.config import AgentConfig
from client_agent.learning import Evaluation, Origin
from client_agent.model import AdaptedModel
from client_agent.tables import quoted
from client_agent.tasks.registry import task_of
from shelora.federation import TrainingSpec

_LICENCE = re.compile(r"^license:\s*([\w.+-]{1,60})\s*$", re.MULTILINE)
_FRONT_BYTES = 65_536
BASE_WEIGHTS = "SHA-256 of its weights as the agent loads them"
_NAMES = {"macro_f1": "macro F1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card says beside what the federation specified."""

    federation: str
    spec: TrainingSpec
    rounds: int
    """Of the federation, when this client joined."""
    protection: str
    """How updates travelled."""
    base: str
    """SHA-256 of the base model's weights, in hex."""
    privacy: str
    """What hid single examples; "" if nothing did."""
    start: str
    """SHA-256 of the adapter and head that training started from, in hex; "" without any."""
    precision: str
    """Numbers that the base model was held in while training."""
    rank: int
    alpha: float
    train_count: int
    test_count: int
    licence: str
    """Of the base model; "" if it does not say."""


def licence_of(path: str) -> str:
    """The licence that a base model's own card names; "" if there is none."""
    try:
        with (Path(path) / "README.md").open(encoding="utf-8", errors="replace") as file:
            text = file.read(_FRONT_BYTES)
    except (OSError, ValueError):
        return ""
    front = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = _LICENCE.search(front)
    return found.group(1) if found else ""


def card_of(
    config: AgentConfig,
    spec: TrainingSpec,
    model: AdaptedModel,
    *,
    rounds: int,
    protection: str,
    privacy: str,
    counts: tuple[int, int],
) -> Card:
    """What is known before the first round. Args: counts: of training and of test examples."""
    return Card(
        federation=config.federation,
        spec=spec,
        rounds=rounds,
        protection=protection,
        base=model.base.weights.hex(),
        privacy=privacy,
        start=model.base.start.hex(),
        precision=str(model.precision),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        train_count=counts[0],
        test_count=counts[1],
        licence=licence_of(config.model.path),
    )


def rendered(card: Card, made: Origin, measured: Evaluation | None) -> str:
    """The card as Markdown with the front matter of the Hugging Face hub."""
    spec = card.spec
    task = task_of(spec.task)
    front = {
        "base_model": spec.base_model,
        "library_name": "peft",
        "pipeline_tag": task.pipeline,
        "tags": ["lora", "federated-learning", "shelora"],
        **({"license": card.licence} if card.licence else {}),
    }
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in front.items()),
        "---",
        "",
        f"# LoRA adapter of the federation {card.federation}",
        "",
        f"- Base model: {quoted(spec.base_model)}, by the federation's name for it",
        f"- {BASE_WEIGHTS}: {card.base}",
        *(
            [f"- SHA-256 of the adapter and head that training started from: {card.start}"]
            if card.start
            else []
        ),
        f"- Licence of the base model: {card.licence or 'not stated where it was loaded from'}",
        f"- Task: {spec.task}" + (f"; classes: {', '.join(map(quoted, spec.labels))}" if spec.labels else ""),
        f"- Training round {made.number} of {card.rounds}, the aggregate of {made.contributors} clients",
        *(
            [f"- Fingerprint of that aggregate, the same at all clients: {made.fingerprint}"]
            if made.fingerprint
            else []
        ),
        f"- Protection of updates: {card.protection}",
        f"- Differential privacy of examples: {card.privacy or 'none'}",
        f"- Base model held in {card.precision} while training",
        f"- {spec.local_steps} steps a round of {spec.batch_size} examples, learning rate {spec.learning_rate:g}",
        *([f"- Texts are cut to {spec.max_tokens} tokens"] if task.reads_text else []),
        f"- LoRA on {', '.join(map(quoted, spec.target_modules))}",
        f"- Rank {card.rank} and alpha {card.alpha:g} at this client",
        f"- Examples at this client: {card.train_count:,} for training, {card.test_count:,} for tests",
        f"- {_measured(measured, task.predictions_named)}",
        "",
        "## Use",
        "",
        "The base model must be a folder or a name on the Hugging Face hub; if it is elsewhere, change",
        "`base_model_name_or_path` in `adapter_config.json`.",
        "",
        "```python",
        task.usage,
    ]
    return "\n".join(lines) + "```\n"


def _measured(measured: Evaluation | None, what: str) -> str:
    if measured is None:
        return "Not evaluated by this client"
    share = measured.correct / max(measured.count, 1)
    figures = "".join(f", {_NAMES.get(name, name)} {value:.4g}" for name, value in measured.figures.items())
    return (
        f"At this client: {share:.1%} of {measured.count:,} {what} right, loss {measured.loss:.4f}{figures}"
    )


def name_base(folder: Path, base_model: str) -> None:
    """Has an adapter and its tokenizer name their base as the federation does, and not by a path of this machine."""
    for name, field in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("config.json", "_name_or_path"),
        ("tokenizer_config.json", "name_or_path"),
    ):
        path = folder / name
        if not path.exists():  # of a tokenizer, where there is none
            continue
        values = json.loads(path.read_text(encoding="utf-8"))
        if field in values:
            path.write_text(json.dumps(values | {field: base_model}, indent=2) + "\n", encoding="utf-8")
