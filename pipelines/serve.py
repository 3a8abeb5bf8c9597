"""`nexusgen serve`: a model behind Ray Serve.

    client -> Serve's HTTP proxy -> ingress (the app of api.py) -> ar -> generation_decoder or editing_decoder
                                      versions: what is served, and its changes

Each is a deployment with its own resources and number of replicas. `--write-serve-config` writes the same application
for `serve deploy` and KubeRay, which import it by the name `pipelines.serve:build_app`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import ray
import yaml
from pydantic import Field, model_validator
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from nexusgen.config import Config
from nexusgen.errors import ConfigError, ModelError, ResourceError
from pipelines import api, registry, runtime, storage
from pipelines.api_guard import log_requests
from pipelines.api_settings import ApiSettings
from pipelines.ingress import HandleBackend
from pipelines.replicas import DrawReplica, ReplicaSettings, ReplyReplica
from pipelines.versions import COMPUTING, Versions, VersionSettings

APP_NAME = "nexusgen"
KEYS_VARIABLE = "NEXUSGEN_API_KEYS"  # comma-separated
# Doors, and what knows the versions, live on the head node beside Serve's own proxy: a lost node then costs a 503 of
# those whom it worked for, where the proxy would say 500 of a lost door. They take no CPU that Ray counts, as many
# clusters' heads have none.
ON_HEAD: dict[str, Any] = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
MAX_ONGOING = 10_000  # of a deployment, in Serve's eyes: the door admits, and queues stand inside the replicas
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 5.0, 15.0
DRAIN_S = 30.0  # requests that run have so long to end when their replica is to go
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Read by Serve in each replica. A hop takes 2 ms less on one event loop (nothing of ours blocks it, as engines have
# threads), and less again by gRPC, whose server every replica has, used or not.
_HOPS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
_PROXY_HOP = "RAY_SERVE_PROXY_USE_GRPC"  # the same for Serve's proxy, of a cluster that starts here
_PARTS = {"ar": "autoregressive", "generation_decoder": "generation_decoder", "editing_decoder": "editing_decoder"}


class PartConfig(Config):
    """Replicas of one computing deployment."""

    replicas: int | tuple[int, int] = 1  # [min, max]: as many as the load asks for
    cpus: Annotated[float, Field(gt=0)] = 1.0  # of a replica, which computes on so many threads
    gpus: Annotated[float, Field(ge=0)] = 0.0
    max_batch: Annotated[int, Field(ge=1)] = 8  # requests that share a step

    @model_validator(mode="after")
    def _check(self) -> Self:
        fewest, most = self.bounds
        if not 1 <= fewest <= most:
            raise ValueError(f"replicas={self.replicas}: wanted a number from 1 on, or [min, max] with 1 <= min <= max")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most replicas."""
        return self.replicas if isinstance(self.replicas, tuple) else (self.replicas, self.replicas)


class ServeConfig(Config):
    """What to serve, where, and how much of it at a time."""

    storage: str = Field(description="folder or s3:// URI; where models:/ names are looked up")
    name: str = Field(default="nexusgen", description="name of the project, as in the other jobs")
    model: str = Field(description="demo-base, a model folder, models:/nexusgen@champion or models:/nexusgen/VERSION")
    canary: str | None = Field(default=None, description="another version, which takes a share of the requests")
    canary_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    also: tuple[str, ...] = Field(default=(), description="further versions, which requests name as nexusgen/VERSION")
    swap: Literal["beside", "in_place", "rolling"] = Field(
        default="beside",
        description="a new version is loaded beside the old one, after it has gone, or so by one replica after another",
    )
    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 opens the API to the network")
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    ingress_replicas: Annotated[int, Field(ge=1)] = 1
    ar: PartConfig = PartConfig()
    generation_decoder: PartConfig = PartConfig()
    editing_decoder: PartConfig = PartConfig()
    queue_size: Annotated[int, Field(ge=1, description="requests that may be inside an ingress; more get 429")] = 64
    request_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    deterministic: bool = Field(default=False, description="the same bits for a request whatever its company; slower")
    allowed_image_hosts: tuple[str, ...] = Field(default=(), description="hosts that image URLs may point to")

    @model_validator(mode="after")
    def _check(self) -> Self:
        alone = [name for name in COMPUTING if getattr(self, name).bounds[0] < 2]
        if self.swap == "rolling" and alone:
            raise ValueError(
                f"swap=rolling: {', '.join(alone)} may have one replica, and nobody answers while that one changes: "
                "wanted 2 or more of ar, generation_decoder and editing_decoder each, or swap=in_place"
            )
        return self

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
    os.environ.setdefault(_PROXY_HOP, "1")
    stopping = threading.Event()
    with runtime.ray_cluster(_num_cpus(config), "serve") as cluster:
        try:
            start(config)
            with _set_by_signals(stopping):
                print(_greeting(config), flush=True)
                stopping.wait()
                print("stopping: running requests end first; a second Ctrl-C ends them", file=sys.stderr, flush=True)
            drain(config)
        finally:
            if cluster.is_local:
                ray_serve.delete(APP_NAME)  # lets requests end; the rest of Serve goes with the cluster
            else:
                shutdown()


