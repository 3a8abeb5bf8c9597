"""Embedded data as a training stage reads it: which rows there are, and batches of them by row number.

Modes of one name join by position, checked by key. Slices are read whole, the stage's columns only, before the plan
comes to them; what the stage prepares from a row is kept, so that data that fits in memory is read and tokenised once.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nexusgen.errors import FingerprintError, InputError
from nexusgen.model.manifest import Manifest
from nexusgen.schema import TASKS, EmbedMode
from pipelines import embedded, storage
from pipelines.batches import RankStep, Rows, RowTable
from pipelines.checkpoint import DataInput
from pipelines.embedded import EmbeddedManifest, SliceInfo
from pipelines.loaded_slice import LoadedSlice, columns_of
from pipelines.online import COLUMNS, OnlineEncoder
from pipelines.slice_cache import SliceCache
from pipelines.stages import AnyStage, Stage

MAX_CACHE_BYTES = 1_500_000_000  # of slices and what was prepared from them, per training process
TOKEN_BYTES = 64  # in memory, of a tokenised conversation: id, label and position, as numbers of 8 bytes; and its text

PreparedT = TypeVar("PreparedT")
BatchT = TypeVar("BatchT")
Embeddings = Literal["stored", "online"]  # as `embed` wrote them, or made of pictures while the training runs
Roles = Mapping[EmbedMode, tuple[str, ...]]  # that are read, by mode


@dataclass(frozen=True)
class StageData:
    """The rows that a stage can use, numbered from 0, and the slices they lie in (one entry per mode)."""

    slices: tuple[dict[EmbedMode, SliceInfo], ...]
    table: RowTable  # of all rows, training and validation
    places: Rows  # of each row in its slice
    train: Rows
    validation: Rows
    inputs: tuple[DataInput, ...]

    @property
    def train_table(self) -> RowTable:
        """The table of the training rows; the plan's row i is row `train[i]` here."""
        of_rows = [column[self.train] for column in (self.table.lengths, self.table.tasks, self.table.slices)]
        return RowTable(of_rows[0], of_rows[1], of_rows[2], self.table.slice_bytes)

    @property
    def digest(self) -> str:
        """Names the content of all data that is read."""
        return " ".join(entry.digest for entry in self.inputs)


def open_data(
    storage_uri: str,
    names: Sequence[str],
    stage: type[AnyStage],
    model: Manifest,
    validation_fraction: float,
    embeddings: Embeddings = "stored",
) -> StageData:
    """Find the rows of embedded data that a stage can use, and check that the data is this model's.

    Held out for validation: rows by a hash of their key, so that a sample stays on its side when data is added.
    Raises: InputError if data, modes, columns or usable rows are missing; FingerprintError if another encoder made it.
    """
    slices: list[dict[EmbedMode, SliceInfo]] = []
    slice_bytes: list[int] = []
    columns: dict[str, list[Any]] = {"lengths": [], "tasks": [], "slices": [], "places": [], "hashes": []}
    inputs: list[DataInput] = []
    roles: Roles = stage.roles if embeddings == "stored" else {"images": ()}
    for name in names:
        manifests = {mode: embedded.read_manifest(storage_uri, name, mode) for mode in roles}
        for mode, manifest in manifests.items():
            _check_fingerprint(manifest, name, mode, stage, model)
            uri = embedded.folder_of(storage_uri, name, mode)
            inputs.append(DataInput(name=f"{name}/{mode}", uri=uri, digest=manifest.digest, run_id=manifest.run_id))
        for group in _join_slices(name, manifests):
            header, num_bytes = _read_header(group, roles)
            lengths = stage.lengths(header)
            tasks = np.array([TASKS.index(task) for task in header["task"].to_pylist()])
            usable = np.flatnonzero((lengths > 0) & np.isin(tasks, [TASKS.index(task) for task in stage.tasks]))
            keys = header["key"].to_pylist()
            columns["lengths"].append(lengths[usable])
            columns["tasks"].append(tasks[usable])
            columns["slices"].append(np.full(len(usable), len(slices)))
            columns["places"].append(usable)
            columns["hashes"].append(np.array([zlib.crc32(keys[place].encode()) for place in usable], dtype=np.int64))
            slices.append(group)
            slice_bytes.append(num_bytes)
    joined = {name: np.concatenate([np.zeros(0, np.int64), *parts]) for name, parts in columns.items()}
    is_validation = joined["hashes"] >= (1 - validation_fraction) * 2**32
    if not (~is_validation).any():
        raise InputError(
            f"embedded data {', '.join(names)} has no training row for stage {stage.name}, which uses the tasks "
            f"{', '.join(stage.tasks)}: embed more data"
        )
    return StageData(
        slices=tuple(slices),
        table=RowTable(joined["lengths"], joined["tasks"], joined["slices"], np.array(slice_bytes, dtype=np.int64)),
        places=joined["places"],
        train=np.flatnonzero(~is_validation),
        validation=np.flatnonzero(is_validation),
        inputs=tuple(inputs),
    )


