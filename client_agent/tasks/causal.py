"""The next token of plain texts."""

from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from peft import TaskType
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from client_agent.config import DataConfig
from client_agent.data import Examples, read_examples
from client_agent.encoding import NOT_LEARNT, Encoder
from client_agent.survey import Survey, survey
from client_agent.tasks.port import Task
from shelora.federation import TrainingSpec
from shelora.tasks import CAUSAL_LM, TaskName


class NextTokens(Protocol):
    """A batch whose next tokens are predicted."""

    @property
    def next_targets(self) -> torch.Tensor:
        """[rows, tokens], int64: what is to be predicted there; NOT_LEARNT if nothing is."""


class CausalLm(Task):
    """Texts alone; the loss is of every token but the first."""

    name: ClassVar[TaskName] = CAUSAL_LM
    peft = TaskType.CAUSAL_LM
    loader = AutoModelForCausalLM
    has_head = False
    predicts_next = True
    predictions_named = "next tokens"
    pipeline = "text-generation"
    usage = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("adapter")  # this folder
tokenizer = AutoTokenizer.from_pretrained("adapter")
"""

    def read(self, path: Path, data: DataConfig, spec: TrainingSpec) -> Examples:
        del spec
        return read_examples(path, data.text_field, data.label_field, (), cache_dir=data.cache_dir)

    def encoder(self, tokenizer: PreTrainedTokenizerBase, limit: int, spec: TrainingSpec) -> Encoder:
        del spec
        return Encoder(tokenizer, limit, append_end=True)

    def survey(self, path: Path, data: DataConfig, examples: Any, encoder: Any) -> Survey:  # noqa: ANN401 - its own
        return survey(path, data.text_field, examples, encoder)

    def predictions(  # type: ignore[override]
        self, logits: torch.Tensor, batch: NextTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        targets = batch.next_targets[:, 1:]
        known = targets != NOT_LEARNT
        return logits[:, :-1][known], targets[known]

    def target_count(self, batch: NextTokens) -> int:  # type: ignore[override]
        return int((batch.next_targets[:, 1:] != NOT_LEARNT).sum().item())
