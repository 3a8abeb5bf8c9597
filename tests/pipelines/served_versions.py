"""Model folders as versions of a registry, without the road that makes them, for tests and benchmarks of serving."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from nexusgen.model.decoder import save_decoder
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import load_model, save_autoregressive, start_editing_decoder, write_manifest
from pipelines import registry, tracking

ALIAS = "champion"


def with_editing_decoder(base: Path, folder: Path, seed: int = 0) -> Path:
    """A copy of a model folder that can edit, by an untrained decoder; another `seed` gives other predictions."""
    shutil.copytree(base, folder)
    manifest = read_manifest(base)
    if seed:
        model = load_model(base, ["autoregressive"])
        assert model.autoregressive is not None
        assert model.tokenizer is not None
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            weight = model.autoregressive.vision_head.weight
            weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=generator)
        shutil.rmtree(folder / "autoregressive")
        save_autoregressive(model.autoregressive, folder / "autoregressive", model.tokenizer, torch.float32)
    decoder = start_editing_decoder(folder).editing_decoder
    assert decoder is not None
    save_decoder(decoder, folder / "decoders" / "editing", torch.float32)
    values = manifest.model_dump(exclude={"version", "parts", "fingerprints", "fingerprint"})
    write_manifest(folder, **values)
    return folder


def cut_short(folder: Path) -> Path:
    """Damage a model folder: half of its language model's weights is missing.

    Of a part that is in memory already, as another version has the same one, no file would be read.
    """
    (path,) = (folder / "autoregressive").glob("*.safetensors")
    os.truncate(path, path.stat().st_size // 2)
    return folder


def add_version(storage: str, folder: Path, alias: str | None = ALIAS) -> str:
    """Put a model folder into a storage and its registry; gives the version, which gets the alias."""
    fingerprint = read_manifest(folder).fingerprint
    target = Path(storage) / "models" / fingerprint
    if not target.exists():
        shutil.copytree(folder, target)
    client = MlflowClient(tracking_uri=tracking.mlflow_uri(storage))
    try:
        client.create_registered_model(registry.MODEL_NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {tracking.TAG_FINGERPRINT: fingerprint}
    version = str(client.create_model_version(registry.MODEL_NAME, str(target), tags=tags).version)
    if alias is not None:
        client.set_registered_model_alias(registry.MODEL_NAME, alias, version)
    return version


def move_alias(storage: str, version: str, alias: str = ALIAS) -> None:
    """Have the alias mean another version."""
    client = MlflowClient(tracking_uri=tracking.mlflow_uri(storage))
    client.set_registered_model_alias(registry.MODEL_NAME, alias, version)
