"""Writes tests/vectors/additive_golden.json. Run from the repository root:

    python -m tests.vectors.make_additive_vectors

What agents and servers of different releases and machines must agree on, bit by bit: public polynomials, summands,
sums, opened values, contexts, committees, dealings. A change here is a change of the protocol.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from shelora.additive import PROFILES, Adder, ShardShape
from shelora.additive.parameters import AdditiveParameters
from shelora.additive.ring import Multiplier, expand_public
from shelora.additive.sampler import Csprng, gaussian
from shelora.additive.secret import SecretKey, open_sum
from shelora.committee.certificate import ContributorSet
from shelora.committee.context import RoundContext
from shelora.committee.dealer import Dealer
from shelora.committee.dealing import dealing_digest, update_digest
from shelora.committee.keys import KeySet, keys_digest
from shelora.committee.rules import committee_rule
from shelora.committee.sealing import new_exchange_key, seal_answer
from shelora.committee.statements import Signer, StatementKind, signed_bytes
from shelora.obfuscation import Obfuscation
from shelora.transport.certificates import new_key

FILE: Final = Path(__file__).parent / "additive_golden.json"
CONTEXT: Final = bytes(range(32))
SECRET: Final = Obfuscation(bytes(range(32)), 1)
VALUES: Final = 1500


def rng(name: str) -> Csprng:
    return Csprng(hashlib.sha256(name.encode()).digest())


def values(client: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values in [-1, 1] that every machine makes alike."""
    return ((np.arange(VALUES) * (client * 2 + 7)) % 2001 - 1000) / 1000


def summands(parameters: AdditiveParameters) -> tuple[list[bytes], np.ndarray[Any, np.dtype[np.int64]]]:
    """Three clients' shards, and the sum of their secrets."""
    data, total = [], np.zeros(parameters.degree, dtype=np.int64)
    for client in range(3):
        secret = SecretKey.draw(parameters, rng(f"secret {client}"))
        total += secret.coefficients
        data.append(secret.encryption(CONTEXT, 3, rng(f"errors {client}")).encrypt(values(client)))
    return data, total


def scheme(parameters: AdditiveParameters) -> dict[str, Any]:
    data, secret_sum = summands(parameters)
    adder = Adder(ShardShape(parameters, 0, VALUES))
    for shard in data:
        adder.add(shard)
    total = adder.finish()
    opened = open_sum(parameters, secret_sum, CONTEXT, adder.shape, total, 3, 3)
    public = expand_public(parameters, CONTEXT, 3, 1, 1)
    large = Multiplier(parameters, 128 * secret_sum).times(public)  # split into limbs
    return {
        "digest": parameters.digest.hex(),
        "scale": parameters.scale(3),
        "public": public[0, :8].tolist(),
        "public_sha256": _sha(public.astype("<i4").tobytes()),
        "product_sha256": _sha(large.astype("<i8").tobytes()),
        "header": data[0][:52].hex(),
        "summand_sha256": _sha(data[0]),
        "sum_sha256": _sha(total),
        "opened": [float(x).hex() for x in opened[:4]],
        "opened_sha256": _sha(opened.astype("<f8").tobytes()),
    }


def golden_context() -> RoundContext:
    return RoundContext(
        federation_id="clinic",
        instance="00000001",
        round_id="clinic.0.1",
        kind="TRAIN",
        round_number=3,
        attempt=2,
        epoch=1,
        layout_digest=bytes(range(32, 64)),
        parameters=PROFILES["insecure-toy"],
        cohort=tuple(f"ward-{i}" for i in range(8)),
        most_contributors=10,
        rule=committee_rule(8),
        min_updates=3,
        most_weight=1000,
    )


def committee() -> dict[str, Any]:
    context = golden_context()
    members = context.committee(SECRET.committee_key())
    public = [new_exchange_key(rng(f"member {p}")).public_key().public_bytes_raw() for p in range(1, 8)]
    keys = dict(enumerate(public, 1))
    signer = Signer("ward-2", new_key(), b"certificate")
    dealer = Dealer(context, KeySet(keys, keys_digest(context, keys)), signer, rng("dealer"))
    dealt = dealer.deal([bytes(32), bytes(range(32))], 17)
    names = context.cohort[:5]
    chosen = ContributorSet.of(
        context, {name: (hashlib.sha256(name.encode()).digest(), 400) for name in names}
    )
    return {
        "context_digest": context.digest.hex(),
        "committee": list(members.members),
        "order_key": SECRET.committee_key().hex(),
        "answer_key": SECRET.answer_key().hex(),
        "keys_digest": keys_digest(context, keys).hex(),
        "update_digest": update_digest([bytes(32), bytes(range(32))]).hex(),
        "dealing": dealt.dealing.content.hex(),
        "dealing_digest": dealing_digest(dealt.dealing).hex(),
        "share_of_member_3": dealt.shares[2].sealed.hex(),
        "set": chosen.content.hex(),
        "set_digest": chosen.digest.hex(),
        "signed_sha256": _sha(signed_bytes(StatementKind.SET, context, chosen.content)),
        "answer": seal_answer(SECRET.answer_key(), chosen.digest, 3, b"sum of shares", rng("answer")).hex(),
    }


def vectors() -> dict[str, Any]:
    """All of it, as JSON has it."""
    return {
        "gaussian": gaussian(6.4).sample(rng("gaussian"), 16).tolist(),
        "gaussian_table_sha256": _sha(gaussian(6.4).table.astype("<u8").tobytes()),
        "profiles": {name: scheme(parameters) for name, parameters in PROFILES.items()},
        "committee": committee(),
    }


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors(), indent=1) + "\n")
