import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shelora.ckks

FOLDER = Path(shelora.ckks.__file__).parent
SECRET_NAMES = {"SecretKey", "KeyGenerator", "Encryptor", "Decryptor", "PublicKey"}
PURE = {"os": {"seal.py"}, "tenseal": {"seal.py", "evaluator.py", "secret.py"}}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def used(tree):
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name)
    }


def sources():
    return sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("source", [s for s in sources() if s.name != "secret.py"], ids=lambda s: s.name)
def test_only_the_secret_module_can_name_a_key(source):
    tree = ast.parse(source.read_text())
    assert "shelora.ckks.secret" not in set(imported(tree))
    assert not used(tree) & SECRET_NAMES


@pytest.mark.parametrize("source", sources(), ids=lambda s: s.name)
def test_the_operating_system_and_tenseal_stay_in_their_modules(source):
    roots = {name.split(".")[0] for name in imported(ast.parse(source.read_text()))}
    assert not roots & {"pickle", "time", "logging", "random", "grpc", "redis", "torch"}
    for module, allowed in PURE.items():
        assert module not in roots or source.name in allowed


@pytest.mark.parametrize(
    ("module", "absent"),
    [("shelora.ckks", "tenseal"), ("shelora.ckks.evaluator", "shelora.ckks.secret")],
)
def test_importing_one_layer_does_not_load_the_next(module, absent):
    check = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    root = FOLDER.parent.parent
    assert subprocess.run([sys.executable, "-c", check], cwd=root, check=False).returncode == 0
