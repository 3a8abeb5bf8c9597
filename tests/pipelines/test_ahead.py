from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.ahead import map_ahead


def test_results_come_in_order_and_few_are_begun_before_they_are_wanted() -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            begun.append(number)
            yield number

    with ThreadPoolExecutor(3) as pool:
        for taken, square in enumerate(map_ahead(pool, lambda number: number**2, items(), 4)):
            assert square == taken**2
            assert len(begun) <= taken + 4
        assert len(begun) == 20
        assert list(map_ahead(pool, str, [], 4)) == []


def test_an_error_comes_in_its_place() -> None:
    with ThreadPoolExecutor(3) as pool:
        results = map_ahead(pool, lambda number: 1 // number, [1, 0, 1], 2)
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)
