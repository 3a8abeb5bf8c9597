"""The published models in MLflow: what their tags say, where they lie, and how a name becomes a model folder.

`register.py` makes versions, `promote.py` moves aliases. A version of the registered model `nexusgen` is a reference:
its source is the folder STORAGE/models/FINGERPRINT. With a local storage folder and a tracking *server*, which refuses
such a reference, the folder is stored a second time as artefacts of the register run.

A folder made with `adapter: keep` holds an adapter of LoRA, and the name and fingerprint of its base, in place of all
the weights that it shares with the base. It has the name and manifest of the merged model; `resolve_model` checks the
base and makes that model of both, once per machine.

| tag of a version | value |
|---|---|
| nexusgen.fingerprint | of the model folder's weights |
| nexusgen.project | the project (experiment) it belongs to |
| nexusgen.recipe | hash of the base and the checkpoints it was assembled from |
| nexusgen.run.register, nexusgen.run.STAGE, nexusgen.run.evaluate | MLflow run ids |
| nexusgen.inputs | json list of the data that the stages read: stage, name, uri, digest, run_id of its embed run |
| nexusgen.eval.SUITE.METRIC | scores |
| nexusgen.gate.ALIAS | what the gate last said |

The registered model's tag `nexusgen.previous.ALIAS` lists the earlier targets of an alias, latest last.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexusgen.errors import ConfigError, FingerprintError, InputError, ModelError, UsageError
from nexusgen.model.manifest import Manifest, demo_base, read_manifest
from nexusgen.schema import MANIFEST_NAME
from nexusgen.statistics import Interval
from pipelines import gate, model_card, storage, tracking
from pipelines.lora import ADAPTER_FILE, ADAPTER_RECORD, AdapterRecord, LoraConfig, merge_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL_NAME = "nexusgen"
DEMO_BASE = "demo-base"

TAG_PROJECT = "nexusgen.project"
TAG_RECIPE = "nexusgen.recipe"
TAG_INPUTS = "nexusgen.inputs"
TAG_RUN = "nexusgen.run"
TAG_EVAL = "nexusgen.eval"
TAG_GATE = "nexusgen.gate"
TAG_PREVIOUS = "nexusgen.previous"


def resolve_model(spec: str, storage_uri: str | None = None) -> Path:
    """The local folder of a model named `demo-base`, by a folder, an s3:// URI, or models:/NAME@ALIAS | NAME/VERSION.

    `storage_uri` says which registry is meant, unless MLFLOW_TRACKING_URI does. Of a folder that holds an adapter it is
    the model that adapter and base make.
    Raises: InputError if there is nothing of that name; ModelError if it isn't a model folder; ConfigError;
    FingerprintError if an adapter's base has changed.
    """
    folder = locate_model(spec, storage_uri)
    return _with_base(folder, storage_uri) if (folder / ADAPTER_RECORD).is_file() else folder


def locate_model(spec: str, storage_uri: str | None = None) -> Path:
    """As `resolve_model`, but a folder that holds an adapter stays as it is: `find_adapter` tells what it is for."""
    place = _find_place(spec, storage_uri)
    folder = storage.fetch_folder(place, _check_weights) if storage.is_remote(place) else Path(place)
    read_manifest(folder)
    return folder


def _check_weights(folder: Path) -> None:
    from nexusgen.model.weights import check_fingerprints  # torch, which only who copies weights needs

    check_fingerprints(folder, may_lack_parts=(folder / ADAPTER_RECORD).is_file())


def find_manifest(spec: str, storage_uri: str | None = None) -> Manifest:
    """The manifest of what `resolve_model` gives, read where it lies: nothing is copied or merged.

    Raises: as `resolve_model`.
    """
    place = _find_place(spec, storage_uri)
    manifest = _read_manifest_at(place)
    if storage.exists(record_uri := storage.join(place, ADAPTER_RECORD)):
        record = _read_record(record_uri)
        with _base_of(place, record):
            found = find_manifest(record.base, storage_uri).fingerprint
        _check_base_of(place, record, found)
    return manifest


def _find_place(spec: str, storage_uri: str | None) -> str:
    """Folder or URI of a model, as it is stored. Raises: as `resolve_model`."""
    if spec == DEMO_BASE:
        return str(demo_base())
    if spec.startswith("models:/"):
        version = _find_named_version(spec, storage_uri)
        uri = model_uri(storage_uri, version)
        if uri.startswith("mlflow-artifacts:"):
            return str(_download_artifacts(tracking.connect(storage_uri or "."), version))
        if not storage.is_folder(uri):
            raise InputError(f"{uri} is not a folder")
        return uri if storage.is_remote(uri) else str(storage.local_path(uri))
    if "://" in spec:
        if not storage.exists(storage.join(spec, MANIFEST_NAME)):
            raise ModelError(f"{spec} is not a model folder: it holds no {MANIFEST_NAME}")
        return spec if storage.is_remote(spec) else str(storage.local_path(spec))
    if not Path(spec).exists():
        raise InputError(
            f"model {spec}: there is no such folder; give {DEMO_BASE}, a model folder, an s3:// URI, "
            f"models:/{MODEL_NAME}@champion or models:/{MODEL_NAME}/VERSION"
        )
    return spec


def _read_manifest_at(place: str) -> Manifest:
    if not storage.is_remote(place):
        return read_manifest(Path(place))
    with tempfile.TemporaryDirectory() as scratch:
        content = storage.read_bytes(storage.join(place, MANIFEST_NAME))
        (Path(scratch) / MANIFEST_NAME).write_bytes(content)
        return read_manifest(Path(scratch))


@dataclass(frozen=True)
class Adapter:
    """What a model folder holds in place of whole weights of a language model, and the base folder that it is for."""

    file: Path
    base: Path
    lora: LoraConfig


def find_adapter(folder: Path, storage_uri: str | None = None) -> Adapter | None:
    """The adapter in a model folder, with its base, to be used beside each other; None if it holds whole weights.

    Raises: ModelError if the record can't be read, the adapter's file has changed or the base isn't found;
    FingerprintError if the base has changed.
    """
    if not (folder / ADAPTER_RECORD).is_file():
        return None
    record, file = _read_record(str(folder / ADAPTER_RECORD)), folder / ADAPTER_FILE
    if record.digest is not None and (found := storage.file_digest(file)) != record.digest:
        raise ModelError(f"{file} has changed: its sha256 is {found}, wanted {record.digest}; register it again")
    return Adapter(file, _find_base(folder, record, storage_uri), record.lora)


def pin_model(spec: str, storage_uri: str | None = None) -> str:
    """The same model under a name that means the same in another process and later: an alias becomes its version, a
    relative folder an absolute one. Raises: InputError or UsageError for an alias or version that doesn't exist.
    """
    if spec == DEMO_BASE:
        return spec
    if spec.startswith("models:/"):
        version = _find_named_version(spec, storage_uri)
        return f"models:/{MODEL_NAME}/{version.version}"
    return spec if "://" in spec else str(Path(spec).absolute())


def _with_base(folder: Path, storage_uri: str | None) -> Path:
    """The model that a folder's adapter and its base make, made once per machine.

    Raises: ModelError if the record can't be read, the base isn't found, or both make another model than was
    registered; FingerprintError if the base has changed.
    """
    manifest, record = read_manifest(folder), _read_record(str(folder / ADAPTER_RECORD))
    cache = Path(tempfile.gettempdir()) / f"nexusgen-cache-{os.getuid()}"  # as `storage.fetch_folder` has it
    target = cache / f"adapted-{manifest.fingerprint}-{record.base_fingerprint}"
    if target.is_dir():
        return target
    base = _find_base(folder, record, storage_uri)
    from nexusgen.model.weights import DECODER_FOLDERS, assemble_model, write_manifest

    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=cache) as scratch:
        merged, out = Path(scratch) / "merged.safetensors", Path(scratch) / "model"
        merge_file(base, folder / ADAPTER_FILE, merged, record.lora)
        assemble_model(base, out, autoregressive=merged, lineage=manifest.lineage)
        for place in DECODER_FOLDERS.values():
            if (folder / place).is_dir():  # trained, too
                shutil.rmtree(out / place, ignore_errors=True)
                shutil.copytree(folder / place, out / place)
        values = manifest.model_dump(exclude={"version", "parts", "fingerprints", "fingerprint"})
        made = write_manifest(out, **values).fingerprint
        if made != manifest.fingerprint:
            raise ModelError(
                f"{folder}: its adapter and the base {record.base} make the model {made}, but {manifest.fingerprint} "
                "was registered: the adapter's files have changed; register the checkpoint again"
            )
        storage.put_in_place(out, target)
    return target


def _find_base(folder: Path, record: AdapterRecord, storage_uri: str | None) -> Path:
    """The base of a folder's adapter. Raises: ModelError if it isn't found; FingerprintError if it has changed."""
    with _base_of(str(folder), record):
        base = resolve_model(record.base, storage_uri)
    _check_base_of(str(folder), record, read_manifest(base).fingerprint)
    return base


@contextmanager
def _base_of(place: str, record: AdapterRecord) -> Iterator[None]:
    """The body looks for the base of an adapter. Raises: ModelError if it doesn't find it."""
    try:
        yield
    except (InputError, UsageError, ModelError) as error:
        raise ModelError(f"{place} holds an adapter for the base {record.base}, which isn't there: {error}") from None


