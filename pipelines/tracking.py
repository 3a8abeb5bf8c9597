"""MLflow, as every job uses it: where it is, what names mean, and a run that a dead server can't stop.

Where: MLFLOW_TRACKING_URI if set, else a sqlite database in the storage folder (`mlflow_uri` tells; to look:
`mlflow ui --backend-store-uri URI`). Nothing here touches MLflow's global state: every call names its server.

A `Run` never waits for the server. What is logged goes into a spool file under the storage first and is delivered by a
background thread, again and again until it arrives; what can't be delivered before the job ends stays in the spool, and
the next job on the same storage delivers it. MLflow takes the same metric, tag or input twice without harm, so
"at least once" is enough.

| tag | on | value |
|---|---|---|
| nexusgen.job, nexusgen.stage | run | the entry point; the training stage |
| nexusgen.fingerprint | run, model version | of the model that was used or made |
| nexusgen.against | run | fingerprint of the model that an evaluation compares with |
| nexusgen.parent | run | the road's run; beside mlflow.parentRunId, which the UI nests by |
| nexusgen.parent | dataset input | the run that made the dataset |
| nexusgen.digest | dataset input | the whole digest; MLflow's own field holds its first 36 characters |
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import yaml
from PIL import Image

from nexusgen.errors import ConfigError, InputError, NexusgenError, ResourceError
from nexusgen.schema import REASON_CODES
from pipelines.exported import Exporter
from pipelines.runtime import JobReport
from pipelines.storage import is_remote, local_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

# Words in capitals stand for a name: of a suite and its metric, or one of schema.REASON_CODES.
METRICS = {
    "train/loss": "weighted sum of the stage's losses, normalised by the step's global counts",
    "train/ce": "cross entropy of text tokens",
    "train/mse": "mean squared error of predicted image embeddings",
    "train/cosine": "1 - cosine similarity of predicted image embeddings",
    "train/flow": "weighted squared error of the decoder's velocity",
    "train/grad_norm": "norm of the gradient before clipping",
    "train/lr": "learning rate",
    "train/skipped_steps": "steps so far that changed no weight: a gradient that wasn't finite, or far too large",
    "train/samples_per_s": "samples per wall second, all ranks",
    "train/tokens_per_s": "tokens per wall second, all ranks",
    "train/data_wait_fraction": "share of the step's time spent waiting for data",
    "train/mfu": "share of the devices' peak arithmetic in bf16 that the model needs; only where a GPU's peak is known",
    "train/checkpoint_s": "seconds until a checkpoint was in its place; in object storage steps go on meanwhile",
    "eval/SUITE/METRIC": "a score of a suite; validation of a training run is the suite `validation`",
    "eval/SUITE/METRIC.BOUND": "low and high of the score's 95 % interval, and n, the items that it is the mean of",
    "against/SUITE/METRIC": "difference of a score to another model's on the same items; with .low, .high and .n",
    "data/samples": "samples read",
    "data/embedded": "samples embedded",
    "data/quarantined": "samples not used",
    "data/quarantine/CODE": "samples not used, by reason code",
    "data/int8_cosine": "cosine similarity of stored int8 embeddings with what was encoded, mean over tokens",
    "data/int8_mse": "mean squared error of stored int8 embeddings",
    "job/seconds": "wall seconds of the job",
    "job/cpu_seconds": "CPU seconds of the job's processes on this machine",
    "job/cpu_hours": "CPU hours of driver and workers, on all machines, over all restarts; of a training its workers'",
    "job/gpu_hours": "GPUs that were allocated x hours, over all restarts",
    "job/samples": "samples worked on, over all restarts; of a training also those of steps that were repeated",
    "job/bytes_read": "bytes of artefacts (tars, rows, checkpoints, models) that were read, over all restarts",
    "job/bytes_written": "bytes of artefacts that were written, over all restarts",
    "job/cost_usd": "US dollars, by the configuration's `prices`; only where it has them",
}

TAG_JOB = "nexusgen.job"
TAG_STAGE = "nexusgen.stage"
TAG_FINGERPRINT = "nexusgen.fingerprint"
TAG_AGAINST = "nexusgen.against"
TAG_PARENT = "nexusgen.parent"
TAG_DIGEST = "nexusgen.digest"
MLFLOW_PARENT = "mlflow.parentRunId"

CREATE_PATIENCE_S = 300.0  # a nested or resumed run waits so long for a server that is being restarted
CLOSE_PATIENCE_S = 30.0  # at the end of a job, for what is still in the spool
GATHER_S = 1.0  # metrics of this span travel together
MAX_RETRY_DELAY_S = 5.0

_SQLITE = "sqlite:///"
_SPOOL = "mlflow_spool"
_RECORDS = "records.jsonl"
_MAX_METRICS = 900  # MLflow's limits per request are 1,000 metrics, 100 params or tags, 1,000 inputs
_MAX_PARAMS = 100
_MAX_INPUTS = 200
_MAX_PARAM_CHARS = 6000
_MAX_DIGEST_CHARS = 36

_REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "BAD_REQUEST"}
_SECRET_KEY = re.compile(r"(^|[._-])(secret|password|passwd|api_?key|access_?key|credentials?|auth_token)", re.I)
_URI_USER = re.compile(r"(?<=://)[^/@\s]+@")

T = TypeVar("T")
_Record = dict[str, Any]


def mlflow_uri(storage: str) -> str:
    """The tracking URI that jobs on `storage` use.

    Raises: ConfigError if the storage isn't a local folder and MLFLOW_TRACKING_URI isn't set.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if is_remote(storage):
        raise ConfigError(
            f"storage {storage} is not a local folder, so MLflow can't be embedded in it: "
            "set MLFLOW_TRACKING_URI to a tracking server"
        )
    return f"sqlite:///{local_path(storage) / 'mlflow.db'}"


