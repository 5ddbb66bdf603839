"""What a language model writes to its operator's prompts after each round. It stays on this machine."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from client_agent.config import SampleSettings
from client_agent.model import AdaptedModel
from client_agent.training import Report
from shelora.errors import DomainError, Reason

_NAMED: Final = 40
"""Characters by which a prompt is named."""


@runtime_checkable
class PromptEncoder(Protocol):
    """An encoder of a task whose models write."""

    def prompt(self, text: str) -> list[int]:
        """Token ids of what the model is to go on from."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One prompt and what the model wrote."""

    prompt: str
    text: str


class Sampler:
    """Writes to the prompts of an agent's file, taking the likeliest token each time: the same model writes the same.

    Args:
        settings: The prompts.
        model: What writes.
        encoder: Of its task.

    Raises: CONFIGURATION_INVALID if the task's models do not write, or a prompt leaves no room for an answer.
    """

    def __init__(self, settings: SampleSettings, model: AdaptedModel, encoder: Any) -> None:  # noqa: ANN401 - of any task
        self._settings = settings
        self._model = model
        self._prompts: list[list[int]] = []
        if not settings.prompts:
            return
        if not (model.task.predicts_next and isinstance(encoder, PromptEncoder)):
            raise _refused(f"models of task {model.task.name} write no text: remove samples")
        for prompt in settings.prompts:
            ids = encoder.prompt(prompt)
            self._require_room(prompt, len(ids))
            self._prompts.append(ids)

    def _require_room(self, prompt: str, tokens: int) -> None:
        most = self._model.most_positions
        if not tokens:
            raise _refused(f"the prompt {prompt[:_NAMED]!r} has no tokens")
        if tokens + self._settings.max_new_tokens > most:
            raise _refused(
                f"the prompt {prompt[:_NAMED]!r} has {tokens} tokens, and with max_new_tokens = "
                f"{self._settings.max_new_tokens} that is more than the {most} that the model takes: lower one of them"
            )

    def __bool__(self) -> bool:
        return bool(self._prompts)

    def write(self, report: Report) -> list[Completion]:
        """A sample of every prompt from the model's present state.

        Args: report: Takes the progress before every token; what it raises ends the work.
        """
        samples = []
        for position, (prompt, ids) in enumerate(zip(self._settings.prompts, self._prompts, strict=True)):
            done = position / len(self._prompts)
            written = continued(self._model, ids, self._settings.max_new_tokens, partial(report, done))
            text = self._model.tokenizer.decode(written, skip_special_tokens=True)
            samples.append(Completion(prompt, text.strip()))
        return samples


def continued(
    model: AdaptedModel, ids: Sequence[int], most: int, before_token: Callable[[], None]
) -> list[int]:
    """At most that many tokens after the given ones, to an end of the text: the most likely token each time.

    Args:
        model: What writes.
        ids: Token ids to continue from.
        most: Tokens at most.
        before_token: Called before every token; an exception that it raises ends the work.
    """
    network: Any = model.module
    prompt = torch.tensor([list(ids)], device=model.device)

    def watch(*_: Any, **__: Any) -> bool:  # noqa: ANN401 - as transformers calls it
        before_token()
        return False

    network.eval()
    before_token()
    with torch.inference_mode():
        written = network.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=most,
                pad_token_id=model.tokenizer.pad_token_id,
                eos_token_id=_ends(network, model.tokenizer) or None,
            ),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
    return [int(token) for token in written[0, len(ids) :]]


def _ends(network: Any, tokenizer: Any) -> list[int]:  # noqa: ANN401 - PEFT's models are untyped, tokenizers of any kind
    """Tokens that end a text, as the tokenizer and the base model say."""
    stated = getattr(network.get_base_model().generation_config, "eos_token_id", None)
    ends = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id]
    return sorted({int(token) for token in ends if token is not None})


def as_json(number: int, samples: Sequence[Completion]) -> bytes:
    """The content of a file of samples after that training round; 0: before the first."""
    content = {"round": number, "samples": [asdict(one) for one in samples]}
    return json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n"


def _refused(why: str) -> DomainError:
    return DomainError(Reason.CONFIGURATION_INVALID, f"samples: {why}")
