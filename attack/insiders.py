"""What one agent adds to what servers hold: the epoch's secrets, and so every ciphertext under its one key.

Under `selective` all clients share that key, as in the paper: a client that colludes with a server opens every update.
The same client alone, a fellow member, sees the decrypted sum and takes its own part out of it.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from attack.capture import Round
from attack.opened import clear_parts, normalization
from attack.stage import Client, Performance
from client_agent.config import AgentConfig
from client_agent.keys import EpochSecrets
from client_agent.session import Session
from client_agent.state import AgentState
from shelora.additive.noise import noise_sampler
from shelora.additive.parameters import DEFAULT
from shelora.additive.sampler import Csprng
from shelora.ckks.wire import decode_block
from shelora.errors import DomainError, Reason
from shelora.lora.codec import parse_update
from shelora.lora.kinds import kind_of
from shelora.lora.layout import Layout, Matrix, SumTerms
from shelora.lora.noise import ClientNoise
from shelora.lora.shards import Float64
from shelora.lora.sketches import Sketcher, flat, joined, parted, sketch_sizes
from shelora.lora.slots import Slotted
from shelora.negotiation.plan import column_orders
from shelora.obfuscation import SECRET_BYTES, Obfuscation

Matrixwise: TypeAlias = tuple[Float64, Float64]
"""The s B and A of one matrix."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """One matrix of one update, opened: what was trained is scaling * B A."""

    B: Float64
    A: Float64


def secrets_of(performance: Performance, client: str) -> EpochSecrets:
    """What the key authority gave a client, fetched again with its certificate."""

    async def fetch() -> EpochSecrets:
        home = performance.homes / client
        config = AgentConfig.load(home / "agent.yaml", {})
        session = Session(config, config.credentials())
        try:
            return await session.secrets(1)
        finally:
            await session.close()

    if performance.scene.mode == "none":
        return EpochSecrets.unprotected(performance.scene.name, 1)
    return asyncio.run(fetch())


def opened_update(round_: Round, client: str, secrets: EpochSecrets) -> dict[str, Factors]:
    """A client's factors, with the secrets of any client; of budgets that encrypt all columns or none.

    Those are in one tier, so that their secret order needs no plan.
    """
    layout = round_.layout
    clear = clear_parts(round_, client)
    orders = column_orders(None, layout.matrices, secrets.obfuscation if secrets.secret else None)
    found: dict[str, Factors] = {}
    for index, content in sorted(round_.of(client).items()):
        parsed, shard = parse_update(layout, index, content), layout.shards[index]
        kind = kind_of(shard)
        if not shard.matrices or not isinstance(kind, Slotted):
            continue
        shape = kind.update_block_shape(layout, parsed)
        rows = np.zeros((parsed.rank, 0))
        if shape is not None and secrets.decryptor is not None:
            block = decode_block(parsed.ciphertexts, shape)
            rows = secrets.decryptor.decrypt(block, kind.slot_count(layout, shard, parsed.encrypted_tiers))
        for item, matrix in enumerate(layout.matrices[i] for i in shard.matrices):
            hidden = [s for s in kind.segments(layout, shard, parsed.encrypted_tiers) if s.item == item]
            columns = [rows[:, s.slot : s.slot + s.length] for s in hidden]
            ordered = np.hstack([*columns, clear[matrix.name].A])
            A = np.empty_like(ordered)
            A[:, orders[matrix.name]] = ordered
            found[matrix.name] = Factors(B=clear[matrix.name].B, A=A)
    return found


def sum_of_others(performance: Performance, client: Client, names: Iterable[str]) -> dict[str, Float64]:
    """By matrix the sum of the other clients' s B A after one round, from what a client keeps on its disk.

    All have the same weight. What it keeps is the mean, cut to the round's largest rank, and its own update.
    """
    state = AgentState(performance.homes / client.name / "state")
    try:
        saved = state.applied()
    finally:
        state.close()
    if saved is None:
        raise DomainError(Reason.INTERNAL, f"{client.name} kept no result")
    mean, own = saved[1], performance.trained[client.name][0]
    scaling, found = client.alpha / client.rank, {}
    for name in names:
        B, A = joined(mean.factors[name], scaling, mean.frozen.get(name))
        mine = scaling * own.factors[name].B.astype(np.float64) @ own.factors[name].A.astype(np.float64)
        found[name] = len(performance.scene.clients) * B @ A - mine
    return found


def hidden_sum(
    updates: Sequence[Mapping[str, Matrixwise]], layout: Layout, names: Iterable[str], multiplier: float
) -> dict[str, Float64]:
    """What a member sees of a first round's sum under client privacy, its own part and noise taken out.

    Every victim's sketches are clipped together, to the median of their norms, as an operator would choose; each adds
    its noise. Then they are restored with what noise may have made up, which an attacker need not leave out.

    Args:
        updates: Of the victims, s B and A of every matrix.
        layout: That has all these matrices.
        names: Of the matrices asked for.
        multiplier: Deviation of all victims' noise together over the clip.
    """
    rank = max(len(A) for update in updates for _, A in update.values())
    columns, rows = sketch_sizes(rank)
    terms = SumTerms(profile=DEFAULT.name, sketch_columns=columns, sketch_rows=rows)
    shapes = {m.name: Matrix(m.name, m.out_features, m.in_features) for m in layout.matrices}
    known = Obfuscation(bytes(SECRET_BYTES), 1)  # any secret: a member knows its epoch's
    drawn = {name: Sketcher.draw(known, terms, shape, 1) for name, shape in shapes.items()}
    flats = [{name: flat(drawn[name].sketch(*update[name])) for name in shapes} for update in updates]
    norms = [float(np.linalg.norm(np.concatenate(list(parts.values())))) for parts in flats]
    clip = float(np.median(norms))
    noise = ClientNoise(bound=clip, clip=clip, multiplier=multiplier, honest=len(updates))
    grid, rng = noise.grid(DEFAULT, len(updates) + 1), Csprng.fresh()
    totals = {name: np.zeros(len(flats[0][name])) for name in shapes}
    for parts, norm in zip(flats, norms, strict=True):
        factor = grid.factor(norm)
        for name, values in parts.items():
            added = noise_sampler(grid.deviation).sample(rng, len(values))
            totals[name] = totals[name] + grid.unit * (grid.change(values, factor) + added)
    found = {}
    for name in names:
        restored = drawn[name].recovered(parted(shapes[name], terms, totals[name]))
        found[name] = restored.Q @ restored.M
    return found


def initial_A(secrets: EpochSecrets, matrix: str, rank: int, columns: int) -> Float64:
    """The A that a client started from."""
    return _values(secrets.obfuscation, matrix, rank, columns)


def normalized_initial_A(secrets: EpochSecrets, matrix: str, rank: int, columns: int) -> Float64:
    """The same, its rows scaled as they travel."""
    A = _values(secrets.obfuscation, matrix, rank, columns)
    return np.asarray(np.ldexp(A, -normalization(A)[:, None]))


def _values(obfuscation: Obfuscation, matrix: str, rank: int, columns: int) -> Float64:
    return obfuscation.initial_A(matrix, rank, columns).astype(np.float64)
