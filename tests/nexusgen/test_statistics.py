"""Bounds against scipy's, their coverage in trials, and the cases in which a bootstrap would see no doubt."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nexusgen.errors import ShapeError
from nexusgen.statistics import (
    Interval,
    mean_interval,
    mean_of_groups_interval,
    paired_difference,
    paired_difference_of_groups,
)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (24, 24), (0, 24), (138, 144), (87, 140)])
def test_shares_have_wilsons_bounds(right: int, count: int) -> None:
    found = mean_interval([1.0] * right + [0.0] * (count - right))
    expected = stats.binomtest(right, count).proportion_ci(0.95, "wilson")
    assert (found.value, found.n) == (pytest.approx(right / count), count)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_other_scores_are_resampled() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=80)
    found = mean_interval(values.tolist())
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=0.02), pytest.approx(expected.high, abs=0.02))


def test_the_same_scores_and_seed_give_the_same_bounds() -> None:
    values = np.random.default_rng(2).normal(size=50).tolist()
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_a_single_or_a_constant_score_has_no_spread() -> None:
    assert mean_interval([0.4]) == Interval(0.4, 0.4, 0.4, 1)
    found = mean_interval([0.25] * 9)
    assert (found.low, found.high) == (0.25, 0.25)


def test_groups_weigh_the_same_whatever_their_size() -> None:
    found = mean_of_groups_interval([[1.0] * 30, [0.0] * 10])
    assert found.value == 0.5
    assert found.n == 40
    assert 0.3 < found.low < 0.5 < found.high < 0.7


def test_one_group_is_no_group() -> None:
    shares, others = [1.0, 0.0, 1.0, 1.0], [0.1, 0.5, 0.7]
    for values in (shares, others):
        assert mean_of_groups_interval([values]) == mean_interval(values)
        assert paired_difference_of_groups([values], [values[::-1]]) == paired_difference(values, values[::-1])


def test_all_right_is_not_certain() -> None:
    found = mean_of_groups_interval([[1.0] * 24] * 6)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(mean_interval([1.0] * 144).low)
    assert 0.97 < found.low < 0.98


def covered(draw: object, truth: float, trials: int = 1000) -> float:
    """The share of trials whose interval holds the truth."""
    assert callable(draw)
    hits = 0
    for trial in range(trials):
        found = draw(np.random.default_rng((8, trial)))
        hits += found.low <= truth <= found.high
    return hits / trials


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    shares = (0.95, 0.6, 0.8)

    def of_groups(rng: np.random.Generator) -> Interval:
        return mean_of_groups_interval([(rng.random(24) < share).astype(float).tolist() for share in shares])

    def of_pairs(rng: np.random.Generator) -> Interval:
        shared = rng.random(100)  # how hard the items are, the same for both
        ours = (shared + 0.2 * rng.normal(size=100) < 0.7).astype(float)
        theirs = (shared + 0.2 * rng.normal(size=100) < 0.7).astype(float)
        return paired_difference(ours.tolist(), theirs.tolist())

    def of_numbers(rng: np.random.Generator) -> Interval:
        return mean_of_groups_interval([rng.normal(1, 1, 60).tolist(), rng.normal(3, 2, 60).tolist()])

    def of_rarely_wrong(rng: np.random.Generator) -> Interval:
        return mean_of_groups_interval([(rng.random(24) < 0.97).astype(float).tolist() for _ in range(6)])

    assert 0.94 <= covered(of_groups, sum(shares) / 3) <= 0.98
    assert 0.94 <= covered(of_rarely_wrong, 0.97) <= 0.98
    assert 0.93 <= covered(of_pairs, 0.0) <= 0.99
    assert 0.92 <= covered(of_numbers, 2.0) <= 0.98


def test_pairs_see_what_two_intervals_dont() -> None:
    hard = np.arange(200) / 200
    ours, theirs = (hard < 0.60).astype(float).tolist(), (hard < 0.55).astype(float).tolist()
    apart = [mean_interval(values) for values in (ours, theirs)]
    assert apart[0].low < apart[1].high  # alone, they overlap
    assert paired_difference(ours, theirs).low > 0
    assert paired_difference(theirs, ours).high < 0


def test_agreement_on_a_few_items_is_not_equality() -> None:
    found = paired_difference([1.0] * 24, [1.0] * 24)
    assert found.value == 0
    assert 0.05 < found.high < 0.15
    assert found.low == -found.high


def test_differences_of_other_scores_are_resampled_together() -> None:
    theirs = np.random.default_rng(3).normal(0, 10, 40)
    found = paired_difference((theirs + 0.1).tolist(), theirs.tolist())
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_nothing_to_measure_and_unequal_items_are_refused() -> None:
    with pytest.raises(ShapeError, match="no interval without scores"):
        mean_interval([])
    with pytest.raises(ShapeError, match=r"groups of \[2\] and of \[3\]"):
        paired_difference([1, 0], [1, 0, 1])


def test_an_interval_reads_as_a_line() -> None:
    assert str(mean_interval([1, 1, 0, 0])) == "0.500 (0.150 to 0.850, n = 4)"
    assert mean_interval([0.4]).to_json() == {"value": 0.4, "low": 0.4, "high": 0.4, "n": 1}
