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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from nexusgen import errors
from nexusgen.config import Config, dump_config
from nexusgen.errors import InputError, ModelError, QuarantineError
from nexusgen.model.manifest import Manifest, read_manifest
from nexusgen.schema import EmbedMode, StoredDtype
from pipelines import embedded, storage, takedowns, tracking
from pipelines.accounting import Account, Prices, account_uri
from pipelines.embedded import EmbeddedManifest, ShardInfo, SliceInfo
from pipelines.quarantine import check_fraction
from pipelines.registry import pin_model, resolve_model
from pipelines.runtime import CpuMeter, JobReport, ray_cluster
from pipelines.shards import list_shards
from pipelines.slice_encoder import ENCODING_PARTS, Plan, SliceEncoder, compute_dtype
from pipelines.slices import SliceRules, check_names, read_shards, shard_name, shard_stat

LAYOUT_VERSION = 4  # raised when stored rows change for the same input
MAX_READ_TASKS = 400  # Ray's scheduler takes minutes over 100,000 tasks; each loops over its shards instead
CHECK_EVERY = 1000  # samples between two looks at the quarantined fraction
READER_CPUS = 0.5  # another number than an encoder's: Ray would fuse the two stages into one busy actor
MAX_LISTED_INPUTS = 100  # shards that MLflow gets one by one; of more, it gets the digest of all
MAX_NAMED_KEYS = 5  # of those that match no sample
SHARDS_AT_A_TIME = 256  # whose records are in memory as they stand on the disk, slice by slice
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
    drop_keys: str | None = None  # a text file of keys, one a line (# in front: a comment), to take out for good
    max_quarantine_fraction: float = Field(default=0.05, ge=0, le=1)  # of samples, and of shards; 1: never stop
    pairs_as: Literal["generation", "understanding"] = "generation"  # the task of images with a text (img2dataset)
    slice_samples: int = Field(default=256, ge=1, le=256)  # good and bad
    slice_bytes: int = Field(default=64 << 20, ge=1, le=64 << 20)  # of pictures, compressed, and texts
    num_readers: int = Field(default=1, ge=1)
    num_encoders: int = Field(default=1, ge=1)
    gpus_per_encoder: float = Field(default=0.0, ge=0)
    decode_threads: int = Field(default=1, ge=1)  # of an encoder, which reserves as many CPUs
    # Patches of the vision tower in one batch: 6 released targets fit a CPU's caches; a GPU wants some ten times more.
    batch_patches: int = Field(default=2048, ge=1)
    prices: Prices | None = None  # what an hour costs: then the job's run tells its cost

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dtype == "int8" and self.mode == "latents":
            raise ValueError("dtype int8 has a scale per token, and latents have no tokens: leave them bfloat16")
        if self.mode == "images" and (self.dtype != "bfloat16" or self.gpus_per_encoder):
            raise ValueError("mode images encodes nothing: leave out dtype and gpus_per_encoder")
        return self


def embed(config: EmbedConfig, parent_run_id: str | None = None) -> JobReport:
    """Embed every sample of the input, or quarantine it with a reason; finished slices are kept and re-used.

    Raises: ConfigError or InputError for the input; ModelError for the model, FingerprintError if it changes meanwhile;
    ResourceError for too few CPUs or an unwritable storage; QuarantineError if too many samples or shards are bad (what
    is finished stays).
    """
    with CpuMeter() as meter:
        started_ns = time.time_ns()
        shards = list_shards(config.input)
        check_names(shards)
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
        tally = _Tally(plan, len(shards))
        records = _finished_shards(plan, shards, tally)
        done = _find_entered(plan, records) if len(records) == len(shards) else None
        if done is not None:
            tally.check(is_final=True)
            _tell_unmatched(tally)
            return _report(meter, folder, done, tally, num_rewritten, reused=True)
        todo = [shard for shard in shards if shard not in records]
        with (
            _ready(config, todo),  # refuses before anything is begun
            tracking.job_run(
                config.storage,
                config.name,
                "embed",
                dump_config(config),
                makes=config.mode,
                parent=parent_run_id,
                tags={tracking.TAG_FINGERPRINT: plan.fingerprint},
            ) as run,
        ):
            run.set_tags({"mlflow.runName": f"embed {config.mode}"})
            storage.delete(storage.join(folder, embedded.MANIFEST_NAME))  # until all of it agrees again
            account = _open_account(plan, run, meter)
            try:
                if todo:
                    records |= _run_ray(plan, todo, tally, run, account)
                tally.check(is_final=True)
            finally:
                account.write()
                run.log_metrics(tally.metrics(), step=tally.num_samples)
                told = _quarantine_report(tally)
                run.log_text(told, "quarantine.txt")
                print(f"embed {config.mode}: {told}", end="", file=sys.stderr, flush=True)
            _tell_unmatched(tally)
            _remove_stale(plan, records, started_ns)
            done = _enter(plan, shards, records, tally, run.run_id)
            _log_inputs(run, config, done)
            run.log_metrics(account.finish().metrics())
            report = _report(meter, folder, done, tally, num_rewritten, reused=False)
            run.log_report(report)
    return report