def connect(storage: str) -> MlflowClient:
    """A client of the MLflow that belongs to `storage`; the embedded database is made where it doesn't exist yet.

    Several processes that open a fresh database at once break its migration, so they take turns here.
    Raises: ConfigError without a usable place for MLflow; InputError if the storage can't be written.
    """
    # Read by MLflow when it is imported, and at each request. A dead server must not hold a job for minutes: we retry.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # where commands print their json
    uri = mlflow_uri(storage)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    from mlflow import MlflowClient  # takes seconds, and not every command needs it
    from mlflow.exceptions import MlflowException

    if not uri.startswith(_SQLITE):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    folder = Path(uri.removeprefix(_SQLITE)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".mlflow.lock").open("w")
    except OSError as error:
        raise InputError(f"the folder {folder} of MLflow's database can't be written: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return MlflowClient(tracking_uri=uri, registry_uri=uri)  # opens and, if need be, migrates the database
        except MlflowException as error:
            raise InputError(f"the MLflow database at {uri} can't be opened: {error}") from None


def configure(storage: str) -> None:
    """Check MLflow's place and make the embedded database, before a job starts anything. Raises: as `connect`."""
    connect(storage)


def check_metric_names(names: Iterator[str] | Sequence[str] | Mapping[str, float]) -> None:
    """Raises: ValueError (a programming error) for a metric that isn't in the table METRICS."""
    for name in names:
        prefix, _, last = name.rpartition("/")
        is_known = (
            name in METRICS
            or (prefix == "data/quarantine" and last in REASON_CODES)
            or re.fullmatch(r"(eval|against)/\w+/[\w./-]+", name) is not None
        )
        if not is_known:
            raise ValueError(f"metric {name!r} is not in the table METRICS of pipelines/tracking.py")


class Run:
    """One MLflow run, logged into without waiting; made by `job_run`, `road_run` or `attach`."""

    def __init__(
        self, run_id: str, outbox: _Outbox, exporter: Exporter | None, known_params: Mapping[str, str] | None = None
    ) -> None:
        self.run_id = run_id
        self._outbox = outbox
        self._exporter = exporter
        self._known_params = dict(known_params or {})

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Tell MLflow, and Prometheus where Ray runs. Raises: ValueError for a name outside the table METRICS."""
        check_metric_names(metrics)
        now = _now_ms()
        self._outbox.put({"metrics": [[name, float(value), now, int(step)] for name, value in metrics.items()]})
        if self._exporter is not None:
            self._exporter.export(metrics, int(step))

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Log a (nested) configuration under dotted names, without secrets.

        A param can't change in MLflow: in a resumed run those that it has already keep their values.
        """
        params = {k: v for k, v in flatten_params(config).items() if k not in self._known_params}
        self._known_params |= params
        if params:
            self._outbox.put({"params": params})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags of the run."""
        self._outbox.put({"tags": {name: str(value) for name, value in tags.items()}})

    def log_dataset_input(
        self,
        name: str,
        source_uri: str,
        digest: str,
        context: str = "training",
        num_rows: int | None = None,
        run_id: str | None = None,
    ) -> None:
        """Say that the run read a dataset; `run_id` is the run that made it, if one of ours did."""
        self._outbox.put(
            {
                "input": {
                    "name": name[-500:],
                    "source": redact(source_uri),
                    "digest": digest,
                    "context": context,
                    "num_rows": num_rows,
                    "run_id": run_id,
                }
            }
        )

    def log_text(self, text: str, artifact: str) -> None:
        """Store a text as the artefact named `artifact` (a relative path)."""
        self._put_artifact(text.encode(), artifact)

    def log_image(self, image: Image.Image, artifact: str) -> None:
        """Store a picture as PNG under the relative path `artifact`."""
        data = io.BytesIO()
        image.save(data, format="PNG")
        self._put_artifact(data.getvalue(), artifact)

    def log_report(self, report: JobReport) -> None:
        """Store what the job did and cost."""
        self.log_metrics({"job/seconds": report.seconds, "job/cpu_seconds": report.cpu_seconds})
        self.log_text(json.dumps(report.to_json(), indent=2, default=str), "report.json")

    def _put_artifact(self, data: bytes, artifact: str) -> None:
        self._outbox.put({"artifact": {"file": self._outbox.keep_file(data), "path": artifact}})


@contextmanager
def job_run(
    storage: str,
    experiment: str,
    job: str,
    config_yaml: str,
    *,
    stage: str | None = None,
    makes: str | None = None,
    parent: str | None = None,
    resume_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """Follow a job: a run (nested under `parent`), its configuration as params and as `config.yaml`, its end.

    `makes` is the job's `stage` in Prometheus' eyes, where it has none in MLflow's (default: the job's name).
    `resume_run_id` continues that run. The run ends FINISHED, KILLED on Ctrl-C, or FAILED with the message in its note.
    Raises: ConfigError without a place for MLflow; ResourceError if its server doesn't answer; what the body raises.
    """
    client = connect(storage)
    all_tags = {TAG_JOB: job, "mlflow.source.name": f"nexusgen {job}", "mlflow.source.type": "JOB", **(tags or {})}
    if stage is not None:
        all_tags[TAG_STAGE] = stage
    if parent is not None:
        all_tags |= {TAG_PARENT: parent, MLFLOW_PARENT: parent}
    name = f"{job} {stage}" if stage else job
    patience_s = CREATE_PATIENCE_S if parent or resume_run_id else 0.0

    def open_run() -> tuple[str, dict[str, str]]:
        _deliver_leftovers(client, _spool_root(storage))  # first: among them may be how the resumed run ended
        return _open_run(client, experiment, name, all_tags, resume_run_id)

    run_id, known_params = _patiently(open_run, mlflow_uri(storage), patience_s)
    outbox = _Outbox(client, run_id, _spool_root(storage))
    run = Run(run_id, outbox, Exporter(experiment, stage or makes or job), known_params)
    run.log_text(config_yaml, "config.yaml")
    run.log_params(yaml.safe_load(config_yaml) or {})
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except Exception as error:
        run.set_tags({"mlflow.note.content": f"{type(error).__name__}: {error}"[:5000]})
        raise
    finally:
        _deliver_leftovers(client, _spool_root(storage))  # of this job's workers that were killed
        outbox.put({"status": [status, _now_ms()]})
        outbox.close(CLOSE_PATIENCE_S)


@contextmanager
def road_run(storage: str, experiment: str, config_yaml: str, *, resume_run_id: str | None = None) -> Iterator[Run]:
    """The run of a whole road; its jobs' runs take its id as their `parent`."""
    with job_run(storage, experiment, "road", config_yaml, resume_run_id=resume_run_id) as run:
        yield run


