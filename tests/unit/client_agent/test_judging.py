"""What an agent remembers of the results that it judged."""

from types import SimpleNamespace

from client_agent.judging import Judge
from client_agent.plausibility import Motion

FEW_CONTRIBUTORS = SimpleNamespace(
    contributors=4, own="own", before="before", motion=Motion(), own_share=0.0, rounds=1
)


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