def _open_account(plan: Plan, run: tracking.Run, meter: CpuMeter) -> Account:
    config = plan.config
    uri = account_uri(config.storage, "embed", config.name, config.mode)
    recipe = f"{plan.config_hash} {plan.fingerprint}"
    return Account(uri, run.run_id, recipe, config.prices, meter, workers=config.num_encoders)


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
    part = ENCODING_PARTS[config.mode]
    if part not in manifest.fingerprints:
        raise ModelError(f"{model} has no part {part!r}, which mode {config.mode} encodes with: give another model")
    return manifest.fingerprints[part]


@dataclass(frozen=True, slots=True)
class _Finished:
    """What is kept of a shard that is through. Its record, ten times larger, is on the disk."""

    info: ShardInfo
    slices: tuple[SliceInfo, ...]
    refused: tuple[int, ...]  # indices of the slices with rows in quarantine


def _finished(plan: Plan, record: Mapping[str, Any]) -> _Finished:
    shard, entries = record["shard"], record["slices"]
    slices = tuple(
        SliceInfo(storage.join(plan.folder, e["file"]), shard, e["index"], e["num_rows"], e["num_bytes"], e["sha256"])
        for e in entries
    )
    num_quarantined = sum(sum(entry["quarantined"].values()) for entry in entries)
    num_embedded = sum(info.num_rows for info in slices)
    info = ShardInfo(shard, record["digest"], record["num_bytes"], len(slices), num_embedded, num_quarantined)
    return _Finished(info, slices, tuple(entry["index"] for entry in entries if entry["quarantined"]))


def _finished_shards(plan: Plan, shards: Sequence[str], tally: _Tally) -> dict[str, _Finished]:
    """Shards that are embedded whole, unchanged since, by this encoder and configuration; the tally counts them."""
    known = {storage.name_of(uri) for uri in storage.list_files(storage.join(plan.folder, embedded.ENTRIES_FOLDER))}
    kept, refused = (
        {storage.name_of(uri): size for uri, size in storage.list_sizes(folder).items()}
        for folder in (plan.folder, storage.join(plan.folder, embedded.QUARANTINE_FOLDER))
    )

    def find(shard: str) -> dict[str, Any] | None:
        record = storage.find_json(storage.join(plan.folder, embedded.ENTRIES_FOLDER, f"{shard_name(shard)}.json"))
        is_same = record is not None and {key: record.get(key) for key in plan.stamp} == plan.stamp
        if record is None or not is_same or record["stat"] != shard_stat(shard):
            return None
        is_whole = all(
            kept.get(entry["file"], 0) == entry["num_bytes"]
            and refused.get(entry["file"], 0) == entry["quarantine_bytes"]
            for entry in record["slices"]
        )
        return record if is_whole else None

    listed = [shard for shard in shards if f"{shard_name(shard)}.json" in known]
    found: dict[str, _Finished] = {}
    with ThreadPoolExecutor(embedded.NUM_PARALLEL) as pool:  # S3 takes tens of milliseconds to answer each
        for start in range(0, len(listed), SHARDS_AT_A_TIME):
            part = listed[start : start + SHARDS_AT_A_TIME]
            for shard, record in zip(part, pool.map(find, part), strict=True):
                if record is not None:
                    for entry in record["slices"]:
                        tally.add(entry | {"is_reused": True})
                    found[shard] = _finished(plan, record)
    return found


def _find_entered(plan: Plan, records: Mapping[str, _Finished]) -> EmbeddedManifest | None:
    """The data's manifest, if it can be read and lists exactly the slices of these shards."""
    config = plan.config
    try:
        manifest = embedded.read_manifest(config.storage, config.name, config.mode)
    except InputError:
        return None
    return manifest if manifest.digest == embedded.digest_of(_slices_of(records.values())) else None


def _slices_of(records: Iterable[_Finished]) -> Iterator[SliceInfo]:
    return (info for record in records for info in record.slices)


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


