"""From embedded rows to batches: a pure plan says which rows a step takes, an iterator reads them in that order.

The plan knows only lengths, tasks and slices of the rows, a seed and a rule; the samples of a step never depend on the
number of workers. Each step is cut into V virtual streams, of which its micro-batches are made; ranks share those. The
position in the data is a step of the plan: a resumed run, on any number of ranks, sees exactly what is left.

`iterate` executes the plan by reading slices in a background thread of the training process.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from nexusgen.config import Config
from nexusgen.errors import ConfigError, InputError
from nexusgen.schema import TASKS, Task

SHUFFLE_ROWS = 4096  # rows mixed with each other, at most: whole slices, read once each
SHUFFLE_BYTES = 1 << 29  # of the same, of all tasks together; a worker holds two such windows
LENGTH_ROWS = 1024  # rows sorted by length together before a token budget cuts them; more pads less
NUM_PREFETCHED = 4  # batches made ahead

BatchT = TypeVar("BatchT")
BatchT_co = TypeVar("BatchT_co", covariant=True)
Rows = Int[np.ndarray, " rows"]


class BatchRule(Config):
    """How batches are formed. Exactly one of `samples` and `tokens` is set."""

    samples: int | None = Field(default=None, ge=1)  # rows of a step
    tokens: int | None = Field(default=None, ge=1)  # budget of a step: rows x longest row, padding included
    mixture: dict[Task, float] | None = None  # share of each task in a step; None: as the data has them
    virtual_streams: int = Field(default=2, ge=1)
    window_bytes: int = Field(default=SHUFFLE_BYTES, ge=1)  # of the slices whose rows are mixed with each other

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.samples is None) == (self.tokens is None):
            raise ValueError("set either the number of samples or the number of tokens of a step")
        if self.mixture is not None and (not self.mixture or min(self.mixture.values()) <= 0):
            raise ValueError("mixture: every named task needs a share above 0")
        return self


@dataclass(frozen=True)
class RowTable:
    """What a plan needs to know of the training rows, one entry per row."""

    lengths: Int[np.ndarray, " rows"]  # tokens
    tasks: Int[np.ndarray, " rows"]  # index into schema.TASKS
    slices: Int[np.ndarray, " rows"]  # rows of one number are stored together; numbers needn't be dense
    # In memory, of the slice of each number, whole; empty: so small that they don't matter.
    slice_bytes: Int[np.ndarray, " slices"] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def digest(self) -> str:
        """sha256 over all entries of rows."""
        digest = hashlib.sha256()
        for column in (self.lengths, self.tasks, self.slices):
            digest.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class PlannedStep:
    """The rows of one step, by virtual stream; a stream may be empty where a step has fewer rows than streams."""

    step: int
    epoch: int
    streams: tuple[Rows, ...]

    @property
    def rows(self) -> Rows:
        """All rows of the step."""
        return np.concatenate(self.streams)

    def rows_of(self, rank: int, world_size: int, num_micro_batches: int | None = None) -> list[Rows]:
        """The micro-batches of the step that one rank takes, one after another; every rank has equally many.

        A step is always cut into the same `num_micro_batches` (default: one for each rank), whoever computes them:
        fewer ranks take more each. Where they can't be shared evenly, the last ranks get empty ones in their place.
        """
        num_micro_batches = num_micro_batches or world_size
        share = len(self.streams) // num_micro_batches
        each = -(-num_micro_batches // world_size)
        return [
            np.concatenate(self.streams[number * share : (number + 1) * share])
            if number < num_micro_batches
            else self.streams[0][:0]
            for number in range(rank * each, (rank + 1) * each)
        ]


@dataclass(frozen=True)
class _Pool:
    """Rows that are shuffled by themselves: all of them, or those of one task of a mixture."""

    rows: Rows
    stream: int  # of random numbers
    max_bytes: int | None  # of the slices of a window; None: any SHUFFLE_ROWS rows are within the limit


def plan_epoch(table: RowTable, rule: BatchRule, seed: int, epoch: int) -> list[Rows]:
    """The batches of one epoch, a pure function of its arguments.

    Without a mixture every row occurs exactly once and nothing is dropped at the end. With one, an epoch is as long as
    the task that lasts longest needs for each of its rows; rows of the others come round again, reshuffled.

    Whoever can hold `num_window_bytes` twice reads each slice once in each pass over the rows of a task.
    Raises: InputError if a task of the mixture has no rows.
    """
    pools = _pools(table, rule)
    sequence = _sequence(table, pools, rule, seed, epoch)
    if rule.samples is not None:
        return np.array_split(sequence, -(-len(sequence) // rule.samples))
    assert rule.tokens is not None
    rng = np.random.default_rng([seed, epoch, 1])
    batches: list[Rows] = []
    for window in _length_windows(sequence, table, pools):
        cut = _cut_by_tokens(window[np.argsort(table.lengths[window], kind="stable")], table.lengths, rule.tokens)
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


def num_window_bytes(table: RowTable, rule: BatchRule) -> int:
    """Bytes in memory of the slices that are in use at a time, but where one window ends and the next one begins.

    At most `rule.window_bytes`, or a slice of each task where those are larger.
    """
    return sum(_limit(table, rows, rule) for rows in _rows_of_pools(table, rule))


def _pools(table: RowTable, rule: BatchRule) -> list[_Pool]:
    """The rule's pools. Raises: InputError if a task of the mixture has no rows."""
    pools = []
    for number, rows in enumerate(_rows_of_pools(table, rule)):
        limit = _limit(table, rows, rule)
        is_bound = _max_window_bytes(table, rows) > limit
        pools.append(_Pool(rows, number + (rule.mixture is not None), limit if is_bound else None))
    return pools


def _rows_of_pools(table: RowTable, rule: BatchRule) -> list[Rows]:
    if rule.mixture is None:
        return [np.arange(len(table))]
    pools = [np.flatnonzero(table.tasks == TASKS.index(task)) for task in rule.mixture]
    for task, rows in zip(rule.mixture, pools, strict=True):
        if not len(rows):
            raise InputError(
                f"the mixture asks for task {task}, but the data has no training row of it: remove the task"
            )
    return pools


def _limit(table: RowTable, rows: Rows, rule: BatchRule) -> int:
    """Bytes of a pool's window: its part of all, but at least one slice."""
    if not len(table.slice_bytes):
        return 0
    largest = int(table.slice_bytes[table.slices[rows]].max())
    return max(rule.window_bytes // (len(rule.mixture) if rule.mixture else 1), largest)


def _max_window_bytes(table: RowTable, rows: Rows) -> int:
    """More than any window of a pool can have that is bounded by rows alone."""
    if not len(table.slice_bytes):
        return 0
    numbers, counts = np.unique(table.slices[rows], return_counts=True)
    sizes = table.slice_bytes[numbers]
    in_rows = int(np.ceil(SHUFFLE_ROWS * (sizes / counts).max())) + int(sizes.max())  # the last slice may stand out
    return min(int(sizes.sum()), in_rows)


def _sequence(table: RowTable, pools: Sequence[_Pool], rule: BatchRule, seed: int, epoch: int) -> Rows:
    """The rows of an epoch in shuffled order, tasks interleaved evenly by their shares."""
    if rule.mixture is None:
        return _shuffled(pools[0], table, seed, epoch)
    total = sum(rule.mixture.values())
    shares = [share / total for share in rule.mixture.values()]
    length = max(len(pool.rows) / share for pool, share in zip(pools, shares, strict=True))
    parts, places = [], []
    for pool, share in zip(pools, shares, strict=True):
        count = round(length * share)
        parts.append(_from_endless(pool, table, seed, epoch * count, count))
        places.append((np.arange(count) + 0.5) / count)
    return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]


def _from_endless(pool: _Pool, table: RowTable, seed: int, start: int, count: int) -> Rows:
    """`count` rows from place `start` of the endless sequence of a pool's shuffled passes."""
    size = len(pool.rows)
    first, last = start // size, (start + count - 1) // size
    passes = [_shuffled(pool, table, seed, number) for number in range(first, last + 1)]
    offset = start - first * size
    return np.concatenate(passes)[offset : offset + count]


def _shuffled(pool: _Pool, table: RowTable, seed: int, number: int) -> Rows:
    """One pass: slices in random order, then rows mixed within windows of whole slices, so that few are in use."""
    rows = pool.rows
    rng = np.random.default_rng([seed, number, 0, pool.stream])
    numbers, dense = np.unique(table.slices[rows], return_inverse=True)
    order = rng.permutation(len(numbers))
    rank = order[dense]
    ordered = rows[np.argsort(rank, kind="stable")]
    ends = np.cumsum(np.bincount(rank)).tolist()
    sizes = np.zeros(len(numbers), dtype=np.int64)
    if pool.max_bytes is not None:
        sizes[order] = table.slice_bytes[numbers]
    max_bytes = pool.max_bytes or 0
    shuffled, start, window_bytes = [], 0, 0
    for index, (end, following) in enumerate(zip(ends, [*sizes[1:].tolist(), 0], strict=True)):
        window_bytes += int(sizes[index])
        is_full = end - start >= SHUFFLE_ROWS or window_bytes + following > max_bytes
        if is_full or index == len(ends) - 1:
            shuffled.append(rng.permutation(ordered[start:end]))
            start, window_bytes = end, 0
    return np.concatenate(shuffled)


def _length_windows(sequence: Rows, table: RowTable, pools: Sequence[_Pool]) -> Iterator[Rows]:
    """Cut a sequence where it is to be sorted by length: LENGTH_ROWS rows, or fewer, lest many slices be in use."""
    is_bound = any(pool.max_bytes is not None for pool in pools)
    max_bytes = sum(pool.max_bytes or _max_window_bytes(table, pool.rows) for pool in pools)
    start = 0
    while start < len(sequence):
        window = sequence[start : start + LENGTH_ROWS]
        if is_bound:
            numbers, firsts = np.unique(table.slices[window], return_index=True)
            by_use = np.argsort(firsts)
            excess = np.flatnonzero(np.cumsum(table.slice_bytes[numbers[by_use]]) > max_bytes)
            if len(excess):
                window = window[: firsts[by_use[excess[0]]]]
        yield window
        start += len(window)


def _cut_by_tokens(rows: Rows, lengths: Rows, budget: int) -> list[Rows]:
    """Cut rows sorted by length into batches of at most `budget` padded tokens; a longer row stands alone."""
    cut, start = [], 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end + 1 - start) * int(lengths[rows[end]]) > budget:
            cut.append(rows[start:end])
            start = end
    return cut


class Plan:
    """Steps of all epochs, one after another without a gap."""

    def __init__(self, table: RowTable, rule: BatchRule, seed: int, data_digest: str) -> None:
        """`data_digest` names the content behind the table.

        Raises: InputError if there are no rows, or none of a task of the mixture.
        """
        if not len(table):
            raise InputError("the data has no training rows for this stage")
        self._table, self._rule, self._seed = table, rule, seed
        text = f"{table.digest} {rule.model_dump_json(exclude={'window_bytes'})} {seed} {data_digest}"
        if any(pool.max_bytes is not None for pool in _pools(table, rule)):
            text += f" {rule.window_bytes} {hashlib.sha256(table.slice_bytes.astype(np.int64).tobytes()).hexdigest()}"
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def steps(self, from_step: int = 0) -> Iterator[PlannedStep]:
        """Planned steps from a position on, without end."""
        first = 0  # step of the epoch's first batch
        for epoch in itertools.count():
            batches = plan_epoch(self._table, self._rule, self._seed, epoch)
            for step, rows in enumerate(batches, start=first):
                if step >= from_step:
                    yield PlannedStep(step, epoch, self._cut(rows))
            first += len(batches)

    @property
    def num_window_bytes(self) -> int:
        """Bytes in memory of the slices that are in use at a time; see the function of that name."""
        return num_window_bytes(self._table, self._rule)

    def num_tokens(self, rows: Rows) -> int:
        """Tokens of these rows, padding not included."""
        return int(self._table.lengths[rows].sum())

    def num_padded_tokens(self, rows: Rows) -> int:
        """Tokens of a batch of these rows, each as long as the longest."""
        return len(rows) * int(self._table.lengths[rows].max(initial=0))

    def _cut(self, rows: Rows) -> tuple[Rows, ...]:
        """Deal rows out by length, so that streams cost about the same."""
        by_length = rows[np.argsort(self._table.lengths[rows], kind="stable")]
        return tuple(by_length[stream :: self._rule.virtual_streams] for stream in range(self._rule.virtual_streams))


