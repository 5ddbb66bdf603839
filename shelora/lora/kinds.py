"""The kinds of shards by name: the one place that looks a name up."""

from typing import Final

from shelora.lora import products, sums, whole
from shelora.lora.kind import ShardKind
from shelora.lora.layout import Layout, Shard, refuse

_KINDS: Final[dict[str, ShardKind]] = {}


def register(kind: ShardKind) -> None:
    """Makes a kind known. Raises ValueError if another has its name."""
    if _KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"there is a kind named {kind.name} already")


def kind_of(shard: Shard) -> ShardKind:
    """The kind of a shard. Raises INVALID_ARGUMENT if this version of shelora does not know it."""
    try:
        return _KINDS[shard.kind]
    except KeyError:
        raise refuse(f"a shard is of kind {shard.kind!r}; known are {', '.join(sorted(_KINDS))}") from None


def require_kinds(layout: Layout) -> Layout:
    """The layout. Raises INVALID_ARGUMENT unless every shard can be of the kind it names."""
    for shard in layout.shards:
        kind_of(shard).require(layout, shard)
    return layout


register(products.KIND)
register(whole.KIND)
register(sums.SKETCHES_KIND)
register(sums.SUMS_KIND)


def largest_update_bytes(layout: Layout) -> list[int]:
    """Bound of a serialized update shard of the largest rank in bytes, by shard."""
    return [kind_of(shard).largest_update_bytes(layout, shard, layout.max_rank) for shard in layout.shards]