def _check_fingerprint(
    manifest: EmbeddedManifest, name: str, mode: EmbedMode, stage: type[AnyStage], model: Manifest
) -> None:
    part = stage.encoders[mode]
    wanted = model.fingerprints.get(part)
    if manifest.fingerprint != wanted:
        raise FingerprintError(
            f"embedded data {name!r} of mode {mode} was made by {part} {manifest.fingerprint[:12]}, but the model's is "
            f"{str(wanted)[:12]}: embed it again with this model (`nexusgen embed` with name={name} mode={mode}), or "
            "train the model that it was made with"
        )


def _join_slices(name: str, manifests: dict[EmbedMode, EmbeddedManifest]) -> list[dict[EmbedMode, SliceInfo]]:
    """Slices of all modes by file name, in the first mode's order; those without rows are left out."""
    by_mode = {mode: {storage.name_of(s.uri): s for s in manifest.slices} for mode, manifest in manifests.items()}
    first, *others = by_mode
    for mode in others:
        ours, theirs = by_mode[first], by_mode[mode]
        odd = [
            n for n in {**ours, **theirs} if n not in ours or n not in theirs or ours[n].num_rows != theirs[n].num_rows
        ]
        if odd:
            raise InputError(
                f"embedded data {name!r}: the modes {first} and {mode} differ in {len(odd)} slices ({odd[0]}, ...); "
                f"run `nexusgen embed` for both modes on the same input"
            )
    return [{mode: by_mode[mode][n] for mode in by_mode} for n, info in by_mode[first].items() if info.num_rows]


def _read_header(group: dict[EmbedMode, SliceInfo], roles: Roles) -> tuple[dict[str, pa.ChunkedArray], int]:
    """The small columns of a slice (key, task, length, and the grids of its roles), and its bytes in memory."""
    header: dict[str, pa.ChunkedArray] = {}
    num_bytes = 0
    for mode, info in group.items():
        wanted = ["key", "task", "num_tokens"]
        wanted += [f"{role}_{part}" for role in roles[mode] for part in ("grid", "dtype")]
        table, sizes = embedded.read_small_columns(info, wanted)
        _check_columns(info, table, wanted)
        header |= {column: table[column] for column in wanted}
        num_bytes += sizes.get("images", 0)
        for role in roles[mode]:
            is_int8 = "int8" in pc.unique(table[f"{role}_dtype"]).to_pylist()
            num_bytes += sizes.get(f"{role}_data", 0) * (1 + 4 * is_int8)  # as stored, and as float32
    return header, num_bytes + int(pc.sum(header["num_tokens"]).as_py() or 0) * TOKEN_BYTES


def _read_columns(info: SliceInfo, columns: Sequence[str]) -> pa.Table:
    table = embedded.read_slice(info, columns=columns)
    _check_columns(info, table, columns)
    return table