def _run_ray(
    plan: Plan, shards: Sequence[str], tally: _Tally, run: tracking.Run, account: Account
) -> dict[str, _Finished]:
    """Read and encode shards, to the end of each."""
    config = plan.config
    num_readers = min(config.num_readers, len(shards))
    entries: dict[str, dict[int, dict[str, Any]]] = {}  # of shards that are under way
    ends: dict[str, dict[str, Any]] = {}
    records: dict[str, _Finished] = {}
    progress = _Progress(plan, len(shards))
    num_gpus = config.num_encoders * config.gpus_per_encoder
    for row in _stream(plan, shards, num_readers, account, num_gpus):
        shard = row["shard"]
        if shard in records:
            continue  # a read task that died is run again from its first shard and slice
        slices = entries.setdefault(shard, {})
        if row["kind"] == "shard":
            ends[shard] = row
        elif row["index"] not in slices:
            slices[row["index"]] = row
            tally.add(row)
        if shard in ends and len(slices) == ends[shard]["num_slices"]:
            records[shard] = _finish_shard(plan, ends.pop(shard), entries.pop(shard))
            if not records[shard].info.digest:
                tally.unreadable.append(shard)
        progress.show(tally, len(records))
        if tally.check():
            run.log_metrics(tally.metrics(), step=tally.num_samples)
    progress.show(tally, len(records), is_last=True)
    missing = [shard for shard in shards if shard not in records]
    if missing:  # our own bug or Ray's: never enter data that lacks something
        raise RuntimeError(f"{len(missing)} shards didn't come to an end, first {missing[0]}")
    return records


def _stream(
    plan: Plan, shards: Sequence[str], num_readers: int, account: Account, num_gpus: float
) -> Iterator[dict[str, Any]]:
    """Entries of slices and ends of shards, in the order in which they are done; the account gets what each took."""
    import ray.data
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our own progress lines say what its plans and bars say
    rules = SliceRules(plan.config.pairs_as, plan.config.slice_samples, plan.config.slice_bytes)
    reader: Any = functools.partial(read_shards, rules=rules)
    items = [{"shard": shard} for shard in shards]
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = MAX_BLOCK_BYTES
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context), account.gpus(num_gpus):
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
                is_work = row["kind"] == "slice" and not row.get("is_reused")
                account.add(_num_samples(row) if is_work else 0, row.pop("uses"))
                if row["kind"] == "failure":
                    raise getattr(errors, row["error"])(row["message"])
                yield row


def _num_samples(entry: Mapping[str, Any]) -> int:
    return int(entry["num_rows"]) + sum(entry["quarantined"].values())


# ---- the account ----------------------------------------------------------------------------------------------------


class _Tally:
    """Counts of what was embedded and quarantined, and the limit on the latter."""

    def __init__(self, plan: Plan, num_shards: int) -> None:
        self.plan = plan
        self.num_shards = num_shards
        self.unreadable: list[str] = []  # shards that are absent, or couldn't be read to their end
        self.num_embedded = 0
        self.num_new = 0  # embedded by this run
        self.quarantined: Counter[str] = Counter()
        self.tasks: Counter[str] = Counter()
        self.fidelity: Counter[str] = Counter()  # sums; see encoders.Fidelity
        self.num_slices = 0
        self.num_slices_reused = 0
        self.dropped: set[str] = set()  # keys of samples that were taken down
        self._next_check = CHECK_EVERY

    @property
    def num_samples(self) -> int:
        return self.num_embedded + self.quarantined.total()

    @property
    def unmatched(self) -> list[str]:
        """Keys that were to be dropped, but that no sample has, sorted."""
        return sorted(self.plan.dropped - self.dropped)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Count one slice."""
        self.num_slices += 1
        self.num_embedded += entry["num_rows"]
        self.quarantined.update(entry["quarantined"])
        self.tasks.update(entry["tasks"])
        self.fidelity.update(entry["fidelity"] or {})
        self.dropped.update(entry["dropped"])
        if entry.get("is_reused"):
            self.num_slices_reused += 1
        else:
            self.num_new += entry["num_rows"]

    def check(self, *, is_final: bool = False) -> bool:
        """Whether another CHECK_EVERY samples are through.

        Raises: QuarantineError if too many of them are bad, or too many of the job's shards can't be read: one that is
        absent is a single row, however many samples it was to hold.
        """
        if not is_final and self.num_samples < self._next_check:
            return False
        self._next_check = self.num_samples + CHECK_EVERY
        folder, allowed = self.plan.folder, self.plan.config.max_quarantine_fraction
        num_unreadable = len(self.unreadable)
        if allowed < 1 and num_unreadable > allowed * self.num_shards:
            raise QuarantineError(
                f"{num_unreadable} of {self.num_shards} shards can't be read ({num_unreadable / self.num_shards:.1%}; "
                f"at most {allowed:.1%} are allowed), first {self.unreadable[0]}. See the reasons in "
                f"{storage.join(folder, embedded.QUARANTINE_FOLDER)}, correct the names or the rights, or raise "
                f"max_quarantine_fraction"
            )
        num_bad = self.quarantined.total() - self.quarantined[takedowns.REASON_CODE]
        check_fraction(num_bad, self.num_samples, allowed, self.quarantined, folder)
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


def _finish_shard(plan: Plan, end: dict[str, Any], entries: dict[int, dict[str, Any]]) -> _Finished:
    """Record a shard whose slices are all entered; one that couldn't be read whole is tried again next time."""
    record = {**end, "slices": [entries[index] for index in sorted(entries)], **plan.stamp}
    if end["digest"]:
        name = f"{shard_name(end['shard'])}.json"
        storage.write_json(storage.join(plan.folder, embedded.ENTRIES_FOLDER, name), record)
    return _finished(plan, record)


