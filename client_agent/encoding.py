"""Texts to batches of token ids."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from client_agent.data import Examples


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Token ids of some examples, padded on the right to the longest."""

    input_ids: torch.Tensor
    """[examples, tokens], int64."""
    attention_mask: torch.Tensor
    """[examples, tokens], int64: 1 for a token, 0 for padding."""
    targets: torch.Tensor
    """[examples], int64: label indices; empty for causal-lm, whose targets are the next tokens."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device))


class Encoder:
    """Tokenizes and pads. Stateless but for the tokenizer.

    Args:
        max_tokens: Tokens an example is cut to.
        append_end: Whether an end token follows each text (causal-lm: the model learns where texts end).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, append_end: bool) -> None:
        self._tokenizer = tokenizer
        self._pad = int(tokenizer.pad_token_id)
        self._end = [int(tokenizer.eos_token_id)] if append_end and tokenizer.eos_token_id is not None else []
        self._limit = min(max_tokens, tokenizer.model_max_length)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, each cut to the limit, the end token included."""
        limit = max(1, self._limit - len(self._end))
        encoded = self._tokenizer(list(texts), truncation=True, max_length=limit, return_attention_mask=False)
        return [[*ids, *self._end][: self._limit] for ids in encoded["input_ids"]]

    def batch(self, examples: Examples) -> Batch:
        """The batch of these examples."""
        return self.padded(self.ids(examples.texts), examples.labels)

    def padded(self, ids: Sequence[Sequence[int]], labels: Sequence[int]) -> Batch:
        """The batch of examples that are token ids already."""
        width = max(len(row) for row in ids)
        return Batch(
            input_ids=torch.tensor([[*row, *[self._pad] * (width - len(row))] for row in ids]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
            targets=torch.tensor(list(labels), dtype=torch.int64),
        )
