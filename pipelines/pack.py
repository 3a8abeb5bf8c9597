"""Pack samples into tar shards of the project's convention, by webdataset's own writer; the same bytes every time.

Samples come from the demo world or from the user's own files (`pipelines/pack_sources.py`), whose pictures are copied
byte for byte. One process does it, shard by shard in memory. A shard is written whole, then entered; what is entered
and still agrees with input and configuration isn't made again.

STORAGE/tars/NAME/TASK-00000.tar                      Nexus-Gen style: KEY.json, KEY.0.png, KEY.1.png
STORAGE/tars/NAME/samples-000000.tar                  the same, of own files
STORAGE/tars/NAME/_manifest/samples-000000.json       how many samples, which digest, made from what
STORAGE/tars/NAME/quarantine/samples-000000.parquet   what couldn't be packed, and why; `shard` is the input's file

Whether own files have changed is told by their sizes and times of change; pictures that a jsonl names aren't asked.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tarfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, astuple
from typing import Any, Literal, get_args

import pyarrow as pa
import webdataset
from PIL import Image
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from nexusgen import shapes
from nexusgen.config import Config, dump_config
from nexusgen.errors import ConfigError, InputError, SampleError
from nexusgen.schema import QUARANTINE_SCHEMA, TASKS, QuarantineRow, Task
from pipelines import embedded, process_use, storage, tracking
from pipelines.accounting import Account, Prices, account_uri
from pipelines.pack_sources import (
    JsonlSource,
    Keys,
    Loaded,
    PairsAs,
    PairSource,
    ParquetSource,
    Place,
    Record,
    Source,
    read_ahead,
    to_members,
)
from pipelines.quarantine import check_fraction
from pipelines.runtime import CpuMeter, JobReport

LAYOUT_VERSION = 2  # raised when the packed bytes change for the same configuration
ENTRIES_FOLDER = "_manifest"
RECORD_NAME = "run.json"
CHECK_EVERY = 1000  # samples between two looks at the quarantined fraction
PROGRESS_S = 5.0
MAX_LISTED_INPUTS = 100  # files that MLflow is told of; run.json lists all

_OWN_NAME = re.compile(rf"(samples-\d{{6}}|({'|'.join(TASKS)})-\d{{5}})\d*")
Format = Literal["demo_world", "jsonl", "pairs", "parquet"]

_SHARED_KEYS = {"storage", "name", "format", "samples_per_shard", "prices"}
_INPUT_KEYS = {"input", "shard_bytes", "max_quarantine_fraction"}
_KEYS: dict[Format, set[str]] = {
    "demo_world": {"counts", "start", "seed", "image_size"},
    "jsonl": {*_INPUT_KEYS, "images"},
    "pairs": {*_INPUT_KEYS, "pairs_as"},
    "parquet": {*_INPUT_KEYS, "pairs_as", "image_column", "text_column", "id_column"},
}


def _default_counts() -> dict[Task, int]:
    return {"understanding": 1000, "generation": 4000, "editing": 1000}


class PackConfig(Config):
    """What is packed: samples of the demo world, so many of each task, or what stands in files of the user's own."""

    storage: str
    name: str
    format: Format = "demo_world"
    samples_per_shard: int = Field(default=1000, ge=1)
    prices: Prices | None = None  # what an hour costs: then the job's run tells its cost
    # format demo_world
    counts: dict[Task, int] = Field(default_factory=_default_counts)
    start: int = Field(default=0, ge=0)  # number of the first sample; sample i depends on (seed, task, i) alone
    seed: int = Field(default=0, ge=0)
    image_size: int = Field(default=96, ge=8)  # pixels on a side
    # own files
    input: str | list[str] | None = None  # jsonl or Parquet: paths, globs, ranges, folders, s3://; pairs: folders
    shard_bytes: int = Field(default=256 << 20, ge=1)  # of a tar at most, unless one sample is larger; held in memory
    max_quarantine_fraction: float = Field(default=0.05, ge=0, le=1)  # 1: never stop
    images: str | None = None  # jsonl: folder that names of images are relative to; null: that of the jsonl file
    pairs_as: PairsAs = "generation"  # pairs and Parquet: the task of an image with a text
    image_column: str | None = None  # Parquet: null finds it
    text_column: str | None = None
    id_column: str | None = None

    @model_validator(mode="after")
    def _check(self) -> PackConfig:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in _SHARED_KEYS | _KEYS[self.format] or value == field.get_default(call_default_factory=True):
                continue
            fitting = " or ".join(other for other in get_args(Format) if name in _KEYS[other])
            raise ConfigError(f"{name} = {value!r}: no key of format {self.format}, but of {fitting}; remove it")
        if self.format != "demo_world" and not self.input:
            raise ConfigError(f"input = {self.input!r}: format {self.format} needs the files or folders to pack")
        return self

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the keys of other formats."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name in _SHARED_KEYS | _KEYS[self.format]}


