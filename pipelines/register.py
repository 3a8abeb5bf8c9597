"""From checkpoints to a version: a model folder made of a base and what was trained on it, and its entry in MLflow.

What was trained with LoRA is merged into the base's weights. With `adapter: keep` the folder holds the adapter in place
of all the weights that it shares with the base; `registry.py` tells how it is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from nexusgen.config import Config, dump_config
from nexusgen.errors import ConfigError, FingerprintError, InputError, ModelError
from nexusgen.model.manifest import Manifest, read_manifest
from nexusgen.schema import MANIFEST_NAME
from pipelines import checkpoint, process_use, registry, storage, tracking
from pipelines.accounting import Account, Prices, account_uri
from pipelines.checkpoint import Checkpoint
from pipelines.lora import ADAPTER_FILE, ADAPTER_RECORD, AdapterRecord, LoraConfig, merge_file
from pipelines.runtime import CpuMeter, JobReport

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MAX_ARTIFACT_BYTES = 2_000_000_000  # a larger model is never copied into MLflow's artefact store


class RegisterConfig(Config):
    """Which weights become a version: a base, and the checkpoints trained on it."""

    storage: str
    name: str
    model: str = registry.DEMO_BASE  # the base that the stages were trained from
    ar: str | None = "latest"  # a checkpoint's URI, `latest` of this project, or null: the base's own weights
    generation_decoder: str | None = "latest"
    editing_decoder: str | None = None  # learned from the predictions of the base's language model: then ar is null
    adapter: Literal["merge", "keep"] = "merge"  # of a LoRA training: into the weights, or beside its base's name
    prices: Prices | None = None  # what an hour costs: then the job's run tells its cost


def register(config: RegisterConfig, parent_run_id: str | None = None) -> JobReport:
    """Assemble STORAGE/models/FINGERPRINT from the base and the trained checkpoints, and make a version of it.

    The same weights get no second version: the report then says `reused`.
    Raises: InputError if a checkpoint is missing; ModelError or FingerprintError if it doesn't fit the base;
    ConfigError if the version can't be stored.
    """
    with CpuMeter() as meter:
        base = registry.resolve_model(config.model, config.storage)
        trained = _find_checkpoints(config)
        base_manifest = read_manifest(base)
        base_fingerprint = base_manifest.fingerprint
        for found in trained.values():
            _check_base(found, base_fingerprint, config.model)
        _check_adapter(config, trained)
        kept = ["adapter"] if config.adapter == "keep" else []
        recipe = _hash([base_fingerprint, *[_identity(found) for found in trained.values()], *kept])
        client = tracking.connect(config.storage)
        version = registry.find_version(client, registry.TAG_RECIPE, recipe)
        if version is not None and storage.exists(
            storage.join(registry.model_uri(config.storage, version), MANIFEST_NAME)
        ):
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
            version = registry.find_version(client, tracking.TAG_FINGERPRINT, fingerprint)
            is_known = version is not None
            if version is None:
                tags = _version_tags(config, fingerprint, recipe, run.run_id, lineage["stages"])
                version = _create_version(client, config.storage, fingerprint, run.run_id, tags)
            run.log_metrics(account.finish().metrics())
            registry.write_card(client, config.storage, version)
            report = _register_report(meter, config.storage, version, reused=is_known, run_id=run.run_id)
            run.log_report(report)
        return report


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
            name = registry.pin_model(config.model, config.storage)
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


def _version_tags(
    config: RegisterConfig, fingerprint: str, recipe: str, run_id: str, stages: Mapping[str, Any]
) -> dict[str, str]:
    inputs = [{"stage": stage, **data} for stage, made in stages.items() for data in made["inputs"]]
    return {
        tracking.TAG_FINGERPRINT: fingerprint,
        registry.TAG_PROJECT: config.name,
        registry.TAG_RECIPE: recipe,
        registry.TAG_INPUTS: json.dumps(inputs),
        f"{registry.TAG_RUN}.register": run_id,
        **{f"{registry.TAG_RUN}.{stage}": made["run_id"] for stage, made in stages.items()},
    }


def _create_version(
    client: MlflowClient, storage_uri: str, fingerprint: str, run_id: str, tags: dict[str, str]
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(registry.MODEL_NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = storage.join(storage_uri, "models", fingerprint)
    if not storage.is_remote(source):
        folder = storage.local_path(source)
        is_served = client.tracking_uri.startswith("http")
        source = _store_as_artifacts(client, folder, run_id, storage_uri) if is_served else str(folder)
    return client.create_model_version(registry.MODEL_NAME, source, run_id=run_id, tags=tags, await_creation_for=0)


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
        "model": registry.model_uri(storage_uri, version),
        "fingerprint": version.tags[tracking.TAG_FINGERPRINT],
        "version": int(version.version),
        "run_id": run_id or version.run_id,
    }
    return JobReport("register", meter.seconds, meter.cpu_seconds, outputs=outputs, reused=reused)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
