"""Memory of a process and all that it started: the sum of their proportional set sizes, shared pages counted once."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import psutil

SAMPLE_S = 2.0  # reading the pages of fifteen processes takes some time itself


class PeakMemory:
    """Measures a block of code: `peak_bytes`, of this process or of `root` and its descendants, object store included.

    Ray's object store is shared memory that processes map, so its used pages are in the sum.
    """

    def __init__(self, root: int | None = None) -> None:
        self.peak_bytes = 0
        self._root = psutil.Process(root)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, memory_of(self._root))
            if self._stop.wait(SAMPLE_S):
                return


def memory_of(root: psutil.Process) -> int:
    """Bytes that a process and its descendants hold now."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_pss(process.pid) for process in processes)


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()
    except OSError:  # it has ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