def pack(config: PackConfig, parent_run_id: str | None = None) -> JobReport:
    """Write the shards that aren't there yet, and remove those of an earlier, larger configuration.

    Raises: ConfigError if nothing is asked for, or columns can't be told; InputError for an input that is absent or
    holds nothing; QuarantineError if too many samples are bad (finished shards stay); ResourceError if the storage
    can't be written.
    """
    with CpuMeter() as meter:
        folder = storage.join(config.storage, "tars", config.name)
        with closing(_World(config, folder) if config.format == "demo_world" else _Files(config, folder)) as work:
            storage.check_writable(folder)
            if work.resume() and not _stale_files(folder, work.names) and _is_recorded(folder, work):
                return _report(meter, folder, work, reused=True)
            with tracking.job_run(
                config.storage, config.name, "pack", dump_config(config), parent=parent_run_id
            ) as run:
                account = Account(
                    account_uri(config.storage, "pack", config.name), run.run_id, work.recipe, config.prices, meter
                )
                try:
                    work.write(account)
                finally:
                    account.write()
                    run.log_metrics(work.metrics())
                    run.log_text(work.quarantine_report(), "quarantine.txt")
                for uri in _stale_files(folder, work.names):
                    storage.delete(uri)
                for uri, digest in work.inputs[:MAX_LISTED_INPUTS]:
                    run.log_dataset_input(storage.name_of(uri), uri, digest, "packing")
                run.log_text(json.dumps(work.entries, indent=1), "shards.json")
                storage.write_bytes_atomic(storage.join(folder, "config.yaml"), dump_config(config).encode())
                storage.write_json(storage.join(folder, RECORD_NAME), {"run_id": run.run_id, **_lineage(work)})
                run.log_metrics(account.finish().metrics())
                report = _report(meter, folder, work, reused=False)
                run.log_report(report)
    return report


class _Work(ABC):
    """The shards of a job: those that are there, and how the others are made."""

    def __init__(self, config: PackConfig, folder: str) -> None:
        self.config = config
        self.folder = folder
        self.inputs: list[tuple[str, str]] = []  # URI and digest
        self.num_new = 0  # samples packed by this run
        self.quarantined: Counter[str] = Counter()
        self._entries: dict[str, dict[str, Any] | None] = {}  # by name of the shard, in order; None: not there yet
        self._shown = time.monotonic()

    @abstractmethod
    def resume(self) -> bool:
        """Take the shards that are there and made from the same recipe. Gives whether that is all of them."""

    @abstractmethod
    def write(self, account: Account) -> None:
        """Write the others, and enter what that takes."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and threads."""

    @property
    def recipe(self) -> str:
        """Names what is packed from what."""
        own = self.config.model_dump(exclude={"storage", "name", "prices", "max_quarantine_fraction"})
        return _digest([LAYOUT_VERSION, own, self.inputs])

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [entry for entry in self._entries.values() if entry is not None]

    @property
    def names(self) -> set[str]:
        """Of every shard that the job is to leave."""
        return set(self._entries)

    @property
    def num_samples(self) -> int:
        """Packed, by this run or an earlier one."""
        return sum(entry["samples"] for entry in self.entries)

    def metrics(self) -> dict[str, float]:
        """By the names of the metrics table."""
        num_bad = self.quarantined.total()
        counts = {"data/samples": self.num_samples + num_bad, "data/quarantined": num_bad}
        counts |= {f"data/quarantine/{code}": count for code, count in self.quarantined.items()}
        return {name: float(count) for name, count in counts.items()}

    def quarantine_report(self) -> str:
        """How many samples were packed, and how many not, by reason."""
        lines = [f"{self.num_samples} samples packed, {self.quarantined.total()} quarantined"]
        lines += [f"{count:8d}  {code}" for code, count in self.quarantined.most_common()]
        return "\n".join(lines) + "\n"

    def _finished(self, name: str, recipe: str) -> dict[str, Any] | None:
        """The entry of a shard that is there and made from the same recipe."""
        entry_uri = storage.join(self.folder, ENTRIES_FOLDER, f"{name}.json")
        shard_uri = storage.join(self.folder, f"{name}.tar")
        if not storage.exists(entry_uri) or not storage.exists(shard_uri):
            return None
        entry: dict[str, Any] = json.loads(storage.read_bytes(entry_uri))
        is_same = entry["recipe"] == recipe and storage.stat(shard_uri).size == entry["bytes"]
        return {**entry, "uri": shard_uri} if is_same else None

    def _enter(self, name: str, recipe: str, tar: _Tar, **more: Any) -> None:
        """Write a shard, then its entry; `more` is what else the entry holds."""
        data = tar.finish()
        uri = storage.join(self.folder, f"{name}.tar")
        storage.write_bytes_atomic(uri, pa.py_buffer(data))
        entry = {
            "file": f"{name}.tar",
            "samples": tar.num_samples,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "recipe": recipe,
            **more,
        }
        entry_uri = storage.join(self.folder, ENTRIES_FOLDER, f"{name}.json")
        storage.write_bytes_atomic(entry_uri, json.dumps(entry, ensure_ascii=False).encode())
        self._keep(name, {**entry, "uri": uri})
        self.num_new += tar.num_samples

    def _keep(self, name: str, entry: dict[str, Any]) -> None:
        self._entries[name] = {key: value for key, value in entry.items() if key != "keys"}

    def _show(self, name: str, num_samples: int, *, is_last: bool = False) -> None:
        """A line on standard error every few seconds."""
        if is_last or time.monotonic() - self._shown >= PROGRESS_S:
            self._shown = time.monotonic()
            bad = f", {self.quarantined.total()} quarantined" if self.quarantined else ""
            print(f"pack: {num_samples} samples in {name}.tar and before{bad}", file=sys.stderr, flush=True)


