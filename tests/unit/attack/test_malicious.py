"""Hostile servers against the members of one round, on values that are nobody's words: what is opened, and what not."""

import numpy as np
import pytest

from attack import malicious
from shelora.obfuscation import Obfuscation

VALUES = np.random.default_rng(5).uniform(-1, 1, 1000)


def told(got):
    """Correlation of what was opened with the victim's values."""
    return abs(float(np.corrcoef(got.values, VALUES)[0, 1]))


@pytest.mark.parametrize("attack", [attack for attack, _ in malicious._ATTACKS])
def test_what_all_refuse_gives_nothing_and_where_nobody_refuses_it_gives_everything(attack):
    people = malicious._People(Obfuscation(bytes(range(32)), 1))
    got = attack(people, VALUES, control=False)
    assert got.refused == got.asked > 0
    assert told(got) < 0.2, "six deviations of the correlation of so many values with noise are 0.19"

    control = attack(malicious._People(Obfuscation(bytes(range(32)), 1)), VALUES, control=True)
    assert told(control) > 0.99
