"""One name means one thing, and old names for a thing do not come back. The words themselves: docs/glossary.md."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("shelora", "coordinator", "services", "client_agent")
IN_TWO_SCHEMES = {"SecretKey"}
"""Names that a scheme of encryption has, and the other one, too: `shelora.ckks` and `shelora.additive`."""
REPLACED = {
    r"\bRedisStore\b": "coordinator.store.Store, of parts",
    r"\bservices[./]shell\b": "services.common",
    r"\bclass (Shared|Room|Standing)\b": "SingleFlight, Watermark, PlanFit",
    r"\bwholly\.begun\b|\bimport begun\b": "services.common.detached",
    r"^MAX_TIERS: Final = 16": "MAX_PLAN_TIERS of a plan; MAX_TIERS bounds what a layout may say",
}
"""Names that were replaced, and by what."""


def sources() -> list[Path]:
    """Every source of the product that is not generated."""
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [path for path in found if path.parent != ROOT / "shelora" / "v1"]


def test_a_public_class_has_a_name_of_its_own():
    homes = defaultdict(list)
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path.relative_to(ROOT)))
    twice = {name: paths for name, paths in homes.items() if len(paths) > 1}
    assert {name: paths for name, paths in twice.items() if name not in IN_TWO_SCHEMES} == {}
    assert twice.keys() >= IN_TWO_SCHEMES, "an exception that is not needed any more"


@pytest.mark.parametrize(("old", "new"), REPLACED.items(), ids=str)
def test_a_replaced_name_does_not_come_back(old, new):
    texts = [*sources(), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
    found = [str(path.relative_to(ROOT)) for path in texts if re.search(old, path.read_text(), re.MULTILINE)]
    assert found == [], f"say {new}"
