"""From checkpoints to a published model: `register` makes a version, `promote` moves aliases, `resolve_model` finds it.

A version of the registered model `nexusgen` is a reference: its source is the folder STORAGE/models/FINGERPRINT, its
tags say what it was made of. With a local storage folder and a tracking *server*, which refuses such a reference, the
folder is stored a second time as artefacts of the register run.

What was trained with LoRA is merged into the base's weights. With `adapter: keep` the folder holds the adapter, and the
name and fingerprint of its base, in place of all the weights that it shares with the base. It has the name and manifest
of the merged model; `resolve_model` checks the base and makes that model of both, once per machine.

| tag of a version | value |
|---|---|
| nexusgen.fingerprint | of the model folder's weights |
| nexusgen.project | the project (experiment) it belongs to |
| nexusgen.recipe | hash of the base and the checkpoints it was assembled from |
| nexusgen.run.register, nexusgen.run.STAGE, nexusgen.run.evaluate | MLflow run ids |
| nexusgen.inputs | json list of the data that the stages read: stage, name, uri, digest, run_id of its embed run |
| nexusgen.eval.SUITE.METRIC | scores |
| nexusgen.gate.ALIAS | what the gate last said |

Aliases: `candidate` needs an evaluation of exactly these weights; `champion` needs what gate.py asks for.
The registered model's tag `nexusgen.previous.ALIAS` lists the earlier targets, latest last, for `--rollback`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from nexusgen.config import Config, dump_config
from nexusgen.errors import ConfigError, FingerprintError, GateError, InputError, ModelError, UsageError
from nexusgen.model.manifest import Manifest, demo_base, read_manifest
from nexusgen.schema import MANIFEST_NAME
from nexusgen.statistics import Interval
from pipelines import checkpoint, gate, model_card, process_use, storage, tracking
from pipelines.accounting import Account, Prices, account_uri
from pipelines.checkpoint import Checkpoint
from pipelines.lora import ADAPTER_FILE, ADAPTER_RECORD, AdapterRecord, LoraConfig, merge_file
from pipelines.runtime import CpuMeter, JobReport

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL_NAME = "nexusgen"
DEMO_BASE = "demo-base"
MAX_TAG = 4900  # characters; MLflow keeps 5,000 of a version's tag
MAX_ARTIFACT_BYTES = 2_000_000_000  # a larger model is never copied into MLflow's artefact store

TAG_PROJECT = "nexusgen.project"
TAG_RECIPE = "nexusgen.recipe"
TAG_INPUTS = "nexusgen.inputs"
TAG_RUN = "nexusgen.run"
TAG_EVAL = "nexusgen.eval"
TAG_GATE = "nexusgen.gate"
TAG_PREVIOUS = "nexusgen.previous"

# Of the demo world's scores, and of their number: 144 short prompts, 96 captions, 140 edits, 192 questions.
CHAMPION_THRESHOLDS = {
    "n": 572.0,
    "generation.overall": 0.85,
    "generation.explicit_strict": 0.35,
    "editing.strict": 0.30,
    "understanding.overall": 0.70,
}

Alias = Literal["candidate", "champion"]


class RegisterConfig(Config):
    """Which weights become a version: a base, and the checkpoints trained on it."""

    storage: str
    name: str
    model: str = DEMO_BASE  # the base that the stages were trained from
    ar: str | None = "latest"  # a checkpoint's URI, `latest` of this project, or null: the base's own weights
    generation_decoder: str | None = "latest"
    editing_decoder: str | None = None  # learned from the predictions of the base's language model: then ar is null
    adapter: Literal["merge", "keep"] = "merge"  # of a LoRA training: into the weights, or beside its base's name
    prices: Prices | None = None  # what an hour costs: then the job's run tells its cost


class PromoteConfig(Config):
    """Which version an alias moves to, and what it must have reached."""

    storage: str
    version: int | None = None  # may be left out with rollback
    to: Alias = "champion"
    rollback: bool = False
    suite: str = "demo_world"
    thresholds: dict[str, float] = Field(default_factory=lambda: dict(CHAMPION_THRESHOLDS))
    understanding_drop: Annotated[float, Field(ge=0, le=1)] = Field(
        default=gate.REFERENCE_DROP,
        description="how much of the base model's understanding may be lost; the default is what the reference lost",
    )


def register(config: RegisterConfig, parent_run_id: str | None = None) -> JobReport:
    """Assemble STORAGE/models/FINGERPRINT from the base and the trained checkpoints, and make a version of it.

    The same weights get no second version: the report then says `reused`.
    Raises: InputError if a checkpoint is missing; ModelError or FingerprintError if it doesn't fit the base;
    ConfigError if the version can't be stored.
    """
    with CpuMeter() as meter:
        base = resolve_model(config.model, config.storage)
        trained = _find_checkpoints(config)
        base_manifest = read_manifest(base)
        base_fingerprint = base_manifest.fingerprint
        for found in trained.values():
            _check_base(found, base_fingerprint, config.model)
        _check_adapter(config, trained)
        kept = ["adapter"] if config.adapter == "keep" else []
        recipe = _hash([base_fingerprint, *[_identity(found) for found in trained.values()], *kept])
        client = tracking.connect(config.storage)
        version = _find_version(client, TAG_RECIPE, recipe)
        if version is not None and storage.exists(storage.join(_model_uri(config.storage, version), MANIFEST_NAME)):
            return _register_report(meter, config.storage, version, reused=True)
        with tracking.job_run(
            config.storage, config.name, "register", dump_config(config), parent=parent_run_id
        ) as run:
            uri = account_uri(config.storage, "register", config.name)
            account = Account(uri, run.run_id, recipe, config.prices, meter)
            account.write()
            lineage = _lineage(config, base_manifest, trained) | {"register_run_id": run.run_id}
            fingerprint = _publish(config, base, trained, lineage)
            run.set_tags({tracking.TAG_FINGERPRINT: fingerprint})
            for stage, found in trained.items():
                digest = _hash(_identity(found))
                run.log_dataset_input(f"checkpoint {stage}", found.uri, digest, stage, run_id=found.meta.run_id)
            version = _find_version(client, tracking.TAG_FINGERPRINT, fingerprint)
            is_known = version is not None
            if version is None:
                tags = _version_tags(config, fingerprint, recipe, run.run_id, lineage["stages"])
                version = _create_version(client, config.storage, fingerprint, run.run_id, tags)
            run.log_metrics(account.finish().metrics())
            _write_card(client, config.storage, version)
            report = _register_report(meter, config.storage, version, reused=is_known, run_id=run.run_id)
            run.log_report(report)
        return report


def promote(config: PromoteConfig, parent_run_id: str | None = None) -> JobReport:
    """Move an alias to a version that passes its gate, or back to the alias's last target.

    Raises: UsageError for a version or rollback that doesn't exist; GateError, with the reason, if the gate refuses.
    """
    with CpuMeter() as meter:
        client = tracking.connect(config.storage)
        current = _alias_target(client, config.to)
        history = _alias_history(client, config.to)
        version = _rollback_target(client, config, current, history) if config.rollback else _wanted(client, config)
        project = version.tags.get(TAG_PROJECT, MODEL_NAME)
        with tracking.job_run(config.storage, project, "promote", dump_config(config), parent=parent_run_id) as run:
            run.set_tags({tracking.TAG_FINGERPRINT: version.tags.get(tracking.TAG_FINGERPRINT, "")})
            said = "not asked" if config.rollback else _pass_gate(client, config, version, current, run)
            if str(version.version) != current:
                _move_alias(client, config, str(version.version), current, history)
            report = JobReport(
                job="promote",
                seconds=meter.seconds,
                cpu_seconds=meter.cpu_seconds,
                outputs={
                    "alias": config.to,
                    "version": int(version.version),
                    "previous": int(current) if current is not None else None,
                    "model": f"models:/{MODEL_NAME}@{config.to}",
                    "gate": said,
                    "run_id": run.run_id,
                },
                reused=str(version.version) == current,
            )
            run.log_report(report)
        return report


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
        uri = _model_uri(storage_uri, version)
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


def attach_scores(
    storage_uri: str, fingerprint: str, suite: str, scores: Mapping[str, Any], run_id: str | None = None
) -> None:
    """Write an evaluation's scores to the tags of the version with these weights; none may exist yet.

    `scores` may be nested: {"generation": {"overall": 0.9}} becomes the tag nexusgen.eval.SUITE.generation.overall.
    """
    client = tracking.connect(storage_uri)
    version = _find_version(client, tracking.TAG_FINGERPRINT, fingerprint)
    if version is None:
        return
    tags = {f"{TAG_EVAL}.{suite}.{name}": f"{value:.4f}" for name, value in _flatten_scores(scores)}
    if run_id is not None:
        tags[f"{TAG_RUN}.evaluate"] = run_id
    for key, value in tags.items():
        client.set_model_version_tag(MODEL_NAME, version.version, key, value)
    _write_card(client, storage_uri, version)


def measures_uri(storage_uri: str, fingerprint: str, suite: str) -> str:
    """Where `evaluate` writes, and the gate reads, the items' own scores by metric."""
    return storage.join(storage_uri, "evaluations", fingerprint, suite, "measures.json")


