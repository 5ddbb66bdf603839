"""Texts to batches of token ids."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol, Self

import torch
from transformers import PreTrainedTokenizerBase

from client_agent.data import Examples
from client_agent.tables import first_line
from shelora.errors import DomainError, Reason

TEXTS_AT_ONCE: Final = 4096
"""Texts that are encoded at once where not all are needed."""
NOT_LEARNT: Final = -100
"""Target of a token that is not learnt; cross-entropy in torch and transformers leaves it out, too."""
SHOWN_TOKENS: Final = 40
"""Tokens of an example that are shown to people."""


class ModelBatch(Protocol):
    """What a model is given at once, of texts or of images."""

    def __len__(self) -> int: ...

    @property
    def inputs(self) -> Mapping[str, torch.Tensor]:
        """What the model takes, by its names."""

    @property
    def targets(self) -> torch.Tensor:
        """As the task has them."""

    @property
    def mask(self) -> torch.Tensor | None:
        """[examples, tokens]: what is not padding; None if nothing is padded."""

    @property
    def described(self) -> str:
        """One of its examples, for people."""

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""

    def only(self, index: int) -> Self:
        """The batch of that example alone."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as the model takes it."""

    ids: Sequence[int]
    """Token ids."""
    targets: Sequence[int] = ()
    """The index of its label; none where the next tokens are the targets."""
    types: Sequence[int] = ()
    """Which text of a pair each token is of, as the tokenizer numbers them; none of a single text."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """Token ids of some examples, padded on the right to the longest."""

    input_ids: torch.Tensor
    """[examples, tokens], int64."""
    attention_mask: torch.Tensor
    """[examples, tokens], int64: 1 for a token, 0 for padding."""
    targets: torch.Tensor
    """[examples], int64: label indices; or [examples, tokens], NOT_LEARNT where a token is not learnt; empty where all
    tokens are."""
    token_type_ids: torch.Tensor | None = None
    """[examples, tokens], int64: which text of a pair a token is of; None where that is not told apart."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def mask(self) -> torch.Tensor:
        """[examples, tokens]: what is not padding."""
        return self.attention_mask

    @property
    def next_targets(self) -> torch.Tensor:
        """[examples, tokens], int64, of a language task: what is to be predicted there; NOT_LEARNT if nothing is."""
        if self.targets.ndim > 1:
            return self.targets
        return self.input_ids.masked_fill(self.attention_mask == 0, NOT_LEARNT)

    @property
    def described(self) -> str:
        """One of its examples, for people."""
        return f"a text of {self.input_ids.shape[1]} tokens"

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model takes, by its names."""
        types = {} if self.token_type_ids is None else {"token_type_ids": self.token_type_ids}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **types}

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def only(self, index: int) -> "Batch":
        """The batch of that example alone, padded as it is."""
        return self._each(lambda tensor: tensor[index : index + 1])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        types = None if self.token_type_ids is None else change(self.token_type_ids)
        return Batch(
            input_ids=change(self.input_ids),
            attention_mask=change(self.attention_mask),
            targets=change(self.targets),
            token_type_ids=types,
        )


class Encoder:
    """Tokenizes, cuts and pads. Stateless but for the tokenizer.

    The special tokens that a tokenizer puts around a text, such as [CLS] or <s>, are not put a second time around a
    text that holds them already. A text that is cut keeps its beginning; no appended end follows it then, or the model
    would learn to end where the limit is.

    Args:
        limit: Tokens an example is cut to.
        append_end: Whether an end token follows each whole text: the model learns where texts end.

    Raises: DomainError MODEL_INVALID if special tokens leave no room for a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int, *, append_end: bool) -> None:
        self._tokenizer = tokenizer
        self._pad = int(tokenizer.pad_token_id)
        self._head, self._tail = _frame(tokenizer)
        self._ends_matter = append_end
        end = tokenizer.eos_token_id
        if append_end and end is not None and end not in self._tail:
            self._tail = [*self._tail, int(end)]
        self.at_once = TEXTS_AT_ONCE
        self.limit = min(limit, tokenizer.model_max_length)
        self._require_room(
            max(2, len(self._head) + 1) if append_end else len(self._head) + 1 + len(self._tail)
        )

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, special tokens included, each cut to the limit."""
        return [self._cut(body) for body in self._bodies(texts)]

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text to go on from: no special token follows it."""
        (body,) = self._bodies([text])
        return [*self._framed(body)[0], *body]

    def measure(self, texts: Sequence[str], seconds: Sequence[str] = ()) -> tuple[list[int], int]:
        """Tokens of every text or pair before it is cut, special tokens included, and the largest token id.

        Raises: DomainError MODEL_INVALID if special tokens leave no room for both texts of a pair.
        """
        if seconds:
            self._require_room(self._tokenizer.num_special_tokens_to_add(pair=True) + 2)
            whole = self._pairs(texts, seconds, cut=False)["input_ids"]
            return [len(row) for row in whole], max((max(row) for row in whole if row), default=0)
        bodies = self._bodies(texts)
        lengths = [sum(map(len, self._framed(body))) for body in bodies]
        return lengths, max((max(body) for body in bodies if body), default=0)

    def tokens(self, text: str) -> list[str]:
        """What `ids` gives, for people."""
        tokens: list[str] = self._tokenizer.convert_ids_to_tokens(self.ids([text])[0])
        return tokens

    def shown(self, examples: Examples) -> Mapping[str, str]:
        """The first example's tokens; what lies in the middle of many is left out."""
        tokens = self._tokenizer.convert_ids_to_tokens(self.encoded(examples.select([0]))[0].ids)
        return {"the first one": " ".join(shortened(tokens, SHOWN_TOKENS))}

    def encoded(self, examples: Examples) -> list[Encoded]:
        """Every example as `ids`, with its label if it has one; of a pair, the longer text is cut first."""
        targets: list[tuple[int, ...]] = [(label,) for label in examples.labels] or [()] * len(examples)
        if examples.seconds:
            pairs = self._pairs(examples.texts, examples.seconds, cut=True)
            types: Sequence[Sequence[int]] = pairs.get("token_type_ids") or [()] * len(targets)
            return [Encoded(*one) for one in zip(pairs["input_ids"], targets, types, strict=True)]
        ids = self.ids(examples.texts)
        return [Encoded(row, target) for row, target in zip(ids, targets, strict=True)]

    def batch(self, examples: Examples) -> Batch:
        """The batch of these examples."""
        return self.collated(self.encoded(examples))

    def collated(self, encoded: Sequence[Encoded]) -> Batch:
        """The batch of examples that are encoded already."""
        targets = [target for one in encoded for target in one.targets]
        ids, mask = padded([one.ids for one in encoded], self._pad)
        types = padded([one.types for one in encoded], 0)[0] if encoded[0].types else None
        return Batch(
            input_ids=ids,
            attention_mask=mask,
            targets=torch.tensor(targets, dtype=torch.int64),
            token_type_ids=types,
        )

    def _require_room(self, needed: int) -> None:
        if self.limit < needed:
            raise DomainError(
                Reason.MODEL_INVALID,
                f"texts are cut to {self.limit} tokens, and the special tokens leave no room for a text: the operator "
                f"must create the federation with max_tokens of at least {needed}, or the model be another",
            )

    def _pairs(
        self, texts: Sequence[str], seconds: Sequence[str], *, cut: bool
    ) -> dict[str, list[list[int]]]:
        """As the tokenizer frames pairs, its special tokens included."""
        encoded: dict[str, list[list[int]]] = self._tokenizer(
            list(texts),
            list(seconds),
            truncation="longest_first" if cut else False,
            max_length=self.limit if cut else None,
            return_attention_mask=False,
            verbose=False,
        )
        return encoded

    def _bodies(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens but those that the texts hold themselves, uncut."""
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _framed(self, body: list[int]) -> tuple[list[int], list[int], list[int]]:
        """What comes before the text, the text, and what comes after it."""
        head = [] if body[: len(self._head)] == self._head else self._head
        tail = [] if self._tail and body[-len(self._tail) :] == self._tail else self._tail
        return head, body, tail

    def _cut(self, body: list[int]) -> list[int]:
        head, body, tail = self._framed(body)
        if len(head) + len(body) + len(tail) <= self.limit:
            return [*head, *body, *tail]
        kept = [] if self._ends_matter else self._tail
        return [*head, *body[: self.limit - len(head) - len(kept)], *kept]


@contextmanager
def tokenizing() -> Iterator[None]:
    """Turns whatever a tokenizer raises into one line: a damaged one can raise anything, for some texts alone.

    Raises: DomainError MODEL_INVALID.
    """
    try:
        yield
    except (DomainError, MemoryError):
        raise
    except Exception as error:
        raise DomainError(
            Reason.MODEL_INVALID,
            f"model.path: the tokenizer fails on a text: {first_line(error)}; see that tokenizer.json is whole",
        ) from error


def padded(rows: Sequence[Sequence[int]], filling: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows filled up on the right, and a mask that is 1 where a row is; both [rows, longest], int64."""
    width = max(len(row) for row in rows)
    values = [[*row, *[filling] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(values), torch.tensor(mask)


def shortened(tokens: Sequence[str], most: int) -> list[str]:
    """The tokens, about that many; dots stand for what lies in the middle of more."""
    if len(tokens) <= most:
        return list(tokens)
    return [*tokens[: most // 2], "...", *tokens[-(most // 2) :]]


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    before = special.index(0) if 0 in special else len(ids)
    after = special[::-1].index(0) if 0 in special else 0
    return ids[:before], ids[len(ids) - after :]
