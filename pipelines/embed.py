"""The embed job: tar shards -> Ray Data -> slices of embedded rows in the storage.

Reader tasks stream shards into slices of compressed samples, one slice one row of Ray Data; encoder actors decode,
encode and write a slice, and pass on only its manifest entry: embeddings never cross the object store. A slice is
written under a temporary name, renamed, then entered; what is entered and still agrees with its input, encoder and
configuration isn't made again.

Nothing here knows the mathematics (`pipelines/encoders.py`) or what a tar is (`pipelines/shards.py`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from nexusgen import errors
from nexusgen.config import Config, dump_config
from nexusgen.errors import ModelError, QuarantineError
from nexusgen.model.manifest import Manifest, read_manifest
from nexusgen.schema import EmbedMode, StoredDtype
from pipelines import embedded, storage, takedowns, tracking
from pipelines.embedded import EmbeddedManifest, ShardInfo, SliceInfo
from pipelines.registry import pin_model, resolve_model
from pipelines.runtime import CpuMeter, JobReport, ray_cluster
from pipelines.shards import list_shards
from pipelines.slice_encoder import Plan, SliceEncoder, compute_dtype
from pipelines.slices import SliceRules, read_shards, shard_name, shard_stat

LAYOUT_VERSION = 2  # raised when stored rows change for the same input
MAX_READ_TASKS = 400  # Ray's scheduler takes minutes over 100,000 tasks; each loops over its shards instead
CHECK_EVERY = 1000  # samples between two looks at the quarantined fraction
READER_CPUS = 0.5  # another number than an encoder's: Ray would fuse the two stages into one busy actor
MAX_LISTED_INPUTS = 100  # shards that MLflow gets one by one; of more, it gets the digest of all
PROGRESS_S = 5.0
MAX_BLOCK_BYTES = 1  # every slice is a block of its own: it reaches an idle encoder as soon as it is read


class EmbedConfig(Config):
    """What is embedded, by which model, into which storage."""

    storage: str
    name: str
    input: str | list[str]
    mode: EmbedMode
    dtype: StoredDtype = "bfloat16"  # of stored arrays; int8, with a scale per token, takes half the room
    model: str = "demo-base"
    drop_keys: str | None = None  # a text file of keys, one a line: samples to take out of the data for good
    max_quarantine_fraction: float = Field(default=0.05, ge=0, le=1)  # 1: never stop
    pairs_as: Literal["generation", "understanding"] = "generation"  # the task of images with a text (img2dataset)
    slice_samples: int = Field(default=256, ge=1, le=256)
    slice_bytes: int = Field(default=64 << 20, ge=1, le=64 << 20)  # compressed
    num_readers: int = Field(default=1, ge=1)
    num_encoders: int = Field(default=1, ge=1)
    gpus_per_encoder: float = Field(default=0.0, ge=0)
    decode_threads: int = Field(default=1, ge=1)  # of an encoder, which reserves as many CPUs
    # Patches of the vision tower in one batch: 6 released targets fit a CPU's caches; a GPU wants some ten times more.
    batch_patches: int = Field(default=2048, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dtype == "int8" and self.mode == "latents":
            raise ValueError("dtype int8 has a scale per token, and latents have no tokens: leave them bfloat16")
        return self


_PARTS: dict[EmbedMode, str] = {"vision": "vision", "latents": "vae", "predicted": "autoregressive"}  # what encodes


def embed(config: EmbedConfig, parent_run_id: str | None = None) -> JobReport:
    """Embed every sample of the input, or quarantine it with a reason; finished slices are kept and re-used.

    Raises: ConfigError or InputError for the input; ModelError for the model; ResourceError for too few CPUs or an
    unwritable storage; QuarantineError if too many samples are bad (what is finished stays).
    """
    with CpuMeter() as meter:
        shards = list_shards(config.input)
        pinned = pin_model(config.model, config.storage)
        config = config.model_copy(update={"storage": storage.absolute(config.storage), "model": pinned})
        model = resolve_model(config.model, config.storage)
        manifest = read_manifest(model)
        folder = embedded.folder_of(config.storage, config.name, config.mode)
        fingerprint = _encoder_fingerprint(config, manifest, model)
        storage.check_writable(folder)
        dropped = takedowns.record(config.storage, config.name, config.drop_keys)
        tracking.mlflow_uri(config.storage)  # refuses without a place for MLflow
        plan = Plan(config, folder, _config_hash(config, manifest, model), fingerprint, dropped)
        num_rewritten = takedowns.rewrite(folder, dropped)
        records = _finished_shards(plan, shards)
        if len(records) == len(shards) and _is_entered(plan, records):
            done = embedded.read_manifest(config.storage, config.name, config.mode)
            tally = _Tally(config, [entry for record in records.values() for entry in record["slices"]])
            return _report(meter, folder, done, tally, num_rewritten, reused=True)
        todo = [shard for shard in shards if shard not in records]
        with (
            _ready(config, todo),  # refuses before anything is begun
            tracking.job_run(
                config.storage,
                config.name,
                "embed",
                dump_config(config),
                parent=parent_run_id,
                tags={tracking.TAG_FINGERPRINT: plan.fingerprint},
            ) as run,
        ):
            run.set_tags({"mlflow.runName": f"embed {config.mode}"})
            storage.delete(storage.join(folder, embedded.MANIFEST_NAME))  # until all of it agrees again
            tally = _Tally(config, [entry for record in records.values() for entry in record["slices"]])
            try:
                if todo:
                    records |= _run_ray(plan, todo, tally, run)
                tally.check(is_final=True)
            finally:
                run.log_metrics(tally.metrics(), step=tally.num_samples)
                account = _quarantine_report(tally)
                run.log_text(account, "quarantine.txt")
                print(f"embed {config.mode}: {account}", end="", file=sys.stderr, flush=True)
            done = _enter(plan, shards, records, run.run_id)
            _log_inputs(run, config, done)
            report = _report(meter, folder, done, tally, num_rewritten, reused=False)
            run.log_report(report)
    return report


def _log_inputs(run: tracking.Run, config: EmbedConfig, done: EmbeddedManifest) -> None:
    """Which tars, by digest. run.json lists all of them; a tracking server isn't sent 100,000."""
    if len(done.shards) <= MAX_LISTED_INPUTS:
        for info in done.shards:
            num_samples = info.num_embedded + info.num_quarantined
            run.log_dataset_input(storage.name_of(info.uri), info.uri, info.digest, "embedding", num_samples)
        return
    digest = hashlib.sha256("".join(f"{info.uri} {info.digest}\n" for info in done.shards).encode()).hexdigest()
    num_samples = sum(info.num_embedded + info.num_quarantined for info in done.shards)
    run.log_dataset_input(config.name, done.shards[0].uri, digest, "embedding", num_samples)