def _write_card(client: MlflowClient, storage_uri: str, version: ModelVersion) -> None:
    """Write a version's model card anew: into its folder, its run's artefacts and its description."""
    version = _get_version(client, str(version.version))  # with the tags that it has now
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


# --- register ---------------------------------------------------------------------------------------------------------


def _find_checkpoints(config: RegisterConfig) -> dict[str, Checkpoint]:
    """The trained checkpoints by stage. Raises: FingerprintError if they don't belong together; as `register`."""
    asked = {
        "ar": config.ar,
        "generation_decoder": config.generation_decoder,
        "editing_decoder": config.editing_decoder,
    }
    if asked["editing_decoder"] is not None and asked["ar"] is not None:
        raise FingerprintError(
            f"editing_decoder={config.editing_decoder} learned from what the autoregressive model of "
            f"model={config.model} predicts, but ar={config.ar} would be published in its place: set ar=null to keep "
            "the base's, or register ar first and train the editing decoder from that version, on its predictions"
        )
    trained = {}
    for stage, wanted in asked.items():
        if wanted is None:
            continue
        found = _latest_checkpoint(config, stage) if wanted == "latest" else _read_checkpoint(wanted)
        if found.meta.stage != stage:
            raise ModelError(f"{stage}={wanted}: that checkpoint is of stage {found.meta.stage}")
        trained[stage] = found
    if not trained:
        raise ConfigError(f"register: {', '.join(asked)} are all null, so there is nothing to publish")
    return trained


