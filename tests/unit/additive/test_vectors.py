import json

import pytest

from tests.vectors import make_additive_vectors as golden

STORED = json.loads(golden.FILE.read_text())
MADE = golden.vectors()


@pytest.mark.parametrize("part", ["gaussian", "gaussian_table_sha256", "committee"])
def test_sampler_and_committee_are_those_of_every_release_and_machine(part):
    assert MADE[part] == STORED[part]


@pytest.mark.parametrize("name", STORED["profiles"])
def test_the_scheme_is_that_of_every_release_and_machine(name):
    assert MADE["profiles"][name] == STORED["profiles"][name]
    assert set(MADE["profiles"]) == set(STORED["profiles"])
