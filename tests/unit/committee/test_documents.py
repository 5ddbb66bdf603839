"""The table of sizes in docs/committee.md is that of the code."""

import re
from pathlib import Path

import pytest

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
