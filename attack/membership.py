"""Was this sentence in the batch? From clear B alone, A unknown, any rank.

In the first round B = 0. For a candidate text the public model gives the space in which its share of the gradient of B
must lie; how much of the captured B lies there, beside what a random direction would, is the score.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import torch

from attack.public import Public
from shelora.lora.shards import Float64

Score = Callable[[Mapping[str, Float64]], float]
"""Takes the gradients (or updates) of B by matrix; larger is likelier a member."""
_TOLERANCE = 1e-6


class CausalMembership:
    """For causal models: spans of what every position of a candidate sends back, in the last layers."""

    def __init__(self, public: Public, layers: int = 3) -> None:
        """Takes the attacker's model and how many of the last layers are looked at, never the first."""
        self._public = public
        last = len(public.base.model.layers)
        kept = {f".layers.{index}." for index in range(max(last - layers, 1), last)}
        self.names = [n for n in public.names if any(part in f".{n}" for part in kept)]
        self._spans = lru_cache(maxsize=256)(self._fresh_spans)

    def score(self, gradients: Mapping[str, Float64], text: str) -> float:
        """Mean logarithm of the share of B in the candidate's span over that of a random one."""
        spans = self._spans(text)
        return float(np.mean([_log_ratio(spans[name], gradients[name]) for name in self.names]))

    def _fresh_spans(self, text: str) -> dict[str, Float64]:
        """Orthonormal columns [out, k] by matrix."""
        kept: dict[str, Float64] = {}
        hooks = [
            self._public.model.layers[n].register_full_backward_hook(_keeper(kept, n)) for n in self.names
        ]
        try:
            self._public.loss(text).backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
            self._public.model.module.zero_grad()
        return {name: _columns(back) for name, back in kept.items()}


def _keeper(kept: dict[str, Float64], name: str) -> Callable[..., None]:
    def keep(_: torch.nn.Module, __: object, outputs: tuple[torch.Tensor, ...]) -> None:
        kept[name] = outputs[0][0].detach().double().numpy()

    return keep


def _columns(back: Float64) -> Float64:
    vectors, values, _ = np.linalg.svd(back.T, full_matrices=False)
    kept: Float64 = vectors[:, values > values[0] * _TOLERANCE]
    return kept


def _log_ratio(span: Float64, B: Float64) -> float:
    share = (np.linalg.norm(span.T @ B) / np.linalg.norm(B)) ** 2
    return float(np.log(max(share, 1e-300) / (span.shape[1] / len(B))))


class ClassifierMembership:
    """For BERT-like classifiers with a secret head: the last layer's query at the first token.

    Its gradient in head h is Cov_a(k, v) z_h with z_h unknown, so it lies in the span of that covariance, which the
    public model gives for a candidate text.
    """

    def __init__(self, public: Public) -> None:
        """Takes the attacker's model."""
        self._public = public
        self._attention = public.base.bert.encoder.layer[-1].attention.self
        config = public.base.config
        self._heads = config.num_attention_heads
        self._width = config.hidden_size // self._heads
        last = f"encoder.layer.{config.num_hidden_layers - 1}.attention.self.query"
        self.names = [n for n in public.names if n.endswith(last)]
        self._covariances = lru_cache(maxsize=1024)(self._fresh_covariances)

    def score(self, gradients: Mapping[str, Float64], text: str) -> float:
        """Mean over heads of the logarithm of B's energy, weighted by the covariance's singular values."""
        B = gradients[self.names[0]]
        found = []
        for head, (vectors, values) in enumerate(self._covariances(text)):
            block = B[head * self._width : (head + 1) * self._width]
            block = block / max(float(np.linalg.norm(block)), 1e-30)
            weights = values**2 / (values**2).sum() * self._width
            found.append(float(((vectors.T @ block) ** 2 * weights[:, None]).sum()))
        return float(np.mean(np.log(np.maximum(found, 1e-30))))

    @torch.no_grad()
    def _fresh_covariances(self, text: str) -> list[tuple[Float64, Float64]]:
        kept: dict[str, torch.Tensor] = {}

        def keep(
            _: torch.nn.Module, positional: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]
        ) -> None:
            kept["x"] = (positional[0] if positional else named["hidden_states"])[0]

        hook = self._attention.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self._public.loss(text)
        finally:
            hook.remove()
        x, attention = kept["x"], self._attention
        shape = (len(x), self._heads, self._width)
        query = getattr(attention.query, "base_layer", attention.query)(x)[0].view(self._heads, self._width)
        key = getattr(attention.key, "base_layer", attention.key)(x).view(shape)
        value = getattr(attention.value, "base_layer", attention.value)(x).view(shape)
        weights = (torch.einsum("hd,thd->ht", query, key) / self._width**0.5).softmax(-1)
        return [self._covariance(weights[h], key[:, h], value[:, h]) for h in range(self._heads)]

    def _covariance(
        self, weight: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[Float64, Float64]:
        centred = key - weight @ key
        vectors, values, _ = torch.linalg.svd((centred * weight[:, None]).T @ value)
        return vectors.double().numpy(), values.double().numpy()
