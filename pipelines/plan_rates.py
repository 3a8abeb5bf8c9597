"""How fast a job is: from arithmetic and a GPU's peak, or from what a run of it at small size took.

What isn't known exactly stands in plan_rates.yaml, each figure with its source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nexusgen.config import Config, parse_config
from nexusgen.errors import UsageError
from nexusgen.schema import Task
from pipelines.flops import PEAK_FLOPS, peak_flops

RATES_FILE = Path(__file__).with_name("plan_rates.yaml")
ELSEWHERE = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")  # what rates are measured by touches neither
CPU = "CPU"  # in place of a GPU's kind: this machine's cores, whose rates are measured


class Assumptions(Config):
    """What a plan takes for granted; plan_rates.yaml tells where each figure is from."""

    training_utilisation: float
    encoding_utilisation: float
    gpu_hours_between_failures: float
    restart_seconds: float
    checkpoint_gb_per_s_per_worker: float
    online_share_of_step: float
    usd_per_gb_month: float
    decoded_images_per_core_s: float
    shares: dict[Task, float]
    text_tokens: float
    picture_bytes: float


def read_assumptions() -> Assumptions:
    """What plan_rates.yaml says."""
    return parse_config(Assumptions, yaml.safe_load(RATES_FILE.read_text(encoding="utf-8")), str(RATES_FILE))


@dataclass(frozen=True)
class Devices:
    """So many devices of a kind; `peak` in FLOP/s of one in bf16, None for CPUs."""

    number: int
    kind: str
    peak: float | None

    def __str__(self) -> str:
        return f"{self.number}x{self.kind}"


def parse_devices(text: str) -> Devices:
    """Devices from NxKIND, like 8xH100, or 1xCPU. Raises: UsageError."""
    known = ", ".join(pattern.replace(r"\b", "") for pattern, _ in PEAK_FLOPS)
    number, separator, kind = text.partition("x")
    if not separator or not number.isdecimal() or int(number) == 0 or not kind:
        raise UsageError(f"--gpus {text}: wanted NxKIND, a number > 0 and a kind of GPU, like 8xH100, or 1xCPU")
    if kind.upper() == CPU:
        if int(number) != 1:
            raise UsageError(f"--gpus {text}: CPUs are those of this machine, as a whole: give 1xCPU")
        return Devices(1, CPU, None)
    peak = peak_flops(kind)
    if peak is None:
        raise UsageError(f"--gpus {text}: the peak of {kind!r} isn't known; known are {known}, and 1xCPU")
    return Devices(int(number), kind, peak)


@contextmanager
def on_this_machine() -> Iterator[None]:
    """Jobs of the body have a Ray and an MLflow of their own, whatever the environment names.

    A small walk registers and promotes models that are worth nothing: they mustn't meet those of a real registry. And
    its storage is a folder of this machine, which a cluster's nodes don't see.
    """
    hidden = {name: os.environ.pop(name) for name in ELSEWHERE if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@dataclass(frozen=True)
class Rate:
    """One kind of a job's work, as measured: seconds of a unit by the wall, with all workers at it, and of CPU."""

    units: float
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Calibration:
    """A job at small size: what each kind of its work took, and what was left, which a job of any size takes."""

    seconds: float  # all of the small job
    cpu_seconds: float
    fixed_seconds: float
    fixed_cpu_seconds: float
    rates: Mapping[str, Rate]

    def predict(self, units: Mapping[str, float]) -> tuple[float, float]:
        """Wall and CPU seconds of a job with so many units of each kind of work.

        Raises: KeyError for a kind of work that the small job didn't have.
        """
        seconds, cpu_seconds = self.fixed_seconds, self.fixed_cpu_seconds
        for kind, number in units.items():
            if number:
                rate = self.rates[kind]
                seconds += number * rate.seconds
                cpu_seconds += number * rate.cpu_seconds
        return seconds, cpu_seconds


def calibrate(attempts: Iterable[Mapping[str, Any]], seconds: float, cpu_seconds: float) -> Calibration:
    """Rates from the attempts of a small job (see accounting.py) that took so many wall and CPU seconds in all."""
    sums: dict[str, list[float]] = {}
    workers = 1
    for attempt in attempts:
        workers = attempt["workers"]
        for kind, numbers in attempt["work"].items():
            sums[kind] = [old + new for old, new in zip(sums.get(kind, [0.0] * 3), numbers, strict=True)]
    rates = {
        kind: Rate(units, busy / units / workers, busy_cpu / units)
        for kind, (units, busy, busy_cpu) in sums.items()
        if units
    }
    busy = sum(rate.units * rate.seconds for rate in rates.values())
    busy_cpu = sum(rate.units * rate.cpu_seconds for rate in rates.values())
    return Calibration(seconds, cpu_seconds, max(0.0, seconds - busy), max(0.0, cpu_seconds - busy_cpu), rates)