@contextmanager
def attach(storage: str, run_id: str, exporter: Exporter | None = None) -> Iterator[Run]:
    """Log into a run that another process has opened and will close: rank 0 of training into the driver's run.

    Prometheus is told by the `exporter`, if there is one.
    """
    outbox = _Outbox(connect(storage), run_id, _spool_root(storage))
    try:
        yield Run(run_id, outbox, exporter)
    finally:
        outbox.close(CLOSE_PATIENCE_S)


def flatten_params(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and texts of a nested configuration; secrets become `***`."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten_params(value, f"{name}.")
            continue
        text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
        flat[name] = "***" if _SECRET_KEY.search(name) else redact(text)[:_MAX_PARAM_CHARS]
    return flat


def redact(text: str) -> str:
    """Take user names and passwords out of URIs."""
    return _URI_USER.sub("***@", text)


def _open_run(
    client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str], resume_run_id: str | None
) -> tuple[str, dict[str, str]]:
    """Continue or create a run. Returns its id and the params it has."""
    from mlflow.exceptions import MlflowException

    if resume_run_id is not None:
        try:
            params = dict(client.get_run(resume_run_id).data.params)
            client.update_run(resume_run_id, status="RUNNING")
            for key, value in tags.items():
                client.set_tag(resume_run_id, key, value)
            return resume_run_id, params
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning("the MLflow run %s to continue is not on this server; a new one begins", resume_run_id)
    run = client.create_run(_experiment_id(client, experiment), tags=dict(tags), run_name=name)
    return run.info.run_id, {}