def _check_columns(info: SliceInfo, table: pa.Table, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise InputError(
            f"{info.uri} lacks the columns {', '.join(missing)} that the stage reads: "
            "embed the data again with `nexusgen embed`"
        )


class StageSource(Generic[PreparedT, BatchT]):
    """Batches of a stage. Slices and what was prepared of their rows are kept within a budget.

    The loop's validation and the thread that makes its batches share one source.
    """

    def __init__(self, data: StageData, stage: Stage[PreparedT, BatchT], cache_bytes: int | None = None) -> None:
        """Raises, later: InputError if a slice can't be read or lacks something."""
        self._data, self._stage = data, stage
        sizes = data.table.slice_bytes.tolist()
        self._cache = SliceCache(self._load, sizes, MAX_CACHE_BYTES if cache_bytes is None else cache_bytes)
        self._kept: dict[int, PreparedT] = {}
        self._lock = threading.Lock()

    def batch(self, rows: Rows) -> BatchT:
        """The batch of the plan's `rows`, which number the training rows. Raises: InputError if one can't be used."""
        numbers = self._data.train[rows]
        slices = {number: self._cache.get(number) for number in self._slices_of(numbers)}
        in_slices, places = self._data.table.slices[numbers].tolist(), self._data.places[numbers].tolist()
        return self._stage.collate(
            self._prepare([(slices[number], place) for number, place in zip(in_slices, places, strict=True)])
        )

    def ahead(self, steps: Iterator[RankStep]) -> Generator[RankStep, None, None]:
        """The same steps; slices of later ones are read while one is used."""
        return self._cache.ahead(steps, lambda step: self._slices_of(self._data.train[np.concatenate(step.parts)]))

    def samples(self, numbers: Rows) -> list[PreparedT]:
        """Prepared samples of any rows of the data, in the order of their `numbers`, which are kept: a training looks
        at the same few again and again. Raises: as `batch`.
        """
        with self._lock:
            missing = np.array([number for number in numbers.tolist() if number not in self._kept], dtype=np.int64)
            for number in self._slices_of(missing):
                rows = missing[self._data.table.slices[missing] == number]
                found = self._load(number, self._data.places[rows])
                prepared = self._prepare([(found, place) for place in range(len(rows))])
                self._kept |= dict(zip(rows.tolist(), prepared, strict=True))
            return [self._kept[number] for number in numbers.tolist()]

    def keys(self, rows: Rows) -> list[str]:
        """The keys of the samples of the plan's `rows`, to name them in a message."""
        numbers = self._data.train[rows]
        known = {
            number: _read_columns(next(iter(self._data.slices[number].values())), ["key"])["key"].to_pylist()
            for number in self._slices_of(numbers)
        }
        in_slices, places = self._data.table.slices[numbers].tolist(), self._data.places[numbers].tolist()
        return [known[number][place] for number, place in zip(in_slices, places, strict=True)]

    def _slices_of(self, numbers: Rows) -> list[int]:
        return np.unique(self._data.table.slices[numbers]).tolist()

    def _load(self, number: int, places: Rows | None = None) -> Any:
        """A slice, or some of its rows in memory of their own."""
        group = self._data.slices[number]
        tables = {mode: _read_columns(info, columns_of(self._stage, mode)) for mode, info in group.items()}
        if places is not None:
            tables = {mode: table.take(pa.array(places)) for mode, table in tables.items()}
        return LoadedSlice(tables, self._stage, next(iter(group.values())).uri)

    def _prepare(self, rows: Sequence[tuple[Any, int]]) -> list[PreparedT]:
        """What the stage makes of rows, given as what `_load` gave, and their places in it."""
        return [loaded.prepared(place) for loaded, place in rows]


class OnlineSource(StageSource[PreparedT, BatchT]):
    """Batches of a stage whose embeddings are made of pictures when they are used, those of a batch together.

    Slices of pictures are kept as stored ones are, embeddings aren't: each rank encodes its own rows, and no others.
    """

    def __init__(
        self,
        data: StageData,
        stage: Stage[PreparedT, BatchT],
        encoder: OnlineEncoder,
        cache_bytes: int | None = None,
    ) -> None:
        """`data` is opened with embeddings="online". Raises, later: as `StageSource`."""
        super().__init__(data, stage, cache_bytes)
        self._encoder = encoder

    def _load(self, number: int, places: Rows | None = None) -> pa.Table:
        table = _read_columns(self._data.slices[number]["images"], COLUMNS)
        return table if places is None else table.take(pa.array(places))

    def _prepare(self, rows: Sequence[tuple[pa.Table, int]]) -> list[PreparedT]:
        made = self._encoder.encode(pa.concat_tables([table.slice(place, 1) for table, place in rows]))
        loaded = LoadedSlice({"vision": made}, self._stage, "a batch")
        return [loaded.prepared(place) for place in range(len(rows))]
