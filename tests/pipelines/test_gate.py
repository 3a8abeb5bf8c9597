"""The gate's rules, on the items' scores of real demo models.

data/demo_scores.json holds the scores of each item (1 or 0) of the base and of five trainings of the demo, under the
demo's settings: `a` to `d` are equally good, the fifth learned to edit with an editing decoder that drew noise.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexusgen import shapes
from nexusgen.config import read_values
from nexusgen.statistics import holm, mean_of_groups, mean_of_groups_interval, probability_by_chance
from pipelines.gate import REFERENCE_DROP, Evaluation, Rules, compare, judge
from pipelines.promote import CHAMPION_THRESHOLDS, PromoteConfig
from pipelines.suite_demo_world import DemoWorldSuite

SUITE = DemoWorldSuite(
    seed=0,
    steps=None,
    per_category=24,
    num_explicit=96,
    num_questions=192,
    num_edits=140,
    num_pictures=24,
    batch_size=24,
)
REAL: Mapping[str, Mapping[str, Mapping[str, str]]] = json.loads(
    (Path(__file__).parent / "data/demo_scores.json").read_text(encoding="utf-8")
)
GOOD = ("a", "b", "c", "d")
DEMO = PromoteConfig.model_validate(
    read_values(Path(__file__).parents[2] / "jobs/configs/demo/promote.yaml") | {"storage": "s"}
)
RULES = Rules(DEMO.thresholds, DEMO.understanding_drop)
Scores = dict[str, dict[str, np.ndarray]]


def real(name: str) -> Scores:
    return {
        kind: {column: np.array(list(text), dtype=float) for column, text in columns.items()}
        for kind, columns in REAL[name].items()
    }


@functools.cache
def items() -> dict[str, list[tuple[str, str]]]:
    """Category and language of each kind's items, in order."""
    prompts = SUITE._prompts()
    return {
        **{kind: [(str(one.category), str(one.lang)) for one in prompts[kind]] for kind in ("generation", "explicit")},
        "editing": [(one.kind, one.lang) for one in shapes.evaluation_edits(140)],
        "understanding": [(one.kind, one.lang) for one in shapes.evaluation_questions(192)],
    }


def evaluation(fingerprint: str, scores: Scores, **settings: Any) -> Evaluation:
    rows = [
        {"kind": kind, "index": index, "category": category, "lang": lang}
        | {column: float(values[index]) for column, values in scores[kind].items()}
        for kind, found in items().items()
        for index, (category, lang) in enumerate(found)
    ]
    measures = SUITE.measures(rows)
    return Evaluation(
        fingerprint,
        SUITE.settings | settings,
        {name.replace("/", "."): mean_of_groups(groups) for name, groups in measures.items()} | {"n": len(rows)},
        {name: mean_of_groups_interval(groups) for name, groups in measures.items()},
        measures,
    )


def of_real(name: str, **settings: Any) -> Evaluation:
    return evaluation(name, real(name), **settings)


@functools.cache
def base() -> Evaluation:
    return of_real("base")


def retrained(rng: np.random.Generator) -> Scores:
    """A training with another seed: each category's items from one of the real ones, a tenth of them from another.

    So what goes together in reality (all shapes on grey, say) goes together here.
    """
    sources = {name: real(name) for name in GOOD}
    made: Scores = {}
    for kind, found in items().items():
        of_category = {category: rng.choice(GOOD) for category, _ in found}
        names = [rng.choice(GOOD) if rng.random() < 0.1 else of_category[category] for category, _ in found]
        columns = sources["a"][kind]
        made[kind] = {
            column: np.array([sources[name][kind][column][index] for index, name in enumerate(names)])
            for column in columns
        }
    return made


def spoiled(scores: Scores, kind: str, share: float, rng: np.random.Generator) -> Scores:
    """Some of the items of a kind, drawn by lot, have failed."""
    columns = scores[kind]
    keep = rng.random(len(columns["score"])) >= share
    return scores | {kind: {column: values * keep for column, values in columns.items()}}


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.permutations(GOOD, 2)))
def test_real_retrainings_pass_against_each_other(ours: str, theirs: str) -> None:
    verdict = judge(of_real(ours), of_real(theirs), base(), RULES)
    assert verdict.reasons == ()
    assert all(one.is_paired for one in verdict.against_champion)
    assert len(verdict.against_champion) > 20


def test_of_ten_retrainings_at_most_one_is_refused() -> None:
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(8):
        champion = evaluation("champion", retrained(rng))
        ours = [evaluation(f"{number}", retrained(rng)) for number in range(10)]
        refused.append(sum(bool(judge(one, champion, base(), RULES).reasons) for one in ours))
    assert max(refused) <= 1
    assert sum(refused) <= 0.05 * 80


