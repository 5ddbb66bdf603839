"""What a server may ask of an update, and how the update is made: checked, ordered, encrypted, spooled."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import structlog
from numpy.typing import NDArray

from client_agent.keys import EpochSecrets
from client_agent.learning import LocalModel, Weights
from client_agent.metrics import timed
from client_agent.progress import Activity
from client_agent.state import AgentState, Spool, UpdateNote
from shelora.ckks.wire import KEY_ID_BYTES
from shelora.errors import DomainError, Reason
from shelora.federation import ProtectionSpec
from shelora.lora.codec import encode_update
from shelora.lora.layout import Layout, build_layout, tiers_within
from shelora.lora.protect import protect
from shelora.negotiation.plan import Plan, check_layout, column_orders
from shelora.negotiation.votes import vote_layout
from shelora.protocol import Stage

_log = structlog.get_logger(__name__)


def expected_layout(model: LocalModel, budget: float, protection: ProtectionSpec) -> Layout:
    """The layout of this client's updates if it were alone; the plan may spread its budget otherwise over matrices."""
    selective = protection.mode == "selective"
    tiers = (budget,) if selective and budget else ()
    return build_layout(
        parameters=protection.parameters,
        key_id=bytes(KEY_ID_BYTES),
        matrices=[
            replace(m, tier_columns=tuple(round(m.in_features * t) for t in tiers)) for m in model.matrices
        ],
        tensors=model.tensors,
        tiers=tiers,
        encrypt_tensors=selective,
        max_rank=model.rank,
        max_directions=protection.max_directions,
    )


def check_vote_layout(layout: Layout, model: LocalModel, protection: ProtectionSpec) -> None:
    """Raises: DomainError LAYOUT_MISMATCH unless the layout is that of this model's encrypted votes."""
    expected = vote_layout(model.matrices, protection.parameters, layout.key_id)
    _expect(layout.digest == expected.digest, "it is not that of this model's encrypted votes")


def check_model(layout: Layout, model: LocalModel) -> None:
    """Raises: DomainError LAYOUT_MISMATCH unless matrices and tensors are the model's."""
    _expect(
        tuple(replace(m, tier_columns=()) for m in layout.matrices) == model.matrices, "it has other matrices"
    )
    asked = [(t.name, t.shape) for t in layout.tensors]
    _expect(asked == [(t.name, t.shape) for t in model.tensors], "it has other tensors")


def check_train_layout(
    layout: Layout, model: LocalModel, protection: ProtectionSpec, plan: Plan | None, budget: float
) -> None:
    """Refuses a layout that is of another model, or that protects less than the federation promised.

    Raises: DomainError LAYOUT_MISMATCH; PLAN_REFUSED if its column counts are not the plan's.
    """
    check_model(layout, model)
    _expect(
        all(t.bound == protection.tensor_bound for t in layout.tensors), "it has another bound of tensors"
    )
    _expect(
        model.rank <= layout.max_rank, f"its largest rank is {layout.max_rank}, this client's is {model.rank}"
    )
    _expect((plan is None) == (not layout.tiers), "it has tiers without a plan, or a plan without tiers")
    if plan is not None:
        check_layout(plan, layout.matrices)
    if protection.mode == "selective":
        _expect(layout.encrypt_tensors, "it asks for tensors in the clear")
        _expect(bool(layout.tiers) or not budget, "it has no columns to encrypt")
        _expect(layout.parameters == protection.parameters, "it names another CKKS profile")


def encrypted_tiers(layout: Layout, budget: float) -> int:
    """Tiers that this client encrypts. Warns if they cover less than its budget."""
    count = tiers_within(layout.tiers, budget)
    share = layout.tiers[count - 1] if count else 0.0
    if layout.tiers and share < budget:
        _log.warning("encrypts_less_than_budget", budget=budget, share=share, tiers=list(layout.tiers))
    return count


def orders_of(layout: Layout, plan: Plan | None, secrets: EpochSecrets) -> Mapping[str, NDArray[np.int64]]:
    """Column order by matrix; the true order only under protection "none"."""
    return column_orders(plan, layout.matrices, secrets.obfuscation if secrets.secret else None)


def spool_update(
    state: AgentState,
    layout: Layout,
    weights: Weights,
    note: UpdateNote,
    *,
    budget: float,
    plan: Plan | None,
    secrets: EpochSecrets,
    activity: Activity,
) -> Spool:
    """Protects an update shard by shard and spools it.

    Args: note: Its `encrypt_s` is replaced by the seconds this takes.
    Raises: Stopped; DomainError VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE, SHAPE_MISMATCH.
    """
    contents = protect(
        layout,
        weights.factors,
        weights.tensors,
        encrypted_tiers(layout, budget),
        orders_of(layout, plan, secrets),
        secrets.encryptor_for(layout),
    )
    writer = state.begin_spool(note.round_id)
    with timed(Stage.ENCRYPTING) as watch:
        for done, content in enumerate(contents):
            activity.report(Stage.ENCRYPTING, done / len(layout.shards))
            writer.add(encode_update(layout, content))
    return writer.finish(replace(note, encrypt_s=watch.seconds))


def _expect(condition: bool, what: str) -> None:  # noqa: FBT001 - reads as a sentence at the call
    if not condition:
        raise DomainError(Reason.LAYOUT_MISMATCH, f"the layout is refused: {what}")
