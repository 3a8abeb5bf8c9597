"""Samples taken out of embedded data for good, by their keys: recorded once, then kept out of every mode and re-run.

    STORAGE/embedded/NAME/dropped_keys.json     every key ever dropped, with the day and the file that named it

A finished slice that holds such a sample is rewritten without its row, which becomes a quarantine row; no other slice
is touched, and no bit of the other rows changes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nexusgen.errors import InputError
from nexusgen.schema import QUARANTINE_SCHEMA, QuarantineRow
from pipelines import embedded, storage
from pipelines.embedded import SliceInfo

RECORD_NAME = "dropped_keys.json"
REASON_CODE = "taken_down"


def record(storage_uri: str, name: str, keys_file: str | None) -> frozenset[str]:
    """Add the keys of a text file (one a line; empty lines and # count for nothing) to the record; gives all of them.

    Raises: InputError if the file can't be read, isn't UTF-8 or names no key, or the record is damaged.
    """
    uri = storage.join(storage_uri, "embedded", name, RECORD_NAME)
    known: dict[str, Any] = {}
    if storage.exists(uri):
        try:
            known = json.loads(storage.read_bytes(uri))
        except ValueError as error:
            raise InputError(f"{uri}, the record of dropped keys, can't be read: {error}; restore it") from None
    if keys_file is None:
        return frozenset(known)
    try:
        lines = storage.read_bytes(keys_file).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"drop_keys={keys_file}: expected UTF-8 text, a key a line: {error}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise InputError(f"drop_keys={keys_file} names no key; write one a line")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    new = {key: {"date": today, "file": keys_file} for key in keys if key not in known}
    if new:
        storage.write_bytes_atomic(uri, json.dumps(known | new, indent=1, ensure_ascii=False).encode())
    return frozenset(known | new)


def rewrite(folder: str, dropped: frozenset[str]) -> int:
    """Take dropped samples out of the finished shards of one mode; gives the number of slices rewritten.

    A shard's record is removed first and written last: a job killed in between looks at the shard again.
    """
    if not dropped:
        return 0
    names = [storage.name_of(uri) for uri in storage.list_files(storage.join(folder, embedded.ENTRIES_FOLDER))]
    with ThreadPoolExecutor(embedded.NUM_PARALLEL) as pool:
        return sum(pool.map(lambda name: _rewrite_shard(folder, name, dropped), names))


def _rewrite_shard(folder: str, name: str, dropped: frozenset[str]) -> int:
    uri = storage.join(folder, embedded.ENTRIES_FOLDER, name)
    shard = json.loads(storage.read_bytes(uri))
    if shard["kind"] != "shard":
        return 0
    found = {entry["file"]: _keys_in(folder, entry) & dropped for entry in shard["slices"] if entry["num_rows"]}
    concerned = [entry for entry in shard["slices"] if found.get(entry["file"])]
    if not concerned:
        return 0
    storage.delete(uri)
    for entry in concerned:
        entry.update(_rewrite_slice(folder, entry, found[entry["file"]]))
    storage.write_bytes_atomic(uri, json.dumps(shard).encode())
    return len(concerned)


def _keys_in(folder: str, entry: dict[str, Any]) -> set[str]:
    """Keys of a slice's rows; none where its file is gone, which the job will notice."""
    uri = storage.join(folder, entry["file"])
    if not storage.exists(uri):
        return set()
    return set(embedded.read_slice(_info(uri, entry), ["key"]).column("key").to_pylist())


def _rewrite_slice(folder: str, entry: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Write a slice without the rows of `keys` and enter it; gives what has changed in its entry."""
    uri = storage.join(folder, entry["file"])
    table, rejected = drop_rows(embedded.read_slice(_info(uri, entry)), keys)
    data = embedded.to_parquet(table)
    if table.num_rows:
        storage.write_bytes_atomic(uri, data)
    else:
        storage.delete(uri)
    quarantine_uri = storage.join(folder, embedded.QUARANTINE_FOLDER, entry["file"])
    rows = pa.Table.from_pylist([asdict(row) for row in rejected], schema=QUARANTINE_SCHEMA)
    if storage.exists(quarantine_uri):
        rows = pa.concat_tables([embedded.read_slice(_info(quarantine_uri, entry)), rows])
    storage.write_bytes_atomic(quarantine_uri, embedded.to_parquet(rows))
    changed = {
        "num_rows": table.num_rows,
        "num_bytes": data.size if table.num_rows else 0,
        "sha256": hashlib.sha256(data).hexdigest(),
        "dropped": sorted({*entry["dropped"], *keys}),
        "tasks": dict(Counter(table.column("task").to_pylist())),
        "quarantined": dict(Counter(entry["quarantined"]) + Counter({REASON_CODE: len(rejected)})),
    }
    name = entry["file"].replace(".parquet", ".json")
    own = storage.join(folder, embedded.ENTRIES_FOLDER, name)
    storage.write_bytes_atomic(own, json.dumps(entry | changed).encode())
    return changed


def _info(uri: str, entry: dict[str, Any]) -> SliceInfo:
    return SliceInfo(uri, entry["shard"], entry["index"], entry["num_rows"], entry["num_bytes"], entry["sha256"])


def drop_rows(table: pa.Table, keys: Iterable[str]) -> tuple[pa.Table, list[QuarantineRow]]:
    """The rows of other keys, and a quarantine row for each of those that go."""
    is_dropped = pc.is_in(table.column("key"), value_set=pa.array(list(keys), pa.string()))
    gone = table.filter(is_dropped).select(["shard", "key"]).to_pylist()
    rejected = [QuarantineRow(row["shard"], row["key"], "", REASON_CODE, "dropped on request") for row in gone]
    return (table.filter(pc.invert(is_dropped)), rejected) if gone else (table, [])