def _check_base_of(place: str, record: AdapterRecord, found: str) -> None:
    if found != record.base_fingerprint:
        raise FingerprintError(
            f"{place} holds an adapter for the base {record.base} of fingerprint {record.base_fingerprint}, but "
            f"{record.base} is {found} now: bring the base back, or register the checkpoint again with adapter=merge"
        )


def _read_record(uri: str) -> AdapterRecord:
    try:
        return AdapterRecord.model_validate_json(storage.read_bytes(uri))
    except (InputError, ValueError) as error:
        raise ModelError(f"{uri} can't be read as an adapter's record: {error}") from None


def _find_named_version(spec: str, storage_uri: str | None) -> ModelVersion:
    from_registry = spec.removeprefix("models:/")
    if storage_uri is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(f"{spec} names a registered model: say where with storage=URI or MLFLOW_TRACKING_URI")
    name, at, alias = from_registry.partition("@")
    if not at:
        name, _, number = from_registry.partition("/")
        if not number.isdigit():
            raise UsageError(f"{spec}: wanted models:/{MODEL_NAME}@ALIAS or models:/{MODEL_NAME}/VERSION")
    if name != MODEL_NAME:
        raise InputError(f"{spec}: the registered model is called {MODEL_NAME}, not {name!r}")
    client = tracking.connect(storage_uri or ".")
    if at:
        target = alias_target(client, alias)
        if target is None:
            raise InputError(f"{spec}: no version has the alias {alias!r}: promote one first")
        number = target
    return get_version(client, number)


