"""The table of sizes in docs/committee.md is that of the code."""

import math
import re
from pathlib import Path

import pytest

from shelora.committee.dealing import COMBINATIONS
from shelora.committee.field import PRIME
from shelora.committee.rules import committee_rule

TEXT = (Path(__file__).parents[3] / "docs/committee.md").read_text(encoding="utf-8")
ROW = re.compile(r"\| (?:from )?(\d+)[^|]*\| (\d+), (\d+), (\d+) \|([^\n]*)\|")


def rows():
    return [
        (int(m[1]), tuple(map(int, m.group(2, 3, 4))), re.findall(r"\d+", m[5])) for m in ROW.finditer(TEXT)
    ]


@pytest.mark.parametrize(("cohort", "numbers", "columns"), rows())
def test_a_row_of_the_table_is_what_the_rule_says(cohort, numbers, columns):
    rule = committee_rule(cohort)
    assert (rule.size, rule.threshold, rule.packing) == numbers
    expected = (
        rule.threshold,
        rule.needed,
        rule.quorum,
        rule.size - rule.quorum,
        rule.size - rule.needed,
        (rule.size - rule.needed) // 2,
    )
    assert tuple(map(int, columns)) == expected


def test_the_table_has_every_rule():
    assert {numbers for _, numbers, _ in rows()} == {
        (rule.size, rule.threshold, rule.packing) for rule in map(committee_rule, (2, 3, 4, 5, 7, 32, 256))
    }


def test_the_stated_chance_of_bad_shares_is_that_of_the_rules():
    """Choices of honest members that accept, times the chance that one choice of bad shares fits all combinations."""
    bits = {
        rule.size: math.log2(math.comb(rule.size - rule.threshold, rule.needed + 1) or 1)
        - COMBINATIONS * math.log2(PRIME)
        for rule in map(committee_rule, (2, 3, 4, 5, 7, 32, 256))
    }
    largest = bits.pop(64)
    assert -109 < largest <= -108
    assert max(bits.values()) <= -124
    assert "2^-108 for the largest committee, 2^-124 and less for the others" in TEXT
