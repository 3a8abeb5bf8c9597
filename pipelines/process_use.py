"""What this process has used so far: CPU time, and the bytes of artefacts that it has read and written.

The functions that move artefacts count here: tars, embedded rows, checkpoints, model folders and the small files beside
them. Mapped weights are counted by who opens them. Caches of the system make no difference: a byte asked for counts.
A worker reports what it has used since its last report, so that no second is reported twice, whatever task or actor its
process serves next; what it used after its last report is lost with it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

Work = dict[str, list[float]]  # by kind: units done, wall seconds and CPU seconds that they took


class _Counters:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_read = 0
        self.num_written = 0
        self.reported = (0.0, 0, 0)


_counters = _Counters()


def count_read(num_bytes: int) -> None:
    """Count bytes of an artefact that were read."""
    with _counters.lock:
        _counters.num_read += num_bytes


def count_written(num_bytes: int) -> None:
    """Count bytes of an artefact that were written."""
    with _counters.lock:
        _counters.num_written += num_bytes


def so_far() -> tuple[float, int, int]:
    """CPU seconds of this process, user and system, all threads; bytes read; bytes written."""
    with _counters.lock:
        return time.process_time(), _counters.num_read, _counters.num_written


def clock() -> tuple[float, float]:
    """Wall seconds and CPU seconds of this process, to give to `work_since`."""
    return time.monotonic(), time.process_time()


def work_since(started: tuple[float, float], kind: str, units: int) -> Work:
    """So many units of a kind of work were done since `started`."""
    seconds, cpu_seconds = (now - then for now, then in zip(clock(), started, strict=True))
    return {kind: [float(units), seconds, cpu_seconds]}


def report(work: Work | None = None) -> dict[str, Any]:
    """What was used since the last report, and by which process: a mapping that travels as JSON.

    `work` is what was done meanwhile, without what came before it, like loading a model.
    """
    now = so_far()
    with _counters.lock:
        before, _counters.reported = _counters.reported, now
    names = ("cpu_seconds", "bytes_read", "bytes_written")
    used = {name: new - old for name, new, old in zip(names, now, before, strict=True)}
    return {"host": socket.gethostname(), "pid": os.getpid(), **used, "work": work or {}}
