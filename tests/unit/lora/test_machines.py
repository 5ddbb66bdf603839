"""What agents must agree on is the same to the bit whatever the threads, the BLAS kernels, the vector units."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.unit.lora.elsewhere import figures

ELSEWHERE = {
    "four threads": {"OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"},
    "an old processor": {
        "OPENBLAS_NUM_THREADS": "1",
        "OPENBLAS_CORETYPE": "Nehalem",
        "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX",
    },
}


@pytest.mark.parametrize("settings", ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_agents_agree_on_is_the_same_on_other_machines(settings):
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.unit.lora.elsewhere"],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    here, there = figures(), json.loads(found.stdout)
    assert there["exact"] == here["exact"]
    largest = np.abs(here["restored"]).max()
    np.testing.assert_allclose(there["restored"], here["restored"], atol=1e-6 * largest)
