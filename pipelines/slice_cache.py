"""Slices in memory: within a budget, and read before they are needed, as a plan tells what will be."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

STEPS_AHEAD = 4096  # whose slices are known: what a window of rows still needs isn't dropped; a step is a few KB
STEPS_AT_A_TIME = 16  # looked at between two that are taken, so that the first one needn't wait for all
NEVER = 1 << 62

SliceT = TypeVar("SliceT")
StepT = TypeVar("StepT")


class SliceCache(Generic[SliceT]):
    """Slices by number, each loaded once for as long as there is room.

    Loaded in the order of their use in known steps. For a slice that is to be loaded those go that are needed latest
    after it, or not at all (Belady's rule, which loads least), as soon as they aren't needed before it; among equals
    the least recently used first. What a single step uses is held even if that is more than the budget.
    """

    def __init__(
        self, load: Callable[[int], SliceT], sizes: Sequence[int], max_bytes: int, num_threads: int = 2
    ) -> None:
        """`sizes` are bytes in memory by number; so many threads `load` at a time."""
        self._load, self._sizes, self._max_bytes = load, sizes, max_bytes
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="slices")
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Future[SliceT]] = OrderedDict()  # least recently used first
        self._num_bytes = 0  # of those
        self._uses: dict[int, deque[int]] = {}  # numbers of the known steps that will use a slice

    @property
    def num_bytes(self) -> int:
        """Of all slices that are kept, or being loaded."""
        return self._num_bytes

    def get(self, number: int) -> SliceT:
        """The slice, loaded if need be. Raises: what `load` raises."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
            else:
                self._schedule(number, NEVER, is_due=True)
            future = self._kept[number]
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._kept.get(number) is future:
                    self._drop(number)  # to be tried again
            raise

    def ahead(
        self, steps: Iterator[StepT], slices_of: Callable[[StepT], Sequence[int]]
    ) -> Generator[StepT, None, None]:
        """The same steps; while one is used, slices of later ones are loaded. One such iterator at a time."""
        known: deque[tuple[StepT, Sequence[int]]] = deque()
        wanted: deque[tuple[int, int]] = deque()  # (step, slice) of known steps, that isn't yet on its way
        num_known = num_taken = 0
        try:
            while True:
                found = list(itertools.islice(steps, min(STEPS_AT_A_TIME, STEPS_AHEAD - len(known))))
                found_slices = [slices_of(step) for step in found]
                known.extend(zip(found, found_slices, strict=True))
                if not known:
                    return
                with self._lock:
                    for numbers in found_slices:
                        for number in numbers:
                            wanted.append((num_known, number))
                            self._uses.setdefault(number, deque()).append(num_known)
                        num_known += 1
                    while wanted:
                        at, number = wanted[0]
                        if number not in self._kept and not self._schedule(number, at, is_due=at == num_taken):
                            break
                        wanted.popleft()
                step, numbers = known.popleft()
                yield step
                with self._lock:
                    num_taken += 1
                    for number in numbers:
                        self._uses[number].popleft()
        finally:
            with self._lock:
                self._uses.clear()
                for number, future in list(self._kept.items()):
                    if future.cancel():  # it hasn't begun, and nobody will ask for it
                        self._drop(number)

    def _schedule(self, number: int, step: int, *, is_due: bool) -> bool:
        """Begin to load a slice that a step uses, if there is room, or it is due."""
        excess = self._num_bytes + self._sizes[number] - self._max_bytes
        dropped: list[int] = []
        if excess > 0:
            uses = {kept: self._uses_around(kept, step) for kept in self._kept}
            for kept in sorted(uses, key=lambda kept: (-uses[kept][1], uses[kept][0])):
                if excess <= 0 or uses[kept][1] <= step < NEVER:
                    break
                if uses[kept][0] and not is_due:
                    return False
                dropped.append(kept)
                excess -= self._sizes[kept]
            if excess > 0 and not is_due:
                return False
        for kept in dropped:
            self._drop(kept)
        self._kept[number] = self._pool.submit(self._load, number)
        self._num_bytes += self._sizes[number]
        return True

    def _uses_around(self, number: int, step: int) -> tuple[bool, int]:
        """Whether known steps before this one use a slice, and the first that does from this one on."""
        uses = self._uses.get(number) or (NEVER,)
        return uses[0] < step, next((use for use in uses if use >= step), NEVER)

    def _drop(self, number: int) -> None:
        del self._kept[number]
        self._num_bytes -= self._sizes[number]
