"""Pack samples into tar shards of the project's convention, by webdataset's own writer; the same bytes every time.

STORAGE/tars/NAME/TASK-00000.tar      Nexus-Gen style: KEY.json, KEY.0.png, KEY.1.png
STORAGE/tars/NAME/_manifest/TASK-00000.json   how many samples, which digest, made from what
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Iterable
from typing import Any

import webdataset
from PIL import Image
from pydantic import Field

from nexusgen import shapes
from nexusgen.config import Config, dump_config
from nexusgen.errors import ConfigError
from nexusgen.schema import Task
from pipelines import storage, tracking
from pipelines.runtime import CpuMeter, JobReport

LAYOUT_VERSION = 2  # raised when the packed bytes change for the same configuration
ENTRIES_FOLDER = "_manifest"
PROGRESS_S = 5.0


def _default_counts() -> dict[Task, int]:
    return {"understanding": 1000, "generation": 4000, "editing": 1000}


class PackConfig(Config):
    """What is packed: samples of the demo world, so many of each task."""

    storage: str
    name: str
    counts: dict[Task, int] = Field(default_factory=_default_counts)
    start: int = Field(default=0, ge=0)  # number of the first sample; sample i depends on (seed, task, i) alone
    seed: int = Field(default=0, ge=0)
    image_size: int = Field(default=96, ge=8)  # pixels on a side
    samples_per_shard: int = Field(default=1000, ge=1)


def pack(config: PackConfig, parent_run_id: str | None = None) -> JobReport:
    """Write the shards that aren't there yet, and remove those of an earlier, larger configuration.

    Raises: ConfigError if nothing is asked for; ResourceError if the storage can't be written.
    """
    with CpuMeter() as meter:
        shards = _plan(config)
        folder = storage.join(config.storage, "tars", config.name)
        storage.check_writable(folder)
        done = {name: _finished(config, folder, name, span) for name, span in shards.items()}
        todo = [name for name, entry in done.items() if entry is None]
        if not todo:
            return _report(meter, folder, [entry for entry in done.values() if entry is not None], 0, reused=True)
        with tracking.job_run(config.storage, config.name, "pack", dump_config(config), parent=parent_run_id) as run:
            shown = time.monotonic()
            num_new = 0
            for name in todo:
                entry = _write_shard(config, folder, name, shards[name])
                done[name] = entry
                num_new += entry["samples"]
                if time.monotonic() - shown >= PROGRESS_S or name == todo[-1]:
                    shown = time.monotonic()
                    print(f"pack: {num_new} samples in {name}.tar and before", file=sys.stderr, flush=True)
            entries = [entry for entry in done.values() if entry is not None]
            _remove_stale(folder, shards)
            run.log_text(json.dumps(entries, indent=1), "shards.json")
            storage.write_bytes_atomic(storage.join(folder, "config.yaml"), dump_config(config).encode())
            record = {"run_id": run.run_id, "outputs": [{"uri": e["uri"], "digest": e["sha256"]} for e in entries]}
            storage.write_bytes_atomic(storage.join(folder, "run.json"), json.dumps(record, indent=1).encode())
            report = _report(meter, folder, entries, num_new, reused=False)
            run.log_report(report)
    return report


def _plan(config: PackConfig) -> dict[str, tuple[Task, int, int]]:
    """Name of each shard -> its task, first sample and number of samples."""
    shards: dict[str, tuple[Task, int, int]] = {}
    for task, count in config.counts.items():
        for index, offset in enumerate(range(0, count, config.samples_per_shard)):
            size = min(config.samples_per_shard, count - offset)
            shards[f"{task}-{index:05d}"] = (task, config.start + offset, size)
    if not shards:
        raise ConfigError(f"counts = {config.counts}: nothing to pack; give a task a number of samples above 0")
    return shards


def _recipe(config: PackConfig, span: tuple[Task, int, int]) -> str:
    values = [LAYOUT_VERSION, config.seed, config.image_size, *span]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _finished(config: PackConfig, folder: str, name: str, span: tuple[Task, int, int]) -> dict[str, Any] | None:
    """The entry of a shard that is there and made from the same recipe."""
    entry_uri = storage.join(folder, ENTRIES_FOLDER, f"{name}.json")
    shard_uri = storage.join(folder, f"{name}.tar")
    if not storage.exists(entry_uri) or not storage.exists(shard_uri):
        return None
    entry: dict[str, Any] = json.loads(storage.read_bytes(entry_uri))
    is_same = entry["recipe"] == _recipe(config, span) and storage.stat(shard_uri).size == entry["bytes"]
    return {**entry, "uri": shard_uri} if is_same else None


def _write_shard(config: PackConfig, folder: str, name: str, span: tuple[Task, int, int]) -> dict[str, Any]:
    task, start, count = span
    buffer = io.BytesIO()
    # Owner, mode and time are fixed: the same samples make the same bytes on every machine.
    with webdataset.TarWriter(buffer, user="", group="", mode=0o444, mtime=0.0, encoder=False) as writer:
        for sample in shapes.training_samples(task, start, count, config.seed, config.image_size):
            writer.write(to_members(sample))
    data = buffer.getvalue()
    uri = storage.join(folder, f"{name}.tar")
    storage.write_bytes_atomic(uri, data)
    entry = {
        "file": f"{name}.tar",
        "task": task,
        "samples": count,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "recipe": _recipe(config, span),
    }
    storage.write_bytes_atomic(storage.join(folder, ENTRIES_FOLDER, f"{name}.json"), json.dumps(entry).encode())
    return {**entry, "uri": uri}


def _remove_stale(folder: str, kept: Iterable[str]) -> None:
    """Remove shards that an earlier configuration made; files that pack never made stay."""
    for uri in storage.list_files(storage.join(folder, ENTRIES_FOLDER)):
        name = storage.name_of(uri).removesuffix(".json")
        if name not in kept:
            storage.delete(storage.join(folder, f"{name}.tar"))
            storage.delete(uri)


def to_members(sample: shapes.WorldSample) -> dict[str, Any]:
    """A sample as webdataset's writer takes it: extension -> bytes."""
    names = [f"{index}.png" for index in range(len(sample.images))]
    record = {
        "id": sample.key,
        "images": names,
        "messages": [{"role": message.role, "content": message.content} for message in sample.messages],
        "lang": sample.lang,
        "source": "nexusgen demo world",
        "license": "Apache-2.0",
        **sample.meta,
    }
    members: dict[str, Any] = {"__key__": sample.key, "json": json.dumps(record, ensure_ascii=False).encode()}
    for name, pixels in zip(names, sample.images, strict=True):
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        members[name] = png.getvalue()
    return members


def _report(meter: CpuMeter, folder: str, entries: list[dict[str, Any]], num_new: int, *, reused: bool) -> JobReport:
    outputs = {
        "tars": folder,
        "shards": [entry["uri"] for entry in entries],
        "digests": [entry["sha256"] for entry in entries],
        "samples": sum(entry["samples"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
    }
    return JobReport("pack", meter.seconds, meter.cpu_seconds, num_new, outputs=outputs, reused=reused)
