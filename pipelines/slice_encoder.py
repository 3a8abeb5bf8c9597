"""The encoding end of `embed`: an actor takes slices, encodes and writes them, and enters each in the manifest.

A slice is written under a temporary name, renamed, then entered; one that is entered and still agrees with its input,
encoder and configuration isn't made again.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from nexusgen.errors import FingerprintError, NexusgenError
from nexusgen.model.manifest import read_manifest
from nexusgen.schema import QUARANTINE_SCHEMA, EmbedMode
from pipelines import embedded, process_use, storage, takedowns
from pipelines.registry import resolve_model
from pipelines.slices import Slice, failure

if TYPE_CHECKING:
    from nexusgen.geometry import Geometry
    from pipelines.embed import EmbedConfig
    from pipelines.encoders import Encoder


# The part of a model that encodes, by the name that its manifest has a fingerprint for; or will, of mode images.
ENCODING_PARTS: dict[EmbedMode, str] = {
    "vision": "vision",
    "latents": "vae",
    "predicted": "autoregressive",
    "images": "vision",
}


@dataclass(frozen=True)
class Plan:
    """What encoders need to know; the same for all of them."""

    config: EmbedConfig
    folder: str
    config_hash: str
    fingerprint: str
    dropped: frozenset[str]  # keys that were taken down

    @property
    def stamp(self) -> dict[str, str]:
        return {"config_hash": self.config_hash, "fingerprint": self.fingerprint}


def compute_dtype(config: EmbedConfig) -> str:
    """The name of torch's dtype that a configuration encodes in."""
    return "bfloat16" if config.gpus_per_encoder else "float32"


class SliceEncoder:
    """Ray Data stage: slices and ends of shards in, pickled, their entries out; the model is loaded once per actor."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.encoder: Encoder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        entries = []
        for data in batch.column("items").to_pylist():
            for item in pickle.loads(data):  # our own reader's bytes, never the shard's
                work: process_use.Work = {}
                try:
                    entry, work = self._encode(item) if isinstance(item, Slice) else (item, work)
                except NexusgenError as error:
                    entry = failure(error)
                uses = [*entry.get("uses", ()), process_use.report(work)]
                entries.append(json.dumps(entry | {"uses": uses}))
        return pa.table({"entry": pa.array(entries, pa.string())})

    def _encode(self, item: Slice) -> tuple[dict[str, Any], process_use.Work]:
        """A slice's entry, and the work that was done for it."""
        known = storage.find_json(storage.join(self.plan.folder, embedded.ENTRIES_FOLDER, f"{item.name}.json"))
        if known is not None and is_current(self.plan, item, known):
            return known | {"is_reused": True}, {}
        if self.encoder is None:
            self.encoder = self._load()
        started = process_use.clock()
        entry = write_slice(self.plan, item, self.encoder, self.tokenizer, self.geometry)
        return entry, process_use.work_since(started, "samples", len(item.samples) + len(item.rejected))

    def _load(self) -> Encoder:
        # Imported here: the driver names this class, but has no need of torch, whose import takes seconds.
        import torch

        from nexusgen.model.weights import load_model
        from nexusgen.prompts import load_tokenizer
        from pipelines.encoders import ImageKeeper, LatentEncoder, PredictionEncoder, VisionEncoder

        config = self.plan.config
        device = "cuda" if config.gpus_per_encoder else "cpu"
        if device == "cpu":
            torch.set_num_threads(1)
        folder = resolve_model(config.model, config.storage)
        encoding = ENCODING_PARTS[config.mode]
        found = read_manifest(folder).fingerprints.get(encoding)
        if found != self.plan.fingerprint:
            raise FingerprintError(
                f"model {config.model}: {encoding} is {found} where it is to encode, in {folder}, but was "
                f"{self.plan.fingerprint} when the job began: keep the model as it is until the job ends, and start it "
                f"again"
            )
        parts: dict[EmbedMode, list[str]] = {"latents": ["vae"], "images": []}
        model = load_model(
            folder, parts.get(config.mode, ["autoregressive"]), getattr(torch, compute_dtype(config)), device
        )
        self.geometry: Geometry = model.manifest.geometry
        self.tokenizer = model.tokenizer or load_tokenizer(folder / "autoregressive")
        if config.mode == "images":
            return ImageKeeper()
        if config.mode == "latents":
            assert model.autoencoder is not None
            max_pixels = config.batch_patches * model.manifest.geometry.patch_size**2
            return LatentEncoder(model.autoencoder, model.manifest.image_size, max_pixels, device)
        assert model.autoregressive is not None
        if config.mode == "vision":
            return VisionEncoder(model.autoregressive, config.batch_patches)
        return PredictionEncoder(model.autoregressive, config.batch_patches, int(self.tokenizer.pad_token_id))


