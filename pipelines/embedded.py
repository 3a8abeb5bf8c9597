"""Embedded data at rest: its files and its manifest; written by `embed`, read by training and evaluation.

    STORAGE/embedded/NAME/MODE/
      STEM-HASH8-00000.parquet     one slice: columns of `schema.embedded_schema`, rows in tar order
      quarantine/STEM-HASH8-00000.parquet   what that slice's samples lost; columns of `schema.QUARANTINE_SCHEMA`
      _manifest/STEM-HASH8-00000.json       one finished slice; STEM-HASH8.json one finished shard
      manifest.json                what the data consists of; written last, read first
      config.yaml run.json fingerprint      made by which configuration, MLflow run and encoder
      takedowns.json               which dropped keys the finished shards were searched for (`takedowns.py`)

Slices of the modes of one NAME have the same file names, rows and order; mode images holds pictures, not
embeddings. Plain pyarrow or polars read the files; `arrays.py` tells what the bytes are.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nexusgen.errors import InputError
from nexusgen.schema import EmbedMode
from pipelines import process_use, storage

MANIFEST_NAME = "manifest.json"
QUARANTINE_FOLDER = "quarantine"
ENTRIES_FOLDER = "_manifest"
NUM_PARALLEL = 16  # small files read at a time: S3 takes tens of milliseconds to answer each
ROW_GROUP_ROWS = 64  # rows read together; 64 targets of the released model are 37 MB
_TEXT_PATHS = ("messages.list.element.content", "meta")


@dataclass(frozen=True, slots=True)
class SliceInfo:
    """One slice of embedded data: at most some hundred consecutive samples of one shard, in one file.

    Data may have millions of them, hence the slots.
    """

    uri: str
    shard: str
    index: int
    num_rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardInfo:
    """One input shard and what became of its samples. `digest` is the sha256 of the file as it was read."""

    uri: str
    digest: str
    num_bytes: int
    num_slices: int
    num_embedded: int
    num_quarantined: int


@dataclass(frozen=True)
class EmbeddedManifest:
    """What embedded data consists of, and what made it."""

    mode: str
    fingerprint: str  # of the encoder: the model's vision tower, or its autoencoder
    config_hash: str
    run_id: str  # of the embed job in MLflow
    digest: str  # sha256 over the slices' contents: names this very data
    slices: tuple[SliceInfo, ...]
    shards: tuple[ShardInfo, ...]
    quarantined: dict[str, int]  # by reason code


def folder_of(storage_uri: str, name: str, mode: EmbedMode) -> str:
    """Where embedded data of a name and mode lives."""
    return storage.join(storage_uri, "embedded", name, mode)


def digest_of(slices: Iterable[SliceInfo]) -> str:
    """The digest of a set of slices, whatever their order."""
    lines = sorted(f"{storage.name_of(s.uri)} {s.num_rows} {s.sha256}" for s in slices)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_manifest(folder: str, manifest: EmbeddedManifest) -> None:
    """Enter the data: from now on it can be read. File names are stored relative to the folder, so that it may move."""
    lists: dict[str, Sequence[SliceInfo | ShardInfo]] = {"slices": manifest.slices, "shards": manifest.shards}
    others = {field.name: getattr(manifest, field.name) for field in fields(manifest) if field.name not in lists}
    text = io.BytesIO()  # a line for each slice and shard: as one mapping, millions of slices would be held twice
    text.write(json.dumps(others, indent=1).removesuffix("\n}").encode())
    for name, infos in lists.items():
        text.write(f',\n "{name}": ['.encode())
        for number, info in enumerate(infos):
            values = asdict(info)
            if isinstance(info, SliceInfo):
                values["uri"] = storage.name_of(info.uri)
            text.write(f"{',' if number else ''}\n  {json.dumps(values)}".encode())
        text.write(b"\n ]")
    text.write(b"\n}\n")
    storage.write_bytes_atomic(storage.join(folder, MANIFEST_NAME), text.getvalue())


def read_manifest(storage_uri: str, name: str, mode: EmbedMode) -> EmbeddedManifest:
    """What embedded data consists of. Raises: InputError if there is none, or its job hasn't finished."""
    folder = folder_of(storage_uri, name, mode)
    uri = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(uri):
        raise InputError(
            f"no embedded data {name!r} of mode {mode} at {folder}: it was never made, or its job hasn't finished; "
            f"run `nexusgen embed` with name={name} mode={mode}"
        )
    try:
        values: dict[str, Any] = json.loads(storage.read_bytes(uri))
        slices = [SliceInfo(**{**entry, "uri": storage.join(folder, entry["uri"])}) for entry in values.pop("slices")]
        shards = [ShardInfo(**entry) for entry in values.pop("shards")]
        return EmbeddedManifest(slices=tuple(slices), shards=tuple(shards), **values)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{uri} can't be read as a manifest of embedded data: {error}") from None


def list_slices(storage_uri: str, name: str, mode: EmbedMode) -> list[SliceInfo]:
    """The slices in order of shard and index, without those that hold no row. Raises: InputError as `read_manifest`."""
    return [info for info in read_manifest(storage_uri, name, mode).slices if info.num_rows]


def fingerprint_of(storage_uri: str, name: str, mode: EmbedMode) -> str:
    """Fingerprint of the encoder that made the data. Raises: InputError as `read_manifest`."""
    return read_manifest(storage_uri, name, mode).fingerprint


def read_slice(
    info: SliceInfo, columns: Sequence[str] | None = None, row_groups: Sequence[int] | None = None
) -> pa.Table:
    """Rows of a slice; only the given columns and row groups (of ROW_GROUP_ROWS rows) are read.

    Raises: InputError if the file is absent or damaged.
    """
    with _opened(info) as parquet:
        wanted = None if columns is None else list(columns)
        if row_groups is None:
            table = parquet.read(columns=wanted)
        else:
            table = parquet.read_row_groups(list(row_groups), columns=wanted)
    process_use.count_read(table.nbytes)
    return table


def read_small_columns(info: SliceInfo, columns: Sequence[str]) -> tuple[pa.Table, dict[str, int]]:
    """Columns of a slice, and the bytes of all its columns, uncompressed, without reading those.

    Raises: InputError as `read_slice`.
    """
    with _opened(info) as parquet:
        sizes: dict[str, int] = {}
        for group in range(parquet.metadata.num_row_groups):
            row_group = parquet.metadata.row_group(group)
            for number in range(row_group.num_columns):
                column = row_group.column(number)
                name = column.path_in_schema.partition(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_uncompressed_size
        return parquet.read(columns=list(columns)), sizes


@contextmanager
def _opened(info: SliceInfo) -> Iterator[pq.ParquetFile]:
    try:
        with storage.open_random(info.uri) as file, pq.ParquetFile(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{info.uri} can't be read as embedded data: {error}; embed it again") from None


def to_parquet(table: pa.Table) -> pa.Buffer:
    """A table as the bytes of a Parquet file: arrays raw and without dictionary, as they don't compress; texts do."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_ROWS,
        compression=dict.fromkeys(_TEXT_PATHS, "ZSTD"),  # columns that aren't named stay uncompressed
        use_dictionary=False,
        write_statistics=["key", "row", "num_tokens"],
    )
    return sink.getvalue()
