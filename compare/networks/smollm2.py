"""The last layer of SmolLM2, a Llama, below its own frozen head: the loss of answers' tokens.

Conversations end at the last position: those before a shorter one are empty. Rotary embeddings tell distances alone
(Su et al., arXiv 2104.09864), so where a conversation begins makes no difference.
"""

import math
from typing import Final

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from compare.data import Encoded
from compare.networks.port import Adapters, Network
from shelora.lora.layout import Matrix

UNLEARNT: Final = -1
"""In place of a target where no token of an answer follows."""
_PARTS: Final = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attended": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "wide": "mlp.up_proj",
    "narrow": "mlp.down_proj",
    "before": "input_layernorm",
    "between": "post_attention_layernorm",
}
ADAPTED: Final = ("query", "value", "attended")


class SmolLm2(Network):
    """Inputs: `states` [examples, positions, width], 0 where a conversation has not begun; `targets`, the token that
    follows, as its place in `words`, or UNLEARNT [examples, positions]; `words`, tokens among which the head chooses.
    """

    tensors = ()

    def __init__(self, model: LlamaForCausalLM, data: Encoded) -> None:
        """Takes the whole model, of which the last layer, the norm above it and the head are used."""
        config, layer = model.config, model.model.layers[-1]
        self._parts = {name: layer.get_submodule(part).weight.detach() for name, part in _PARTS.items()}
        self._last_norm = model.model.norm.weight.detach()
        self._head = model.lm_head.weight.detach()[torch.from_numpy(data.inputs["words"])]
        self._epsilon = config.rms_norm_eps
        self._width, self._heads = config.hidden_size, config.num_attention_heads
        self._shared = self._heads // config.num_key_value_heads
        """Heads of queries to one of keys and values."""
        self._states = torch.from_numpy(data.inputs["states"])
        self._targets = torch.from_numpy(data.inputs["targets"])
        self._empty = torch.where((self._states == 0).all(dim=2), -1e4, 0.0)
        self._turns = _turns(
            self._states.shape[1], self._width // self._heads, config.rope_parameters["rope_theta"]
        )
        normed = self._normed(self._states, self._parts["before"])
        keys = _by_head(functional.linear(normed, self._parts["key"]), self._width // self._heads)
        self._keys = _turned(keys, self._turns)
        self._values = functional.linear(normed, self._parts["value"])
        self.matrices = tuple(Matrix(name, *self._parts[name].shape) for name in ADAPTED)

    def loss(self, adapters: Adapters, indices: torch.Tensor) -> torch.Tensor:
        """Mean over the answers' tokens of a client's batch."""
        by_example = self.figures(adapters, indices.flatten())
        nats, tokens = (each.view(indices.shape).sum(dim=1) for each in by_example)
        return (nats / tokens).sum()

    def figures(self, adapters: Adapters, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats of an answer, and its tokens."""
        targets = self._targets[indices]
        targets = targets[:, int((targets != UNLEARNT).any(dim=0).nonzero()[0]) :]  # the window of answers
        learnt = targets != UNLEARNT
        states = self._attended(adapters, indices, learnt)[learnt]  # [tokens, width]
        logits = functional.linear(self._above(states), self._head)
        nats = functional.cross_entropy(logits, targets[learnt], reduction="none")
        owners = torch.arange(len(indices))[:, None].expand_as(learnt)[learnt]
        return torch.zeros(len(indices)).index_add(0, owners, nats), learnt.sum(dim=1)

    def _above(self, states: torch.Tensor) -> torch.Tensor:
        """What the head sees, of states after attention [tokens, width]."""
        y = self._normed(states, self._parts["between"])
        gates = functional.silu(functional.linear(y, self._parts["gate"]))
        wide = gates * functional.linear(y, self._parts["wide"])
        return self._normed(states + functional.linear(wide, self._parts["narrow"]), self._last_norm)

    def _attended(self, adapters: Adapters, chosen: torch.Tensor, learnt: torch.Tensor) -> torch.Tensor:
        """States after attention [clients * batch, window, width], at the last positions.

        Those at which no token is learnt are used nowhere, so the matrices see zeros there: in moments, too.
        """
        x, size = self._states[chosen], self._width // self._heads
        window = slice(x.shape[1] - learnt.shape[1], None)
        normed = self._normed(x, self._parts["before"])
        asking = normed[:, window] * learnt[:, :, None]
        queries = adapters.applied("query", asking, functional.linear(asking, self._parts["query"]))
        queries = _turned(_by_head(queries, size), [turn[window] for turn in self._turns])
        values = _by_head(adapters.applied("value", normed, self._values[chosen]), size)
        keys, values = (each.repeat_interleave(self._shared, dim=1) for each in (self._keys[chosen], values))
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)[window]
        scores = queries @ keys.mT / math.sqrt(size) + self._empty[chosen][:, None, None]
        shares = scores.masked_fill(later, -1e4).softmax(dim=-1)
        heads = (shares @ values).transpose(1, 2).flatten(2) * learnt[:, :, None]
        attended = adapters.applied("attended", heads, functional.linear(heads, self._parts["attended"]))
        return x[:, window] + attended

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (self._width,), weight, self._epsilon)


def _by_head(x: torch.Tensor, size: int) -> torch.Tensor:
    """[examples, heads, positions, size]."""
    return x.view(*x.shape[:-1], -1, size).transpose(1, 2)


def _turns(positions: int, size: int, theta: float) -> list[torch.Tensor]:
    """Cosines and sines [positions, size] of rotary embeddings."""
    frequencies = theta ** -(torch.arange(0, size, 2) / size)
    angles = torch.arange(positions)[:, None] * frequencies
    return [torch.cat([f(angles)] * 2, dim=1) for f in (torch.cos, torch.sin)]


def _turned(x: torch.Tensor, turns: list[torch.Tensor]) -> torch.Tensor:
    """Rotates the first half of a head's values against the second, as Llama does."""
    cosines, sines = turns
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines
