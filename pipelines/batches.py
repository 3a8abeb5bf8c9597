"""From embedded rows to batches: a pure plan says which rows a step takes, an iterator reads them in that order.

The plan knows only lengths, tasks and slices of the rows, a seed and a rule; the samples of a step never depend on the
number of workers. Each step is cut into V virtual streams, and a rank of W takes V/W of them. The position in the data
is a step of the plan: a resumed run, on the same or another W, sees exactly what is left.

`iterate` executes the plan by reading slices in a background thread of the training process.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from nexusgen.config import Config
from nexusgen.errors import ConfigError, InputError
from nexusgen.schema import TASKS, Task

SHUFFLE_ROWS = 4096  # rows mixed with each other: whole slices, read once each, that a worker can hold
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

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def digest(self) -> str:
        """sha256 over all entries."""
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

    def rows_of(self, rank: int, world_size: int, num_parts: int = 1) -> list[Rows]:
        """The rows that one rank takes, in so many parts, one after another."""
        share = len(self.streams) // (world_size * num_parts)
        first = rank * num_parts
        return [
            np.concatenate(self.streams[part * share : (part + 1) * share]) for part in range(first, first + num_parts)
        ]


def plan_epoch(table: RowTable, rule: BatchRule, seed: int, epoch: int) -> list[Rows]:
    """The batches of one epoch, a pure function of its arguments.

    Without a mixture every row occurs exactly once and nothing is dropped at the end. With one, an epoch is as long as
    the task that lasts longest needs for each of its rows; rows of the others come round again, reshuffled.
    Raises: InputError if a task of the mixture has no rows.
    """
    sequence = _sequence(table, rule, seed, epoch)
    if rule.samples is not None:
        return np.array_split(sequence, -(-len(sequence) // rule.samples))
    assert rule.tokens is not None
    rng = np.random.default_rng([seed, epoch, 1])
    batches: list[Rows] = []
    for start in range(0, len(sequence), LENGTH_ROWS):
        window = sequence[start : start + LENGTH_ROWS]
        cut = _cut_by_tokens(window[np.argsort(table.lengths[window], kind="stable")], table.lengths, rule.tokens)
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


def _sequence(table: RowTable, rule: BatchRule, seed: int, epoch: int) -> Rows:
    """The rows of an epoch in shuffled order, tasks interleaved evenly by their shares."""
    if rule.mixture is None:
        return _shuffled(np.arange(len(table)), table.slices, seed, epoch, 0)
    pools = [np.flatnonzero(table.tasks == TASKS.index(task)) for task in rule.mixture]
    for task, pool in zip(rule.mixture, pools, strict=True):
        if not len(pool):
            raise InputError(
                f"the mixture asks for task {task}, but the data has no training row of it: remove the task"
            )
    total = sum(rule.mixture.values())
    shares = [share / total for share in rule.mixture.values()]
    length = max(len(pool) / share for pool, share in zip(pools, shares, strict=True))
    parts, places = [], []
    for number, (pool, share) in enumerate(zip(pools, shares, strict=True)):
        count = round(length * share)
        parts.append(_from_endless(pool, table.slices, seed, number + 1, epoch * count, count))
        places.append((np.arange(count) + 0.5) / count)
    return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]


def _from_endless(pool: Rows, slices: Rows, seed: int, stream: int, start: int, count: int) -> Rows:
    """`count` rows from place `start` of the endless sequence of a pool's shuffled passes."""
    first, last = start // len(pool), (start + count - 1) // len(pool)
    passes = [_shuffled(pool, slices, seed, number, stream) for number in range(first, last + 1)]
    offset = start - first * len(pool)
    return np.concatenate(passes)[offset : offset + count]


def _shuffled(rows: Rows, slices: Rows, seed: int, epoch: int, stream: int) -> Rows:
    """Slices in random order, then rows mixed within windows of whole slices: few slices are in use at a time."""
    rng = np.random.default_rng([seed, epoch, 0, stream])
    numbers, dense = np.unique(slices[rows], return_inverse=True)
    rank = rng.permutation(len(numbers))[dense]
    ordered = rows[np.argsort(rank, kind="stable")]
    ends = np.cumsum(np.bincount(rank))
    shuffled, start = [], 0
    for index, end in enumerate(ends):
        if end - start >= SHUFFLE_ROWS or index == len(ends) - 1:
            shuffled.append(rng.permutation(ordered[start:end]))
            start = end
    return np.concatenate(shuffled)


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
        """`data_digest` names the content behind the table. Raises: InputError if there are no rows."""
        if not len(table):
            raise InputError("the data has no training rows for this stage")
        self._table, self._rule, self._seed = table, rule, seed
        text = f"{table.digest} {rule.model_dump_json()} {seed} {data_digest}"
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


class Source(Protocol[BatchT_co]):
    """Where a plan's rows come from: number in, batch out."""

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
    num_micro_batches: int = 1,
) -> Iterator[Batch[BatchT]]:
    """One rank's batches of the steps from `from_step` to `num_steps`, made ahead in a background thread.

    What the thread raises is raised here. Closing the iterator ends the thread.
    """
    made: queue.Queue[tuple[PlannedStep, tuple[MicroBatch[BatchT], ...]] | BaseException | None]
    made = queue.Queue(NUM_PREFETCHED)
    is_closed = threading.Event()

    def work() -> None:
        try:
            for planned in itertools.islice(plan.steps(from_step), num_steps - from_step):
                parts = planned.rows_of(rank, world_size, num_micro_batches)
                micro_batches = tuple(
                    MicroBatch(source.batch(rows if len(rows) else planned.rows[:1]), float(len(rows) > 0))
                    for rows in parts
                )
                if not _put(made, (planned, micro_batches), is_closed):
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


def _put(made: queue.Queue[Any], item: Any, is_closed: threading.Event) -> bool:
    while not is_closed.is_set():
        try:
            made.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
