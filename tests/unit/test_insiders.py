"""The table of attacks names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_attack_is_held_by_tests_that_exist() -> None:
    rows = [row for row in (ROOT / "tests/insiders/README.md").read_text().splitlines() if "`tests/" in row]
    assert len(rows) > 20
    for row in rows:
        for file, name in re.findall(r"`(tests/[^`:]+)::([^`]+)`", row):
            assert f"def {name}(" in (ROOT / file).read_text(), row
