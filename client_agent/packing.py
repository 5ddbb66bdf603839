"""Texts of a batch laid end to end in place of side by side, so that nothing is padded.

Positions begin anew with every text, and models of transformers infer from it that no text sees those before it. Loss
and gradients are those of the padded batch, up to rounding; `require_packable` tries it, for not all models do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from client_agent.encoding import NOT_LEARNT, Batch, ModelBatch
from client_agent.tables import first_line
from shelora.configuration import invalid

if TYPE_CHECKING:
    from client_agent.model import AdaptedModel

_TOLERANCE: Final = 1e-3
"""Largest difference of logits, relative to the largest of them, that is rounding in float32; in smaller types, four
units in the last place."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedBatch:
    """Token ids of some texts, one after the other."""

    input_ids: torch.Tensor
    """[1, tokens], int64."""
    position_ids: torch.Tensor
    """[1, tokens], int64: from 0 in every text."""
    targets: torch.Tensor
    """[1, tokens], int64: NOT_LEARNT for the first token of every text, and where it is not learnt."""

    def __len__(self) -> int:
        return int((self.position_ids == 0).sum().item())

    @property
    def next_targets(self) -> torch.Tensor:
        """The targets."""
        return self.targets

    @property
    def mask(self) -> None:
        """Nothing is padded."""

    @property
    def described(self) -> str:
        """What it holds, for people."""
        return f"{len(self)} texts of {self.input_ids.shape[1]} tokens together"

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model takes, by its names. A cache, or a mask, would keep it from telling texts apart."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def only(self, index: int) -> "PackedBatch":
        """The batch of that text alone."""
        text = (self.position_ids[0] == 0).cumsum(0) == index + 1
        return self._each(lambda tensor: tensor[:, text])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        return PackedBatch(
            input_ids=change(self.input_ids),
            position_ids=change(self.position_ids),
            targets=change(self.targets),
        )


def packed(batch: Batch) -> PackedBatch:
    """The same texts without padding."""
    real = batch.attention_mask.bool()
    positions = torch.arange(real.shape[1]).expand_as(batch.input_ids)
    targets = batch.next_targets.masked_fill(positions == 0, NOT_LEARNT)
    return PackedBatch(
        input_ids=batch.input_ids[real][None],
        position_ids=positions[real][None],
        targets=targets[real][None],
    )


def require_packable(model: "AdaptedModel", batch: ModelBatch) -> None:
    """Predicts a batch of two texts, packed and padded.

    Raises: DomainError CONFIGURATION_INVALID if the model does not take packed texts, or mixes them.
    """
    remedy = "leave training.packing off"
    if not (model.task.predicts_next and isinstance(batch, Batch)):
        raise invalid(f"training.packing: it is for language models, not for {model.task.name}: {remedy}")
    try:
        with torch.inference_mode():
            apart, _ = model.predict(batch)
            together, _ = model.predict(packed(batch))
    except Exception as error:  # a model can make torch raise anything
        raise invalid(
            f"training.packing: the model takes no packed texts: {first_line(error)}: {remedy}"
        ) from error
    tolerance = max(_TOLERANCE, 4 * torch.finfo(model.precision.dtype).eps)
    if (apart - together).abs().max() > tolerance * apart.abs().max():
        raise invalid(f"training.packing: the model does not keep packed texts apart: {remedy}")
