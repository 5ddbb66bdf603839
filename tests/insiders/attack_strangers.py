"""Callers without a certificate, 200 at once: no server grows, and members are served as before."""

from collections.abc import Collection

import pytest

from tests.insiders.figures import MOST_GROWTH_MIB, SERVERS, Figures, under_attack
from tests.insiders.lab import Lab
from tests.insiders.stranger import AT_ONCE, CALLS, CONNECTING

SECONDS = (3.0, 12.0, 48.0)
"""Of an attack; where the machine is too busy for half of the callers to be heard in that time, the next."""


REFUSED = {
    "big-messages": {"RESOURCE_EXHAUSTED"},
    "big-metadata": {"RESOURCE_EXHAUSTED", "UNAVAILABLE"},
    "bad-tokens": {"UNAUTHENTICATED", "RESOURCE_EXHAUSTED"},
    "bad-proofs": {"UNAUTHENTICATED", "RESOURCE_EXHAUSTED"},
    "silent-calls": {"DATA_LOSS", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAVAILABLE"},
}
"""How calls end that reached the server and were refused."""


async def made(lab: Lab, kind: str, target: str, ends: Collection[str] = ()) -> Figures:
    """The attack, by half of its callers at least. Args: ends: how calls end that count; none for any."""
    for seconds in SECONDS:
        figures = await under_attack(lab, kind, target, seconds)
        if sum(count for end, count in figures.ends.items() if not ends or end in ends) >= AT_ONCE / 2:
            return figures
    raise AssertionError(f"the attack was not made: {figures.ends}")


@pytest.mark.parametrize("kind", [*CALLS, "silent-calls"])
async def test_calls_of_strangers_do_not_make_the_key_authority_grow(lab: Lab, kind: str):
    figures = await made(lab, kind, "enrolment", REFUSED[kind])
    # Where it is overrun, gRPC resets streams before our code sees them (REFUSED_STREAM, told as UNAVAILABLE).
    # Where the machine is, strangers lose their patience.
    assert set(figures.ends) <= REFUSED[kind] | {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert figures.worst_growth_mib < MOST_GROWTH_MIB, figures


@pytest.mark.parametrize("target", SERVERS)
@pytest.mark.parametrize("kind", [kind for kind in CONNECTING if kind != "silent-calls"])
async def test_connections_of_strangers_do_not_make_a_server_grow(lab: Lab, kind: str, target: str):
    figures = await made(lab, kind, target)
    assert figures.worst_growth_mib < MOST_GROWTH_MIB, figures
