"""Conversations as text, by a chat template, and where the answers are in it."""

from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from client_agent.conversations import ASSISTANT, USER, Conversation, Turn
from client_agent.tables import first_line
from shelora.errors import DomainError, Reason

DEFAULT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}{% endif %}"
    "{% endfor %}"
)
"""Renders one question and its answer where the tokenizer has no template: Alpaca's headings (Taori et al., 2023)."""
_MARKED: Final = "{% generation"
_MARKED_TIGHT: Final = "{%- generation"
"""How a template begins to mark what the assistant says."""


class NotRenderable(Exception):  # noqa: N818 - as Stopped
    """Why a conversation cannot be rendered, or its answers not be found."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of a conversation, uncut."""

    ids: list[int]
    learnt: list[bool]
    """By token, whether it is of an answer."""


class ChatRenderer:
    """Renders with the tokenizer's template, or with the default one, which the tokenizer is given then.

    Raises: DomainError MODEL_INVALID if the tokenizer cannot say which characters a token stands for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DomainError(
                Reason.MODEL_INVALID,
                "chat needs a tokenizer with tokenizer.json: save the model with a fast one",
            )
        self._tokenizer = tokenizer
        self._own = bool(tokenizer.chat_template)
        if not self._own:
            begins = (
                tokenizer.bos_token_id is not None
                and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
            )
            tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + DEFAULT_TEMPLATE
        template = str(tokenizer.chat_template)
        self._marks = _MARKED in template or _MARKED_TIGHT in template

    def rendered(self, conversation: Conversation) -> Rendered:
        """Raises: NotRenderable."""
        if conversation.of_messages and not self._own:
            raise NotRenderable(
                "the tokenizer has no chat template, which messages need: take the instruct variant of the model, put "
                "its chat_template.jinja into the model's folder at every agent, or write prompt and completion"
            )
        return self._by_marks(conversation) if self._marks else self._by_prefixes(conversation)

    def prompt(self, text: str) -> list[int]:
        """Token ids of what a user says, up to where the answer begins. Raises: NotRenderable."""
        rendered = self._text((Turn(USER, text),), add_generation_prompt=True)
        return list(self._tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])

    def _by_marks(self, conversation: Conversation) -> Rendered:
        encoded = self._applied(
            conversation.turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Rendered(list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]])

    def _by_prefixes(self, conversation: Conversation) -> Rendered:
        turns = conversation.turns
        whole = self._text(turns)
        spans = [
            self._span(turns, index, whole) for index, turn in enumerate(turns) if turn.role == ASSISTANT
        ]
        encoded = self._tokenizer(
            whole,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        learnt = [
            any(start < after and before < end for before, after in spans)
            for start, end in encoded["offset_mapping"]
        ]
        return Rendered(list(encoded["input_ids"]), learnt)

    def _span(self, turns: tuple[Turn, ...], index: int, whole: str) -> tuple[int, int]:
        """First and last + 1 character of an answer and of the mark that ends it."""
        before = self._text(turns[:index], add_generation_prompt=True)
        after = self._text(turns[: index + 1])
        if not (after.startswith(before) and whole.startswith(after)):
            raise NotRenderable(
                "the chat template renders the beginning of a conversation otherwise than the same turns in the whole, "
                "so the answers cannot be told apart: split the record so that each holds one answer, or take a "
                "template with generation marks"
            )
        content = turns[index].content.strip()
        stripped = after.rstrip()
        marked = not stripped.endswith(content)  # white space behind the mark of an end is not the answer's
        return len(before), len(stripped) if marked else len(after)

    def _text(self, turns: tuple[Turn, ...], *, add_generation_prompt: bool = False) -> str:
        if not turns:
            return ""
        return str(self._applied(turns, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _applied(self, turns: tuple[Turn, ...], **options: Any) -> Any:  # noqa: ANN401 - as transformers has it
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # a template can raise anything
            raise NotRenderable(f"the chat template refuses the conversation: {first_line(error)}") from error
