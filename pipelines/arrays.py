"""Arrays as the bytes of embedded rows: bfloat16 keeps every bit, int8 has a scale for each token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
import torch.utils.dlpack
from jaxtyping import Shaped, UInt8
from torch import Tensor

from nexusgen.errors import InputError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
_MAX_INT8 = 127

RawBytes = UInt8[Tensor, " bytes"]


def encode_array(array: Shaped[Tensor, "..."], dtype: str = "bfloat16") -> bytes:
    """The raw little-endian bytes of an array, converted to `dtype`."""
    flat = array.detach().to("cpu", DTYPES[dtype]).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def decode_array(data: bytes | RawBytes, dtype: str, shape: Sequence[int]) -> Shaped[Tensor, "..."]:
    """The array that `encode_array` stored; `shape` may hold one -1. A view of `data`, if that is a tensor.

    Raises: InputError if the bytes don't fit it.
    """
    try:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if isinstance(data, bytes) else data
        if raw.storage_offset() % DTYPES[dtype].itemsize:
            raw = raw.clone()
        return raw.view(DTYPES[dtype]).reshape(*shape)
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{len(data)} bytes don't make an array of {dtype} {tuple(shape)}: {error}") from None


def raw_entries(column: pa.ChunkedArray) -> list[list[RawBytes]]:
    """The entries of a column list<binary>, row by row, as views of the column's memory: nobody may write to them."""
    rows: list[list[RawBytes]] = []
    for chunk in column.chunks:
        values = chunk.values
        _, offsets_buffer, data = values.buffers()
        if data is None or not len(values):
            rows += [[] for _ in range(len(chunk))]
            continue
        flat = torch.utils.dlpack.from_dlpack(pa.Array.from_buffers(pa.uint8(), data.size, [None, data]))
        width = np.int64 if pa.types.is_large_binary(values.type) else np.int32
        offsets = np.frombuffer(offsets_buffer, width)[values.offset : values.offset + len(values) + 1].tolist()
        entries = [flat[start:end] for start, end in itertools.pairwise(offsets)]
        rows += [entries[start:end] for start, end in itertools.pairwise(chunk.offsets.to_pylist())]
    return rows


def quantise_tokens(array: Shaped[Tensor, "tokens hidden"]) -> tuple[bytes, bytes]:
    """An array as int8 and one float32 scale per token, (data, scale): the largest number of a token becomes 127."""
    exact = array.detach().cpu().float()
    scale = exact.abs().amax(dim=-1, keepdim=True) / _MAX_INT8
    rounded = (exact / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-_MAX_INT8, _MAX_INT8)
    return encode_array(rounded, "int8"), encode_array(scale, "float32")


def decode_entry(
    data: bytes | RawBytes, dtype: str, grid: tuple[int, int], scale: bytes | RawBytes = b""
) -> Shaped[Tensor, "tokens hidden"]:
    """An entry of a vision role as [h * w, hidden], float32 where it was quantised; `grid` is its (h, w) in tokens.

    Raises: InputError if the bytes don't fit the grid.
    """
    array = decode_array(data, dtype, (grid[0] * grid[1], -1))
    return array.float() * decode_array(scale, "float32", (len(array), 1)) if dtype == "int8" else array


def decode_latents_entry(
    data: bytes | RawBytes, dtype: str, grid: tuple[int, int]
) -> Shaped[Tensor, "channels height width"]:
    """An entry of the role `latents` as [channels, h, w]; `grid` is its (h, w) in latent pixels."""
    return decode_array(data, dtype, (-1, *grid))
