"""Where a project stands: what its storage holds, what MLflow says of its runs and versions, what an endpoint serves.

The storage alone tells what is finished, how far a job is, its last checkpoint and its quarantine: a tracking server
that is away takes only runs, versions and aliases with it. Nothing is written, and no MLflow database is made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs

from nexusgen.errors import NexusgenError
from pipelines import embedded, registry, storage, tracking

MAX_RUNS = 20  # of each project, latest first
ENDPOINT_S = 5.0
STALE_S = 60.0  # a training that hasn't told its step for so long is called silent: it may load, validate, or be dead
_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class EmbeddedStatus:
    """Embedded data of one mode. Before it is finished, `slices` counts what is there, and the rest isn't known."""

    name: str
    mode: str
    finished: bool
    slices: int
    embedded: int | None = None
    quarantined: int | None = None
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def quarantine_rate(self) -> float | None:
        """Share of the samples that can't be used."""
        if self.embedded is None or self.quarantined is None:
            return None
        total = self.embedded + self.quarantined
        return self.quarantined / total if total else 0.0


@dataclass(frozen=True)
class TrainingStatus:
    """One stage. `step` is where it was when it last said so, `age_s` how long ago that is."""

    name: str
    stage: str
    step: int
    num_steps: int | None
    checkpoint: str  # the last one's URI; empty where there is none
    checkpoint_step: int
    age_s: float | None
    note: str = ""

    @property
    def state(self) -> str:
        """finished, running, or silent: neither finished nor heard of lately, for `age_s` seconds if that is known."""
        if self.num_steps is not None and self.checkpoint_step >= self.num_steps:
            return "finished"
        return "running" if self.age_s is not None and self.age_s < STALE_S else "silent"


@dataclass(frozen=True)
class RunStatus:
    """A run of MLflow's."""

    project: str
    run: str
    status: str
    started: float  # Unix seconds
    note: str


@dataclass(frozen=True)
class VersionStatus:
    """A version of the registered model."""

    version: int
    fingerprint: str
    project: str
    aliases: tuple[str, ...]
    gate: str


@dataclass(frozen=True)
class Status:
    """All of it. `tracking_error` and `endpoint_error` say why MLflow's or the endpoint's part is missing."""

    storage: str
    projects: tuple[str, ...]
    embedded: tuple[EmbeddedStatus, ...]
    trainings: tuple[TrainingStatus, ...]
    models: tuple[str, ...]
    evaluations: Mapping[str, tuple[str, ...]]  # suites by fingerprint
    tracking: str = ""
    tracking_error: str = ""
    runs: tuple[RunStatus, ...] = ()
    versions: tuple[VersionStatus, ...] = ()
    endpoint: str = ""
    endpoint_error: str = ""
    serving: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What scripts get."""
        values = asdict(self)
        for kind, extra in (("embedded", "quarantine_rate"), ("trainings", "state")):
            for entry, one in zip(values[kind], getattr(self, kind), strict=True):
                entry[extra] = getattr(one, extra)
        return values


def read_status(storage_uri: str, endpoint: str = "") -> Status:
    """Look everywhere. Raises: InputError or ResourceError if the storage can't be read."""
    trainings = tuple(
        _training(name, stage, place)
        for name, folder in _folders(storage.join(storage_uri, "checkpoints"))
        for stage, place in _folders(folder)
    )
    data = tuple(
        _embedded(storage_uri, name, mode, place)
        for name, folder in _folders(storage.join(storage_uri, "embedded"))
        for mode, place in _folders(folder)
    )
    roads = [name for name, _ in _folders(storage.join(storage_uri, "roads"))]
    packed = [name for name, _ in _folders(storage.join(storage_uri, "tars"))]
    projects = sorted({*roads, *packed, *(one.name for one in data), *(one.name for one in trainings)})
    evaluations = {
        fingerprint: tuple(suite for suite, _ in _folders(place))
        for fingerprint, place in _folders(storage.join(storage_uri, "evaluations"))
    }
    return Status(
        storage=storage_uri,
        projects=tuple(projects),
        embedded=data,
        trainings=trainings,
        models=tuple(name for name, _ in _folders(storage.join(storage_uri, "models"))),
        evaluations=evaluations,
        **_tracked(storage_uri, projects),
        **_served(endpoint),
    )


def _folders(uri: str) -> list[tuple[str, str]]:
    """Names and URIs of the folders in a folder; hidden ones are under way."""
    names = [storage.name_of(info.path) for info in storage.list_folder(uri) if info.type == fs.FileType.Directory]
    return [(name, storage.join(uri, name)) for name in names if not name.startswith(".")]


