"""`nexusgen serve`: a model folder behind Ray Serve.

    client -> Serve's HTTP proxy -> Ingress (the app of api.py) -> ModelReplica: BatchQueue -> sampling.generate_images

The queue stands inside the replica: while one batch is drawn the next one gathers, so the batches grow with the load
and a lone request waits for nobody. Ingress and model are deployments of their own, with their own resources and
number of replicas; finer cuts (language model, decoders) replace `ModelReplica` without touching the API.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import ray
from pydantic import Field, field_validator
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from nexusgen.config import Config
from nexusgen.errors import InputError, ModelError, ResourceError
from pipelines import api, orders, registry, runtime, storage
from pipelines.api_guard import log_requests
from pipelines.api_inputs import HostList
from pipelines.api_settings import GRACE_S, ApiSettings
from pipelines.pictures import encode_png

if TYPE_CHECKING:
    from nexusgen.model.manifest import Manifest

APP_NAME = "nexusgen"
INGRESS_CPUS = 0.25
KEYS_VARIABLE = "NEXUSGEN_API_KEYS"  # keys of the API, separated by commas or spaces
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServeConfig(Config):
    """What to serve, where, and how much of it at a time."""

    storage: str = Field(description="folder or s3:// URI; where models:/ names are looked up")
    name: str = Field(default="nexusgen", description="name of the project, as in the other jobs")
    model: str = Field(description="demo-base, a model folder, models:/nexusgen@champion or models:/nexusgen/VERSION")
    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 opens the API to the network")
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    num_replicas: Annotated[int, Field(ge=1)] = 1
    replica_cpus: Annotated[float, Field(gt=0)] = 1.0
    max_batch: Annotated[int, Field(ge=1)] = 8
    queue_size: Annotated[int, Field(ge=1, description="requests that may wait; more get 429")] = 64
    request_timeout_s: Annotated[float, Field(gt=0, description="of an answer; one that takes longer gets 504")] = 300.0
    allowed_image_hosts: list[str] = Field(
        default=[], description="HOST or HOST:PORT from which pictures of a chat may be fetched; none: data URIs alone"
    )

    @field_validator("allowed_image_hosts")
    @classmethod
    def _check_hosts(cls, hosts: list[str]) -> list[str]:
        HostList(hosts)
        return hosts

    @property
    def url(self) -> str:
        """Address of the API as a client on this machine writes it."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def serve(config: ServeConfig, block: bool = True) -> None:
    """Serve until Ctrl-C or SIGTERM, then let running requests end and stop.

    With `block` false: return once the API answers; the caller owns the Ray cluster and calls `shutdown`.
    """
    if not block:
        start(config)
        return
    check(config)
    stopping = threading.Event()
    with runtime.ray_cluster(_num_cpus(config), "serve") as cluster, _set_by_signals(stopping):
        try:
            start(config)
            print(_greeting(config), flush=True)
            stopping.wait()
            print("stopping: running requests end first", file=sys.stderr, flush=True)
        finally:
            if cluster.is_local:
                ray_serve.delete(APP_NAME)  # lets requests end; the rest of Serve goes with the cluster
            else:
                shutdown()


def check(config: ServeConfig) -> None:
    """Find what would fail after a long start: a model that isn't one, a port that is taken."""
    registry.resolve_model(config.model, config.storage)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror or error}; "
                "stop what listens there or choose another port=NUMBER"
            ) from None


