"""How Ray and the system tell of a training's end: drained nodes, signals, and changes of the number of workers.

Ray is imported at the top: only `train` imports this module, when it starts the workers.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray
from ray.train.v2._internal.constants import DEFAULT_PREEMPTION_DEADLINE_S
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller.state import ResizingState

from nexusgen.errors import NexusgenError
from pipelines import storage
from pipelines.notices import Notice, is_quiet, tell_active

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

STOP_POLL_S = 2.0  # rank 0 looks whether the driver was told to end
RESIZE_PATIENCE_S = 900.0  # a step, a save and its upload
RESIZE_POLL_S = 0.5


class DrainWatch:
    """When the node of any worker will be taken away, as Ray Train has told this worker.

    Ray Train watches Ray's draining nodes, tells every worker, and starts them all again at the deadline. Its public
    function for this is a barrier of all ranks; here each rank looks at what itself was told.
    """

    def __init__(self) -> None:
        self._context = get_train_context().preemption_context
        self._first_seen: float | None = None

    def deadline(self) -> float | None:
        """Unix seconds; where no deadline was given, the one that Ray Train assumes."""
        info = self._context.preemption_info
        if info is None:
            return None
        self._first_seen = self._first_seen or time.time()
        if info.deadline_ms is None:
            return self._first_seen + DEFAULT_PREEMPTION_DEADLINE_S
        return float(info.deadline_ms) / 1000


class SignalCallback(WorkerCallback):
    """On each worker: a first SIGTERM is a notice to the training. A second, or one between trainings, ends at once."""

    def after_init_train_context(self) -> None:
        """Runs in the main thread of the worker, the only one that may set a handler."""
        previous = signal.getsignal(signal.SIGTERM)

        def on_sigterm(number: int, frame: FrameType | None) -> None:
            if not tell_active(Notice.RESTART) and callable(previous):
                previous(number, frame)

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


class ResizeCallback(WorkerGroupCallback, ControllerCallback):
    """In Ray Train's controller: before the number of workers changes, they save, so that no step is computed twice."""

    def __init__(self) -> None:
        self._group: WorkerGroup | None = None

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Know the workers."""
        self._group = worker_group

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called before the workers are stopped for a new number of them; not when one has died."""
        if not isinstance(current_state, ResizingState) or self._group is None:
            return
        workers = self._group.get_workers()
        deadline = time.monotonic() + RESIZE_PATIENCE_S
        with suppress(ray.exceptions.RayError):  # one dies meanwhile: the last checkpoint must do
            _on_each(workers, tell_active, Notice.HOLD)
            while time.monotonic() < deadline and not all(_on_each(workers, is_quiet)):
                time.sleep(RESIZE_POLL_S)


def _on_each(workers: Sequence[Any], function: Callable[..., bool], *arguments: Any) -> list[bool]:
    return list(ray.get([worker.execute_async(function, *arguments) for worker in workers]))


@contextmanager
def stop_watched(uri: str) -> Iterator[None]:
    """While rank 0 trains in the body, it is told to end when the driver has written `uri`."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(STOP_POLL_S):
            with suppress(NexusgenError):  # a store that doesn't answer is asked again
                if storage.exists(uri):
                    tell_active(Notice.END)
                    return

    thread = threading.Thread(target=watch, name="stop-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()


@contextmanager
def saved_on_sigterm(uri: str, told: str) -> Iterator[threading.Event]:
    """While the driver waits in the body, a first SIGTERM makes rank 0 end the training through `uri`; gives its event.

    Signals belong to the main thread: in another one nothing is done. A second SIGTERM ends the driver at once.
    """
    came = threading.Event()
    previous = signal.getsignal(signal.SIGTERM)

    def write() -> None:
        print(told, file=sys.stderr, flush=True)
        try:
            storage.write_json(uri, {"reason": "SIGTERM"})
        except NexusgenError as error:
            print(f"SIGTERM: the workers can't be told, {error}", file=sys.stderr, flush=True)

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        if came.is_set() and callable(previous):
            previous(number, frame)
        came.set()
        threading.Thread(target=write, name="stop").start()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield came
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous)
