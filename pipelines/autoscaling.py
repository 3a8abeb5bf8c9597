"""Asking a cluster's autoscaler for CPUs, and taking that back.

Ray keeps one such request for a whole cluster, the latest, until another takes its place. So it's repeated while one
waits, as other jobs ask too, and taken back when the work has begun, or its nodes would stay without work for ever.
Not before that: nodes that were idle for long while the last one started would go at once.
"""

from __future__ import annotations

import contextlib
import math
import threading

HOLD_S = 120.0  # so long after the CPUs are there, the work has begun


class CpuRequest:
    """This process's request; without an autoscaler nobody hears it."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._is_made = False

    def make(self, num_cpus: float) -> None:
        """Ask that the cluster has so many CPUs in all, busy ones among them."""
        from ray.autoscaler.sdk import request_resources

        self._forget_timer()
        request_resources(num_cpus=math.ceil(num_cpus))
        self._is_made = True

    def take_back_later(self) -> None:
        """In HOLD_S seconds, if it was made."""
        if self._is_made:
            self._forget_timer()
            self._timer = threading.Timer(HOLD_S, self.take_back)
            self._timer.daemon = True
            self._timer.start()

    def take_back(self) -> None:
        """Now, if it was made."""
        from ray.autoscaler.sdk import request_resources

        self._forget_timer()
        if self._is_made:
            self._is_made = False
            with contextlib.suppress(Exception):  # the cluster has gone; a job that is done must not fail by it
                request_resources(bundles=[])

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


CPU_REQUEST = CpuRequest()
