"""What agents compute of a round, to be compared with other machines: `python -m tests.unit.lora.elsewhere`.

It prints JSON: a SHA-256 of what must be the same to the bit, and entries of the restored product, which need not be.
"""

import hashlib
import json

import numpy as np

from shelora.additive import BALANCED, Adder, ShardShape
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SecretKey, SumOpener
from shelora.lora.layout import Matrix, SumTerms
from shelora.lora.sketches import (
    Clipping,
    ExponentRange,
    Sketcher,
    best_cut,
    next_exponents,
    packed,
    sketch_sizes,
    unpacked,
)
from shelora.obfuscation import Obfuscation

MATRIX, RANK, CLIENTS = Matrix("m", 384, 320), 8, 3
CONTEXT = bytes(range(32))


def figures():
    """By name: `exact`, hexadecimal; `restored`, floats."""
    columns, rows = sketch_sizes(RANK)
    terms = SumTerms(profile=BALANCED.name, sketch_columns=columns, sketch_rows=rows)
    possible = ExponentRange.of(MATRIX, RANK, 0.01, 1)
    sketcher = Sketcher.draw(Obfuscation(bytes(range(32)), 1), terms, MATRIX, 1)
    generator, exact = (
        np.random.default_rng(0),
        hashlib.sha256(sketcher.chi.tobytes() + sketcher.phi.tobytes()),
    )
    adder, secrets = None, []
    for client in range(CLIENTS):
        # Sketches themselves may differ in their last bits: what is compared is what follows from given values.
        B, A = (generator.integers(-8, 9, shape) * 2.0**-12 for shape in ((384, 2), (2, 320)))
        values = np.rint(packed("m", sketcher.sketch(B, A), possible.first, Clipping()) * 2**18) / 2**18
        secret = SecretKey.draw(BALANCED, Csprng(bytes([client]) * 32))
        secrets.append(secret.coefficients)
        summand = secret.encryption(CONTEXT, CLIENTS, Csprng(bytes([client + 9]) * 32)).encrypt(values)
        exact.update(summand)
        adder = adder or Adder(ShardShape(BALANCED, 0, len(values)))
        adder.add(summand)
    total = adder.finish()
    opened = SumOpener(BALANCED, sum(secrets), CONTEXT, CLIENTS, CLIENTS).open(total, adder.shape)
    exact.update(total + opened.tobytes())
    sketch, exponents = unpacked(MATRIX, terms, opened / CLIENTS, possible)
    exact.update(repr((exponents, next_exponents(sketch, exponents))).encode())
    cut = best_cut(sketcher.recovered(sketch, 1e-9, 1e-9), 6)
    return {"exact": exact.hexdigest(), "restored": (cut.Q @ cut.M)[::16, ::16].ravel().tolist()}


if __name__ == "__main__":
    print(json.dumps(figures()))  # noqa: T201 - what it is for