def _latest_checkpoint(config: RegisterConfig, stage: str) -> Checkpoint:
    folder = checkpoint.stage_folder(config.storage, config.name, stage)
    found = checkpoint.latest(folder)
    if found is None:
        raise InputError(
            f"no checkpoint of stage {stage} in {folder}: train it first, "
            f"or keep the base's own weights with {stage}=null"
        )
    return found


def _read_checkpoint(uri: str) -> Checkpoint:
    meta = storage.join(uri, "meta.json")
    if not storage.exists(meta):
        raise InputError(f"{uri} is not a checkpoint: {meta} is missing")
    try:
        return Checkpoint(uri, checkpoint.Meta.model_validate_json(storage.read_bytes(meta)))
    except ValidationError as error:
        raise ModelError(f"{meta} can't be read: {error}") from None


def _identity(found: Checkpoint) -> list[Any]:
    """What tells one checkpoint from another without reading its weights."""
    return [found.meta.stage, found.uri, found.meta.step, found.meta.run_id]


def _check_base(found: Checkpoint, base_fingerprint: str, model: str) -> None:
    if found.meta.base_fingerprint != base_fingerprint:
        raise FingerprintError(
            f"checkpoint {found.uri} was trained from base {found.meta.base_fingerprint}, but model={model} is "
            f"{base_fingerprint}: register it with the base it was trained from"
        )


