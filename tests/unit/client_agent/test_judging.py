"""What an agent remembers of the results that it judged."""

from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from client_agent.judging import Judge
from client_agent.plausibility import FEW, Motion

FEW_CONTRIBUTORS = SimpleNamespace(
    contributors=4, own="own", before="before", rounds=1, own_share=0.25, motion=Motion()
)
CONTRARY = Motion(along=-1.0, change=1.0, own=1.0)
HALF_AS_FAR = Motion(along=0.125, change=0.25, own=1.0)
LIKE = Motion(along=0.5, change=0.5, own=1.0)


def objections(losses: dict[str, float], *results: tuple[str, str]) -> list[bool]:
    """Whether a judge objects to results, each by its loss's name and the round that it began from."""
    judge, found = Judge(losses.__getitem__), {}
    for name, start in results:
        why = judge.objection(
            name,
            FEW_CONTRIBUTORS,
            start=start,
            round_id=f"of {name}",
            overruled=bool(found.get(start)),
        )
        found[f"of {name}"] = bool(why)
    return [*found.values()]


def test_who_was_overruled_measures_by_what_the_others_went_on_from_and_asks_no_lesson():
    """One whose labels nobody else has: its objections would be half of those that take an honest sum back."""
    losses = {"own": 0.1, "before": 0.86, "first": 1.76, "second": 2.8, "third": 2.7, "worst": 50.0}
    results = [
        ("first", "start"),
        ("second", "of first"),
        ("third", "of second"),
        ("worst", "of third"),
    ]
    assert objections(losses, *results) == [True, False, False, True]


def test_who_was_not_overruled_measures_the_repetition_as_the_first_attempt():
    losses = {"own": 0.1, "before": 0.86, "first": 1.76, "again": 1.75, "better": 0.5}
    results = [("first", "start"), ("again", "start"), ("better", "start")]
    assert objections(losses, *results) == [True, True, False]


def test_a_result_that_serves_better_sets_the_measure_again():
    losses = {"own": 0.1, "before": 0.86, "first": 1.76, "good": 0.5, "worse": 1.1}
    results = [("first", "start"), ("good", "of first"), ("worse", "of good")]
    assert objections(losses, *results) == [True, False, True]


def test_who_objected_with_most_measures_as_before_and_asks_results_to_teach_it():
    """The spoiled result is taken back; the next one that teaches nothing is objected to all the same."""
    losses = {"own": 0.1, "before": 1.9, "spoiled": 9.0, "again": 1.5, "idle": 1.45}
    results = [("spoiled", "start"), ("again", "start"), ("idle", "of again")]
    assert objections(losses, *results) == [True, False, True]


def directions(contributors: int, *results: tuple[Motion, str]) -> list[bool]:
    """Whether a judge objects to results that leave its loss as it is, each by its motion and what it began from."""
    judge, found = Judge(lambda _: 0.5), []
    for number, (motion, start) in enumerate(results):
        seen = SimpleNamespace(
            contributors=contributors, own="own", before="before", rounds=1, own_share=0.25, motion=motion
        )
        why = judge.objection("result", seen, start=start, round_id=f"films.{number}", overruled=False)
        found.append("takes back what this client learned" in why)
    return found


@pytest.mark.parametrize(
    ("before", "after", "objects"),
    [(1.0, 0.75, False), (1.0, 0.76, True), (0.06, 0.05, False), (0.06, 0.051, True)],
)
def test_a_result_that_teaches_much_or_leaves_nothing_to_learn_needs_less_agreement(before, after, objects):
    """Honest rounds of `make chaos`: half the own share in a sum that halved the loss; noise at a loss of 0.001."""
    losses = {"before": before, "own": 0.0, "result": after}
    for motion, found in ((HALF_AS_FAR, objects), (CONTRARY, True), (LIKE, False)):
        seen = SimpleNamespace(**FEW_CONTRIBUTORS.__dict__ | {"motion": motion})
        why = Judge(losses.__getitem__).objection("result", seen, start="s", round_id="r", overruled=False)
        assert bool(why) == found


@pytest.mark.parametrize("contributors", [3, 4, 5, 20])
def test_sums_that_point_elsewhere_whoever_sits_out_are_those_of_honest_members_with_unlike_data(
    contributors,
):
    """Else the last suspect's sitting out would not help either, and an honest federation would fail."""
    most = min(contributors - 1, FEW)
    with capture_logs() as logs:
        found = directions(contributors, *[(CONTRARY, "start")] * (most + 1), (CONTRARY, "next"))
    assert found == [True] * most + [False, False]
    assert [log["event"] for log in logs].count("direction_not_judged") == 1


def test_every_suspect_may_spoil_a_sum_before_the_last_one_sits_out():
    spoiled = [(CONTRARY, "start")] * 3
    assert directions(4, *spoiled, (LIKE, "start"), (CONTRARY, "next")) == [True, True, True, False, True]


def test_who_is_overruled_by_most_goes_on_to_judge_directions():
    """Its objection to the next sum may be what makes most: not everybody sees every spoiled one."""
    starts = [f"films.{number}" for number in range(12)]
    assert all(directions(4, *[(CONTRARY, start) for start in starts]))