def _enter(
    plan: Plan, shards: Sequence[str], records: Mapping[str, _Finished], tally: _Tally, run_id: str
) -> EmbeddedManifest:
    """Write the data's manifest, and before it what stands beside it."""
    slices = tuple(_slices_of(records[shard] for shard in shards))
    manifest = EmbeddedManifest(
        plan.config.mode,
        plan.fingerprint,
        plan.config_hash,
        run_id,
        embedded.digest_of(slices),
        slices,
        tuple(records[shard].info for shard in shards),
        dict(tally.quarantined),
    )
    inputs = [{"uri": info.uri, "digest": info.digest} for info in manifest.shards]
    run_record = {"run_id": run_id, "digest": manifest.digest, "inputs": inputs}
    storage.write_bytes_atomic(storage.join(plan.folder, "config.yaml"), dump_config(plan.config).encode())
    storage.write_bytes_atomic(storage.join(plan.folder, "run.json"), json.dumps(run_record, indent=1).encode())
    storage.write_bytes_atomic(storage.join(plan.folder, "fingerprint"), plan.fingerprint.encode())
    embedded.write_manifest(plan.folder, manifest)
    return manifest


def _remove_stale(plan: Plan, records: Mapping[str, _Finished], started_ns: int) -> None:
    """Remove what an earlier run left of other shards and slices, and what killed writes left before this job began."""
    by_name = {shard_name(shard): record for shard, record in records.items()}
    refused = {name: set(record.refused) for name, record in by_name.items() if record.refused}

    def is_kept(place: str, name: str) -> bool:
        stem = name.rpartition(".")[0]
        if stem in by_name:
            return place == embedded.ENTRIES_FOLDER
        shard, _, number = stem.rpartition("-")
        if shard not in by_name or not number.isdigit():
            return False
        index, slices = int(number), by_name[shard].slices
        if place == embedded.QUARANTINE_FOLDER:
            return index in refused.get(shard, ())
        return index < len(slices) and (place == embedded.ENTRIES_FOLDER or slices[index].num_rows > 0)

    num_removed = 0
    for place in ("", embedded.QUARANTINE_FOLDER, embedded.ENTRIES_FOLDER):
        folder = storage.join(plan.folder, place) if place else plan.folder
        storage.remove_temporary(folder, started_ns)
        for uri in storage.list_files(folder):
            name = storage.name_of(uri)
            if not is_kept(place, name) and (place or name.endswith(".parquet")):
                storage.delete(uri)
                num_removed += not place
    if num_removed:
        print(
            f"embed {plan.config.mode}: removed {num_removed} slices of {plan.config.name!r} that the input no longer "
            "makes; another name would have kept them",
            file=sys.stderr,
            flush=True,
        )


def _tell_unmatched(tally: _Tally) -> None:
    """Name keys that were to be dropped and never met: a misspelt one would stay in the data unnoticed."""
    unmatched = tally.unmatched
    if unmatched:
        named = ", ".join(unmatched[:MAX_NAMED_KEYS]) + (", ..." if len(unmatched) > MAX_NAMED_KEYS else "")
        print(
            f"embed {tally.plan.config.mode}: {len(unmatched)} of {len(tally.plan.dropped)} keys to drop match no "
            f"sample of this data: {named}",
            file=sys.stderr,
            flush=True,
        )


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
        "keys_unmatched": len(tally.unmatched),  # of those to be dropped: no sample has them
        "embedded": tally.num_embedded,
        "by_task": dict(tally.tasks),
        "quarantined": dict(tally.quarantined),
        "bytes": sum(info.num_bytes for info in manifest.slices),
        **tally.int8_metrics(),
    }
    return JobReport("embed", meter.seconds, meter.cpu_seconds, tally.num_new, outputs=outputs, reused=reused)