def _lora_of(found: Checkpoint) -> LoraConfig | None:
    """The adapters that a checkpoint holds; None if it holds whole weights."""
    settings = found.meta.config.get("lora")
    return LoraConfig.model_validate(settings) if settings is not None else None


def _check_adapter(config: RegisterConfig, trained: Mapping[str, Checkpoint]) -> None:
    if config.adapter == "keep" and ("ar" not in trained or _lora_of(trained["ar"]) is None):
        found = f"{trained['ar'].uri} was trained in full" if "ar" in trained else "ar is null"
        raise ConfigError(f"register: adapter=keep wants a checkpoint of stage ar with lora, but {found}: leave it out")


def _lineage(config: RegisterConfig, base: Manifest, trained: dict[str, Checkpoint]) -> dict[str, Any]:
    """What the model is made of; stages whose weights stay the base's are where the base says."""
    stages = {
        stage: {
            "checkpoint": found.uri,
            "step": found.meta.step,
            "run_id": found.meta.run_id,
            "inputs": [data.model_dump() for data in found.meta.inputs],
            **({"lora": found.meta.config["lora"]} if _lora_of(found) is not None else {}),
        }
        for stage, found in trained.items()
    }
    return {
        "project": config.name,
        "base_fingerprint": base.fingerprint,
        "origin": base.lineage.get("origin", base.lineage),  # of the base that all training began from
        "stages": {**base.lineage.get("stages", {}), **stages},
    }


