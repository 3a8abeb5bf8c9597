from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from nexusgen.errors import ConfigError, InputError
from nexusgen.schema import TASKS, Task
from pipelines.batches import (
    SHUFFLE_ROWS,
    Batch,
    BatchRule,
    Plan,
    RankStep,
    Rows,
    RowTable,
    check_world_size,
    iterate,
    plan_epoch,
)
from pipelines.slice_cache import SliceCache


def make_table(num_rows: int, seed: int = 0) -> RowTable:
    rng = np.random.default_rng(seed)
    return RowTable(
        lengths=rng.integers(5, 200, num_rows),
        tasks=rng.choice(3, num_rows, p=[0.2, 0.5, 0.3]),
        slices=np.arange(num_rows) // 256,
    )


RULES = [
    BatchRule(samples=24, virtual_streams=4),
    BatchRule(samples=7, virtual_streams=4),
    BatchRule(tokens=2000, virtual_streams=4),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_row_is_seen_exactly_once_per_epoch_on_any_number_of_workers(rule: BatchRule, world_size: int) -> None:
    table = make_table(1000)
    plan = Plan(table, rule, seed=3, data_digest="d")
    steps = list(itertools.takewhile(lambda planned: planned.epoch < 2, plan.steps()))
    for epoch in (0, 1):
        taken = [
            rows
            for p in steps
            if p.epoch == epoch
            for rank in range(world_size)
            for rows in p.rows_of(rank, world_size)
        ]
        assert sorted(np.concatenate(taken)) == list(range(1000))
    assert [p.step for p in steps] == list(range(len(steps)))
    orders = [np.concatenate([p.rows for p in steps if p.epoch == epoch]) for epoch in (0, 1)]
    assert not np.array_equal(*orders)


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_workers() -> None:
    plan = Plan(make_table(500), BatchRule(samples=24, virtual_streams=4), seed=0, data_digest="d")
    for planned in itertools.islice(plan.steps(), 30):
        for world_size in (1, 2, 4):
            parts = [rows for rank in range(world_size) for rows in planned.rows_of(rank, world_size)]
            assert np.array_equal(np.concatenate(parts), planned.rows)


def test_a_plan_is_a_pure_function_and_can_be_entered_anywhere() -> None:
    first, second = (Plan(make_table(300), RULES[2], seed=5, data_digest="d") for _ in range(2))
    assert first.digest == second.digest
    whole = list(itertools.islice(first.steps(), 60))
    rest = list(itertools.islice(second.steps(from_step=41), 19))
    assert [p.step for p in rest] == list(range(41, 60))
    for ours, theirs in zip(whole[41:], rest, strict=True):
        assert ours.epoch == theirs.epoch
        assert all(np.array_equal(a, b) for a, b in zip(ours.streams, theirs.streams, strict=True))


def test_the_digest_changes_with_anything_that_changes_the_plan() -> None:
    table = make_table(100)
    longer = RowTable(table.lengths + 1, table.tasks, table.slices)
    plans = [
        Plan(table, RULES[0], 0, "d"),
        Plan(table, RULES[1], 0, "d"),
        Plan(table, RULES[0], 1, "d"),
        Plan(table, RULES[0], 0, "other"),
        Plan(longer, RULES[0], 0, "d"),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)


def test_a_token_budget_holds_with_little_padding_and_long_rows_stand_alone() -> None:
    table = make_table(5000)
    lengths = np.array(table.lengths)
    lengths[17] = 4000
    table = RowTable(lengths, table.tasks, table.slices)
    batches = plan_epoch(table, BatchRule(tokens=3000), seed=0, epoch=0)
    padded = [len(rows) * lengths[rows].max() for rows in batches]
    assert [rows.tolist() for rows in batches if lengths[rows].max() > 3000] == [[17]]
    assert sum(size > 3000 for size in padded) == 1
    assert lengths.sum() / sum(padded) > 0.92


def test_a_mixture_holds_in_every_step_and_its_scarcest_task_comes_round_once() -> None:
    table = make_table(3000)
    rule = BatchRule(samples=45, mixture={"generation": 20, "editing": 20, "understanding": 5})
    batches = plan_epoch(table, rule, seed=0, epoch=1)
    for rows in batches:
        counts = {task: int((table.tasks[rows] == TASKS.index(task)).sum()) for task in TASKS}
        assert abs(counts["generation"] - len(rows) * 20 / 45) < 2
        assert abs(counts["editing"] - len(rows) * 20 / 45) < 2
        assert abs(counts["understanding"] - len(rows) * 5 / 45) < 2
    seen = np.bincount(np.concatenate(batches), minlength=len(table))
    assert set(seen[table.tasks == TASKS.index("understanding")]) == {1}  # 600 rows at a ninth: the longest way
    assert seen.min() >= 1


def test_a_mixture_of_an_absent_task_is_refused() -> None:
    table = RowTable(np.full(10, 5), np.zeros(10, np.int64), np.zeros(10, np.int64))
    with pytest.raises(InputError, match="editing"):
        plan_epoch(table, BatchRule(samples=4, mixture={"editing": 1.0}), 0, 0)


def test_shuffling_uses_few_slices_at_a_time() -> None:
    table = make_table(40_000)
    (rows,) = [np.concatenate(plan_epoch(table, BatchRule(samples=50), 0, 0))]
    for start in range(0, len(rows), SHUFFLE_ROWS):
        window = table.slices[rows[start : start + SHUFFLE_ROWS]]
        assert len(np.unique(window)) <= 2 * (SHUFFLE_ROWS // 256 + 1)
    assert not np.array_equal(np.sort(rows[:50]), np.arange(rows[:50].min(), rows[:50].min() + 50))


EIGHTS: dict[Task, float] = {"generation": 4, "editing": 3, "understanding": 1}


@pytest.mark.parametrize(
    ("values", "digest", "steps"),
    [
        ({"samples": 24}, "e034b84d1863981c", "18e6e9797e16cba6"),
        ({"tokens": 3000}, "2e5c307a302843cd", "4d50cba8d4f99a14"),
        ({"tokens": 2000, "mixture": {"generation": 3, "understanding": 1}}, "215e75aa6b7e7d4b", "40574472b0e3c67d"),
    ],
)
def test_plans_of_small_data_are_those_of_earlier_versions(values: dict[str, Any], digest: str, steps: str) -> None:
    rng = np.random.default_rng(0)
    columns = (rng.integers(5, 200, 20_000), rng.choice(3, 20_000, p=[0.2, 0.5, 0.3]), np.arange(20_000) // 100 * 7)
    for slice_bytes in (np.zeros(0, np.int64), np.full(1400, 1_000_000)):
        plan = Plan(RowTable(*columns, slice_bytes=slice_bytes), BatchRule(**values), 3, "d")
        assert plan.digest.startswith(digest)
        rows = [rows.tobytes() for step in itertools.islice(plan.steps(), 200) for rows in step.streams]
        assert hashlib.sha256(b"".join(rows)).hexdigest().startswith(steps)


def heavy_table(num_slices: int = 128, rows_per_slice: int = 40) -> RowTable:
    """Slices of one task each, in EIGHTS' shares, of 50 to 100 MB; not all rows are for training."""
    num_rows = num_slices * rows_per_slice
    rng = np.random.default_rng(1)
    of_slices = [TASKS.index(task) for task, share in EIGHTS.items() for _ in range(round(share * num_slices / 8))]
    slices = np.arange(num_rows) // rows_per_slice
    kept = rng.random(num_rows) < 0.9
    lengths = rng.integers(5, 200, num_rows)
    table = RowTable(lengths[kept], np.array(of_slices)[slices][kept], slices[kept])
    return replace(table, slice_bytes=rng.integers(50, 100, num_slices) * 10**6)


HEAVY_RULES = [
    BatchRule(samples=24),
    BatchRule(tokens=2000),
    BatchRule(samples=24, mixture=EIGHTS),
    BatchRule(tokens=2000, mixture=EIGHTS),
    BatchRule(samples=24, window_bytes=1),  # a slice at a time
    BatchRule(tokens=2000, window_bytes=1, mixture=EIGHTS),
]


@pytest.mark.parametrize("rule", HEAVY_RULES)
def test_heavy_slices_are_read_once_in_an_epoch_within_two_windows(rule: BatchRule) -> None:
    table = heavy_table()
    plan = Plan(table, rule, seed=2, data_digest="d")
    assert table.slice_bytes.sum() > 10 * plan.num_window_bytes
    steps = list(itertools.takewhile(lambda planned: planned.epoch < 1, plan.steps()))
    seen = np.concatenate([step.rows for step in steps])
    assert abs(len(seen) - len(table)) < 100  # the mixture is that of the data
    loads: list[int] = []
    cache = SliceCache(
        lambda number: loads.append(number) or number, table.slice_bytes.tolist(), 2 * plan.num_window_bytes
    )

    def slices_of(step: Any) -> list[int]:
        return np.unique(table.slices[step.rows]).tolist()

    for step in cache.ahead(iter(steps), slices_of):
        assert [cache.get(number) for number in slices_of(step)] == slices_of(step)
        assert cache.num_bytes <= 2 * plan.num_window_bytes
    counts = Counter(loads)
    assert len(counts) == len(table.slice_bytes)
    if rule.mixture is None:
        assert set(counts.values()) == {1}
    else:  # shares aren't quite those of the rows, so the first few rows of a task come round again
        assert sum(counts.values()) <= len(counts) + 6


def test_slices_of_the_next_window_are_read_while_this_one_is_used() -> None:
    table = heavy_table()
    plan = Plan(table, BatchRule(samples=24), seed=2, data_digest="d")
    steps = list(itertools.takewhile(lambda planned: planned.epoch < 1, plan.steps()))
    of_steps = [np.unique(table.slices[step.rows]).tolist() for step in steps]
    loads: set[int] = set()
    cache = SliceCache(loads.add, table.slice_bytes.tolist(), 2 * plan.num_window_bytes, num_threads=1)
    for at, numbers in enumerate(cache.ahead(iter(of_steps), lambda numbers: numbers)):
        while not cache._kept.keys() <= loads:
            time.sleep(0)  # until all that was begun is there
        coming = {number for later in of_steps[at : at + 5] for number in later}  # a window has some 9 steps
        assert coming <= loads
        assert set(numbers) <= loads


def test_only_heavy_data_has_its_bytes_in_the_digest() -> None:
    heavy, small = heavy_table(), make_table(5000)
    for table, is_heavy in ((heavy, True), (replace(small, slice_bytes=np.full(20, 10**6)), False)):
        rules = [BatchRule(samples=24, window_bytes=size) for size in (1 << 28, 1 << 29)]
        digests = {Plan(table, rule, 0, "d").digest for rule in rules}
        digests.add(Plan(replace(table, slice_bytes=table.slice_bytes + 1), rules[0], 0, "d").digest)
        assert len(digests) == (3 if is_heavy else 1)


def test_any_number_of_ranks_takes_the_same_micro_batches() -> None:
    plan = Plan(make_table(200), BatchRule(samples=40, virtual_streams=8), 0, "d")
    planned = next(plan.steps())
    alone = planned.rows_of(0, 1, 8)
    assert len(alone) == 8
    for world_size in range(1, 10):
        shared = [planned.rows_of(rank, world_size, 8) for rank in range(world_size)]
        assert len({len(parts) for parts in shared}) == 1  # ranks make equally many passes
        dealt = [rows for parts in shared for rows in parts]
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(dealt, alone, strict=False))
        assert all(not len(rows) for rows in dealt[8:])  # stand-ins


def test_uneven_workers_and_unclear_rules_are_refused() -> None:
    check_world_size(4, 2)
    with pytest.raises(ConfigError, match="virtual_streams"):
        check_world_size(4, 3)
    with pytest.raises(ConfigError, match="num_workers x accumulate"):
        check_world_size(4, 2, 4)
    for values in ({}, {"samples": 3, "tokens": 3}, {"samples": 3, "mixture": {}}):
        with pytest.raises(ValidationError):
            BatchRule.model_validate(values)
    with pytest.raises(InputError, match="no training rows"):
        Plan(make_table(0), RULES[0], 0, "d")


class ListSource:
    """Batches that are just their rows."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.num_made, self.fails_at = 0, fails_at

    def ahead(self, steps: Iterator[RankStep]) -> Generator[RankStep, None, None]:
        yield from steps

    def batch(self, rows: Rows) -> list[int]:
        self.num_made += 1
        if self.num_made == self.fails_at:
            raise InputError("bad row")
        return rows.tolist()


def test_batches_come_in_planned_order_from_any_step_and_cover_both_ranks() -> None:
    plan = Plan(make_table(100), BatchRule(samples=10, virtual_streams=2), seed=0, data_digest="d")
    parts: list[list[Batch[list[int]]]] = [list(iterate(plan, ListSource(), 25, 7, rank, 2)) for rank in range(2)]
    assert [batch.planned.step for batch in parts[0]] == list(range(7, 25))
    for first, second in zip(*parts, strict=True):
        (ours,), (theirs,) = first.micro_batches, second.micro_batches
        assert ours.content + theirs.content == first.planned.rows.tolist()
        assert (ours.weight, theirs.weight) == (1.0, 1.0)


def test_micro_batches_are_what_more_ranks_would_take() -> None:
    plan = Plan(make_table(100), BatchRule(samples=10, virtual_streams=4), seed=0, data_digest="d")
    (alone,) = list(iterate(plan, ListSource(), 1, 0, 0, 1, num_micro_batches=4))
    ranks = [next(iter(iterate(plan, ListSource(), 1, 0, rank, 4))) for rank in range(4)]
    assert alone.micro_batches == tuple(batch.micro_batches[0] for batch in ranks)


def test_a_rank_without_rows_still_takes_the_step() -> None:
    plan = Plan(make_table(3), BatchRule(samples=1, virtual_streams=2), seed=0, data_digest="d")
    batches = list(iterate(plan, ListSource(), 3, 0, 1, 2))
    stand_ins = [batch.planned.rows.tolist() for batch in batches]
    assert [[(m.content, m.weight) for m in batch.micro_batches] for batch in batches] == [
        [(r, 0.0)] for r in stand_ins
    ]


def test_an_error_of_the_reader_is_raised_in_the_loop_and_closing_ends_the_thread() -> None:
    plan = Plan(make_table(100), BatchRule(samples=10), seed=0, data_digest="d")
    batches = iterate(plan, ListSource(fails_at=3), 100, 0, 0, 1)
    next(batches)
    next(batches)
    with pytest.raises(InputError, match="bad row"):
        next(batches)
    source = ListSource()
    batches = iterate(plan, source, 100, 0, 0, 1)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert source.num_made < 10
