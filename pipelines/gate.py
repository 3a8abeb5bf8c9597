"""The gate: whether a version's scores let it have the alias `champion`. Pure functions of evaluations, no storage.

Four questions, each of which can refuse: is there an evaluation of these very weights; do its scores reach the
thresholds; is any metric worse than the present champion's beyond its noise; does it understand pictures worse than the
base model that its training began from, by more than `understanding_drop`?

**Worse beyond noise.** Where both were evaluated under the same settings, their items are pairs, and the question is
how probable it is that a model no worse loses so much on them by chance (`probability_by_chance` of
nexusgen/statistics.py). Under other settings, it is that of the difference of two independent means with the intervals
that were stored. There are dozens of metrics, and at 5 % each every second equal model would be refused; so their
probabilities are corrected by Holm's method: an equal model is refused for *any* of them once in twenty times. Metrics
are all that are means over items, but halves of a score (`HALVES`): a model that wipes every picture clean has done all
removals, and whoever does better at editing would be worse at that. Of errors (`LOWER_IS_BETTER`) more is worse.

**Understanding.** Training for pictures costs understanding; the reference, too, stands below its own base (on MMMU
45.7 against 58.6, as both are published). `understanding_drop` is how much may be lost, 0.13 unless said otherwise; a
model is refused when it has lost more beyond noise: when the whole 95 % interval of the difference lies below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from nexusgen.statistics import Interval, holm, mean_of_groups, paired_difference_of_groups, probability_by_chance

HALVES = ("*done", "*unchanged")  # of `strict`, which asks for both
LOWER_IS_BETTER = ("*mse*", "*loss*", "*error*", "*distance*")
UNDERSTANDING = "understanding/overall"
FAMILY_ERROR = 0.05  # how often a model just as good is refused for being worse than the champion, over all metrics
REFERENCE_DROP = 0.13  # in MMMU's score, what Nexus-Gen lost against Qwen2.5-VL-7B: 58.6 - 45.7 points of 100

_Z = 1.959963984540054  # of the intervals' 95 %


@dataclass(frozen=True)
class Evaluation:
    """What is kept of a suite run on one model. `measures` are the items' own scores by metric, in their order."""

    fingerprint: str
    settings: Mapping[str, Any]
    scores: Mapping[str, float]  # flat, as a.b
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    measures: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    def is_paired_with(self, other: Evaluation) -> bool:
        """Whether the items of both are the same."""
        return self.settings == other.settings and bool(self.measures) and bool(other.measures)


@dataclass(frozen=True)
class Rules:
    """What a version must keep to. `thresholds` name scores, as a.b."""

    thresholds: Mapping[str, float]
    understanding_drop: float = REFERENCE_DROP


@dataclass(frozen=True)
class Comparison:
    """One metric of a version against another model's.

    difference: ours - theirs with its 95 % interval. probability: of so bad a difference by chance, uncorrected; 1 if
    it isn't below 0.
    """

    metric: str
    ours: float
    theirs: float
    difference: Interval
    probability: float
    is_paired: bool
    is_worse: bool = False


@dataclass(frozen=True)
class Verdict:
    """Why a version is refused (not at all if `reasons` is empty), and the comparisons that were made."""

    reasons: tuple[str, ...]
    against_champion: tuple[Comparison, ...] = ()
    understanding: Comparison | None = None

    @property
    def refusal(self) -> str:
        """The reasons in one line; empty if there are none."""
        return "; ".join(self.reasons)

    @property
    def summary(self) -> str:
        """What was compared, in a line."""
        parts = []
        if self.against_champion:
            worst, how = self.against_champion[0], "the same" if self.against_champion[0].is_paired else "other"
            parts.append(
                f"{len(self.against_champion)} metrics against the champion's on {how} items, of which "
                f"{sum(one.is_worse for one in self.against_champion)} are worse beyond noise (worst: {worst.metric} "
                f"{worst.difference.value:+.3f}, p = {worst.probability:.2g})"
            )
        if self.understanding is not None:
            difference = self.understanding.difference
            parts.append(
                f"understanding against the base model's {difference.value:+.3f} "
                f"({difference.low:+.3f} to {difference.high:+.3f}, n = {difference.n})"
            )
        return "; ".join(parts) or "thresholds alone"

    def to_json(self) -> dict[str, Any]:
        """All of it, for those who look closer."""
        return asdict(self)