def model_uri(storage_uri: str | None, version: ModelVersion) -> str:
    """Where a version's folder is: in the storage at hand if it is there (it may have moved), else its source."""
    if storage_uri is not None:
        here = storage.join(storage_uri, "models", version.tags.get(tracking.TAG_FINGERPRINT, "-"))
        if storage.exists(storage.join(here, MANIFEST_NAME)):
            return here
    return str(version.source)


def _download_artifacts(client: MlflowClient, version: ModelVersion) -> Path:
    """A version stored as artefacts of a tracking server, fetched once per machine."""
    cache = Path(tempfile.gettempdir()) / "nexusgen_models"
    folder = cache / version.tags[tracking.TAG_FINGERPRINT]
    if not folder.exists():
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            client.download_artifacts(str(version.run_id), "model", scratch)
            storage.put_in_place(Path(scratch) / "model", folder)
    return folder


def get_version(client: MlflowClient, number: str) -> ModelVersion:
    """A version by its number. Raises: UsageError, with the numbers that there are."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(MODEL_NAME, number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = sorted(int(v.version) for v in client.search_model_versions(f"name = '{MODEL_NAME}'"))
        raise UsageError(
            f"the registry at {tracking.redact(client.tracking_uri)} has no version {number} of {MODEL_NAME}; "
            f"it has {', '.join(map(str, known)) or 'none: run register first'}"
        ) from None


def find_version(client: MlflowClient, tag: str, value: str) -> ModelVersion | None:
    """The latest version with this tag."""
    found = client.search_model_versions(f"name = '{MODEL_NAME}' and tags.`{tag}` = '{value}'")
    return max(found, key=lambda version: int(version.version), default=None)


def _flatten_scores(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted names of the numbers in a nested mapping; anything else is left out."""
    for key, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flatten_scores(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


def _read_json(uri: str, what: str) -> dict[str, Any]:
    if not storage.exists(uri):
        raise InputError(f"{what}: {uri} is missing")
    try:
        content = json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise InputError(f"{what}: {uri} is not valid json: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{what}: {uri} should hold a json object")
    return content


def alias_target(client: MlflowClient, alias: str) -> str | None:
    """The version that an alias points to. Raises: UsageError if no model was ever registered."""
    target = registered_model(client).aliases.get(alias)
    return str(target) if target is not None else None


def registered_model(client: MlflowClient) -> Any:
    """What MLflow knows of `nexusgen`: aliases and tags. Raises: UsageError if no model was ever registered."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(MODEL_NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        where = tracking.redact(client.tracking_uri)
        raise UsageError(f"the registry at {where} has no model {MODEL_NAME}: run register first") from None


def attach_scores(
    storage_uri: str, fingerprint: str, suite: str, scores: Mapping[str, Any], run_id: str | None = None
) -> None:
    """Write an evaluation's scores to the tags of the version with these weights; none may exist yet.

    `scores` may be nested: {"generation": {"overall": 0.9}} becomes the tag nexusgen.eval.SUITE.generation.overall.
    """
    client = tracking.connect(storage_uri)
    version = find_version(client, tracking.TAG_FINGERPRINT, fingerprint)
    if version is None:
        return
    tags = {f"{TAG_EVAL}.{suite}.{name}": f"{value:.4f}" for name, value in _flatten_scores(scores)}
    if run_id is not None:
        tags[f"{TAG_RUN}.evaluate"] = run_id
    for key, value in tags.items():
        client.set_model_version_tag(MODEL_NAME, version.version, key, value)
    write_card(client, storage_uri, version)


def measures_uri(storage_uri: str, fingerprint: str, suite: str) -> str:
    """Where `evaluate` writes, and the gate reads, the items' own scores by metric."""
    return storage.join(storage_uri, "evaluations", fingerprint, suite, "measures.json")


def write_card(client: MlflowClient, storage_uri: str, version: ModelVersion) -> None:
    """Write a version's model card anew: into its folder, its run's artefacts and its description."""
    version = get_version(client, str(version.version))  # with the tags that it has now
    fingerprint = version.tags[tracking.TAG_FINGERPRINT]
    folder = storage.join(storage_uri, "models", fingerprint)
    if not storage.exists(storage.join(folder, MANIFEST_NAME)):
        return  # fetched from elsewhere: the card is there
    said = {tag.removeprefix(f"{TAG_GATE}."): text for tag, text in version.tags.items() if tag.startswith(TAG_GATE)}
    base = root_base(storage_uri, fingerprint)
    facts = model_card.collect(storage_uri, str(version.version), folder, base, said)
    card = model_card.render(facts)
    storage.write_bytes_atomic(storage.join(folder, model_card.CARD_NAME), card.encode())
    if version.run_id:
        client.log_text(version.run_id, card, model_card.CARD_NAME)
    client.update_model_version(MODEL_NAME, version.version, model_card.render(facts, is_short=True))


def scores_uri(storage_uri: str, fingerprint: str, suite: str) -> str:
    """Where `evaluate` writes, and the gate reads, the scores of a model's weights: a json object."""
    return storage.join(storage_uri, "evaluations", fingerprint, suite, "scores.json")


def read_evaluation(storage_uri: str, fingerprint: str, suite: str) -> gate.Evaluation:
    """What `evaluate` left of a suite. Raises: InputError if it left nothing, or the files can't be read."""
    uri = scores_uri(storage_uri, fingerprint, suite)
    content = _read_json(uri, "scores")
    measures = measures_uri(storage_uri, fingerprint, suite)
    return gate.Evaluation(
        fingerprint=content.get("fingerprint", fingerprint),
        settings=content.get("settings", {}),
        scores=dict(_flatten_scores(content.get("scores", content))),
        intervals={name: Interval(**values) for name, values in content.get("intervals", {}).items()},
        measures=_read_json(measures, "the items' scores") if storage.exists(measures) else {},
    )


def root_base(storage_uri: str, fingerprint: str) -> str:
    """The fingerprint of the base model that the training of a registered one began from.

    A version may have been trained on another, which was trained on the base: followed through the models' manifests.
    """
    while True:
        uri = storage.join(storage_uri, "models", fingerprint, MANIFEST_NAME)
        base = _read_json(uri, "manifest").get("lineage", {}).get("base_fingerprint") if storage.exists(uri) else None
        if base is None or base == fingerprint:
            return fingerprint
        fingerprint = base