def test_equal_models_are_seldom_refused_whatever_the_metric() -> None:
    """Two models that pass each item with the same probability, 0.7: any refusal is an error."""
    rng = np.random.default_rng(1)

    def drawn() -> Evaluation:
        return evaluation(
            str(rng.random()),
            {
                kind: {column: (rng.random(len(values)) < 0.7) * 1.0 for column, values in columns.items()}
                for kind, columns in real("a").items()
            },
        )

    refused = sum(any(one.is_worse for one in compare(drawn(), drawn())) for _ in range(60))
    assert refused <= 5  # 3 expected at most


@pytest.mark.parametrize(
    ("kind", "share", "named"),
    [("generation", 0.2, "generation"), ("editing", 0.5, "editing"), ("understanding", 0.2, "understanding")],
)
def test_a_worse_model_is_refused_by_the_name_of_its_fault(kind: str, share: float, named: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        ours = evaluation("worse", spoiled(retrained(rng), kind, share, rng))
        verdict = judge(ours, of_real("a"), None, Rules({}))
        assert verdict.reasons
        assert all(reason.startswith(named) for reason in verdict.reasons)
        assert judge(of_real("a"), ours, None, Rules({})).reasons == ()  # and the better one passes


def test_a_real_model_whose_edits_are_noise_is_refused_and_gives_way() -> None:
    verdict = judge(of_real("spoiled_edits"), of_real("a"), base(), Rules({}, RULES.understanding_drop))
    assert any(
        reason.startswith("editing.strict is 0.021, worse than the champion's 0.614") for reason in verdict.reasons
    )
    # It has "done" more removals, as it wiped much: half of a score doesn't keep a better model out.
    assert judge(of_real("a"), of_real("spoiled_edits"), base(), RULES).reasons == ()


def test_under_other_settings_intervals_are_compared() -> None:
    other = of_real("a", seed=1)
    assert not any(one.is_paired or one.is_worse for one in compare(of_real("b"), other))
    rng = np.random.default_rng(3)
    worse = evaluation("worse", spoiled(real("a"), "generation", 0.3, rng))
    (reason, *_) = judge(worse, other, None, Rules({})).reasons
    assert "on other items" in reason
    bare = replace(other, measures={}, intervals={})
    (reason,) = judge(of_real("b"), bare, None, Rules({})).reasons
    assert "neither items nor intervals: run evaluate on both again" in reason


def test_understanding_may_be_lost_as_far_as_the_setting_says() -> None:
    ours = of_real("d")  # 0.781 against the base's 0.865
    assert judge(ours, None, base(), RULES).reasons == ()
    verdict = judge(ours, None, base(), Rules({}, understanding_drop=0.0))
    (reason,) = verdict.reasons
    assert reason.startswith("understanding.overall is 0.781, worse than its base model's 0.865 beyond noise (-0.083")
    assert "up to 0 may be lost (understanding_drop)" in reason
    lost = spoiled(real("d"), "understanding", 0.3, np.random.default_rng(4))
    assert judge(evaluation("lost", lost), None, base(), RULES).reasons
    assert PromoteConfig(storage="s").understanding_drop == REFERENCE_DROP > DEMO.understanding_drop > 0


def test_thresholds_hold_without_a_champion() -> None:
    verdict = judge(of_real("base"), None, None, Rules(CHAMPION_THRESHOLDS))
    assert "generation.overall is 0, wanted >= 0.85" in verdict.refusal
    assert "a.b is nan, wanted >= 1" in judge(base(), None, None, Rules({"a.b": 1.0})).refusal
    assert judge(of_real("a"), None, base(), RULES).summary.startswith("understanding against the base model's -0.06")


def test_more_of_an_error_is_worse() -> None:
    rng = np.random.default_rng(5)
    values = rng.random(200)

    def of(name: str, scale: float) -> Evaluation:
        groups = {"mse": [(values * scale).tolist()]}
        return Evaluation(name, {}, {}, {k: mean_of_groups_interval(v) for k, v in groups.items()}, groups)

    assert [one.is_worse for one in compare(of("a", 1.3), of("b", 1.0))] == [True]
    assert [one.is_worse for one in compare(of("a", 0.7), of("b", 1.0))] == [False]


def test_probabilities_by_chance_are_exact_and_corrected() -> None:
    ours, theirs = [0.0] * 6 + [1.0] * 18, [1.0] * 24
    assert probability_by_chance([ours], [theirs]) == pytest.approx(1 / 64)
    assert probability_by_chance([theirs], [ours]) == 1.0
    assert probability_by_chance([theirs], [theirs]) == 1.0
    uneven = probability_by_chance([ours, [1.0] * 12], [theirs, [1.0] * 12])
    assert uneven == pytest.approx(1 / 64)  # items that are the same say nothing, whatever they weigh
    rng = np.random.default_rng(6)
    wide = rng.normal(0, 1, 60)
    drawn = probability_by_chance([wide.tolist()], [(wide + 0.5 + rng.normal(0, 1, 60)).tolist()])
    assert 0 < drawn < 0.05
    assert holm([0.04, 0.01, 0.03], 0.05) == [False, True, False]
    assert holm([0.01, 0.02, 0.03], 0.05) == [True, True, True]
    assert holm([], 0.05) == []
