"""What every benchmark prints: its machine, what it measured, what was wanted, and whether it was reached."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Measure:
    """One figure; `wanted` is None where it is only told."""

    measure: str
    wanted: str | None
    got: float
    passed: bool


class Report:
    """Collects measures, telling each on standard error as it comes."""

    def __init__(self) -> None:
        self.measures: list[Measure] = []

    def at_least(self, measure: str, got: float, wanted: float) -> None:
        """Note a figure that must reach `wanted`."""
        self._note(Measure(measure, f">= {wanted:g}", got, got >= wanted))

    def at_most(self, measure: str, got: float, wanted: float) -> None:
        """Note a figure that mustn't exceed `wanted`."""
        self._note(Measure(measure, f"<= {wanted:g}", got, got <= wanted))

    def tell(self, measure: str, got: float) -> None:
        """Note a figure that nothing is wanted of."""
        self._note(Measure(measure, None, got, True))

    def _note(self, measure: Measure) -> None:
        self.measures.append(measure)
        print(_line(measure), file=sys.stderr, flush=True)

    def finish(self, as_json: bool) -> int:
        """Print all; the exit code is 1 if a wanted figure wasn't reached."""
        if as_json:
            print(json.dumps({"machine": machine(), "measures": [asdict(one) for one in self.measures]}))
        else:
            print("\n".join([str(machine()), *map(_line, self.measures)]))
        return 0 if all(one.passed for one in self.measures) else 1


def _line(measure: Measure) -> str:
    verdict = "    " if measure.wanted is None else "ok  " if measure.passed else "FAIL"
    wanted = f"wanted {measure.wanted}" if measure.wanted is not None else ""
    return f"{verdict} {measure.got:>9.3f}  {wanted:<16} {measure.measure}"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    found: dict[str, Any] = {"platform": platform.platform(), "cpus": os.cpu_count(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
