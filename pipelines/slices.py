"""Slices: what embedding reads, encodes, writes and enters at a time; consecutive samples of one shard.

Reader tasks run this module alone: it imports neither torch nor transformers, so that they start within a second.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Literal

import pyarrow as pa

from nexusgen.errors import InputError, NexusgenError
from nexusgen.schema import QuarantineRow, Sample
from pipelines import process_use, storage
from pipelines.shards import ReadOptions, ShardReader, stem_of


@dataclass(frozen=True)
class SliceRules:
    """How shards are read and cut."""

    pairs_as: Literal["generation", "understanding"] = "generation"  # the task of images with a text (img2dataset)
    max_samples: int = 256  # of a slice, together with what is quarantined among them
    max_bytes: int = 64 << 20  # of pictures, compressed, and of all texts


@dataclass(frozen=True)
class Slice:
    """Consecutive samples of one shard on their way to an encoder, with the rows quarantined among them."""

    shard: str
    index: int
    samples: tuple[Sample, ...]
    rejected: tuple[QuarantineRow, ...]

    @property
    def name(self) -> str:
        return f"{shard_name(self.shard)}-{self.index:05d}"

    @property
    def digest(self) -> str:
        """sha256 over everything that its embedded rows depend on."""
        digest = hashlib.sha256()
        for sample in self.samples:
            texts = [sample.key, sample.row, sample.lang, [asdict(m) for m in sample.messages], sample.meta]
            digest.update(json.dumps(texts, sort_keys=True).encode())
            for image in sample.images:
                digest.update(hashlib.sha256(image).digest())
        digest.update(json.dumps([asdict(row) for row in self.rejected]).encode())
        return digest.hexdigest()


def shard_name(shard: str) -> str:
    """STEM-HASH8: the name that a shard's slices begin with."""
    return f"{stem_of(shard)}-{hashlib.sha256(shard.encode()).hexdigest()[:8]}"


def check_names(shards: Sequence[str]) -> None:
    """See that the slices of no two shards bear the same names, as 32 bits of a hash can't rule out.

    Raises: InputError that names both.
    """
    known: dict[str, str] = {}
    for shard in shards:
        other = known.setdefault(shard_name(shard), shard)
        if other != shard:
            raise InputError(
                f"the shards {other} and {shard} would both write slices named {shard_name(shard)}: rename one of them"
            )


def shard_stat(shard: str) -> list[int]:
    """Size and time of change of a shard; nothing if it isn't there."""
    try:
        found = storage.stat(shard)
    except InputError:
        return []
    return [found.size, found.mtime_ns]


def read_slices(shard: str, rules: SliceRules) -> Iterator[tuple[Slice | dict[str, Any], ...]]:
    """A shard's slices, one by one; beside the last one, or alone if there is none, a mapping that says how it ended.

    The two come together because an actor that gets the end as work of its own would soon wait for Ray to hand it more.
    """
    reader = ShardReader(shard, ReadOptions(pairs_as=rules.pairs_as))
    samples: list[Sample] = []
    rejected: list[QuarantineRow] = []
    num_bytes = index = 0
    # Taken before reading: a shard that changes meanwhile then differs from its record.
    before = shard_stat(shard)
    for item in reader:
        size = _num_bytes(item)
        num_items = len(samples) + len(rejected)
        if num_items and (num_items >= rules.max_samples or num_bytes + size > rules.max_bytes):
            yield (Slice(shard, index, tuple(samples), tuple(rejected)),)
            samples, rejected, num_bytes, index = [], [], 0, index + 1
        if isinstance(item, QuarantineRow):
            rejected.append(item)
        else:
            samples.append(item)
        num_bytes += size
    last = (Slice(shard, index, tuple(samples), tuple(rejected)),) if samples or rejected else ()
    end = {
        "kind": "shard",
        "shard": shard,
        "digest": reader.digest,
        "num_bytes": reader.num_bytes,
        "num_ignored": reader.num_ignored,
        "stat": before,
        "num_slices": index + len(last),
    }
    yield (*last, end)


def _num_bytes(item: Sample | QuarantineRow) -> int:
    """Bytes of an item's pictures and texts."""
    if isinstance(item, QuarantineRow):
        return sum(len(text.encode()) for text in astuple(item))
    texts = [item.key, json.dumps(item.meta), *(message.content for message in item.messages)]
    return sum(map(len, item.images)) + sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def read_shards(batch: pa.Table, rules: SliceRules) -> Iterator[pa.Table]:
    """Ray Data stage: names of shards in, pickled slices and ends of shards out, a row for each piece of work."""
    for shard in batch.column("shard").to_pylist():
        try:
            for items in read_slices(shard, rules):
                yield _packed(tuple(item if isinstance(item, Slice) else _with_report(item) for item in items))
        except NexusgenError as error:
            yield _packed((failure(error),))


def _with_report(end: dict[str, Any]) -> dict[str, Any]:
    """The end of a shard, with what its reader has used; see `accounting.py`."""
    return end | {"uses": [process_use.report()]}


def failure(error: NexusgenError) -> dict[str, Any]:
    """An error that ends the job (a full disk, an S3 that is down) as a row: through Ray its type would be lost."""
    return {"kind": "failure", "error": type(error).__name__, "message": str(error)}


def _packed(items: tuple[Slice | dict[str, Any], ...]) -> pa.Table:
    return pa.table({"items": pa.array([pickle.dumps(items)], pa.large_binary())})
