import random

from client_agent.session import FIRST_WAIT_S, LONGEST_WAIT_S, Backoff

AGENTS = 1000


def test_the_bound_of_waits_doubles_and_begins_anew_when_something_arrives():
    wait = Backoff(uniform=lambda _low, high: high)
    waits = [wait.next_s() for _ in range(6)]
    assert waits == [FIRST_WAIT_S, 4.0, 8.0, 16.0, LONGEST_WAIT_S, LONGEST_WAIT_S]
    wait.reset()
    assert wait.next_s() == FIRST_WAIT_S


def test_a_thousand_agents_whose_streams_broke_in_one_moment_do_not_come_back_in_one():
    """A coordinator restarts: whatever time that takes, no tenth of a second sees more than a tenth of the agents."""
    rng = random.Random(1)
    agents = [Backoff(rng.uniform) for _ in range(AGENTS)]
    for down_s in (0.0, 1.0, 5.0, 20.0, 120.0):
        arrivals = [back_after_s(agent, down_s) for agent in agents]
        slots = [int(10 * (arrival - down_s)) for arrival in arrivals]
        assert max(slots.count(slot) for slot in set(slots)) <= AGENTS / 10
        assert max(arrivals) - down_s <= LONGEST_WAIT_S, (
            "and nobody stays away for longer than the longest wait"
        )


def back_after_s(agent: Backoff, down_s: float) -> float:
    """When an agent whose every attempt fails before `down_s` comes back."""
    agent.reset()
    now_s = agent.next_s()
    while now_s < down_s:
        now_s += agent.next_s()
    return now_s