class _Tar:
    """A tar in memory, as webdataset's writer makes it."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._num_bytes = 0  # of headers and padded members
        self._buffer = io.BytesIO()
        # Owner, mode and time are fixed: the same samples make the same bytes on every machine.
        self._writer = webdataset.TarWriter(self._buffer, user="", group="", mode=0o444, mtime=0.0, encoder=False)

    def size_with(self, key: str, members: Mapping[str, bytes]) -> int:
        """Bytes of the tar if it ended after this sample."""
        size = self._num_bytes + _padded_bytes(key, members) + 2 * tarfile.BLOCKSIZE
        return -(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        self._writer.write({"__key__": key, **members})
        self._num_bytes += _padded_bytes(key, members)
        self.num_samples += 1

    def finish(self) -> memoryview:
        """The whole tar; nothing can be added any more."""
        self._writer.close()
        return self._buffer.getbuffer()

    def close(self) -> None:
        """Give up a tar that isn't finished; no harm to one that is."""
        self._writer.close()


def _padded_bytes(key: str, members: Mapping[str, bytes]) -> int:
    """Bytes of a sample's members with their headers, of which names beyond ASCII have more."""
    headers = sum(len(tarfile.TarInfo(f"{key}.{extension}").tobuf(tarfile.PAX_FORMAT)) for extension in members)
    return headers + sum(-(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for data in members.values())


# ---- the demo world -------------------------------------------------------------------------------------------------


class _World(_Work):
    """Samples of the demo world: each shard is drawn by itself. Raises: ConfigError if nothing is asked for."""

    def __init__(self, config: PackConfig, folder: str) -> None:
        super().__init__(config, folder)
        self._spans: dict[str, tuple[Task, int, int]] = {}  # task, first sample, number of samples
        for task, count in config.counts.items():
            for index, offset in enumerate(range(0, count, config.samples_per_shard)):
                size = min(config.samples_per_shard, count - offset)
                self._spans[f"{task}-{index:05d}"] = (task, config.start + offset, size)
        if not self._spans:
            raise ConfigError(f"counts = {config.counts}: nothing to pack; give a task a number of samples above 0")

    def resume(self) -> bool:
        self._entries = {name: self._finished(name, self._recipe(span)) for name, span in self._spans.items()}
        return None not in self._entries.values()

    def write(self, account: Account) -> None:
        todo = [name for name, entry in self._entries.items() if entry is None]
        if any(self._spans[name][0] == "generation" for name in todo):
            for lang in get_args(shapes.Lang):  # all prompts are listed once: no part of what a sample costs
                shapes.short_prompts(lang, is_held_out=False)
        for name in todo:
            started = process_use.clock()
            task, start, count = span = self._spans[name]
            with closing(_Tar()) as tar:
                for sample in shapes.training_samples(task, start, count, self.config.seed, self.config.image_size):
                    tar.add(sample.key, _drawn_members(sample))
                self._enter(name, self._recipe(span), tar, task=task)
            account.add(count, [process_use.report(process_use.work_since(started, "samples", count))])
            self._show(name, self.num_samples, is_last=name == todo[-1])

    def close(self) -> None:
        return None

    def _recipe(self, span: tuple[Task, int, int]) -> str:
        return _digest([LAYOUT_VERSION, self.config.seed, self.config.image_size, *span])


def _drawn_members(sample: shapes.WorldSample) -> dict[str, bytes]:
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
    members = {"json": json.dumps(record, ensure_ascii=False).encode()}
    for name, pixels in zip(names, sample.images, strict=True):
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        members[name] = png.getvalue()
    return members


# ---- the user's own files -------------------------------------------------------------------------------------------


class _Files(_Work):
    """Samples from files, one shard after the other: where one ends, and so where the next begins, its bytes tell.

    A bad sample goes with the shard that was being filled. Raises: ConfigError or InputError for the input.
    """

    def __init__(self, config: PackConfig, folder: str) -> None:
        super().__init__(config, folder)
        self._source = _open_source(config)
        self.inputs = list(self._source.stamps())
        self._place = Place()  # where the next shard begins
        self._is_done = False
        self._keys = Keys()
        self._stream: Generator[Loaded, None, None] | None = None
        self._waiting: Loaded | None = None  # read, but the last shard had no room for it
        self._num_checked = 0

    def resume(self) -> bool:
        while not self._is_done and self._take():
            pass
        if self._is_done:
            self._check()
        return self._is_done

    def write(self, account: Account) -> None:
        while not self._is_done:
            if self._take():
                self._forget_stream()
            else:
                started, num_before = process_use.clock(), self.num_new
                self._write_shard()
                num_packed = self.num_new - num_before
                account.add(num_packed, [process_use.report(process_use.work_since(started, "samples", num_packed))])
        self._check()

    def close(self) -> None:
        self._forget_stream()
        self._keys.close()

    def _take(self) -> bool:
        """Whether the next shard is there; then it is passed over."""
        name, recipe = self._next()
        entry = self._finished(name, recipe)
        if entry is None:
            return False
        for key in entry["keys"]:
            self._keys.add(key)
        self._keep(name, entry)
        self.quarantined.update(entry["quarantined"])
        self._place, self._is_done = Place(*entry["end"]), entry["is_last"]
        return True

    def _next(self) -> tuple[str, str]:
        """Name and recipe of the next shard."""
        own = self.config.model_dump(exclude={"storage", "name", "input", "prices", "max_quarantine_fraction"})
        return f"samples-{len(self._entries):06d}", _digest([LAYOUT_VERSION, own, self.inputs, astuple(self._place)])

    def _write_shard(self) -> None:
        name, recipe = self._next()
        rows: list[QuarantineRow] = []
        with closing(_Tar()) as tar:
            try:
                end, is_last, keys = self._fill(name, tar, rows)
            finally:
                self._write_quarantine(name, rows)
            if not tar.num_samples:
                raise InputError(f"input {self.config.input!r} holds no sample that can be packed (any more)")
            quarantined = dict(Counter(row.reason_code for row in rows))
            place = list(astuple(end))
            self._enter(name, recipe, tar, end=place, is_last=is_last, quarantined=quarantined, keys=keys)
        self._place, self._is_done = end, is_last
        self._show(name, self.num_samples, is_last=is_last)

    def _fill(self, name: str, tar: _Tar, rows: list[QuarantineRow]) -> tuple[Place, bool, list[str]]:
        """Put samples into a tar, and rows of bad ones beside it, until it is full.

        Gives the place where the next shard begins, whether there is none, and the keys.
        """
        end, keys = self._place, list[str]()
        for record, content in self._samples():
            try:
                if isinstance(content, SampleError):
                    raise content
                members = to_members(record.key, content)
            except SampleError as error:
                rows.append(_row(record, error))
                self.quarantined[error.reason_code] += 1
            else:
                if tar.num_samples and not self._has_room(tar, record.key, members):
                    self._waiting = (record, content)
                    return end, False, keys
                process_use.count_read(sum(map(len, members.values())))
                keys.append(self._keys.take(record.key))
                tar.add(keys[-1], members)
            end = record.end
            num_packed = self.num_samples + tar.num_samples
            self._show(name, num_packed)
            if num_packed + self.quarantined.total() >= self._num_checked + CHECK_EVERY:
                self._check(tar.num_samples)
        return end, True, keys

    def _samples(self) -> Iterator[Loaded]:
        """What comes next; left off and taken up by one shard after the other."""
        if self._stream is None:
            self._stream = read_ahead(self._source.records(self._place))
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            yield waiting
        while (item := next(self._stream, None)) is not None:
            yield item

    def _forget_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = self._waiting = None

    def _has_room(self, tar: _Tar, key: str, members: Mapping[str, bytes]) -> bool:
        is_full = tar.num_samples >= self.config.samples_per_shard
        return not is_full and tar.size_with(key, members) <= self.config.shard_bytes

    def _check(self, num_unwritten: int = 0) -> None:
        """Raises: QuarantineError if too many of the samples so far are bad."""
        num_bad = self.quarantined.total()
        self._num_checked = self.num_samples + num_unwritten + num_bad
        allowed = self.config.max_quarantine_fraction
        check_fraction(num_bad, self._num_checked, allowed, self.quarantined, self.folder)

    def _write_quarantine(self, name: str, rows: Sequence[QuarantineRow]) -> None:
        uri = storage.join(self.folder, embedded.QUARANTINE_FOLDER, f"{name}.parquet")
        if rows:
            table = pa.Table.from_pylist([asdict(row) for row in rows], schema=QUARANTINE_SCHEMA)
            storage.write_bytes_atomic(uri, embedded.to_parquet(table))
        else:
            storage.delete(uri)  # of an earlier run over other content


def _open_source(config: PackConfig) -> Source:
    assert config.input is not None  # PackConfig has seen to it
    if config.format == "jsonl":
        return JsonlSource(config.input, config.images)
    if config.format == "pairs":
        return PairSource(config.input, config.pairs_as)
    columns = (config.image_column, config.text_column, config.id_column)
    return ParquetSource(config.input, *columns, config.pairs_as)


def _row(record: Record, error: SampleError) -> QuarantineRow:
    texts = (record.source, record.key, error.member, error.reason_code, f"{record.where}: {error.reason}"[:500])
    return QuarantineRow(*(text.encode("utf-8", "backslashreplace").decode() for text in texts))


# ---- the account ----------------------------------------------------------------------------------------------------


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _lineage(work: _Work) -> dict[str, list[dict[str, str]]]:
    """What the tars were made from, and which they are."""
    return {
        "inputs": [{"uri": uri, "digest": digest} for uri, digest in work.inputs],
        "outputs": [{"uri": entry["uri"], "digest": entry["sha256"]} for entry in work.entries],
    }


def _is_recorded(folder: str, work: _Work) -> bool:
    """Whether a run has entered these very tars as its own; one that was killed, or stopped by bad samples, hasn't."""
    record = storage.find_json(storage.join(folder, RECORD_NAME)) or {}
    return {name: record.get(name) for name in ("inputs", "outputs")} == _lineage(work)


def _stale_files(folder: str, kept: set[str]) -> list[str]:
    """Files of shards that an earlier configuration made, also of one that was killed; what pack never made stays."""
    found = []
    for place, ending in (("", ".tar"), (embedded.QUARANTINE_FOLDER, ".parquet"), (ENTRIES_FOLDER, ".json")):
        for uri in storage.list_files(storage.join(folder, place)):
            name = storage.name_of(uri).removesuffix(ending)
            if uri.endswith(ending) and _OWN_NAME.fullmatch(name) and name not in kept:
                found.append(uri)
    return found


def _report(meter: CpuMeter, folder: str, work: _Work, *, reused: bool) -> JobReport:
    outputs = {
        "tars": folder,
        "shards": [entry["uri"] for entry in work.entries],
        "digests": [entry["sha256"] for entry in work.entries],
        "samples": work.num_samples,
        "bytes": sum(entry["bytes"] for entry in work.entries),
        "quarantined": dict(work.quarantined),
    }
    return JobReport("pack", meter.seconds, meter.cpu_seconds, work.num_new, outputs=outputs, reused=reused)
