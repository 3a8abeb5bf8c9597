"""What a job has used: CPU and GPU hours, samples, bytes and, where prices are configured, money.

Kept in STORAGE/accounts/JOB/..., one file for each thing that is made, as a list of attempts: a job that is killed and
started again begins a new attempt, so what it used before isn't lost (but for the last WRITE_EVERY_S seconds).

    accounts/pack/NAME.json   accounts/embed/NAME/MODE.json   accounts/train/NAME/STAGE.json
    accounts/register/NAME.json   accounts/evaluate/FINGERPRINT.json

Attempts with the same `recipe` made the same thing. The MLflow run that finishes it gets the sum of all attempts since
it was last finished: over runs, every second counts once. Each attempt tells its `seconds`, and of `work` by kind how
many units were done in how many wall and CPU seconds, summed over `workers` that work side by side: `plan` makes rates
of that, and takes the rest for what a job costs whatever it does.

CPU seconds are those of the driver and of all that descends from it, Ray's own processes among them, as `CpuMeter` sees
them; workers on other machines, or of a cluster that somebody else started, report their own. Of a training only the
workers count, all ranks, as two trainings may share a driver. GPU seconds are those allocated, busy or not; of a
training since its workers' work began. Attempts enter themselves as work is done, but `register` does so at its
beginning and end alone: of one that is killed nothing is told.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from nexusgen.config import Config
from nexusgen.errors import InputError, ResourceError
from pipelines import process_use, storage
from pipelines.runtime import CpuMeter

log = logging.getLogger(__name__)

FOLDER = "accounts"
WRITE_EVERY_S = 5.0


class Prices(Config):
    """What an hour costs, in US dollars."""

    gpu_hour: float = Field(default=0.0, ge=0)  # of a GPU, allocated
    cpu_hour: float = Field(default=0.0, ge=0)  # of a core, used


@dataclass(frozen=True)
class Usage:
    """What work took. `cost_usd` is None where no price was configured."""

    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    samples: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    cost_usd: float | None = None

    def __add__(self, other: Usage) -> Usage:
        costs = [cost for cost in (self.cost_usd, other.cost_usd) if cost is not None]
        return Usage(
            self.cpu_seconds + other.cpu_seconds,
            self.gpu_seconds + other.gpu_seconds,
            self.samples + other.samples,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            sum(costs) if costs else None,
        )

    def metrics(self) -> dict[str, float]:
        """By the names of the metrics table."""
        found = {
            "job/cpu_hours": self.cpu_seconds / 3600,
            "job/gpu_hours": self.gpu_seconds / 3600,
            "job/samples": float(self.samples),
            "job/bytes_read": float(self.bytes_read),
            "job/bytes_written": float(self.bytes_written),
        }
        return found | ({"job/cost_usd": self.cost_usd} if self.cost_usd is not None else {})


def cost_of(cpu_seconds: float, gpu_seconds: float, prices: Prices | None) -> float | None:
    """US dollars; None without prices."""
    if prices is None:
        return None
    return (cpu_seconds * prices.cpu_hour + gpu_seconds * prices.gpu_hour) / 3600


def account_uri(storage_uri: str, *names: str) -> str:
    """Where an account is: names as in accounts/embed/NAME/MODE.json."""
    return storage.join(storage_uri, FOLDER, *names[:-1], f"{names[-1]}.json")


def read_attempts(uri: str) -> list[dict[str, Any]]:
    """The attempts of an account, oldest first; none if there is no such account, or it can't be read."""
    content = storage.find_json(uri)
    attempts = content.get("attempts") if content is not None else None
    return attempts if isinstance(attempts, list) else []


def usage_of(attempts: Iterable[Mapping[str, Any]]) -> Usage:
    """The sum of some attempts."""
    names = Usage.__dataclass_fields__
    return sum((Usage(**{name: one[name] for name in names}) for one in attempts), Usage())


