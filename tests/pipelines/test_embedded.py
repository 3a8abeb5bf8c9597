from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nexusgen.errors import InputError
from nexusgen.schema import embedded_schema
from pipelines import arrays, embedded, storage
from pipelines.embedded import EmbeddedManifest, ShardInfo, SliceInfo


def a_table(num_rows: int = 3) -> pa.Table:
    values = torch.arange(8, dtype=torch.float32).reshape(2, 4)
    rows = [
        {
            "key": f"k{number}", "shard": "s", "row": number, "task": "generation", "lang": "en",
            "messages": [{"role": "user", "content": "x"}], "meta": "{}", "num_tokens": 7,
            "target_index": [0], "target_grid": [1, 2], "target_dtype": "bfloat16",
            "target_data": [arrays.encode_array(values + number)], "target_scale": [],
        }
        for number in range(num_rows)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=embedded_schema(("target",)))


def a_manifest(folder: str, *slices: tuple[str, int]) -> EmbeddedManifest:
    infos = tuple(SliceInfo(storage.join(folder, name), "s", i, rows, 1, "h") for i, (name, rows) in enumerate(slices))
    shard = ShardInfo("s", "d", 10, len(infos), sum(rows for _, rows in slices), 1)
    return EmbeddedManifest("vision", "f", "c", "run", embedded.digest_of(infos), infos, (shard,), {"json_invalid": 1})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_arrays_keep_every_bit(dtype: str) -> None:
    values = torch.tensor([[float("nan"), float("inf"), -0.0], [1e-40, 3.140625, -2.0]], dtype=arrays.DTYPES[dtype])
    back = arrays.decode_array(arrays.encode_array(values, dtype), dtype, (2, -1))
    assert back.dtype == values.dtype
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))
    entry = arrays.decode_entry(arrays.encode_array(values, dtype), dtype, (1, 2))
    assert entry.shape == (2, 3)
    assert arrays.decode_latents_entry(arrays.encode_array(values, dtype), dtype, (1, 3)).shape == (2, 1, 3)
    with pytest.raises(InputError, match="don't make an array"):
        arrays.decode_array(b"12345", dtype, (2, -1))


def test_raw_entries_are_the_bytes_of_the_column_without_a_copy() -> None:
    rows = [[b"ab", b""], [], [b"cde"], None, [b"f", b"gh", b"ijklm"]]
    column = pa.chunked_array([pa.array(part, pa.list_(pa.binary())) for part in (rows[:2], rows[2:], [])])
    for table_column, wanted in (
        (column, rows),
        (column.slice(1, 3), rows[1:4]),
        (pa.chunked_array([column.combine_chunks().take(pa.array([4, 0]))]), [rows[4], rows[0]]),
        (column.slice(1, 1), [[]]),
    ):
        found = arrays.raw_entries(table_column)
        assert [[bytes(entry.numpy()) for entry in row] for row in found] == [row or [] for row in wanted]
    data = column.chunk(0).values.buffers()[2]
    assert arrays.raw_entries(column)[0][0].data_ptr() == data.address


def test_a_view_of_raw_bytes_may_begin_anywhere() -> None:
    values = torch.tensor([1.5, -2.0, float("inf")], dtype=torch.bfloat16)
    data = arrays.encode_array(values)
    for padding in (b"", b"x", b"xy"):
        column = pa.chunked_array([pa.array([[padding, data]], pa.list_(pa.binary()))])
        entry = arrays.raw_entries(column)[0][1]
        assert torch.equal(arrays.decode_array(entry, "bfloat16", (3,)), values)


def test_parquet_stores_arrays_raw_and_is_the_same_every_time() -> None:
    data = embedded.to_parquet(a_table())
    assert data == embedded.to_parquet(a_table())
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    column = next(
        metadata.row_group(0).column(i)
        for i in range(metadata.num_columns)
        if metadata.row_group(0).column(i).path_in_schema.startswith("target_data")
    )
    assert column.compression == "UNCOMPRESSED"
    assert not any("DICTIONARY" in encoding for encoding in column.encodings)


def test_slices_are_read_by_column_and_row_group(tmp_path: Path) -> None:
    uri = f"{tmp_path}/s.parquet"
    storage.write_bytes_atomic(uri, embedded.to_parquet(a_table(100)))
    info = SliceInfo(uri, "s", 0, 100, 1, "h")
    assert embedded.read_slice(info).num_rows == 100
    part = embedded.read_slice(info, ["key", "num_tokens"], row_groups=[1])
    assert part.column_names == ["key", "num_tokens"]
    assert part.column("key").to_pylist()[0] == f"k{embedded.ROW_GROUP_ROWS}"
    with pytest.raises(InputError, match="embed it again"):
        embedded.read_slice(info, row_groups=[7])
    Path(uri).write_bytes(b"no parquet")
    with pytest.raises(InputError, match="embed it again"):
        embedded.read_slice(info)
    with pytest.raises(InputError, match="cannot read"):
        embedded.read_slice(replace(info, uri=f"{tmp_path}/none"))


def test_a_manifest_moves_with_its_folder(tmp_path: Path) -> None:
    folder = embedded.folder_of(str(tmp_path / "old"), "n", "vision")
    manifest = a_manifest(folder, ("a.parquet", 3), ("b.parquet", 0))
    embedded.write_manifest(folder, manifest)
    (tmp_path / "old").rename(tmp_path / "new")
    back = embedded.read_manifest(str(tmp_path / "new"), "n", "vision")
    assert back.slices[0].uri == f"{tmp_path}/new/embedded/n/vision/a.parquet"
    assert replace(back, slices=manifest.slices) == manifest
    assert [info.num_rows for info in embedded.list_slices(str(tmp_path / "new"), "n", "vision")] == [3]
    assert embedded.fingerprint_of(str(tmp_path / "new"), "n", "vision") == "f"


def test_missing_and_damaged_manifests_are_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `nexusgen embed` with name=n mode=vision"):
        embedded.read_manifest(str(tmp_path), "n", "vision")
    storage.write_bytes_atomic(f"{tmp_path}/embedded/n/vision/manifest.json", b"{")
    with pytest.raises(InputError, match="can't be read as a manifest"):
        embedded.read_manifest(str(tmp_path), "n", "vision")


def test_the_readmes_lines_read_the_data_with_plain_pyarrow_and_polars(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (code,) = (block for block in blocks if "polars" in block)
    table = a_table()
    storage.write_bytes_atomic(f"{tmp_path}/runs/mine/embedded/mine/vision/a-00000.parquet", embedded.to_parquet(table))
    script = code + '\nimport sys\nassert not {"nexusgen", "pipelines"} & set(sys.modules)\n'
    command = [sys.executable, "-I", "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("k0 torch.Size([2, 4])\n")
    assert "generation" in done.stdout
