"""The malicious worker of `tests/insiders/attack_oracle.py` really crafts what it says, as the product is today."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
ORACLE = ROOT / "tests/insiders/oracle"
SCRIPT = """
import numpy as np
from services.aggregation.worker import Aggregation
from shelora.ckks.secret import Decryptor
from shelora.lora.codec import decode_result
from shelora.lora.kind import Contribution
from shelora.lora.restore import restore
from tests.unit.lora.test_aggregate import cohort_of

cohort, names = cohort_of(ranks=(2, 2, 2), tiers=(1, 1, 1), budgets=(1.0,)), ("bank", "clinic", "sensor")
updates, layout, victim = cohort.updates(), cohort.layout, cohort.members[1]
contributions = [Contribution(name, m.weight, m.scaling) for name, m in zip(names, cohort.members)]
for _ in range(2):
    contents = []
    for index in range(len(layout.shards)):
        work = Aggregation(layout, index, contributions, lambda c, i=index: updates[names.index(c)][i])
        contents.append(decode_result(layout, index, work.whole()))
    restored = restore(layout, contents, cohort.orders, Decryptor(cohort.key))
    for m in layout.matrices:
        first = cohort.orders[m.name][:4]
        read, held = restored.matrices[m.name].M[4:6, first], victim.factors[m.name].A[:, first]
        print(min(abs(np.corrcoef(a, b)[0, 1]) for a, b in zip(read, held)) > 0.999)
"""


def test_the_first_result_holds_the_victims_encrypted_values_and_the_next_one_is_honest(tmp_path):
    """Workers once called something else than what was replaced, and nothing was attacked."""
    environment = {"PYTHONPATH": f"{ORACLE}{os.pathsep}{ROOT}", "SHELORA_TEST_ORACLE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "services.aggregation.worker"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True"] * 3 + ["False"] * 3, done.stdout + done.stderr