def check_world_size(virtual_streams: int, world_size: int, num_parts: int = 1) -> None:
    """Raises: ConfigError if the streams can't be dealt out evenly."""
    if virtual_streams % (world_size * num_parts):
        in_parts = f" in accumulate={num_parts} parts each" if num_parts > 1 else ""
        raise ConfigError(
            f"{world_size} workers can't share virtual_streams={virtual_streams} evenly{in_parts}: "
            f"set virtual_streams to a multiple of {'num_workers x accumulate' if num_parts > 1 else 'num_workers'}"
        )


# --- execution: the plan's rows, read and prepared in the training process ---


@dataclass(frozen=True)
class MicroBatch(Generic[BatchT]):
    """What one forward takes. `weight` is 0 where a step has too few rows: a stand-in, so that ranks stay in step."""

    content: BatchT
    weight: float


@dataclass(frozen=True)
class Batch(Generic[BatchT]):
    """One rank's part of a step, and how long the training loop waited for it."""

    planned: PlannedStep
    micro_batches: tuple[MicroBatch[BatchT], ...]
    wait_s: float


@dataclass(frozen=True)
class RankStep:
    """What one rank takes of a step: the rows of each micro-batch, and its weight (see `MicroBatch`)."""

    planned: PlannedStep
    parts: tuple[Rows, ...]
    weights: tuple[float, ...]


class Source(Protocol[BatchT_co]):
    """Where a plan's rows come from: number in, batch out."""

    def ahead(self, steps: Iterator[RankStep]) -> Generator[RankStep, None, None]:
        """The same steps; what later ones need is being fetched while one is used."""
        ...

    def batch(self, rows: Rows) -> BatchT_co:
        """The batch of these rows, in their order. Raises: InputError if a row can't be used."""
        ...


def iterate(
    plan: Plan,
    source: Source[BatchT],
    num_steps: int,
    from_step: int,
    rank: int,
    world_size: int,
    num_micro_batches: int | None = None,
) -> Iterator[Batch[BatchT]]:
    """One rank's batches of the steps from `from_step` to `num_steps`, made ahead in a background thread.

    `num_micro_batches` are those of a whole step, over all ranks; default: one for each.
    What the thread raises is raised here. Closing the iterator ends the thread.
    """
    made: queue.Queue[tuple[PlannedStep, tuple[MicroBatch[BatchT], ...]] | BaseException | None]
    made = queue.Queue(NUM_PREFETCHED)
    share = (rank, world_size, num_micro_batches)
    is_closed = threading.Event()

    def work() -> None:
        try:
            with contextlib.closing(source.ahead(_steps_of(plan, num_steps, from_step, *share))) as steps:
                for step in steps:
                    made_of_it = zip(map(source.batch, step.parts), step.weights, strict=True)
                    micro_batches = tuple(MicroBatch(content, weight) for content, weight in made_of_it)
                    if not _put(made, (step.planned, micro_batches), is_closed):
                        return
            _put(made, None, is_closed)
        except BaseException as error:  # not lost in a thread: raised where the batches are used
            _put(made, error, is_closed)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            started = time.perf_counter()
            item = made.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield Batch(*item, wait_s=time.perf_counter() - started)
    finally:
        is_closed.set()
        thread.join()


def _steps_of(
    plan: Plan, num_steps: int, from_step: int, rank: int, world_size: int, num_micro_batches: int | None
) -> Iterator[RankStep]:
    for planned in itertools.islice(plan.steps(from_step), num_steps - from_step):
        parts = planned.rows_of(rank, world_size, num_micro_batches)
        stand_in = planned.rows[:1]
        yield RankStep(
            planned,
            tuple(rows if len(rows) else stand_in for rows in parts),
            tuple(float(len(rows) > 0) for rows in parts),
        )


def _put(made: queue.Queue[Any], item: Any, is_closed: threading.Event) -> bool:
    while not is_closed.is_set():
        try:
            made.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