# ---- what is done already -------------------------------------------------------------------------------------------


def _config_hash(config: EmbedConfig, manifest: Manifest, model: Path) -> str:
    """Names everything beside the encoder's weights that embedded rows depend on."""
    tokenizer = hashlib.sha256()
    for path in sorted((model / "autoregressive").glob("*")):
        if path.name in ("tokenizer.json", "vocab.json", "merges.txt"):
            tokenizer.update(path.read_bytes())
    values = {
        "layout": LAYOUT_VERSION,
        "mode": config.mode,
        "slices": [config.slice_samples, config.slice_bytes],
        "pairs_as": config.pairs_as,
        "geometry": manifest.geometry.model_dump(),
        "tokenizer": tokenizer.hexdigest(),
        "image_size": manifest.image_size if config.mode == "latents" else None,
        "batch_patches": config.batch_patches,
        "dtype": config.dtype,
        "computed_in": f"torch.{compute_dtype(config)}",
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _encoder_fingerprint(config: EmbedConfig, manifest: Manifest, model: Path) -> str:
    part = _PARTS[config.mode]
    if part not in manifest.fingerprints:
        raise ModelError(f"{model} has no part {part!r}, which mode {config.mode} encodes with: give another model")
    return manifest.fingerprints[part]


def _finished_shards(plan: Plan, shards: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Records of the shards that are embedded whole, unchanged since, by this encoder and configuration."""
    known = {storage.name_of(uri) for uri in storage.list_files(storage.join(plan.folder, embedded.ENTRIES_FOLDER))}
    files = {storage.name_of(uri) for uri in storage.list_files(plan.folder)}

    def find(shard: str) -> dict[str, Any] | None:
        record = storage.find_json(storage.join(plan.folder, embedded.ENTRIES_FOLDER, f"{shard_name(shard)}.json"))
        is_same = record is not None and {key: record.get(key) for key in plan.stamp} == plan.stamp
        if record is None or not is_same or record["stat"] != shard_stat(shard):
            return None
        is_whole = all(entry["num_rows"] == 0 or entry["file"] in files for entry in record["slices"])
        return record if is_whole else None

    listed = [shard for shard in shards if f"{shard_name(shard)}.json" in known]
    with ThreadPoolExecutor(embedded.NUM_PARALLEL) as pool:  # S3 takes tens of milliseconds to answer each
        return {shard: found for shard, found in zip(listed, pool.map(find, listed), strict=True) if found is not None}


def _is_entered(plan: Plan, records: dict[str, dict[str, Any]]) -> bool:
    """Whether the data's manifest lists exactly the slices of these shards."""
    uri = storage.join(plan.folder, embedded.MANIFEST_NAME)
    if not storage.exists(uri):
        return False
    listed = {(entry["uri"], entry["sha256"]) for entry in json.loads(storage.read_bytes(uri))["slices"]}
    return listed == {(entry["file"], entry["sha256"]) for record in records.values() for entry in record["slices"]}


# ---- the pipeline ---------------------------------------------------------------------------------------------------


@contextmanager
def _ready(config: EmbedConfig, shards: Sequence[str]) -> Iterator[None]:
    """MLflow's place, and the cluster; they start side by side, as both take seconds."""
    with ThreadPoolExecutor(1) as beside:
        tracker = beside.submit(tracking.configure, config.storage)
        with _cluster(config, shards):
            tracker.result()
            yield


def _cluster(config: EmbedConfig, shards: Sequence[str]) -> AbstractContextManager[Any]:
    """Ray with as many free CPUs as embedding these shards takes; nothing where there are none to embed."""
    if not shards:
        return nullcontext()
    num_readers = min(config.num_readers, len(shards))
    num_cpus = num_readers * READER_CPUS + config.num_encoders * config.decode_threads
    return ray_cluster(num_cpus, f"embed with {num_readers} readers and {config.num_encoders} encoders")


def _run_ray(plan: Plan, shards: Sequence[str], tally: _Tally, run: tracking.Run) -> dict[str, dict[str, Any]]:
    """Read and encode shards; gives the records of those that were read whole."""
    config = plan.config
    num_readers = min(config.num_readers, len(shards))
    entries: dict[str, dict[int, dict[str, Any]]] = {shard: {} for shard in shards}
    records: dict[str, dict[str, Any]] = {}
    ends: dict[str, dict[str, Any]] = {}
    progress = _Progress(plan, len(shards))
    for row in _stream(plan, shards, num_readers):
        shard = row["shard"]
        if row["kind"] == "slice":
            if row["index"] not in entries[shard]:  # a read task that died is run again from its first slice
                entries[shard][row["index"]] = row
                tally.add(row)
        else:
            ends[shard] = row
        if shard in ends and len(entries[shard]) == ends[shard]["num_slices"]:
            records[shard] = _finish_shard(plan, ends[shard], entries[shard])
        progress.show(tally, len(records))
        if tally.check():
            run.log_metrics(tally.metrics(), step=tally.num_samples)
    progress.show(tally, len(records), is_last=True)
    return records


def _stream(plan: Plan, shards: Sequence[str], num_readers: int) -> Iterator[dict[str, Any]]:
    """Entries of slices and ends of shards, in the order in which they are done."""
    import ray.data
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our own progress lines say what its plans and bars say
    rules = SliceRules(plan.config.pairs_as, plan.config.slice_samples, plan.config.slice_bytes)
    reader: Any = functools.partial(read_shards, rules=rules)
    items = [{"shard": shard} for shard in shards]
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = MAX_BLOCK_BYTES
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        dataset = (
            ray.data.from_items(items, override_num_blocks=min(len(items), MAX_READ_TASKS))
            .map_batches(
                reader,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=READER_CPUS,
                compute=TaskPoolStrategy(size=num_readers),
            )
            .map_batches(
                SliceEncoder,
                fn_constructor_args=(plan,),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=float(plan.config.decode_threads),
                num_gpus=plan.config.gpus_per_encoder or None,
                compute=ActorPoolStrategy(size=plan.config.num_encoders),
            )
        )
        batches: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for batch in batches:
            for text in batch.column("entry").to_pylist():
                row = json.loads(text)
                if row["kind"] == "failure":
                    raise getattr(errors, row["error"])(row["message"])
                yield row


# ---- the account ----------------------------------------------------------------------------------------------------


class _Tally:
    """Counts of what was embedded and quarantined, and the limit on the latter."""

    def __init__(self, config: EmbedConfig, entries: Sequence[dict[str, Any]] = ()) -> None:
        self.config = config
        self.num_embedded = 0
        self.num_new = 0  # embedded by this run
        self.quarantined: Counter[str] = Counter()
        self.tasks: Counter[str] = Counter()
        self.fidelity: Counter[str] = Counter()  # sums; see encoders.Fidelity
        self.num_slices = 0
        self.num_slices_reused = 0
        self._next_check = CHECK_EVERY
        for entry in entries:
            self.add(entry | {"is_reused": True})

    @property
    def num_samples(self) -> int:
        return self.num_embedded + self.quarantined.total()

    def add(self, entry: dict[str, Any]) -> None:
        """Count one slice."""
        self.num_slices += 1
        self.num_embedded += entry["num_rows"]
        self.quarantined.update(entry["quarantined"])
        self.tasks.update(entry["tasks"])
        self.fidelity.update(entry.get("fidelity") or {})
        if entry.get("is_reused"):
            self.num_slices_reused += 1
        else:
            self.num_new += entry["num_rows"]

    def check(self, *, is_final: bool = False) -> bool:
        """Whether another CHECK_EVERY samples are through. Raises: QuarantineError if too many of them are bad."""
        if not is_final and self.num_samples < self._next_check:
            return False
        self._next_check = self.num_samples + CHECK_EVERY
        allowed = self.config.max_quarantine_fraction
        bad = self.quarantined.total() - self.quarantined[takedowns.REASON_CODE]
        if allowed < 1 and bad > allowed * self.num_samples:
            codes = ", ".join(f"{code} {count}" for code, count in self.quarantined.most_common(5))
            folder = embedded.folder_of(self.config.storage, self.config.name, self.config.mode)
            raise QuarantineError(
                f"{bad} of {self.num_samples} samples are bad ({bad / self.num_samples:.1%}; at most {allowed:.1%} are "
                f"allowed): {codes}. See {folder}/{embedded.QUARANTINE_FOLDER}, mend the data, or raise "
                f"max_quarantine_fraction"
            )
        return True

    def metrics(self) -> dict[str, float]:
        """By the names of the metrics table."""
        counts = {
            "data/samples": self.num_samples,
            "data/embedded": self.num_embedded,
            "data/quarantined": self.quarantined.total(),
        }
        counts |= {f"data/quarantine/{code}": count for code, count in self.quarantined.items()}
        return {name: float(count) for name, count in counts.items()} | self.int8_metrics()

    def int8_metrics(self) -> dict[str, float]:
        """How well quantised arrays hold what was encoded, over all tokens; nothing where they aren't quantised."""
        sums = self.fidelity
        if not sums["num_tokens"]:
            return {}
        return {
            "data/int8_cosine": sums["cosine_sum"] / sums["num_tokens"],
            "data/int8_mse": sums["squared_error_sum"] / sums["num_values"],
        }


class _Progress:
    """A line on standard error every few seconds."""

    def __init__(self, plan: Plan, num_shards: int) -> None:
        self.mode = plan.config.mode
        self.num_shards = num_shards
        self._started = self._shown = time.monotonic()

    def show(self, tally: _Tally, num_done: int, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if not is_last and now - self._shown < PROGRESS_S:
            return
        self._shown = now
        rate = tally.num_new / max(now - self._started, 1e-9)
        print(
            f"embed {self.mode}: {num_done}/{self.num_shards} shards, {tally.num_embedded} samples embedded, "
            f"{tally.quarantined.total()} quarantined, {rate:.0f} samples/s",
            file=sys.stderr,
            flush=True,
        )


def _finish_shard(plan: Plan, end: dict[str, Any], entries: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Record a shard whose slices are all entered; one that couldn't be read whole is tried again next time."""
    record = {**end, "slices": [entries[index] for index in sorted(entries)], **plan.stamp}
    if end["digest"]:
        name = f"{shard_name(end['shard'])}.json"
        storage.write_json(storage.join(plan.folder, embedded.ENTRIES_FOLDER, name), record)
    return record


def _enter(plan: Plan, shards: Sequence[str], records: dict[str, dict[str, Any]], run_id: str) -> EmbeddedManifest:
    """Write the data's manifest and what stands beside it; remove what an earlier run left of other shards."""
    missing = [shard for shard in shards if shard not in records]
    if missing:  # our own bug or Ray's: never enter data that lacks something
        raise RuntimeError(f"{len(missing)} shards didn't come to an end, first {missing[0]}")
    slices, infos = [], []
    quarantined: Counter[str] = Counter()
    for shard in shards:
        record = records[shard]
        entries = record["slices"]
        for entry in entries:
            uri = storage.join(plan.folder, entry["file"])
            slices.append(SliceInfo(uri, shard, entry["index"], entry["num_rows"], entry["num_bytes"], entry["sha256"]))
            quarantined.update(entry["quarantined"])
        num_embedded = sum(entry["num_rows"] for entry in entries)
        num_quarantined = sum(sum(entry["quarantined"].values()) for entry in entries)
        infos.append(
            ShardInfo(shard, record["digest"], record["num_bytes"], len(entries), num_embedded, num_quarantined)
        )
    _remove_stale(plan, records)
    manifest = EmbeddedManifest(
        plan.config.mode,
        plan.fingerprint,
        plan.config_hash,
        run_id,
        embedded.digest_of(slices),
        tuple(slices),
        tuple(infos),
        dict(quarantined),
    )
    inputs = [{"uri": info.uri, "digest": info.digest} for info in infos]
    run_record = {"run_id": run_id, "digest": manifest.digest, "inputs": inputs}
    storage.write_bytes_atomic(storage.join(plan.folder, "config.yaml"), dump_config(plan.config).encode())
    storage.write_bytes_atomic(storage.join(plan.folder, "run.json"), json.dumps(run_record, indent=1).encode())
    storage.write_bytes_atomic(storage.join(plan.folder, "fingerprint"), plan.fingerprint.encode())
    embedded.write_manifest(plan.folder, manifest)
    return manifest


def _remove_stale(plan: Plan, records: dict[str, dict[str, Any]]) -> None:
    entries = [entry for record in records.values() for entry in record["slices"]]
    files = {entry["file"] for entry in entries if entry["num_rows"]}
    refused = {entry["file"] for entry in entries if entry["quarantined"]}
    noted = {entry["file"].replace(".parquet", ".json") for entry in entries}
    noted |= {f"{shard_name(shard)}.json" for shard in records}
    for place, kept in ((None, files), (embedded.QUARANTINE_FOLDER, refused), (embedded.ENTRIES_FOLDER, noted)):
        for uri in storage.list_files(storage.join(plan.folder, place) if place else plan.folder):
            name = storage.name_of(uri)
            if name not in kept and (place or name.endswith(".parquet")):
                storage.delete(uri)


def _quarantine_report(tally: _Tally) -> str:
    lines = [f"{tally.num_samples} samples, {tally.num_embedded} embedded, {tally.quarantined.total()} quarantined"]
    lines += [f"{count:8d}  {code}" for code, count in tally.quarantined.most_common()]
    return "\n".join(lines) + "\n"


def _report(
    meter: CpuMeter, folder: str, manifest: EmbeddedManifest, tally: _Tally, num_rewritten: int, *, reused: bool
) -> JobReport:
    outputs = {
        "data": folder,
        "mode": manifest.mode,
        "run_id": manifest.run_id,
        "fingerprint": manifest.fingerprint,
        "digest": manifest.digest,
        "shards": len(manifest.shards),
        "slices": tally.num_slices,
        "slices_reused": tally.num_slices_reused,
        "slices_rewritten": num_rewritten,  # because samples in them were taken down
        "embedded": tally.num_embedded,
        "by_task": dict(tally.tasks),
        "quarantined": dict(tally.quarantined),
        "bytes": sum(info.num_bytes for info in manifest.slices),
        **tally.int8_metrics(),
    }
    return JobReport("embed", meter.seconds, meter.cpu_seconds, tally.num_new, outputs=outputs, reused=reused)
