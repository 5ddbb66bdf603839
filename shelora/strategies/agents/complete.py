"""`complete`, the secret half: sketches and tensors into values of a sum, and the mean of a cohort out of it.

What it needs of a round beside the epoch's secret comes from the committee's protocol: `AgentContext.summand`, under
which this client encrypts its one update, and `AgentContext.opened`, with which agents open the sum.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from shelora.errors import DomainError, Reason
from shelora.lora import figures
from shelora.lora.layout import Layout, Matrix, Tensor
from shelora.lora.noise import Allowance, ClientNoise, limited
from shelora.lora.protect import checked_tensor
from shelora.lora.restore import Restored
from shelora.lora.shards import MIN_CONTRIBUTORS, Float32, Float64, ResultShardContent, UpdateShardContent
from shelora.lora.sketches import (
    ExponentRange,
    Sketch,
    Sketcher,
    best_cut,
    bound_of,
    flat,
    joined,
    next_exponents,
    packed,
    parted,
    unpacked,
)
from shelora.lora.sums import SKETCHES_KIND, SUMS_KIND, sketch_values, terms_of, update_of
from shelora.negotiation.plan import Plan
from shelora.strategies import complete
from shelora.strategies.agents.port import (
    Adapted,
    AgentContext,
    OpenedSum,
    Summand,
    Update,
    check_model,
    require_layout,
)
from shelora.strategies.port import RoundTerms, Terms


@dataclass(frozen=True)
class CompleteAgent:
    """The secret half of a public one."""

    public: complete.Complete = complete.STRATEGY

    @property
    def name(self) -> str:
        """That of the public half."""
        return self.public.name

    def check(self, layout: Layout, model: Adapted, terms: Terms, plan: Plan | None, budget: float) -> None:
        """As of `AgentStrategy`: the layout is the one that this client would make."""
        check_model(layout, model)
        require_layout(
            model.rank <= layout.max_rank,
            f"its largest rank is {layout.max_rank}, this client's is {model.rank}",
        )
        require_layout(layout.sums is not None, "it has no terms of sums")
        round_ = RoundTerms(key_id=b"", max_rank=layout.max_rank)
        expected = self.public.layout(model, terms, round_)
        require_layout(layout.digest == expected.digest, "it is not that of this model's encrypted sums")

    def check_result(self, layout: Layout, model: Adapted) -> None:
        """As of `AgentStrategy`."""
        check_model(layout, model)
        require_layout(layout.sums is not None, "it has no terms of sums")

    def protect(self, layout: Layout, update: Update, context: AgentContext) -> Iterator[UpdateShardContent]:
        """As of `AgentStrategy`. One summand encrypts one update; a second time it fails with SECRET_UNAVAILABLE."""
        summand = context.summand
        if summand is None:
            raise DomainError(Reason.SECRET_UNAVAILABLE, "there is no key for this round's update")
        if terms_of(layout).noise is not None:
            yield from self._protected_noisily(layout, update, context, summand)
            return
        pack = {SKETCHES_KIND.name: _packed_matrices, SUMS_KIND.name: _packed_tensors}
        for index, shard in enumerate(layout.shards):
            values = pack[shard.kind](layout, index, update, context)
            if _tells(layout, index):
                values = np.concatenate([values, figures.packed(context.figures)])
            yield update_of(index, summand.encryption.encrypt(summand.share * values))

    def _protected_noisily(
        self, layout: Layout, update: Update, context: AgentContext, summand: Summand
    ) -> Iterator[UpdateShardContent]:
        """The shards of an update that noise hides, as `shelora.lora.noise` says. Sketches are made twice."""
        terms, noise, reference = terms_of(layout), terms_of(layout).noise, context.reference
        if noise is None or reference is None or summand.share != 1:
            raise DomainError(Reason.SECRET_UNAVAILABLE, "noise takes the round's start and equal weights")
        grid = noise.grid(terms.additive, summand.most_contributors)
        norm = self.norm(layout, update, context)
        factor, allowance = grid.factor(norm), Allowance(grid)
        for index in range(len(layout.shards)):
            start = _natural(layout, index, reference, context)
            change = np.zeros(len(start), dtype=np.int64)
            if math.isfinite(
                norm
            ):  # else it changes nothing, and is sent all the same: its absence would tell
                change = grid.change(_natural(layout, index, update, context) - start, factor)
            allowance.take(change)
            added = context.draws(grid.deviation, len(start))
            yield update_of(index, summand.encryption.encrypt(grid.values(start, noise.bound, change, added)))

    def norm(self, layout: Layout, update: Update, context: AgentContext) -> float:
        """What client privacy clips: the norm of what an update changes, in values as they are."""
        shards = range(len(layout.shards))
        return math.sqrt(sum(float(np.sum(_difference(layout, i, update, context) ** 2)) for i in shards))

    def restored(
        self, layout: Layout, results: Iterable[ResultShardContent], context: AgentContext
    ) -> Iterator[Restored]:
        """As of `AgentStrategy`: every matrix cut to the largest rank of the round, with the bounds of the next one."""
        opened = context.opened
        if opened is None:
            raise DomainError(Reason.SECRET_UNAVAILABLE, "the sum was not opened")
        restore = {SKETCHES_KIND.name: _restored_matrices, SUMS_KIND.name: _restored_tensors}
        noise = terms_of(layout).noise
        for content in results:
            if content.contributor_count < MIN_CONTRIBUTORS:
                raise DomainError(Reason.TOO_FEW_CONTRIBUTORS, "a sum of one update is not opened")
            values = _mean(layout, content, opened)
            if noise is not None:
                yield from _restored_noisily(layout, content.shard, values, opened, context, noise)
                continue
            yield from restore[layout.shards[content.shard].kind](
                layout, content.shard, values, opened, context
            )
            if _tells(layout, content.shard):
                told = values[-figures.COUNT :]
                context.means.append(figures.means(told, noise=opened.noise, most=1 / opened.shares))


def _tells(layout: Layout, index: int) -> bool:
    """Whether a shard ends with what clients tell of their examples."""
    return terms_of(layout).figures and index == len(layout.shards) - 1


def _packed_matrices(layout: Layout, index: int, update: Update, context: AgentContext) -> Float64:
    terms, parts = terms_of(layout), []
    for matrix in (layout.matrices[i] for i in layout.shards[index].matrices):
        sketcher = Sketcher.draw(context.obfuscation, terms, matrix, context.round_number)
        sketch = _sketched(sketcher, matrix, update, context)
        exponents = _possible(layout, matrix, context).exponents(update.exponents.get(matrix.name))
        parts.append(packed(matrix.name, sketch, exponents, context.clipping))
    return np.concatenate(parts)


def _sketched(sketcher: Sketcher, matrix: Matrix, update: Update, context: AgentContext) -> Sketch:
    factors = update.factors.get(matrix.name)
    shapes = (matrix.out_features, context.model.rank), (context.model.rank, matrix.in_features)
    if factors is None or (factors.B.shape, factors.A.shape) != shapes:
        raise DomainError(
            Reason.SHAPE_MISMATCH, f"the update has no factors of the right shape for {matrix.name}"
        )
    return sketcher.sketch(*joined(factors, context.model.scaling, update.frozen.get(matrix.name)))


def _packed_tensors(layout: Layout, index: int, update: Update, context: AgentContext) -> Float64:
    tensors = [layout.tensors[i] for i in layout.shards[index].tensors]
    return np.concatenate([_over_bound(t, update.tensors.get(t.name)) for t in tensors])


def _over_bound(tensor: Tensor, value: Float32 | None) -> Float64:
    # A value at the bound may pass it by the rounding of float32.
    return np.clip(checked_tensor(tensor, value).ravel().astype(np.float64) / tensor.bound, -1, 1)


def _restored_matrices(
    layout: Layout, index: int, values: Float64, opened: OpenedSum, context: AgentContext
) -> Iterator[Restored]:
    terms, first = terms_of(layout), 0
    for matrix in (layout.matrices[i] for i in layout.shards[index].matrices):
        count = sketch_values(terms, matrix)
        possible = _possible(layout, matrix, context)
        sketch, exponents = unpacked(matrix, terms, values[first : first + count], possible)
        first += count
        sketcher = Sketcher.draw(context.obfuscation, terms, matrix, context.round_number)
        noise = (opened.noise * bound_of(e) for e in (exponents.P, exponents.N))
        found = sketcher.recovered(sketch, *noise)
        yield Restored(
            matrices={matrix.name: best_cut(found, layout.max_rank)},
            exponents={matrix.name: next_exponents(sketch, exponents)},
            summed=True,
            contributors=opened.contributors,
            own_share=opened.own_share,
        )


def _restored_tensors(
    layout: Layout, index: int, values: Float64, opened: OpenedSum, _: AgentContext
) -> Iterator[Restored]:
    first, tensors = 0, {}
    for tensor in (layout.tensors[i] for i in layout.shards[index].tensors):
        part = np.clip(values[first : first + tensor.size], -1, 1) * tensor.bound
        tensors[tensor.name] = part.astype(np.float32).reshape(tensor.shape)
        first += tensor.size
    largest = max(layout.tensors[i].bound for i in layout.shards[index].tensors)
    yield Restored(
        tensors=tensors,
        summed=True,
        contributors=opened.contributors,
        own_share=opened.own_share,
        tensor_noise=opened.noise * largest,
    )


def _possible(layout: Layout, matrix: Matrix, context: AgentContext) -> ExponentRange:
    return ExponentRange.of(matrix, layout.max_rank, context.largest_move, context.round_number)


def _difference(layout: Layout, index: int, update: Update, context: AgentContext) -> Float64:
    assert context.reference is not None
    return _natural(layout, index, update, context) - _natural(layout, index, context.reference, context)


def _natural(layout: Layout, index: int, update: Update, context: AgentContext) -> Float64:
    """The values of a shard as they are, of an update or of what it was trained from."""
    terms, shard, parts = terms_of(layout), layout.shards[index], []
    for matrix in (layout.matrices[i] for i in shard.matrices):
        sketcher = Sketcher.draw(context.obfuscation, terms, matrix, context.round_number)
        parts.append(flat(_sketched(sketcher, matrix, update, context)))
    for tensor in (layout.tensors[i] for i in shard.tensors):
        value = update.tensors.get(tensor.name)
        if value is None or value.shape != tensor.shape:
            raise DomainError(Reason.SHAPE_MISMATCH, f"the update has no {tensor.name} of the right shape")
        parts.append(value.ravel().astype(np.float64))
    return np.concatenate(parts)


def _restored_noisily(
    layout: Layout,
    index: int,
    means: Float64,
    opened: OpenedSum,
    context: AgentContext,
    noise: ClientNoise,
) -> Iterator[Restored]:
    """What a shard's sum of hidden updates holds; nothing of it is asked beside this client's own update."""
    terms, shard = terms_of(layout), layout.shards[index]
    grid = noise.grid(terms.additive, opened.most_contributors)
    deviation = math.hypot(opened.noise * grid.span, grid.mean_deviation(opened.contributors))
    values, first = means * grid.span, 0
    if context.reference is not None:
        start = _natural(layout, index, context.reference, context)
        values, cut = limited(values, start, noise, deviation)
        names = [layout.matrices[i].name for i in shard.matrices] or [
            layout.tensors[i].name for i in shard.tensors
        ]
        context.cut.update(names[:1] if cut else ())
    for matrix in (layout.matrices[i] for i in shard.matrices):
        sketch = parted(matrix, terms, values[first : first + sketch_values(terms, matrix)])
        first += sketch_values(terms, matrix)
        sketcher = Sketcher.draw(context.obfuscation, terms, matrix, context.round_number)
        found = best_cut(sketcher.recovered(sketch, deviation, deviation), layout.max_rank)
        yield Restored(matrices={matrix.name: found}, summed=True, noisy=True)
    tensors = {}
    for tensor in (layout.tensors[i] for i in shard.tensors):
        part = np.clip(values[first : first + tensor.size], -noise.bound, noise.bound)
        tensors[tensor.name] = part.astype(np.float32).reshape(tensor.shape)
        first += tensor.size
    if tensors:
        yield Restored(tensors=tensors, summed=True, noisy=True)


def _mean(layout: Layout, content: ResultShardContent, opened: OpenedSum) -> Float64:
    kind = {k.name: k for k in (SKETCHES_KIND, SUMS_KIND)}[layout.shards[content.shard].kind]
    sums = opened.opener.open(content.ciphertexts, kind.shape(layout, content.shard))
    return sums / opened.shares


COMPLETE: Final = CompleteAgent()
