"""What a training worker is told about its end, and when it must save so that no step is lost. No Ray here.

A worker asks at the beginning of each step. Its answer travels to the other ranks with the counts of that step, so that
all of them save after it, and no collective is added. Notices come from threads, and from a signal handler.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SPARE_S = 5.0  # between the last save and the deadline, beside twice what a step and a save take


class Notice(enum.Flag):
    """What to do at the end of the step that is under way."""

    NONE = 0
    SAVE = enum.auto()  # the node will be taken away later: save, and go on
    HOLD = enum.auto()  # the workers are about to be replaced: save, and wait for that
    RESTART = enum.auto()  # a worker's process was told to end: save, and end, to be started again
    END = enum.auto()  # the job was told to end: save, and end for good


STOPS = Notice.HOLD | Notice.RESTART | Notice.END  # no further step after these
BITS = tuple(Notice)


class Notices:
    """The notices of one worker. `deadline` tells when a worker's node will be taken away (Unix seconds), or None.

    All workers are told of a deadline, not all at the same step: one of them, that `announces` it, speaks for all.
    """

    def __init__(self, deadline: Callable[[], float | None] = lambda: None, announces: bool = True) -> None:
        self.save_s = 0.0  # what the last save took
        self.is_held = threading.Event()  # all is saved, and no step follows
        self._deadline, self._announces = deadline, announces
        self._saved_for: float | None = None
        self._told = Notice.NONE

    def tell(self, notice: Notice) -> None:
        """Take note: from any thread, or from a signal handler."""
        self._told |= notice

    def is_told(self, notice: Notice) -> bool:
        """Whether this worker was told so, by `tell`."""
        return bool(self._told & notice)

    @property
    def seconds_left(self) -> float:
        """Until the node is taken away; 0 where that isn't known."""
        deadline = self._deadline()
        return deadline - time.time() if deadline is not None else 0.0

    def asked(self, step_s: float) -> Notice:
        """What is to be done after the next step; a step takes about `step_s` seconds.

        Of a deadline there are two notices: to save at once, as it may come early; and to save again and hold still
        when there is just time for it, so that no step is computed twice.
        """
        deadline = self._deadline()
        if deadline is None or not self._announces:
            return self._told
        if time.time() + 2 * (step_s + self.save_s) + SPARE_S >= deadline:
            return self._told | Notice.HOLD
        if self._saved_for is None or deadline < self._saved_for:
            self._saved_for = deadline
            return self._told | Notice.SAVE
        return self._told


_active: Notices | None = None  # of the training that this process is at


@contextmanager
def active(notices: Notices) -> Iterator[None]:
    """These are the process's notices while the body trains."""
    global _active
    _active = notices
    try:
        yield
    finally:
        _active = None


def tell_active(notice: Notice) -> bool:
    """Tell this process's training. False if there is none, or it knows already."""
    if _active is None or _active.is_told(notice):
        return False
    _active.tell(notice)
    return True


def is_quiet() -> bool:
    """Whether this process has saved all its steps, and takes no further one."""
    return _active is None or _active.is_held.is_set()
