"""What a server may ask of an update, and how the update is made: checked, ordered, encrypted, spooled."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from client_agent.keys import EpochSecrets
from client_agent.learning import LocalModel, Weights
from client_agent.metrics import timed
from client_agent.progress import Activity
from client_agent.state import AgentState, Spool, UpdateNote
from shelora.ckks.wire import KEY_ID_BYTES
from shelora.committee.dealer import Dealer
from shelora.committee.reader import OpenedRound
from shelora.federation import ProtectionSpec
from shelora.lora.codec import encode_update
from shelora.lora.layout import Layout, tiers_reaching
from shelora.negotiation.plan import Plan
from shelora.negotiation.votes import vote_layout
from shelora.protocol import Stage
from shelora.strategies.agents.port import (
    AgentContext,
    AgentStrategy,
    OpenedSum,
    Summand,
    mean_noise,
    require_layout,
)
from shelora.strategies.port import RoundTerms

_log = structlog.get_logger(__name__)


def expected_layout(
    model: LocalModel, budget: float, protection: ProtectionSpec, max_rank: int = 0
) -> Layout:
    """The layout of this client's updates if it were alone; the plan may spread its budget otherwise over matrices.

    Args: max_rank: Largest rank of a client; 0 for its own.
    """
    strategy = protection.strategy
    tiers = (budget,) if strategy.needs_plan and budget else ()
    round_ = RoundTerms(
        key_id=bytes(KEY_ID_BYTES) if strategy.needs_keys else b"",
        tiers=tiers,
        tier_columns=[tuple(round(m.in_features * tier) for tier in tiers) for m in model.matrices],
        max_rank=max_rank or model.rank,
    )
    return strategy.layout(model, protection, round_)


def check_vote_layout(layout: Layout, model: LocalModel, protection: ProtectionSpec) -> None:
    """Raises: DomainError LAYOUT_MISMATCH unless the layout is that of this model's encrypted votes."""
    expected = vote_layout(model.matrices, protection.parameters, layout.key_id)
    require_layout(layout.digest == expected.digest, "it is not that of this model's encrypted votes")


def round_context(
    model: LocalModel, layout: Layout, plan: Plan | None, budget: float, secrets: EpochSecrets
) -> AgentContext:
    """What a strategy may use of a round under that layout.

    Raises: SECRET_UNAVAILABLE for another epoch's; PROTECTION_REFUSED if its tiers do not reach the budget.
    """
    return AgentContext(
        model=model,
        obfuscation=secrets.obfuscation,
        encryptor=secrets.encryptor_for(layout),
        decryptor=secrets.decryptor_for(layout),
        plan=plan,
        encrypted_tiers=tiers_reaching(layout.tiers, budget) if layout.tiers else 0,
    )


def summing(known: AgentContext, dealer: Dealer, weight: int, largest_move: float) -> AgentContext:
    """What a strategy may use of a round whose sum a committee opens, for this client's one update in it.

    Args: weight: 1 to the round's largest. largest_move: How far local training can move one value at most.
    """
    context = dealer.context
    summand = Summand(
        encryption=dealer.encryption,
        share=weight / context.most_weight,
        most_contributors=context.most_contributors,
    )
    return replace(known, round_number=context.round_number, largest_move=largest_move, summand=summand)


def summed(
    known: AgentContext, opened: OpenedRound, largest_move: float, own_weight: int = 0
) -> AgentContext:
    """What a strategy may use of a result whose sum a committee opened.

    Args: largest_move: as of `summing`. own_weight: that this client's update was to have; 0 if it is not in the sum.
    """
    context, contributors = opened.context, len(opened.contributors)
    shares = opened.total_weight / context.most_weight
    noise = mean_noise(context.parameters, contributors, context.most_contributors, shares)
    opener = opened.sum_opener()
    return replace(
        known,
        round_number=context.round_number,
        largest_move=largest_move,
        opened=OpenedSum(
            opener=opener,
            shares=shares,
            noise=noise,
            contributors=contributors,
            own_share=min(own_weight, context.most_weight) / opened.total_weight,
            most_contributors=context.most_contributors,
        ),
    )


def spool_update(
    state: AgentState,
    layout: Layout,
    weights: Weights,
    note: UpdateNote,
    *,
    strategy: AgentStrategy,
    context: AgentContext,
    activity: Activity,
    deal: Callable[[Sequence[bytes]], bytes] | None = None,
) -> Spool:
    """Protects an update shard by shard and spools it.

    Its note's `encrypt_s` is replaced by the seconds this takes. `deal` shares the update's key among a committee,
    given the SHA-256 of its shards; None without one.

    Raises: Stopped; DomainError VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE, SHAPE_MISMATCH.
    """
    writer = state.begin_spool(note.round_id)
    with timed(Stage.ENCRYPTING) as watch:
        for done, content in enumerate(strategy.protect(layout, weights, context)):
            activity.report(Stage.ENCRYPTING, done / len(layout.shards))
            writer.add(encode_update(layout, content))
        if deal is not None:
            writer.deal(deal([digest.sha256 for digest in writer.digests]))
    if context.clipping.clipped:
        _log.warning(
            "values_clipped",
            clipped=context.clipping.clipped,
            of=context.clipping.values,
            matrices=sorted(context.clipping.matrices),
        )
    return writer.finish(replace(note, encrypt_s=watch.seconds))
