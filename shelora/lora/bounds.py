"""How far a reconstructed update may lie from sum_i w_i s_i B_i A_i.

Notation: B* the columns w_i s_i B_i of all clients side by side, A* the rows of all A_i, ΔW = B* A* = Q M with
M = R A* in exact arithmetic; u = 2^-24 the rounding unit of float32; ^ marks what an agent holds. The error is

    Q^ M^ - ΔW  =  (Q^ - Q) M^  +  Q (M^ - M)  +  (Q M - B* A*)                                        (1)

Rounding to float32. Q and the clear columns of M travel as float32: |Q^ - Q| <= u |Q| and |M^ - M| <= u |M|, entry
by entry, up to half the smallest subnormal, 2^-150.

Ciphertexts. Slots of row t hold M[t] 2^e, with e the largest integer for which |R_t|_1 2^e <= 1/2. With the error
of a slot at most E (`shelora.ckks.bounds`),

    |M^ - M| <= 2^-e E < 4 |R_t|_1 E                                                                   (2)

so the error of a row is in proportion to the weights that meet in it, whatever their size.

Float64. QR and the products are computed in float64 and entries of R below NEGLIGIBLE = 2^-46 of their column are
dropped, as are directions below 2^-46 of the largest. A column of B* is therefore met to sqrt(q) 2^-46 of its norm,
and what dropped directions held is at most sqrt(q) 2^-46 of the norm of B*. For q up to 1024 both are 2^-41, so

    |Q M - B* A*| <= 2^-40 |B*|_F sum_j max|A*_j|                                                      (3)

With max_directions below the rank of B*, Q M is the projection of ΔW onto Q instead, and (3) is about that.

Tensors. Slots hold the average times SUM_LIMIT / bound, so an encrypted one is off by at most

    E bound / SUM_LIMIT + u bound + u |mean|                                                     (4)

with u bound for a value at the bound that float32 rounded up, and u |mean| for the result's own rounding.
"""

from collections.abc import Sequence

import numpy as np

from shelora.ckks.bounds import accumulated_error_bound
from shelora.ckks.parameters import SUM_LIMIT
from shelora.lora.layout import Layout, Tensor
from shelora.lora.shards import FactoredUpdate, Float64

FLOAT32_UNIT = 2.0**-24
"""Relative error of rounding to float32."""
FLOAT32_SUBNORMAL = 2.0**-150
"""Absolute error of rounding to float32 near zero."""
FLOAT64_ERROR = 2.0**-40
"""Relative error of the factorization, equation (3)."""


def encrypted_row_errors(
    layout: Layout, row_exponents: Sequence[int], terms: int, *, worst_case_rounding: bool = False
) -> Float64:
    """Bound on |M^ - M| in the encrypted columns of every row, equation (2), [q].

    Args:
        layout: Layout of the round.
        row_exponents: Those of the result.
        terms: Sum of the ranks of the clients.
        worst_case_rounding: Without the heuristic for rounded weights; see `accumulated_error_bound`.
    """
    slot = accumulated_error_bound(
        layout.ckks, terms=terms, scalar=False, worst_case_rounding=worst_case_rounding
    )
    return slot * np.exp2(-np.array(row_exponents, dtype=np.float64))


def update_error_bound(update: FactoredUpdate, row_errors: Float64, B: Float64, A: Float64) -> Float64:
    """Bound on every entry of |Q^ M^ - ΔW|, equation (1), [out, in].

    Args:
        update: What the agent reconstructed.
        row_errors: `encrypted_row_errors`; zeros where nothing is encrypted. [q]
        B: B*, the stacked w_i s_i B_i. [out, sum of ranks]
        A: A*, the stacked A_i. [sum of ranks, in]
    """
    Q, M = np.abs(update.Q) + FLOAT32_SUBNORMAL, np.abs(update.M)
    row_error = row_errors[:, None] + FLOAT32_UNIT * (1 + FLOAT32_UNIT) * M + FLOAT32_SUBNORMAL
    factorization = FLOAT64_ERROR * np.linalg.norm(B) * np.abs(A).max(axis=1).sum()
    rounded_Q = FLOAT32_UNIT * (1 + FLOAT32_UNIT) * Q
    bound: Float64 = rounded_Q @ (M + row_error) + Q @ row_error + factorization
    return bound


def tensor_error_bound(layout: Layout, tensor: Tensor, clients: int) -> float:
    """Bound on the error of every entry of an averaged tensor, equation (4)."""
    slot = accumulated_error_bound(layout.ckks, terms=clients, scalar=True) if layout.encrypt_tensors else 0.0
    return slot * tensor.bound / SUM_LIMIT + 2 * FLOAT32_UNIT * tensor.bound + FLOAT32_SUBNORMAL
