"""What is kept of an evaluation: whole, of these settings, and gone when it isn't needed any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nexusgen.errors import InputError
from pipelines.suite_demo_world import DemoWorldSuite
from pipelines.suites import Unit
from pipelines.unit_rows import UnitRows

SUITE = DemoWorldSuite(
    seed=0, steps=2, per_category=1, num_explicit=0, num_questions=4, num_edits=0, num_pictures=0, batch_size=2
)
UNITS = [Unit("understanding", 0, 2), Unit("understanding", 2, 4)]


def rows_of(unit: Unit) -> list[dict[str, Any]]:
    row = dict.fromkeys(SUITE.schema.names)
    return [{**row, "kind": unit.kind, "index": place, "score": 1.0} for place in range(unit.first, unit.last)]


def test_finished_units_are_found_with_their_rows(tmp_path: Path) -> None:
    kept = UnitRows.of(SUITE, str(tmp_path))
    assert kept.finished(UNITS) == {}
    kept.write(UNITS[1], rows_of(UNITS[1]))
    assert kept.finished(UNITS) == {UNITS[1]: rows_of(UNITS[1])}
    with pytest.raises(InputError, match="all of them share"):
        kept.read(UNITS[0])


def test_a_damaged_or_short_file_is_as_good_as_none(tmp_path: Path) -> None:
    kept = UnitRows.of(SUITE, str(tmp_path))
    kept.write(UNITS[0], rows_of(UNITS[0])[:1])
    kept.write(UNITS[1], rows_of(UNITS[1]))
    (damaged,) = Path(kept.parts).glob("*000004.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert kept.finished(UNITS) == {}


def test_rows_of_other_settings_arent_taken(tmp_path: Path) -> None:
    kept = UnitRows.of(SUITE, str(tmp_path))
    other = UnitRows.of(SUITE.model_copy(update={"seed": 1}), str(tmp_path))
    kept.write(UNITS[0], rows_of(UNITS[0]))
    assert other.finished(UNITS) == {}
    kept.write_all(rows_of(UNITS[0]))
    assert (kept.has_all(), other.has_all()) == (True, False)
    assert other.read_all() is None
    assert kept.read_all() == rows_of(UNITS[0])


def test_parts_are_removed_and_all_rows_stay(tmp_path: Path) -> None:
    kept = UnitRows.of(SUITE, str(tmp_path))
    kept.write(UNITS[0], rows_of(UNITS[0]))
    kept.write_all(rows_of(UNITS[0]))
    (Path(kept.parts) / ".x.parquet.tmp-000000000001").touch()  # of a writer that was killed
    kept.remove_parts()
    assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]
    kept.remove_parts()  # nothing left: no error
