"""Text from the clear B of a causal model's last layer, A unknown.

In the first round B = 0, so the gradient of the last layer's query factor B is sum_t delta_t (A x_t)^T, where delta_t
is what position t sends back. Its column space is spanned by the delta_t whatever A is, and delta_t follows from the
public model, the tokens up to t, and the token at t + 1. So the text is decoded from left to right: of all next tokens,
take the one whose delta lies best in the column space.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from attack.public import Public
from attack.spans import rank_by_gap
from shelora.lora.shards import Float64

PROBES: Final = 96
"""Random directions outside the span on which all tokens are compared; the best are then compared exactly."""
FINALISTS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Position:
    """The last layer's state at the last position of a prefix."""

    x: torch.Tensor
    """Residual stream [D]."""
    query: torch.Tensor
    keys: torch.Tensor
    """[T, D_kv]."""
    values: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    """[T, d] of the rotary embedding."""
    next_token: torch.Tensor
    """Probabilities [V]."""


class Decoder:
    """Decodes from the last layer of a Llama-like model."""

    def __init__(self, public: Public) -> None:
        """Takes the attacker's copy of the model."""
        self._base = public.base
        self._layer = public.base.model.layers[-1]
        config = public.base.config
        self._heads = config.num_attention_heads
        self._key_heads = config.num_key_value_heads
        self._width = config.hidden_size // self._heads
        self._output = public.base.lm_head.weight.detach()

    def text(
        self,
        gradient: Float64,
        row_scales: Float64,
        prefix: list[int],
        longest: int,
        end: int,
        most_rank: int,
    ) -> list[int]:
        """The tokens that begin with `prefix`.

        Args: gradient: of B [out, rank], its rows scaled by `row_scales` [out]; most_rank: bound of the span's rank.
        """
        vectors, values, _ = np.linalg.svd(gradient, full_matrices=False)
        span = torch.tensor(vectors[:, : rank_by_gap(values, most_rank)], dtype=torch.float32)
        scales = torch.tensor(row_scales, dtype=torch.float32)
        tokens = list(prefix)
        while len(tokens) < longest and tokens[-1] != end:
            position, jacobian = self._at(tokens, scales)
            tokens.append(self._nearest(position, jacobian, span))
        return tokens

    def places(
        self, gradient: Float64, row_scales: Float64, true: list[int], known: int, rank: int
    ) -> list[int]:
        """The place of every true token after the first `known` among all tokens, all before it given; 0 is the best.

        Args: as of `text`; rank: of the span that is taken.
        """
        vectors = np.linalg.svd(gradient, full_matrices=False)[0]
        span = torch.tensor(vectors[:, :rank], dtype=torch.float32)
        scales = torch.tensor(row_scales, dtype=torch.float32)
        found = []
        for length in range(known, len(true)):
            position, jacobian = self._at(true[:length], scales)
            missed = self._missed(position, jacobian, span)
            found.append(int((missed < missed[true[length]]).sum()))
        return found

    def _at(self, tokens: list[int], scales: torch.Tensor) -> tuple[_Position, torch.Tensor]:
        """The last position, and the Jacobian [D, out] of its final state by its query."""
        position = self._position(tokens)
        jacobian = torch.func.jacrev(lambda query: self._final(query, position))(position.query).detach()
        return position, jacobian * scales[None]

    @torch.no_grad()
    def _missed(self, position: _Position, jacobian: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
        """For every token, about the share of its delta outside the span [V]."""
        outside = torch.randn(len(span), PROBES, generator=torch.Generator().manual_seed(0))
        outside = torch.linalg.qr(outside - span @ (span.T @ outside))[0]
        missed = (self._deltas(position, jacobian @ outside) ** 2).sum(1)
        missed = missed * (len(span) - span.shape[1]) / PROBES
        caught = (self._deltas(position, jacobian @ span) ** 2).sum(1)
        share: torch.Tensor = missed / (missed + caught)
        return share

    @torch.no_grad()
    def _nearest(self, position: _Position, jacobian: torch.Tensor, span: torch.Tensor) -> int:
        """The next token whose delta is nearest to the span."""
        finalists = self._missed(position, jacobian, span).argsort()[:FINALISTS]
        states = (position.next_token @ self._output)[None] - self._output[finalists]
        deltas = states @ jacobian
        deltas = deltas / deltas.norm(dim=1, keepdim=True)
        residual = (deltas - (deltas @ span) @ span.T).norm(dim=1)
        return int(finalists[residual.argmin()])

    def _deltas(self, position: _Position, directions: torch.Tensor) -> torch.Tensor:
        """W (p - e_y) for every token y, seen along directions [D, k]: [V, k]."""
        seen = self._output @ directions
        deltas: torch.Tensor = (position.next_token @ seen)[None] - seen
        return deltas

    @torch.no_grad()
    def _position(self, tokens: list[int]) -> _Position:
        kept: dict[str, torch.Tensor] = {}

        def keep(
            _: torch.nn.Module, positional: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]
        ) -> None:
            kept["x"] = positional[0] if positional else named["hidden_states"]

        hook = self._layer.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            logits = self._base(input_ids=torch.tensor([tokens])).logits[0, -1]
        finally:
            hook.remove()
        x, attention = kept["x"][0], self._layer.self_attn
        normed = self._layer.input_layernorm(x)
        cos, sin = self._base.model.rotary_emb(x[None], torch.arange(len(tokens))[None])
        return _Position(
            x=x[-1],
            query=_plain(attention.q_proj)(normed)[-1],
            keys=_plain(attention.k_proj)(normed),
            values=_plain(attention.v_proj)(normed),
            cos=cos[0],
            sin=sin[0],
            next_token=logits.softmax(-1),
        )

    def _final(self, query: torch.Tensor, at: _Position) -> torch.Tensor:
        """The normed final state of a position as a function of its query: attention, then the rest of the layer."""
        length = len(at.keys)
        keys = at.keys.view(length, self._key_heads, self._width)
        keys = keys * at.cos[:, None] + _rotated(keys) * at.sin[:, None]
        values = at.values.view(length, self._key_heads, self._width)
        group = self._heads // self._key_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        heads = query.view(self._heads, self._width)
        heads = heads * at.cos[-1] + _rotated(heads) * at.sin[-1]
        weights = (torch.einsum("hd,thd->ht", heads, keys) / self._width**0.5).softmax(-1)
        mixed = torch.einsum("ht,thd->hd", weights, values).reshape(-1)
        x = at.x + self._layer.self_attn.o_proj(mixed)
        x = x + self._layer.mlp(self._layer.post_attention_layernorm(x))
        final: torch.Tensor = self._base.model.norm(x)
        return final


def _plain(layer: torch.nn.Module) -> torch.nn.Module:
    """A linear layer without its adapter."""
    found: torch.nn.Module = getattr(layer, "base_layer", layer)
    return found


def _rotated(heads: torch.Tensor) -> torch.Tensor:
    half = heads.shape[-1] // 2
    return torch.cat([-heads[..., half:], heads[..., :half]], -1)
