"""One name means one thing, and old names for a thing do not come back. The words themselves: docs/glossary.md."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("shelora", "coordinator", "services", "client_agent")
BESIDE = ("attack", "bench", "compare", "examples", "load", "tools")
MOST_BY_POSITION = 3
"""Fields of a dataclass that may be given without their names."""
IN_TWO_SCHEMES = {"SecretKey"}
"""Names that a scheme of encryption has, and the other one, too: `shelora.ckks` and `shelora.additive`."""
REPLACED = {
    r"\bRedisStore\b": "coordinator.store.Store, of parts",
    r"\bservices[./]shell\b": "services.common",
    r"\bclass (Shared|Room|Standing)\b": "SingleFlight, Watermark, PlanFit",
    r"\bstanding\b": "early_stopping",
    r"\bwholly\.begun\b|\bimport begun\b": "services.common.detached",
    r"^MAX_TIERS: Final = 16": "MAX_PLAN_TIERS of a plan; MAX_TIERS bounds what a layout may say",
}
"""Names that were replaced, and by what."""


def sources(packages=PACKAGES) -> list[Path]:
    """Every source of the product that is not generated."""
    found = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
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


def by_position(node: ast.ClassDef) -> int:
    """Fields that a dataclass takes without their names; 0 for other classes."""
    decorators = [ast.unparse(one) for one in node.decorator_list]
    if not any(text.startswith("dataclass") and "kw_only=True" not in text for text in decorators):
        return 0
    fields = [ast.unparse(one.annotation) for one in node.body if isinstance(one, ast.AnnAssign)]
    plain = fields[: fields.index("KW_ONLY")] if "KW_ONLY" in fields else fields
    return sum("ClassVar" not in annotation for annotation in plain)


def test_no_dataclass_takes_more_than_three_fields_by_position():
    classes = {
        f"{path.relative_to(ROOT)}: {node.name}": by_position(node)
        for path in sources((*PACKAGES, *BESIDE))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert [name for name, count in classes.items() if count > MOST_BY_POSITION] == []


@pytest.mark.parametrize(
    ("decorator", "fields", "count"),
    [
        ("@dataclass", "a: int; b: int; c: ClassVar[int] = 1; d: int", 3),
        ("@dataclass(frozen=True)", "a: int; b: int; _: KW_ONLY; c: int; d: int", 2),
        ("@dataclass(frozen=True, kw_only=True)", "a: int; b: int; c: int; d: int", 0),
        ("@final", "a: int; b: int; c: int; d: int", 0),
    ],
)
def test_fields_by_position_are_counted(decorator, fields, count):
    assert by_position(ast.parse(f"{decorator}\nclass A: {fields}").body[0]) == count
