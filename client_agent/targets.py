"""Which modules a federation adapts, and which it trains whole, by their names in the base model.

The same rules at every agent give the same names, for they look at the model alone. What the protocol cannot carry is
refused in one sentence.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import regex
from torch import nn
from transformers import PreTrainedModel

from client_agent.checkpoint import Checkpoint, invalid, under
from client_agent.layers import LINEAR, is_convolution, keeps_statistics, obstacle
from client_agent.tables import listed, quoted
from shelora.federation import ALL_LINEAR

_PATTERN_S: Final = 2.0
"""Seconds that matching all names may take: some regular expressions take exponential time."""
_LAYER: Final = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Names that are resolved."""

    adapted: tuple[str, ...]
    """Whole names of the modules that get factors, in the model's order."""
    saved: tuple[str, ...]
    """Whole names of the modules trained whole from the base model's values, in the model's order."""
    peft: tuple[str, ...]
    """What to call the adapted ones in a saved adapter: the suffixes, where they say it all."""


@dataclass(frozen=True, slots=True)
class Narrowed:
    """What a specification says of modules beside `target_modules`."""

    layers: Sequence[int] = ()
    pattern: str = ""
    saved: Sequence[str] = ()


WHOLE: Final = Narrowed()
"""Every module that `target_modules` name, and none trained whole."""


def resolve(checkpoint: Checkpoint, target_modules: Sequence[str], narrowed: Narrowed) -> Targets:
    """The modules that a specification means. Raises: MODEL_INVALID naming what matches nothing or is not adaptable."""
    model = checkpoint.model
    modules = {name: module for name, module in model.named_modules() if not under(name, checkpoint.head)}
    saved = tuple(_saved(model, modules, narrowed.saved))
    named = tuple(_named(model, modules, tuple(target_modules)))
    adapted = [name for name in named if not under(name, saved)]
    if narrowed.layers:
        adapted = [name for name in adapted if _layer(name) in narrowed.layers]
    if narrowed.pattern and adapted:
        adapted = list(_matching(adapted, narrowed.pattern))
    if not adapted:
        raise invalid(
            "the federation's target_layers and target_pattern leave none of the modules that its target_modules name; "
            f"the first of those is {next(iter(named), 'none')}"
        )
    _require_adaptable(model, modules, adapted)
    if getattr(model.config, "tf_padding", False) and any(is_convolution(modules[name]) for name in adapted):
        raise invalid(  # PEFT's layers do not tell what they wrap, so the saved adapter would fail as well
            "the model pads each convolution by its stride, as TensorFlow does, and PEFT's layers hide the stride: "
            "take one that was trained with tf_padding false (config.json), or another model"
        )
    whole = tuple(adapted) == named and ALL_LINEAR not in target_modules
    return Targets(
        adapted=tuple(adapted), saved=saved, peft=tuple(target_modules) if whole else tuple(adapted)
    )


def adaptable_layers(checkpoint: Checkpoint) -> dict[str, int]:
    """How many layers can be adapted by each name that `target_modules` can have."""
    modules = {n: m for n, m in checkpoint.model.named_modules() if not under(n, checkpoint.head)}
    return _adaptable(checkpoint.model, modules)


def _require_adaptable(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], names: Sequence[str]
) -> None:
    """Raises: MODEL_INVALID for what is neither a linear layer nor a plain convolution, and what else may be named."""
    obstacles = {name: why for name in names if (why := obstacle(modules[name]))}
    if not obstacles:
        return
    first, why = next(iter(obstacles.items()))
    alike = [name for name, other in obstacles.items() if other == why]
    raise invalid(
        f"the federation adapts {listed(alike)}, of the kind {type(modules[first]).__name__}; only {why}; what can be "
        f"adapted is {listed(_adaptable(model, modules))}"
    )


def _named(model: PreTrainedModel, modules: Mapping[str, nn.Module], targets: Sequence[str]) -> Iterator[str]:
    if targets == (ALL_LINEAR,):
        linear = list(_all_linear(model, modules))
        if not linear:
            raise invalid(
                "the federation's target_modules are all-linear, and the model has no linear layer beside its head; "
                f"what can be adapted is {listed(_adaptable(model, modules))}"
            )
        yield from linear
        return
    found = {target: [n for n in modules if _ends(n, target)] for target in targets}
    for target, names in found.items():
        if not names:
            raise invalid(
                f"the federation's target_modules name {target!r}, and the model has no such module; what can be "
                f"adapted is {listed(_adaptable(model, modules))}"
            )
    chosen = {name for names in found.values() for name in names}
    yield from (name for name in modules if name in chosen)


def _all_linear(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return (name for name, module in modules.items() if isinstance(module, LINEAR) and module is not output)


def _adaptable(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Counts by the last part of linear layers' names, and by the shortest ends of convolutions' names that name no
    layer that cannot be adapted.
    """
    others = [name for name, module in modules.items() if obstacle(module)]
    counts: Counter[str] = Counter(name.rpartition(".")[2] for name in _all_linear(model, modules))
    for name, module in modules.items():
        if is_convolution(module):
            ends = (end for end in _ends_of(name) if not any(_ends(other, end) for other in others))
            counts[next(ends, name)] += 1
    return dict(counts)


def _ends_of(name: str) -> Iterator[str]:
    """The last part of a name, its last two parts, and so on."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in reversed(range(len(parts))))


def _saved(model: PreTrainedModel, modules: Mapping[str, nn.Module], names: Sequence[str]) -> Iterator[str]:
    tied = _tied(model)
    for wanted in names:
        found = [name for name in modules if name and _ends(name, wanted)]
        if not found:
            raise invalid(
                f"the federation's modules_to_save name {wanted!r}, and the model has no such module, or trains it "
                "whole already"
            )
        for name in found:
            parameters = list(modules[name].parameters())
            if not parameters:
                raise invalid(f"the federation's modules_to_save name {name}, which has nothing to train")
            if any(keeps_statistics(module) for module in modules[name].modules()):
                raise invalid(
                    f"the federation's modules_to_save name {name}, which normalizes batches by running statistics; "
                    "these stay as they are in the base model, and so does what scales them: leave it out"
                )
            if any(id(parameter) in tied for parameter in parameters):
                raise invalid(
                    f"the federation's modules_to_save name {name}, whose weights another module of this model shares: "
                    "leave it out, or take a model whose embeddings are not tied"
                )
            yield name


def _tied(model: nn.Module) -> frozenset[int]:
    """Parameters that lie in more than one module."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return frozenset(shared)


def _ends(name: str, suffix: str) -> bool:
    return f".{name}".endswith(f".{suffix}")


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def _matching(names: Sequence[str], pattern: str) -> Iterator[str]:
    """Those that match whole. A pattern is a stranger's: it may take no more than its time."""
    try:
        compiled = regex.compile(pattern)
        for name in names:
            if compiled.fullmatch(name, timeout=_PATTERN_S / len(names)):
                yield name
    except TimeoutError as error:
        raise invalid(
            f"the federation's target_pattern {quoted(pattern)} takes too long to match: ask for a simpler one"
        ) from error
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise invalid(f"the federation's target_pattern {quoted(pattern)} is none: {error}") from error