def start(config: ServeConfig) -> str:
    """Deploy on the Ray cluster that this process is connected to; returns the URL once the API answers.

    Raises: InputError or ModelError if there is no such model or it can't draw, ResourceError if the port is taken.
    """
    check(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    timeout_s = config.request_timeout_s + GRACE_S  # the API's own time limit answers first, in OpenAI's shape
    ray_serve.start(
        http_options={"host": config.host, "port": config.port, "request_timeout_s": timeout_s},
        logging_config=quiet,
    )
    try:
        ray_serve.run(_application(config), name=APP_NAME, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        shutdown()
        raise ModelError(f"the model {config.model} could not be served: {error}") from error
    return config.url


def shutdown() -> None:
    """Take the API down; running requests end first. The Ray cluster stays."""
    if ray.is_initialized():
        ray_serve.shutdown()


@dataclass(frozen=True)
class DrawTask:
    """An order with the model's own settings filled in. Tasks of one kind can share a batch."""

    prompt: str
    seed: int
    steps: int
    size: tuple[int, int]

    @property
    def kind(self) -> tuple[int, tuple[int, int]]:
        """What pictures of one batch have in common: steps and size."""
        return self.steps, self.size


class BatchQueue:
    """Gathers tasks while `draw` runs, and hands it the longest waiting one with others of its kind.

    `draw` runs in one thread of its own. A task that fails in company is tried alone, so that its company lives.
    """

    def __init__(self, draw: Callable[[list[DrawTask]], list[orders.Drawing]], max_batch: int) -> None:
        self._draw = draw
        self._max_batch = max_batch
        self._waiting: list[_Ticket] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._loop_task: asyncio.Task[None] | None = None

    async def submit(self, task: DrawTask) -> orders.Drawing:
        """The drawing of one task. A caller that is cancelled takes its task out of the queue."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run())
        ticket = _Ticket(task, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        self._arrived.set()
        return await ticket.answer

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            # One turn of the event loop lets the other pictures of the same request arrive.
            await asyncio.sleep(0)
            batch = self._take()
            if batch:
                await self._answer(batch)

    def _take(self) -> list[_Ticket]:
        self._waiting = [ticket for ticket in self._waiting if not ticket.answer.done()]
        batch: list[_Ticket] = []
        if self._waiting:
            kind = self._waiting[0].task.kind
            batch = [ticket for ticket in self._waiting if ticket.task.kind == kind][: self._max_batch]
            self._waiting = [ticket for ticket in self._waiting if ticket not in batch]
        if not self._waiting:
            self._arrived.clear()
        return batch

    async def _answer(self, batch: list[_Ticket]) -> None:
        loop = asyncio.get_running_loop()
        try:
            pictures = await loop.run_in_executor(self._thread, self._draw, [ticket.task for ticket in batch])
        except Exception as error:
            if len(batch) > 1:
                for ticket in batch:
                    await self._answer([ticket])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for ticket, picture in zip(batch, pictures, strict=True):
            if not ticket.answer.done():
                ticket.answer.set_result(picture)


@dataclass(eq=False)
class _Ticket:
    task: DrawTask
    answer: asyncio.Future[orders.Drawing]


class ModelReplica:
    """One loaded model and its queue."""

    def __init__(self, model: str, storage_uri: str, max_batch: int, num_threads: int) -> None:
        # Heavy imports stay out of the driver and the ingress.
        import torch

        from nexusgen.model.weights import DRAWING_PARTS, load_model

        torch.set_num_threads(num_threads)
        # Found here, not in the driver: on a cluster this may be another machine, with a cache of its own.
        self._model = load_model(registry.resolve_model(model, storage_uri), DRAWING_PARTS)
        self._info = model_info(self._model.manifest, model)
        self._queue = BatchQueue(self._draw, max_batch)
        # A model that can't draw must not become ready.
        self._draw([self._resolve(orders.PictureOrder("warm-up", orders.PictureSettings(seed=0, steps=1)))])

    async def info(self) -> orders.ModelInfo:
        """What is loaded."""
        return self._info

    async def draw(self, order: orders.PictureOrder) -> orders.Drawing:
        """The drawing of an order."""
        return await self._queue.submit(self._resolve(order))

    def _resolve(self, order: orders.PictureOrder) -> DrawTask:
        settings = order.settings
        size = settings.size or self._info.image_size
        return DrawTask(order.prompt, settings.seed, settings.steps or self._info.steps, size)

    def _draw(self, tasks: list[DrawTask]) -> list[orders.Drawing]:
        from nexusgen.sampling import generate_images

        steps, size = tasks[0].kind
        prompts, seeds = [task.prompt for task in tasks], [task.seed for task in tasks]
        images = generate_images(self._model, prompts, seeds, steps=steps, size=size)
        return [
            orders.Drawing(encode_png(image, self._info, seed, steps), self._info, seed, steps, size)
            for image, seed in zip(images, seeds, strict=True)
        ]


def model_info(manifest: Manifest, model: str) -> orders.ModelInfo:
    """What the API says about a loaded model folder; `model` is its pinned name."""
    _name, slash, version = model.removeprefix("models:/").partition("/")
    return orders.ModelInfo(
        id=registry.MODEL_NAME,
        version=version if slash and model.startswith("models:/") else None,
        fingerprint=manifest.fingerprint,
        parts=tuple(manifest.parts),
        image_size=manifest.image_size,
        steps=manifest.num_inference_steps,
        loaded_at=int(time.time()),
    )


def _application(config: ServeConfig) -> Application:
    model = ray_serve.deployment(
        name="model",
        num_replicas=config.num_replicas,
        # Requests gather inside the replica, where they share batches; those beyond wait in the ingress, then get 429.
        max_ongoing_requests=config.max_batch * 2,
        max_queued_requests=config.queue_size,
        ray_actor_options={"num_cpus": config.replica_cpus},
    )(ModelReplica)
    ingress = ray_serve.deployment(
        name="ingress",
        max_ongoing_requests=4 * (config.max_batch * 2 + config.queue_size),
        ray_actor_options={"num_cpus": INGRESS_CPUS},
    )(ray_serve.ingress()(Ingress))
    pinned = registry.pin_model(config.model, config.storage)
    num_threads = max(1, int(config.replica_cpus))
    keys = os.environ.get(KEYS_VARIABLE, "").replace(",", " ").split()
    settings = ApiSettings(
        api_keys=tuple(keys),
        allowed_image_hosts=tuple(config.allowed_image_hosts),
        request_timeout_s=config.request_timeout_s,
    )
    replica = model.bind(pinned, storage.absolute(config.storage), config.max_batch, num_threads)
    return ingress.bind(replica, settings)


@contextmanager
def _set_by_signals(event: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set the event. Entered after Ray has started, as Ray takes SIGTERM for itself."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda *_: event.set()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _num_cpus(config: ServeConfig) -> float:
    return config.num_replicas * config.replica_cpus + INGRESS_CPUS


def _greeting(config: ServeConfig) -> str:
    body = json.dumps({"prompt": "a red circle", "seed": 0})
    curl = f"curl -s {config.url}/v1/images/generations -H 'Content-Type: application/json' -d '{body}'"
    lines = [f"serving {config.model} at {config.url} (Ctrl-C stops)", f"  {curl}"]
    if config.host not in LOOPBACK and not os.environ.get(KEYS_VARIABLE):
        lines.append(f"  note: {config.host} is reachable from the network and asks for no key; set {KEYS_VARIABLE}")
    return "\n".join(lines)


class Ingress:
    """The HTTP app, in front of a handle to the model."""

    def __init__(self, model: DeploymentHandle[Any], settings: ApiSettings) -> None:
        self._backend = HandleBackend(model)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve in the replica: the app is built there, around the handle."""
        log_requests()
        return api.create_app(self._backend, self._settings)


class HandleBackend:
    """The API's backend at the other end of a Serve handle; Serve's errors become the API's."""

    def __init__(self, model: DeploymentHandle[Any]) -> None:
        self._model = model

    async def models(self) -> list[orders.ModelInfo]:
        """What the replica has loaded."""
        return [await self._ask("info")]

    async def draw(self, order: orders.PictureOrder) -> AsyncIterator[orders.PictureEvent]:
        """The drawing of a text, without pictures on the way."""
        if order.model not in (None, registry.MODEL_NAME):
            raise orders.UnknownModelError(
                f"The model {order.model!r} does not exist; this server has {registry.MODEL_NAME!r}."
            )
        if order.images:
            raise InputError("this server draws from texts alone")
        drawing = await self._ask("draw", order)
        yield drawing
        yield orders.Finished("stop", drawing.model)

    async def chat(self, order: orders.ChatOrder) -> AsyncIterator[orders.ChatEvent]:
        """Nothing yet."""
        raise InputError("this server draws pictures, at /v1/images/generations, and doesn't chat")
        yield  # makes it a generator

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._model, method).remote(*arguments)
        except BackPressureError:
            raise orders.OverloadedError("The queue is full; try again shortly.") from None
        except RayTaskError as error:
            raise error.cause from None
        except (RayActorError, DeploymentUnavailableError):
            raise orders.UnavailableError("The model's replica is gone or not up yet; try again shortly.") from None
