"""Conversations and instructions: the loss is of the assistant's answers."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from transformers import PreTrainedTokenizerBase

from client_agent.config import DataConfig
from client_agent.conversations import Conversations, read_conversations, record_at
from client_agent.encoding import (
    NOT_LEARNT,
    SHOWN_TOKENS,
    TEXTS_AT_ONCE,
    Batch,
    Encoded,
    padded,
    shortened,
)
from client_agent.sources import invalid
from client_agent.survey import Survey
from client_agent.tasks.causal import CausalLm
from client_agent.templates import ChatRenderer, NotRenderable, Rendered
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from shelora.tasks import CHAT, EVERYTHING, TASKS

_LEAST_PROMPT: Final = 4
"""At least one in so many tokens is of the prompt where an answer does not fit."""


class ChatEncoder:
    """Renders, tokenizes, cuts and pads conversations. Stateless but for the tokenizer.

    Args:
        limit: Tokens a conversation is cut to.
        everything: Whether the prompts are learnt, too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int, *, everything: bool) -> None:
        self._tokenizer = tokenizer
        self._pad = int(tokenizer.pad_token_id)
        self._renderer = ChatRenderer(tokenizer)
        self._everything = everything
        self.at_once = TEXTS_AT_ONCE
        self.limit = min(limit, tokenizer.model_max_length)
        least = TASKS[CHAT].least_tokens
        if self.limit < least:
            raise DomainError(
                Reason.MODEL_INVALID,
                f"conversations are cut to {self.limit} tokens, and need at least {least}",
            )

    def rendered(self, examples: Conversations) -> list[Rendered]:
        """Every conversation, uncut. Raises: NotRenderable."""
        return [self._renderer.rendered(one) for one in examples.conversations]

    def prompt(self, text: str) -> list[int]:
        """Token ids of what a user says, up to where the answer begins. Raises: CONFIGURATION_INVALID."""
        try:
            return self._renderer.prompt(text)
        except NotRenderable as error:
            raise DomainError(Reason.CONFIGURATION_INVALID, f"samples: {error}") from error

    def encoded(self, examples: Conversations) -> list[Encoded]:
        """Every conversation, cut; a target for every token, NOT_LEARNT where it is not learnt."""
        return [self.cut(one) for one in self.rendered(examples)]

    def cut(self, one: Rendered) -> Encoded:
        """Tokens up to the end of the last answer, the beginning left out where they are too many.

        A token that begins the whole, and nothing else in it, stays. Where the last answer does not fit with a prompt
        of a quarter of the limit, its end is cut instead.
        """
        start, end = last_answer(one.learnt)
        kept = list(range(end))
        if end > self.limit:
            first = max(0, min(end - self.limit, start - self.limit // _LEAST_PROMPT))
            begins = one.ids[0] == self._tokenizer.bos_token_id and one.ids.count(one.ids[0]) == 1
            head = range(1 if first and begins else 0)
            first += len(head)
            kept = [*head, *range(first, min(end, first + self.limit - len(head)))]
        ids = [one.ids[index] for index in kept]
        targets = [one.ids[i] if self._everything or one.learnt[i] else NOT_LEARNT for i in kept]
        return Encoded(ids, [NOT_LEARNT, *targets[1:]] if targets else [])

    def batch(self, examples: Conversations) -> Batch:
        """The batch of these examples."""
        return self.collated(self.encoded(examples))

    def collated(self, encoded: Sequence[Encoded]) -> Batch:
        """One batch, its targets [examples, tokens], padded on the right."""
        ids, mask = padded([one.ids for one in encoded], self._pad)
        targets, _ = padded([one.targets for one in encoded], NOT_LEARNT)
        return Batch(input_ids=ids, attention_mask=mask, targets=targets)

    def shown(self, examples: Conversations) -> Mapping[str, str]:
        """The first example's tokens, what is learnt in square brackets; long runs are shortened in the middle."""
        one = self.encoded(examples.select([0]))[0]
        parts = []
        for learnt, run in groupby(
            zip(one.ids, one.targets, strict=True), lambda pair: pair[1] != NOT_LEARNT
        ):
            tokens = self._tokenizer.convert_ids_to_tokens([token for token, _ in run])
            text = " ".join(shortened(tokens, SHOWN_TOKENS // 2))
            parts.append(f"[ {text} ]" if learnt else text)
        count = sum(target != NOT_LEARNT for target in one.targets)
        return {
            "the first one, [ learnt ]": " ".join(parts),
            "learnt of it": f"{count:,} of {len(one.ids):,} tokens",
        }


class Chat(CausalLm):
    """Conversations; the loss is of the tokens of answers, the ends of turns included, or of everything."""

    name = CHAT
    predictions_named = "learnt tokens"

    def read(self, path: Path, data: DataConfig, spec: TrainingSpec) -> Conversations:  # type: ignore[override]
        del spec
        return read_conversations(path, data.cache_dir)

    def encoder(  # type: ignore[override]
        self, tokenizer: PreTrainedTokenizerBase, limit: int, spec: TrainingSpec
    ) -> ChatEncoder:
        return ChatEncoder(tokenizer, limit, everything=spec.loss_on == EVERYTHING)

    def survey(self, path: Path, data: DataConfig, examples: Any, encoder: Any) -> Survey:  # noqa: ANN401 - its own
        del data
        return survey_conversations(path, examples, encoder)


def survey_conversations(path: Path, examples: Conversations, encoder: ChatEncoder) -> Survey:
    """Renders every conversation once.

    Raises: DomainError DATA_INVALID naming the place of one that cannot be rendered, or that has no token to learn.
    """
    lengths = np.empty(len(examples), dtype=np.int64)
    largest = ends_cut = 0
    for index in range(len(examples)):
        try:
            one = encoder.rendered(examples.select([index]))[0]
        except NotRenderable as error:
            raise invalid(f"{record_at(path, index)}: {error}") from error
        start, end = last_answer(one.learnt)
        cut = encoder.cut(one)
        if all(target == NOT_LEARNT for target in cut.targets):
            raise invalid(
                f"{record_at(path, index)}: no token of an answer is left to learn: remove the record"
            )
        lengths[index] = end
        largest = max(largest, *one.ids)
        ends_cut += end > encoder.limit and start - encoder.limit // _LEAST_PROMPT < end - encoder.limit
    return Survey(lengths=lengths, limit=encoder.limit, largest_id=largest, ends_cut=ends_cut)


def last_answer(learnt: Sequence[bool]) -> tuple[int, int]:
    """First index and last + 1 of the last run of True; (0, 0) if there is none."""
    end = len(learnt)
    while end and not learnt[end - 1]:
        end -= 1
    start = end
    while start and learnt[start - 1]:
        start -= 1
    return start, end