def _embedded(storage_uri: str, name: str, mode: str, place: str) -> EmbeddedStatus:
    if not storage.exists(storage.join(place, embedded.MANIFEST_NAME)):
        files = [uri for uri in storage.list_files(place) if uri.endswith(".parquet")]
        return EmbeddedStatus(name, mode, finished=False, slices=len(files))
    manifest = embedded.read_manifest(storage_uri, name, mode)  # type: ignore[arg-type]
    return EmbeddedStatus(
        name,
        mode,
        finished=True,
        slices=len(manifest.slices),
        embedded=sum(one.num_rows for one in manifest.slices),
        quarantined=sum(manifest.quarantined.values()),
        reasons=manifest.quarantined,
    )


def _training(name: str, stage: str, place: str) -> TrainingStatus:
    """Read without torch, which a checkpoint's own module needs."""
    pointer = storage.find_json(storage.join(place, "latest.json")) or {}
    uri = storage.join(place, pointer["path"]) if pointer.get("path") else ""
    meta = (storage.find_json(storage.join(uri, "meta.json")) or {}) if uri else {}
    progress_uri = storage.join(place, "progress.json")
    progress = storage.find_json(progress_uri) or {}
    age_s = time.time() - storage.stat(progress_uri).mtime_ns / 1e9 if progress else None
    checkpoint_step = int(meta.get("step", 0))
    num_steps = progress.get("num_steps", meta.get("config", {}).get("num_steps"))
    return TrainingStatus(
        name,
        stage,
        step=max(int(progress.get("step", 0)), checkpoint_step),
        num_steps=num_steps,
        checkpoint=uri,
        checkpoint_step=checkpoint_step,
        age_s=age_s,
        note=str(progress.get("note", "")),
    )


def _tracked(storage_uri: str, projects: list[str]) -> dict[str, Any]:
    """What MLflow knows, or why it doesn't say."""
    from mlflow.exceptions import MlflowException

    try:
        uri = tracking.mlflow_uri(storage_uri)
    except NexusgenError as error:
        return {"tracking_error": str(error)}
    shown = tracking.redact(uri)
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).exists():
        return {"tracking": shown, "tracking_error": "there is no database yet: no job has run on this storage"}
    try:
        client = tracking.connect(storage_uri)
        runs = [run for project in projects for run in _runs(client, project)]
        return {"tracking": shown, "runs": tuple(runs), "versions": _versions(client)}
    except (MlflowException, NexusgenError, OSError) as error:
        reason = tracking.redact(" ".join(str(error).split()))  # it repeats the URI, password and all
        return {"tracking": shown, "tracking_error": f"it doesn't answer ({reason[:200]})"}


def _runs(client: Any, project: str) -> list[RunStatus]:
    experiment = client.get_experiment_by_name(project)
    if experiment is None:
        return []
    found = client.search_runs(
        [experiment.experiment_id], max_results=MAX_RUNS, order_by=["attributes.start_time DESC"]
    )
    return [
        RunStatus(
            project=project,
            run=str(run.info.run_name),
            status=str(run.info.status),
            started=(run.info.start_time or 0) / 1000,
            note=run.data.tags.get("mlflow.note.content", ""),
        )
        for run in found
    ]


def _versions(client: Any) -> tuple[VersionStatus, ...]:
    found = client.search_model_versions(f"name = '{registry.MODEL_NAME}'")
    aliases = client.get_registered_model(registry.MODEL_NAME).aliases if found else {}
    versions = [
        VersionStatus(
            version=int(one.version),
            fingerprint=one.tags.get(tracking.TAG_FINGERPRINT, ""),
            project=one.tags.get(registry.TAG_PROJECT, ""),
            aliases=tuple(sorted(alias for alias, version in aliases.items() if str(version) == str(one.version))),
            gate=one.tags.get(f"{registry.TAG_GATE}.champion", ""),
        )
        for one in found
    ]
    return tuple(sorted(versions, key=lambda one: one.version))


def _served(endpoint: str) -> dict[str, Any]:
    """What the endpoint says at /health, which asks for no key."""
    if not endpoint:
        return {}
    import requests

    url = endpoint.rstrip("/").removesuffix("/v1")
    try:
        answer = requests.get(f"{url}/health", timeout=ENDPOINT_S)
        values = answer.json()
        if answer.status_code == 200:
            return {"endpoint": url, "serving": values}
        return {"endpoint": url, "endpoint_error": str(values.get("reason", answer.status_code))}
    except (requests.RequestException, json.JSONDecodeError, AttributeError) as error:
        return {"endpoint": url, "endpoint_error": f"it doesn't answer ({type(error).__name__})"}
