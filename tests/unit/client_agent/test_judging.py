"""What an agent remembers of the results that it judged."""

from types import SimpleNamespace

from client_agent.judging import Judge

FEW_CONTRIBUTORS = SimpleNamespace(contributors=4, own="own", before="before")


def objections(losses: dict[str, float], *results: tuple[str, str, int]) -> list[bool]:
    """Whether a judge objects to results, each by its loss's name, the round that it began from, and its number."""
    judge = Judge(losses.__getitem__)
    found = []
    for name, start, number in results:
        why = judge.objection(name, FEW_CONTRIBUTORS, start=start, round_id=f"of {name}", number=number)
        found.append(bool(why))
    return found


def test_who_was_overruled_measures_by_what_the_others_went_on_from_and_asks_no_lesson():
    """One whose labels nobody else has: its objections would be half of those that take an honest sum back."""
    losses = {"own": 0.1, "before": 0.86, "first": 1.76, "second": 2.8, "third": 2.7, "worst": 50.0}
    results = [
        ("first", "start", 4),
        ("second", "of first", 5),
        ("third", "of second", 6),
        ("worst", "of third", 7),
    ]
    assert objections(losses, *results) == [True, False, False, True]


def test_who_was_not_overruled_measures_the_repetition_as_the_first_attempt():
    losses = {"own": 0.1, "before": 0.86, "first": 1.76, "again": 1.75, "better": 0.5}
    results = [("first", "start", 4), ("again", "start", 4), ("better", "start", 4)]
    assert objections(losses, *results) == [True, True, False]


def test_a_result_that_serves_better_sets_the_measure_again():
    losses = {"own": 0.1, "before": 0.86, "first": 1.76, "good": 0.5, "worse": 1.1}
    results = [("first", "start", 4), ("good", "of first", 5), ("worse", "of good", 6)]
    assert objections(losses, *results) == [True, False, True]
