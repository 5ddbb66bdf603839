"""What one agent adds to what servers hold: the epoch's secrets, and so every ciphertext under its one key.

Under `selective` all clients share that key, as in the paper: a client that colludes with a server opens every update.
The same client alone, a fellow member, sees the decrypted sum and takes its own part out of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from attack.capture import Round
from attack.opened import clear_parts, normalization
from attack.stage import Performance
from client_agent.keys import EpochSecrets
from shelora.ckks.wire import decode_block
from shelora.lora.codec import parse_update
from shelora.lora.kinds import kind_of
from shelora.lora.shards import Float64
from shelora.lora.sketches import joined
from shelora.lora.slots import Slotted
from shelora.negotiation.plan import column_orders
from shelora.obfuscation import Obfuscation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """One matrix of one update, opened: what was trained is scaling * B A."""

    B: Float64
    A: Float64


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


def sum_of_others(performance: Performance, names: Iterable[str]) -> dict[str, Float64]:
    """By matrix the sum of the other clients' s B A after one round, from what the first client has on its disk.

    All have the same weight. It keeps the mean, cut to the round's largest rank, and has its own update.
    """
    client, insider = performance.scene.clients[0], performance.insider
    scaling, found = client.alpha / client.rank, {}
    for name in names:
        B, A = joined(insider.applied.factors[name], scaling, insider.applied.frozen.get(name))
        own = insider.trained.factors[name]
        mine = scaling * own.B.astype(np.float64) @ own.A.astype(np.float64)
        found[name] = len(performance.scene.clients) * B @ A - mine
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
