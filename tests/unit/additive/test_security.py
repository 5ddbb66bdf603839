"""The figures of docs/additive.md are those of tools/lattice.py, and the profiles are as secure as they say."""

import math
import re
from pathlib import Path

import pytest

from shelora.additive import PROFILES, STANDARD
from tools.lattice import DEGREE, LOG_Q, ROWS, Lwe, conditional, estimate, reduced

TEXT = (Path(__file__).parents[3] / "docs/additive.md").read_text(encoding="utf-8")
ROW = re.compile(r"\| [^|\n]* \| (\d+) \| (\d+) \| (\d+) \|$", re.MULTILINE)


def test_the_documents_table_is_what_the_script_finds():
    found = [estimate(lwe) for lwe in ROWS]
    stated = [tuple(map(int, match.groups())) for match in ROW.finditer(TEXT)]
    assert stated == [(e.beta, round(e.core_svp), round(e.bdgl)) for e in found]


@pytest.mark.parametrize("parameters", [p for p in PROFILES.values() if p.secure], ids=lambda p: p.name)
def test_a_profile_keeps_128_bits_when_the_sum_of_two_secrets_is_known(parameters):
    assert (parameters.degree, parameters.modulus_bits) == (DEGREE, LOG_Q)
    for deviation in (reduced(parameters.deviation), conditional(parameters.deviation)):
        assert (
            estimate(Lwe(label="", secret_deviation=deviation, error_deviation=deviation)).bdgl >= 128 + 8
        )  # the estimator's best attack is 5 bits better


def test_the_reduction_holds_at_the_deviation_that_is_left():
    """Its second condition: the deviation is large enough for 2N coordinates to be smooth up to 2^-128."""
    least = math.sqrt((math.log(4 * STANDARD.degree) + 128 * math.log(2)) / math.pi**2)
    assert 3.1 < least <= reduced(STANDARD.deviation)


def test_ternary_secrets_would_not_do():
    assert estimate(ROWS[-1]).bdgl < 100