def judge(ours: Evaluation, champion: Evaluation | None, base: Evaluation | None, rules: Rules) -> Verdict:
    """Put the last three questions. `champion` is None if there is none yet, `base` if the suite asks it no questions.

    Raises: nothing; a comparison that can't be made is a reason, too.
    """
    reasons = []
    for name, wanted in rules.thresholds.items():
        found = ours.scores.get(name, math.nan)
        if not found >= wanted:  # a missing score is NaN, and NaN fails
            reasons.append(f"{name} is {found:.4g}, wanted >= {wanted:g}")
    comparisons: tuple[Comparison, ...] = ()
    if champion is not None and champion.fingerprint != ours.fingerprint:
        comparisons = compare(ours, champion)
        if not comparisons:
            reasons.append(
                "it can't be compared with the champion, as one of both evaluations has neither items nor intervals: "
                "run evaluate on both again"
            )
        reasons += [_told(one) for one in comparisons if one.is_worse]
    understanding = None
    if base is not None:
        understanding = _compare_one(UNDERSTANDING, ours, base)
        if understanding is None:
            reasons.append(f"its {UNDERSTANDING} can't be compared with its base model's: run evaluate on both again")
        elif understanding.difference.high < -rules.understanding_drop:
            reasons.append(
                f"{_told(understanding, 'its base model')}; up to {rules.understanding_drop:g} may be lost "
                "(understanding_drop)"
            )
    return Verdict(tuple(reasons), comparisons, understanding)


def compare(ours: Evaluation, theirs: Evaluation) -> tuple[Comparison, ...]:
    """All metrics that both have but the halves, the worst first; those worse beyond noise are marked."""
    names = _metrics(ours) & _metrics(theirs)
    found = [one for name in sorted(names) if (one := _compare_one(name, ours, theirs)) is not None]
    found.sort(key=lambda one: one.probability)
    rejected = holm([one.probability for one in found], FAMILY_ERROR)
    return tuple(replace(one, is_worse=is_worse) for one, is_worse in zip(found, rejected, strict=True))


def _metrics(evaluation: Evaluation) -> set[str]:
    names = set(evaluation.measures) | set(evaluation.intervals)
    return {name for name in names if not any(fnmatchcase(name, pattern) for pattern in HALVES)}


def _compare_one(name: str, ours: Evaluation, theirs: Evaluation) -> Comparison | None:
    """One metric, by the items where they are the same, else by the intervals; None where there are neither."""
    is_error = any(fnmatchcase(name, pattern) for pattern in LOWER_IS_BETTER)
    if ours.is_paired_with(theirs) and name in ours.measures and name in theirs.measures:
        one, other = ours.measures[name], theirs.measures[name]
        difference = paired_difference_of_groups(one, other)
        chance = probability_by_chance(*((other, one) if is_error else (one, other)))
        return Comparison(name, mean_of_groups(one), mean_of_groups(other), difference, chance, is_paired=True)
    if name not in ours.intervals or name not in theirs.intervals:
        return None
    mine, its = ours.intervals[name], theirs.intervals[name]
    # Intervals needn't be symmetric: each bound of the difference comes from the two bounds that it depends on.
    middle = mine.value - its.value
    below = math.hypot(mine.value - mine.low, its.high - its.value)
    above = math.hypot(mine.high - mine.value, its.value - its.low)
    difference = Interval(middle, middle - below, middle + above, min(mine.n, its.n))
    loss, deviation = (middle, below / _Z) if is_error else (-middle, above / _Z)
    chance = 1.0 if loss <= 0 else 0.5 * math.erfc(loss / deviation / math.sqrt(2)) if deviation > 0 else 0.0
    return Comparison(name, mine.value, its.value, difference, chance, is_paired=False)


def _told(one: Comparison, whose: str = "the champion") -> str:
    how = "on the same items" if one.is_paired else "on other items"
    return (
        f"{one.metric.replace('/', '.')} is {one.ours:.3f}, worse than {whose}'s {one.theirs:.3f} beyond noise "
        f"({one.difference.value:+.3f}, {one.difference.low:+.3f} to {one.difference.high:+.3f}, "
        f"n = {one.difference.n} {how})"
    )
