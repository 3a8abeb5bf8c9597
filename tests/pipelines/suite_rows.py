"""A suite's rows, as the job's actors make them, without Ray."""

from __future__ import annotations

from typing import Any

from nexusgen.model.weights import Model
from pipelines.suites import EvaluationSuite


def rows_of(suite: EvaluationSuite, model: Model) -> list[dict[str, Any]]:
    """All rows of all units, in order."""
    work = suite.worker(model)
    return [
        {"kind": unit.kind, "index": unit.first + place, **row}
        for unit in suite.units()
        for place, row in enumerate(work(unit))
    ]