def _experiment_id(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        uri = client.tracking_uri
        location = None
        if uri.startswith(_SQLITE):
            location = (Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts").as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was faster
    if found is None or found.lifecycle_stage != "active":
        raise InputError(f"the MLflow experiment {name!r} was deleted: restore it, or choose another project name")
    return str(found.experiment_id)


def _patiently(act: Callable[[], T], uri: str, patience_s: float) -> T:
    """Call `act` until the server answers. Raises: ResourceError after `patience_s` seconds."""
    from mlflow.exceptions import MlflowException

    deadline = time.monotonic() + patience_s
    while True:
        try:
            return act()
        except (MlflowException, OSError) as error:
            if _is_refusal(error):
                raise NexusgenError(f"MLflow at {redact(uri)} refused: {error}") from error
            if time.monotonic() >= deadline:
                raise ResourceError(
                    f"MLflow at {redact(uri)} doesn't answer ({redact(str(error))[:300]}): "
                    "start the server, or correct or unset MLFLOW_TRACKING_URI"
                ) from error
            log.warning("MLflow at %s doesn't answer; trying again", redact(uri))
            time.sleep(1.0)


def _is_refusal(error: Exception) -> bool:
    """True where the server has understood and said no, so that asking again is useless."""
    return getattr(error, "error_code", None) in _REFUSALS


def _spool_root(storage: str) -> Path:
    """Where records wait: in the storage, or, as that is remote, in this user's folder on this machine.

    A server has a spool of its own: what waits for one must not go to another, which would refuse it for good.
    """
    uri = mlflow_uri(storage)
    if not is_remote(storage):
        return local_path(storage) / (_SPOOL if uri.startswith(_SQLITE) else f"{_SPOOL}_{_short_hash(uri)}")
    name = f"nexusgen_{_SPOOL}_{os.getuid()}_{_short_hash(storage.rstrip('/'), uri)}"
    return Path(tempfile.gettempdir()) / name


def _short_hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


class _Outbox:
    """What is on its way to one run: spooled to a file, delivered by a thread, oldest first."""

    def __init__(self, client: MlflowClient, run_id: str, spool_root: Path) -> None:
        self._client = client
        self._run_id = run_id
        self._folder = spool_root / f"{run_id}-{uuid.uuid4().hex[:8]}"
        try:
            (self._folder / "files").mkdir(parents=True)
        except OSError as error:
            raise InputError(f"the spool {self._folder} of MLflow records can't be written: {error.strerror}") from None
        # Others see by the lock that this spool has a living owner, so it gets its name when it is locked.
        unnamed = self._folder / "unnamed"
        self._spool = unnamed.open("a", encoding="utf-8")
        fcntl.flock(self._spool, fcntl.LOCK_EX)
        unnamed.rename(self._folder / _RECORDS)
        self._pending: deque[_Record] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._has_given_up = False
        self._bug: BaseException | None = None
        self._last_error = ""
        self._thread = threading.Thread(target=self._work, name="mlflow-outbox", daemon=True)
        self._thread.start()

    def put(self, record: _Record) -> None:
        with self._changed:
            self._spool.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._spool.flush()
            self._pending.append(record)
            self._changed.notify_all()

    def keep_file(self, data: bytes) -> str:
        """Store an artefact's bytes in the spool; the returned name goes into its record."""
        name = uuid.uuid4().hex
        (self._folder / "files" / name).write_bytes(data)
        return name

    def close(self, patience_s: float) -> None:
        """Deliver what is left, for `patience_s` seconds at most; the rest stays in the spool for the next job."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(patience_s)
        with self._changed:
            self._has_given_up = True
            self._changed.notify_all()
            num_left = len(self._pending)
            if not num_left:
                shutil.rmtree(self._folder, ignore_errors=True)  # while it is still locked
            self._spool.close()
        if self._bug is not None:
            raise self._bug
        if num_left:
            log.warning(
                "%d records of MLflow run %s were not delivered (%s): they wait in %s for the next job on this storage",
                num_left,
                self._run_id,
                self._last_error,
                self._folder,
            )

    def _work(self) -> None:
        try:
            while self._deliver_next():
                pass
        except BaseException as error:  # not lost in a thread: close() raises it
            self._bug = error

    def _deliver_next(self) -> bool:
        """Wait for records, deliver one request's worth. Returns False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._pending) or self._is_closing)
            if not self._pending or self._has_given_up:
                return False
            self._changed.wait_for(lambda: self._is_closing, timeout=GATHER_S)
            batch = _first_batch(self._pending)
        delay_s = 0.5
        while (error := _deliver(self._client, self._run_id, batch, self._folder)) is not None:
            self._last_error = str(error)[:300]
            with self._changed:
                if self._changed.wait_for(lambda: self._has_given_up, timeout=delay_s):
                    return False
            delay_s = min(2 * delay_s, MAX_RETRY_DELAY_S)
        with self._changed:
            if self._has_given_up:
                return False
            for _ in batch:
                self._pending.popleft()
        return True


def _first_batch(pending: Sequence[_Record] | deque[_Record]) -> list[_Record]:
    """The oldest records that fit one request together: all of one kind."""
    batch: list[_Record] = []
    num_entries = 0
    for record in pending:
        ((kind, content),) = record.items()
        if batch and (kind not in batch[0] or kind in ("artifact", "status")):
            break
        limit = {"metrics": _MAX_METRICS, "input": _MAX_INPUTS}.get(kind, _MAX_PARAMS)
        num_entries += len(content) if kind in ("metrics", "params", "tags") else 1
        if batch and num_entries > limit:
            break
        batch.append(record)
    return batch


def _deliver(client: MlflowClient, run_id: str, batch: Sequence[_Record], folder: Path) -> Exception | None:
    """Send records of one kind. Returns the error if it is worth another try; a refusal is logged and done with."""
    from mlflow.exceptions import MlflowException

    try:
        _send(client, run_id, batch, folder)
    except (MlflowException, OSError) as error:
        if not _is_refusal(error):
            return error
        log.warning("MLflow refused %s for run %s: %s", sorted({k for r in batch for k in r}), run_id, error)
    return None


def _send(client: MlflowClient, run_id: str, batch: Sequence[_Record], folder: Path) -> None:
    from mlflow.entities import Metric, Param, RunTag

    (kind,) = batch[0]
    contents = [record[kind] for record in batch]
    if kind == "metrics":
        rows = [Metric(*row) for content in contents for row in content]
        for start in range(0, len(rows), _MAX_METRICS):
            client.log_batch(run_id, metrics=rows[start : start + _MAX_METRICS])
    elif kind == "params":
        params = [Param(*item) for content in contents for item in content.items()]
        for start in range(0, len(params), _MAX_PARAMS):
            client.log_batch(run_id, params=params[start : start + _MAX_PARAMS])
    elif kind == "tags":
        tags = {key: value for content in contents for key, value in content.items()}
        client.log_batch(run_id, tags=[RunTag(*item) for item in tags.items()])
    elif kind == "input":
        client.log_inputs(run_id, [_dataset_input(content) for content in contents])
    elif kind == "artifact":
        for content in contents:
            _send_artifact(client, run_id, folder / "files" / content["file"], content["path"])
    elif kind == "status":
        for status, end_ms in contents:
            client.set_terminated(run_id, status=status, end_time=end_ms)
    else:
        raise ValueError(f"unknown kind of record {kind!r}")


def _send_artifact(client: MlflowClient, run_id: str, kept: Path, path: str) -> None:
    """Upload a kept file; MLflow names an artefact after its file, so the file is linked under that name."""
    *parents, name = path.split("/")
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        named = Path(folder) / name
        named.hardlink_to(kept)
        client.log_artifact(run_id, str(named), artifact_path="/".join(parents) or None)


def _dataset_input(content: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    digest = content["digest"].removeprefix("sha256:")
    tags = {MLFLOW_DATASET_CONTEXT: content["context"], TAG_DIGEST: digest[:500]}
    if content["run_id"]:
        tags[TAG_PARENT] = content["run_id"]
    dataset = Dataset(
        name=content["name"],
        digest=digest[:_MAX_DIGEST_CHARS],
        source_type="s3" if content["source"].startswith("s3://") else "local",
        source=json.dumps({"uri": content["source"]}),
        profile=json.dumps({"num_rows": content["num_rows"]}),
    )
    return DatasetInput(dataset=dataset, tags=[InputTag(*item) for item in tags.items()])


def _deliver_leftovers(client: MlflowClient, spool_root: Path) -> None:
    """Deliver what earlier jobs on this storage could not, unless they still live; on failure it simply stays."""
    for path in sorted(spool_root.glob(f"*/{_RECORDS}")):
        with suppress(FileNotFoundError), path.open("r+", encoding="utf-8") as spool:  # its owner may just be done
            if not _try_lock(spool) or not path.exists():
                continue
            run_id = path.parent.name.rpartition("-")[0]
            pending = deque(_parse_records(spool))
            while pending:
                batch = _first_batch(pending)
                if _deliver(client, run_id, batch, path.parent) is not None:
                    return
                for _ in batch:
                    pending.popleft()
            shutil.rmtree(path.parent, ignore_errors=True)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _parse_records(lines: IO[str]) -> Iterator[_Record]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return  # a killed process left half a line; there is none after it


def _now_ms() -> int:
    return int(time.time() * 1000)
