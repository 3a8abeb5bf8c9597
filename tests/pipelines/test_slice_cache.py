from __future__ import annotations

import threading
import time

import pytest

from nexusgen.errors import InputError
from pipelines.slice_cache import SliceCache


class Loads:
    """Loads numbers as themselves; notes which, in order."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.may_end = threading.Event()
        self.may_end.set()

    def __call__(self, number: int) -> int:
        self.numbers.append(number)
        assert self.may_end.wait(60)
        if number == 13:
            raise InputError("slice 13 is damaged")
        return number


def test_without_a_plan_the_least_recently_used_goes_first() -> None:
    loads = Loads()
    cache = SliceCache(loads, [10] * 20, 30, num_threads=1)
    for number in (0, 1, 2, 0, 3, 0, 1):
        assert cache.get(number) == number
    assert loads.numbers == [0, 1, 2, 3, 1]
    assert cache.num_bytes == 30


def test_what_a_known_step_needs_is_kept() -> None:
    loads = Loads()
    cache = SliceCache(loads, [10] * 20, 30, num_threads=1)
    steps = [[0], [1], [2], [3], [0], [4], [5], [0]]
    for step in cache.ahead(iter(steps), list):
        assert cache.get(step[0]) == step[0]
        assert cache.num_bytes <= 30
    assert loads.numbers == [0, 1, 2, 3, 4, 5]


def test_what_is_needed_latest_goes_first() -> None:
    loads = Loads()
    cache = SliceCache(loads, [10] * 20, 20, num_threads=1)
    for step in cache.ahead(iter([[0], [1], [2], [1], [3], [1], [0]]), list):
        cache.get(step[0])
    assert loads.numbers == [0, 1, 2, 3, 0]  # 0 goes for 2, and 2 for 3


def test_loads_begin_before_their_step_and_no_more_than_fit() -> None:
    loads = Loads()
    loads.may_end.clear()
    cache = SliceCache(loads, [10] * 20, 30, num_threads=8)
    steps = cache.ahead(iter([[0], [1, 2], [3], [4]]), list)
    assert next(steps) == [0]  # not yet loaded: that is for `get` to wait for
    while len(loads.numbers) < 3:
        time.sleep(0.001)
    assert cache.num_bytes == 30
    assert sorted(loads.numbers) == [0, 1, 2]
    loads.may_end.set()
    assert list(steps) == [[1, 2], [3], [4]]


def test_a_step_larger_than_the_budget_is_loaded_all_the_same() -> None:
    loads = Loads()
    cache = SliceCache(loads, [10] * 20, 5, num_threads=2)
    for step in cache.ahead(iter([[0, 1], [1, 2], [3]]), list):
        assert [cache.get(number) for number in step] == step
    assert sorted(loads.numbers) == [0, 1, 2, 3]


def test_an_error_of_loading_is_raised_where_the_slice_is_asked_for_and_the_slice_is_tried_again() -> None:
    loads = Loads()
    cache = SliceCache(loads, [10] * 20, 100, num_threads=1)
    steps = cache.ahead(iter([[1], [13], [2]]), list)
    assert cache.get(next(steps)[0]) == 1
    for _ in range(2):
        with pytest.raises(InputError, match="13 is damaged"):
            cache.get(13)
    assert loads.numbers.count(13) == 2


def test_closing_drops_what_has_not_begun() -> None:
    loads = Loads()
    loads.may_end.clear()
    cache = SliceCache(loads, [10] * 20, 1000, num_threads=1)
    steps = cache.ahead(iter([[number] for number in range(10)]), list)
    next(steps)
    steps.close()
    loads.may_end.set()
    assert cache.get(0) == 0
    assert cache.get(9) == 9
    assert loads.numbers == [0, 9]
