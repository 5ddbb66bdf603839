"""Methods by name: the one place where they are looked up."""

from collections.abc import Callable
from typing import Final

from compare.methods import clear, product
from compare.methods.port import Method

METHODS: Final[dict[str, Callable[[], Method]]] = {
    "complete": product.Complete,
    "selective": product.Selective,
    "exact": clear.ExactSum,
    "fedit": clear.FedIt,
    "ffa": clear.FrozenA,
    "ffa-activations": clear.PrincipalA,
    "rolora": clear.Alternating,
    "fedrot": clear.Rotated,
    "flora": clear.Stacked,
    "dropped": clear.Dropped,
    "published": clear.AsPublished,
    "pooled": clear.Pooled,
    "alone": clear.Alone,
}
