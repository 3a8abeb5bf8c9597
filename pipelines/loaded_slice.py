"""One slice of embedded data in memory, as a training stage uses it. Arrays stay where the reader put them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import pyarrow as pa
from jaxtyping import Shaped
from torch import Tensor

from nexusgen.errors import InputError
from nexusgen.schema import ROLE_PARTS, EmbedMode, Message
from pipelines.arrays import RawBytes, decode_entry, decode_latents_entry, raw_entries
from pipelines.stages import EmbeddedRow, Stage, StoredImage

PreparedT = TypeVar("PreparedT")


def columns_of(stage: Stage[Any, Any] | type[Stage[Any, Any]], mode: EmbedMode) -> list[str]:
    """The columns of a mode that a stage reads for its batches."""
    return ["key", "task", "messages", *(f"{role}_{part}" for role in stage.roles[mode] for part in ROLE_PARTS)]


class LoadedSlice(Generic[PreparedT]):
    """The rows of one slice; what a stage prepared of a row is kept."""

    def __init__(self, tables: Mapping[EmbedMode, pa.Table], stage: Stage[PreparedT, Any], name: str) -> None:
        """`tables` hold the stage's columns of each mode; `name` is for messages. Raises: InputError if keys differ."""
        self._stage = stage
        first, *others = tables.values()
        self.keys: list[str] = first["key"].to_pylist()
        for table in others:
            if table["key"].to_pylist() != self.keys:
                raise InputError(f"{name}: its keys aren't those of the other modes' slice; embed it again")
        self._tasks, self._messages = first["task"].to_pylist(), first["messages"].to_pylist()
        self._roles = {role: _Role(role, table) for mode, table in tables.items() for role in stage.roles[mode]}
        self._prepared: dict[int, PreparedT] = {}

    def prepared(self, place: int) -> PreparedT:
        """What the stage makes of a row. Raises: InputError if the row lacks what it needs."""
        if place not in self._prepared:
            row = EmbeddedRow(
                key=self.keys[place],
                task=self._tasks[place],
                messages=tuple(Message(message["role"], message["content"]) for message in self._messages[place]),
                images={name: role.images(place) for name, role in self._roles.items()},
            )
            self._prepared[place] = self._stage.prepare(row)
        return self._prepared[place]


class _Role:
    """A role's columns."""

    def __init__(self, role: str, table: pa.Table) -> None:
        self._is_latents = role == "latents"
        self._indices, self._grids, self._dtypes = (
            table[f"{role}_{part}"].to_pylist() for part in ("index", "grid", "dtype")
        )
        self._data, self._scales = (raw_entries(table[f"{role}_{part}"]) for part in ("data", "scale"))

    def images(self, place: int) -> tuple[StoredImage, ...]:
        """What is stored for a row."""
        indices: Sequence[int] = self._indices[place] or ()
        if not indices:
            return ()
        grids, dtype, arrays = self._grids[place], self._dtypes[place], self._data[place]
        pairs = list(zip(grids[::2], grids[1::2], strict=True))
        scales: Sequence[bytes | RawBytes] = self._scales[place] or [b""] * len(arrays)  # empty unless quantised
        return tuple(
            StoredImage(index, grid, self._decode(data, dtype, grid, scale))
            for index, grid, data, scale in zip(indices, pairs, arrays, scales, strict=True)
        )

    def _decode(
        self, data: RawBytes, dtype: str, grid: tuple[int, int], scale: bytes | RawBytes
    ) -> Shaped[Tensor, "..."]:
        if self._is_latents:
            return decode_latents_entry(data, dtype, grid)
        return decode_entry(data, dtype, grid, scale)