def _publish(config: RegisterConfig, base: Path, trained: dict[str, Checkpoint], lineage: dict[str, Any]) -> str:
    """Assemble the model and put it at STORAGE/models/FINGERPRINT, unless it is there. Returns the fingerprint."""
    models = None if storage.is_remote(config.storage) else storage.local_path(config.storage) / "models"
    if models is not None:
        models.mkdir(parents=True, exist_ok=True)  # assembled on the same disk, so that renaming is atomic
    with tempfile.TemporaryDirectory(prefix=".assembling-", dir=models) as scratch:
        weights = {stage: Path(scratch) / f"{stage}.safetensors" for stage in trained}
        for stage, found in trained.items():
            checkpoint.export_weights(found, weights[stage])
        lora = _lora_of(trained["ar"]) if "ar" in trained else None
        if lora is not None:
            adapter, weights["ar"] = weights["ar"], Path(scratch) / "merged.safetensors"
            merge_file(base, adapter, weights["ar"], lora)
        out = Path(scratch) / "model"
        from nexusgen.model.weights import assemble_model  # torch, which no other command of the registry needs

        manifest = assemble_model(
            base,
            out,
            autoregressive=weights.get("ar"),
            generation_decoder=weights.get("generation_decoder"),
            editing_decoder=weights.get("editing_decoder"),
            lineage=lineage,
        )
        if lora is not None and config.adapter == "keep":
            name = pin_model(config.model, config.storage)
            record = AdapterRecord(
                base=name,
                base_fingerprint=lineage["base_fingerprint"],
                lora=lora,
                digest=storage.file_digest(adapter),
            )
            _keep_adapter(out, base, adapter, record)
        process_use.count_read(_num_bytes(base))
        if models is not None:  # an upload counts itself
            process_use.count_written(_num_bytes(out))
        (out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        run = {"run_id": lineage["register_run_id"], "inputs": [{"uri": found.uri} for found in trained.values()]}
        (out / "run.json").write_text(json.dumps(run, indent=2), encoding="utf-8")
        target = storage.join(config.storage, "models", manifest.fingerprint)
        if storage.exists(storage.join(target, MANIFEST_NAME)):
            return manifest.fingerprint
        if models is not None:
            storage.put_in_place(out, models / manifest.fingerprint)
        else:
            storage.upload_folder(out, target)
    return manifest.fingerprint


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _keep_adapter(out: Path, base: Path, adapter: Path, record: AdapterRecord) -> None:
    """In an assembled model folder put the adapter in the place of what it and the base make. The manifest stays.

    A folder with a decoder of its own keeps the autoencoder, too, so that it can be drawn with as it is.
    """
    from nexusgen.model.weights import DECODER_FOLDERS

    for path in (out / "autoregressive").glob("model*.safetensors*"):
        path.unlink()
    ours, theirs = read_manifest(out).fingerprints, read_manifest(base).fingerprints
    shared = [part for part in ours if ours[part] == theirs.get(part)]
    for part, place in DECODER_FOLDERS.items():
        if part in shared:
            shutil.rmtree(out / place)
    if not any((out / place).is_dir() for place in DECODER_FOLDERS.values()):
        shutil.rmtree(out / "vae", ignore_errors=True)
    shutil.copyfile(adapter, out / ADAPTER_FILE)
    (out / ADAPTER_RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


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


def _version_tags(
    config: RegisterConfig, fingerprint: str, recipe: str, run_id: str, stages: Mapping[str, Any]
) -> dict[str, str]:
    inputs = [{"stage": stage, **data} for stage, made in stages.items() for data in made["inputs"]]
    return {
        tracking.TAG_FINGERPRINT: fingerprint,
        TAG_PROJECT: config.name,
        TAG_RECIPE: recipe,
        TAG_INPUTS: json.dumps(inputs),
        f"{TAG_RUN}.register": run_id,
        **{f"{TAG_RUN}.{stage}": made["run_id"] for stage, made in stages.items()},
    }


def _create_version(
    client: MlflowClient, storage_uri: str, fingerprint: str, run_id: str, tags: dict[str, str]
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(MODEL_NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = storage.join(storage_uri, "models", fingerprint)
    if not storage.is_remote(source):
        folder = storage.local_path(source)
        is_served = client.tracking_uri.startswith("http")
        source = _store_as_artifacts(client, folder, run_id, storage_uri) if is_served else str(folder)
    return client.create_model_version(MODEL_NAME, source, run_id=run_id, tags=tags, await_creation_for=0)


def _store_as_artifacts(client: MlflowClient, folder: Path, run_id: str, storage_uri: str) -> str:
    """Copy a small model into the run's artefacts, since a server refuses to refer to a local folder."""
    num_bytes = _num_bytes(folder)
    if num_bytes > MAX_ARTIFACT_BYTES:
        raise ConfigError(
            f"the tracking server {tracking.redact(client.tracking_uri)} can't refer to a model in the local storage "
            f"{storage_uri}, and {num_bytes / 1e9:.1f} GB are too much to copy into its artefacts: "
            "use s3:// storage, or unset MLFLOW_TRACKING_URI"
        )
    client.log_artifacts(run_id, str(folder), "model")
    return f"{client.get_run(run_id).info.artifact_uri}/model"


def _register_report(
    meter: CpuMeter, storage_uri: str, version: ModelVersion, *, reused: bool, run_id: str | None = None
) -> JobReport:
    outputs = {
        "model": _model_uri(storage_uri, version),
        "fingerprint": version.tags[tracking.TAG_FINGERPRINT],
        "version": int(version.version),
        "run_id": run_id or version.run_id,
    }
    return JobReport("register", meter.seconds, meter.cpu_seconds, outputs=outputs, reused=reused)


# --- promote ----------------------------------------------------------------------------------------------------------


def _wanted(client: MlflowClient, config: PromoteConfig) -> ModelVersion:
    if config.version is None:
        raise UsageError("promote: which version? (only --rollback needs none)")
    return _get_version(client, str(config.version))


def _rollback_target(
    client: MlflowClient, config: PromoteConfig, current: str | None, history: list[str]
) -> ModelVersion:
    """The alias's last target. A version may be named too, if it is the one to leave or to return to."""
    earlier = [version for version in history if version != current]
    if current is None or not earlier:
        raise UsageError(f"promote: {config.to} has no earlier version to roll back to")
    if config.version is not None and str(config.version) not in (current, earlier[-1]):
        raise UsageError(
            f"promote --rollback: {config.to} is at version {current} and came from {earlier[-1]}, "
            f"but version {config.version} was named: leave it out"
        )
    return _get_version(client, earlier[-1])


def _pass_gate(
    client: MlflowClient, config: PromoteConfig, version: ModelVersion, current: str | None, run: tracking.Run
) -> str:
    """What was compared. Raises: GateError. What the gate said is kept in the tags of version and run either way."""
    verdict = _ask_gate(client, config, version, current)
    refusal = verdict.refusal
    said = f"refused: {refusal}" if refusal else f"passed: {verdict.summary}"
    tag = f"{TAG_GATE}.{config.to}"
    client.set_model_version_tag(MODEL_NAME, version.version, tag, said[:MAX_TAG])
    run.set_tags({tag: said[:MAX_TAG]})
    run.log_text(json.dumps(verdict.to_json(), indent=2), "gate.json")
    _write_card(client, config.storage, version)
    if refusal:
        raise GateError(f"version {version.version} does not become {config.to}: {refusal}")
    return verdict.summary


def _ask_gate(client: MlflowClient, config: PromoteConfig, version: ModelVersion, current: str | None) -> gate.Verdict:
    """Find the evaluations of the version, of the alias's present target and of the base, and ask the gate."""
    fingerprint = version.tags.get(tracking.TAG_FINGERPRINT, "")
    uri = scores_uri(config.storage, fingerprint, config.suite)
    if not fingerprint or not storage.exists(uri):
        return gate.Verdict((f"it has no evaluation ({uri} is missing): run evaluate on it first",))
    ours = read_evaluation(config.storage, fingerprint, config.suite)
    if ours.fingerprint != fingerprint:
        return gate.Verdict((f"{uri} belongs to other weights ({ours.fingerprint[:12]})",))
    if config.to == "candidate":
        return gate.Verdict(())
    others: dict[str, gate.Evaluation] = {}
    missing = []
    wanted = {"champion": _get_version(client, current).tags[tracking.TAG_FINGERPRINT]} if current is not None else {}
    if gate.UNDERSTANDING.replace("/", ".") in ours.scores:
        wanted["base model"] = root_base(config.storage, fingerprint)
    for name, other in wanted.items():
        place = scores_uri(config.storage, other, config.suite)
        if storage.exists(place):
            others[name] = read_evaluation(config.storage, other, config.suite)
        else:
            missing.append(f"the {name} {other} has no evaluation to compare with ({place} is missing): evaluate it")
    verdict = gate.judge(
        ours,
        others.get("champion"),
        others.get("base model"),
        gate.Rules(config.thresholds, config.understanding_drop),
    )
    return replace(verdict, reasons=(*missing, *verdict.reasons))


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


def _move_alias(
    client: MlflowClient, config: PromoteConfig, version: str, current: str | None, history: list[str]
) -> None:
    """History first: if we die between the two writes, an extra entry equal to the current target does no harm."""
    if config.rollback:
        while history and history[-1] in (current, version):
            history = history[:-1]
    elif current is not None:
        history = [*history, current]
    client.set_registered_model_tag(MODEL_NAME, f"{TAG_PREVIOUS}.{config.to}", json.dumps(history[-100:]))
    client.set_registered_model_alias(MODEL_NAME, config.to, version)


def _alias_target(client: MlflowClient, alias: str) -> str | None:
    """The version that an alias points to. Raises: UsageError if no model was ever registered."""
    target = _registered_model(client).aliases.get(alias)
    return str(target) if target is not None else None


def _alias_history(client: MlflowClient, alias: str) -> list[str]:
    return [str(v) for v in json.loads(_registered_model(client).tags.get(f"{TAG_PREVIOUS}.{alias}", "[]"))]


def _registered_model(client: MlflowClient) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(MODEL_NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        where = tracking.redact(client.tracking_uri)
        raise UsageError(f"the registry at {where} has no model {MODEL_NAME}: run register first") from None


# --- versions ---------------------------------------------------------------------------------------------------------


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
        target = _alias_target(client, alias)
        if target is None:
            raise InputError(f"{spec}: no version has the alias {alias!r}: promote one first")
        number = target
    return _get_version(client, number)


def _model_uri(storage_uri: str | None, version: ModelVersion) -> str:
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


def _get_version(client: MlflowClient, number: str) -> ModelVersion:
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


def _find_version(client: MlflowClient, tag: str, value: str) -> ModelVersion | None:
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


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