def is_current(plan: Plan, item: Slice, entry: dict[str, Any]) -> bool:
    """Whether a slice was made from this input by this encoder and configuration, and its file is there."""
    wanted = {"content": item.digest, "dropped": _dropped_of(plan, item), **plan.stamp}
    if {key: entry.get(key) for key in wanted} != wanted:
        return False
    quarantine = storage.join(plan.folder, embedded.QUARANTINE_FOLDER)
    sizes = ((plan.folder, entry["num_bytes"]), (quarantine, entry["quarantine_bytes"]))
    return all(_has_size(storage.join(folder, entry["file"]), size) for folder, size in sizes if size)


def _has_size(uri: str, num_bytes: int) -> bool:
    return storage.exists(uri) and storage.stat(uri).size == num_bytes


def _dropped_of(plan: Plan, item: Slice) -> list[str]:
    return sorted({sample.key for sample in item.samples} & plan.dropped)


def write_slice(plan: Plan, item: Slice, encoder: Encoder, tokenizer: Any, geometry: Geometry) -> dict[str, Any]:
    """Encode a slice, write its rows and its quarantine, then enter it. Gives the entry."""
    from pipelines.encoders import encode_slice

    config = plan.config
    made = encode_slice(item.samples, encoder, tokenizer, geometry, config.dtype, config.decode_threads)
    # Samples that were taken down are encoded, too: what shares a batch, and so every bit of the rest, stays the same.
    dropped = _dropped_of(plan, item)
    table, taken_down = takedowns.drop_rows(made.table, dropped)
    rejected = [*item.rejected, *made.rejected, *taken_down]
    data = embedded.to_parquet(table)
    file = f"{item.name}.parquet"
    if table.num_rows:
        storage.write_bytes_atomic(storage.join(plan.folder, file), data)
    quarantine_uri = storage.join(plan.folder, embedded.QUARANTINE_FOLDER, file)
    quarantine_bytes = 0
    if rejected:
        rows = embedded.to_parquet(pa.Table.from_pylist([asdict(row) for row in rejected], schema=QUARANTINE_SCHEMA))
        quarantine_bytes = rows.size
        storage.write_bytes_atomic(quarantine_uri, rows)
    else:
        storage.delete(quarantine_uri)  # of an earlier run over other content
    entry = {
        "kind": "slice",
        "shard": item.shard,
        "index": item.index,
        "file": file,
        "num_rows": table.num_rows,
        "num_bytes": data.size if table.num_rows else 0,
        "quarantine_bytes": quarantine_bytes,
        "sha256": hashlib.sha256(data).hexdigest(),
        "content": item.digest,
        "dropped": dropped,
        "fidelity": asdict(made.fidelity) if made.fidelity is not None else None,
        "tasks": dict(Counter(table.column("task").to_pylist())),
        "quarantined": dict(Counter(row.reason_code for row in rejected)),
        **plan.stamp,
    }
    storage.write_json(storage.join(plan.folder, embedded.ENTRIES_FOLDER, f"{item.name}.json"), entry)
    return entry