def check(config: ServeConfig) -> None:
    """Find what would fail after a long start: a model that isn't one, a port that is taken."""
    for name in (config.model, *([config.canary] if config.canary else []), *config.also):
        registry.find_manifest(name, config.storage)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise _cannot_listen(config, error.strerror or str(error)) from None


def _cannot_listen(config: ServeConfig, why: str) -> ResourceError:
    return ResourceError(
        f"cannot listen on {config.host}:{config.port}: {why}; stop what listens there or choose another port=NUMBER"
    )


def start(config: ServeConfig) -> str:
    """Deploy on the Ray cluster that this process is connected to; returns the URL once the API answers.

    Raises: InputError or ModelError if there is no such model or it can't draw, ResourceError if the port is taken.
    """
    check(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    try:
        ray_serve.start(proxy_location="HeadOnly", http_options=_http_options(config), logging_config=quiet)
    except RuntimeError as error:  # taken since it was looked at, or on a head that is another machine than this
        shutdown()  # half started, it would neither listen nor let another start listen
        raise _cannot_listen(config, str(error).splitlines()[-1]) from error
    try:
        ray_serve.run(build_app(_settled(config)), name=APP_NAME, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        shutdown()
        raise ModelError(f"the model {config.model} could not be served: {error}") from error
    return config.url


def drain(config: ServeConfig) -> None:
    """Close the doors, and wait until the requests inside have ended, `request_timeout_s` at most."""
    ingress: Any = ray_serve.get_deployment_handle("ingress", APP_NAME)
    with contextlib.suppress(RayServeException, RayError, TimeoutError):  # a door that is gone has nobody inside
        ingress.broadcast("drain", config.request_timeout_s).results(timeout_s=config.request_timeout_s + 5)


def shutdown() -> None:
    """Take the API down; running requests end first. The Ray cluster stays."""
    if ray.is_initialized():
        ray_serve.shutdown()


def serve_config(config: ServeConfig) -> str:
    """The application as YAML for `serve deploy` and KubeRay's `serveConfigV2`."""
    application = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": "pipelines.serve:build_app",
        "args": _settled(config),
    }
    values = {"proxy_location": "HeadOnly", "http_options": _http_options(config), "applications": [application]}
    return yaml.safe_dump(values, sort_keys=False)


def build_app(args: Mapping[str, Any]) -> Application:
    """The application, from the values of a `ServeConfig`: Ray's own tools call this by name."""
    config = ServeConfig.model_validate(args)
    versions = ray_serve.deployment(
        name="versions",
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        ray_actor_options={**ON_HEAD, "runtime_env": {"env_vars": _HOPS}},
    )(Versions).bind(
        VersionSettings(
            config.storage,
            config.model,
            APP_NAME,
            config.canary,
            config.canary_share,
            config.also,
            config.swap,
            drain_s=config.request_timeout_s,
        )
    )
    parts = {name: _computing(name, config, versions) for name in COMPUTING}
    ingress = ray_serve.deployment(
        name="ingress",
        num_replicas=config.ingress_replicas,
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=DRAIN_S,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        ray_actor_options={**ON_HEAD, "runtime_env": {"env_vars": _HOPS}},
    )(ray_serve.ingress()(Ingress))
    wants_keys = bool(os.environ.get(KEYS_VARIABLE))
    return ingress.bind(config.model_dump(mode="json"), wants_keys, versions, *parts.values())


def _computing(name: str, config: ServeConfig, versions: Application) -> Application:
    part: PartConfig = getattr(config, name)
    settings = ReplicaSettings(
        storage=config.storage,
        part=_PARTS[name],
        max_batch=part.max_batch,
        num_threads=max(1, int(part.cpus)),
        on_gpu=part.gpus > 0,
        deterministic=config.deterministic,
    )
    fewest, most = part.bounds
    options: dict[str, Any] = {"num_replicas": fewest}
    if most > fewest:
        # As many as have one full batch of requests each.
        options = {
            "autoscaling_config": {
                "min_replicas": fewest,
                "max_replicas": most,
                "target_ongoing_requests": part.max_batch,
            }
        }
    if config.swap == "rolling":
        router: Any = "pipelines.version_router:VersionRouter"  # which Ray's annotations call a dict
        options["request_router_config"] = RequestRouterConfig(request_router_class=router)
    deployment = ray_serve.deployment(
        name=name,
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=DRAIN_S,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        ray_actor_options={"num_cpus": part.cpus, "num_gpus": part.gpus, "runtime_env": {"env_vars": _HOPS}},
        **options,
    )
    return deployment(ReplyReplica if name == "ar" else DrawReplica).bind(settings, versions)


class Ingress:
    """The HTTP app, in front of handles to what computes."""

    def __init__(
        self,
        config: Mapping[str, Any],
        wants_keys: bool,
        versions: DeploymentHandle[Any],
        ar: DeploymentHandle[Any],
        generation_decoder: DeploymentHandle[Any],
        editing_decoder: DeploymentHandle[Any],
    ) -> None:
        self._config = ServeConfig.model_validate(config)
        decoders = {"generation_decoder": generation_decoder, "editing_decoder": editing_decoder}
        patience_s = self._config.request_timeout_s
        self._backend = HandleBackend(versions, ar, decoders, self._config.queue_size, patience_s)
        self._wants_keys = wants_keys

    async def in_use(self) -> list[str]:
        """Fingerprints of the versions that requests inside began with."""
        return sorted(self._backend.in_use())

    async def look(self) -> None:
        """Know what is served now before this returns."""
        await self._backend.refresh()

    async def drain(self, patience_s: float) -> int:
        """See `HandleBackend.drain`."""
        return await self._backend.drain(patience_s)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve in the replica: the app is built there, around the handles."""
        config = self._config
        keys = tuple(stripped for key in os.environ.get(KEYS_VARIABLE, "").split(",") if (stripped := key.strip()))
        if self._wants_keys and not keys:
            raise ConfigError(
                f"{KEYS_VARIABLE} is set where serve was started, but holds no key where the ingress runs: "
                "give it in the cluster's environment, too, as comma-separated keys"
            )
        log_requests()
        return api.create_app(
            self._backend,
            ApiSettings(
                api_keys=keys,
                allowed_image_hosts=config.allowed_image_hosts,
                request_timeout_s=config.request_timeout_s,
                max_orders=config.queue_size,
                check_room=self._backend.admission.check,
                more_metrics=self._backend.metrics,
            ),
        )


def _settled(config: ServeConfig) -> dict[str, Any]:
    """The configuration's values as another process may read them."""
    settled = {
        "storage": storage.absolute(config.storage),
        "model": _absolute(config.model),
        "canary": _absolute(config.canary) if config.canary else None,
        "also": tuple(map(_absolute, config.also)),
    }
    return config.model_copy(update=settled).model_dump(mode="json")


def _absolute(model: str) -> str:
    is_folder = model != registry.DEMO_BASE and "://" not in model and not model.startswith("models:/")
    return storage.absolute(model) if is_folder else model


def _http_options(config: ServeConfig) -> dict[str, Any]:
    # The app has its own time limit, which it tells in OpenAI's shape; Serve's lies a little beyond.
    return {"host": config.host, "port": config.port, "request_timeout_s": config.request_timeout_s + 5}


@contextlib.contextmanager
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
    parts: list[PartConfig] = [getattr(config, name) for name in COMPUTING]
    return sum(part.bounds[0] * part.cpus for part in parts)


def _greeting(config: ServeConfig) -> str:
    body = json.dumps({"prompt": "a red circle", "seed": 0})
    keys = bool(os.environ.get(KEYS_VARIABLE))
    key = "-H 'Authorization: Bearer KEY' " if keys else ""
    curl = f"curl -s {config.url}/v1/images/generations {key}-H 'Content-Type: application/json' -d '{body}'"
    lines = [f"serving {config.model} at {config.url} (Ctrl-C stops); a page for people is there, too", f"  {curl}"]
    if config.host not in LOOPBACK and not keys:
        lines.append(
            f"  note: {config.host} is reachable from the network, and the API asks for no key: {KEYS_VARIABLE}"
        )
    return "\n".join(lines)