class Account:
    """An attempt under way; one process writes it."""

    def __init__(
        self,
        uri: str,
        run_id: str,
        recipe: str,
        prices: Prices | None = None,
        meter: CpuMeter | None = None,
        workers: int = 1,
    ) -> None:
        """Without a `meter`, CPU seconds and bytes are what workers report, and nothing of this process."""
        self._uri, self._prices, self._meter = uri, prices, meter
        self._entry: dict[str, Any] = {
            "id": uuid.uuid4().hex[:12],
            "run_id": run_id,
            "recipe": recipe,
            "finished": False,
            "workers": workers,
        }
        self._started = time.monotonic() - (meter.seconds if meter is not None else 0.0)
        _, *self._bytes_before = process_use.so_far()
        self._reported = Usage()  # by workers
        self._gpus: dict[float, float] = {}  # allocated since when, how many
        self._gpu_seconds = 0.0
        self._samples = 0
        self._work: dict[str, list[float]] = {}
        self._written = -WRITE_EVERY_S  # what a job has begun is entered at once

    def add(self, samples: int, reports: Iterable[Mapping[str, Any]] = ()) -> None:
        """Take note of work that is done, and of what workers report (`process_use.report`)."""
        self._samples += samples
        for report in reports:
            is_seen = self._meter is not None and self._meter.covers(report["host"], report["pid"])
            is_own = is_seen and report["pid"] == os.getpid()  # then its bytes are in `so_far`, too
            self._reported += Usage(
                cpu_seconds=0.0 if is_seen else report["cpu_seconds"],
                bytes_read=0 if is_own else report["bytes_read"],
                bytes_written=0 if is_own else report["bytes_written"],
            )
            for kind, numbers in report["work"].items():
                known = self._work.get(kind, [0.0] * len(numbers))
                self._work[kind] = [old + new for old, new in zip(known, numbers, strict=True)]
        if time.monotonic() - self._written >= WRITE_EVERY_S:
            self.write()

    def hold_gpus(self, number: float, for_s: float) -> None:
        """So many GPUs have been allocated for some seconds, and are until this process ends."""
        self._gpus[time.monotonic() - for_s] = number

    @contextmanager
    def gpus(self, number: float) -> Iterator[None]:
        """So many GPUs are allocated while the body runs."""
        started = time.monotonic()
        self._gpus[started] = number
        try:
            yield
        finally:
            self._gpu_seconds += self._gpus.pop(started) * (time.monotonic() - started)

    def so_far(self) -> Usage:
        """What this attempt has used."""
        held = sum(number * (time.monotonic() - since) for since, number in self._gpus.items())
        usage = self._reported + Usage(gpu_seconds=self._gpu_seconds + held, samples=self._samples)
        if self._meter is not None:
            self._meter.refresh()
            _, *bytes_now = process_use.so_far()
            read, written = (now - before for now, before in zip(bytes_now, self._bytes_before, strict=True))
            usage += Usage(cpu_seconds=self._meter.cpu_seconds, bytes_read=read, bytes_written=written)
        return usage + Usage(cost_usd=cost_of(usage.cpu_seconds, usage.gpu_seconds, self._prices))

    def write(self) -> None:
        """Enter what was used so far. Where that fails, the job's own writes will say so; the next one tries again."""
        self._written = time.monotonic()
        seconds = self._written - self._started
        own = {**self._entry, **asdict(self.so_far()), "seconds": seconds, "work": self._work}
        try:
            others = [one for one in read_attempts(self._uri) if one["id"] != own["id"]]
            storage.write_json(self._uri, {"attempts": [*others, own]})
        except (InputError, ResourceError) as error:
            log.warning("what the job has used couldn't be entered: %s", error)

    def finish(self) -> Usage:
        """Enter that the thing is made. Gives what all attempts took since it was last finished."""
        self.write()
        return finish_account(self._uri, self._entry["recipe"])


def finish_account(uri: str, recipe: str) -> Usage:
    """Enter that the thing of a recipe is made. Gives what all attempts took since it was last finished."""
    attempts = read_attempts(uri)
    open_ones = [one for one in attempts if one["recipe"] == recipe and not one["finished"]]
    kept = [one | ({"finished": True} if one in open_ones else {}) for one in attempts]
    storage.write_json(uri, {"attempts": kept})
    return usage_of(open_ones)
