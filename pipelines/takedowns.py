"""Samples taken out of embedded data for good, by their keys: recorded once, then kept out of every mode and re-run.

    STORAGE/embedded/NAME/dropped_keys.json     every key ever dropped, with the day and the file that named it
    STORAGE/embedded/NAME/MODE/takedowns.json   digest of the keys that the mode's finished shards were searched for

Keys come from a text file in UTF-8, one a line. An empty line, and one that begins with `#`, is a comment: a key that
begins so can't be named.

A finished slice that holds such a sample is rewritten without its row, which becomes a quarantine row; no other slice
is touched, and no bit of the other rows changes. One that can't be read is made again.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import re
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

log = logging.getLogger(__name__)

RECORD_NAME = "dropped_keys.json"
SEARCHED_NAME = "takedowns.json"
REASON_CODE = "taken_down"
_SHARD_RECORD = re.compile(r"-[0-9a-f]{8}\.json$")  # a slice's has its number before the ending


def record(storage_uri: str, name: str, keys_file: str | None) -> frozenset[str]:
    """Add the keys of a text file (one a line; empty lines and those with a # in front don't count) to the record.

    Gives all keys of the record.

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

    Nothing is read where the same keys were searched for before: what was finished since then was made without them.
    """
    uri = storage.join(folder, SEARCHED_NAME)
    if not dropped:
        storage.delete(uri)  # what is finished from now on may hold any key
        return 0
    searched = {"keys": hashlib.sha256(json.dumps(sorted(dropped)).encode()).hexdigest()}
    if storage.find_json(uri) == searched:
        return 0
    files = map(storage.name_of, storage.list_files(storage.join(folder, embedded.ENTRIES_FOLDER)))
    names = [name for name in files if _SHARD_RECORD.search(name)]
    with ThreadPoolExecutor(embedded.NUM_PARALLEL) as pool:
        num_rewritten = sum(pool.map(lambda name: _rewrite_shard(folder, name, dropped), names))
    storage.write_json(uri, searched)
    return num_rewritten


def _rewrite_shard(folder: str, name: str, dropped: frozenset[str]) -> int:
    """Rewrite the slices of a shard that hold dropped samples.

    The data's manifest and the shard's record are removed first, and the record is written last: of a job killed in
    between no manifest tells what isn't so, and the next one looks at the shard again. Slices that can't be read lose
    their record, too.
    """
    uri = storage.join(folder, embedded.ENTRIES_FOLDER, name)
    shard = storage.find_json(uri)
    if shard is None:
        return 0  # damaged: the job reads the tar again
    concerned: list[tuple[dict[str, Any], set[str]]] = []
    unreadable: list[dict[str, Any]] = []
    for entry in shard["slices"]:
        try:
            keys = _keys_in(folder, entry) & dropped
        except InputError as error:
            log.warning("a slice is made again: %s", error)
            unreadable.append(entry)
            continue
        if keys:
            concerned.append((entry, keys))
    if not concerned and not unreadable:
        return 0
    storage.delete(storage.join(folder, embedded.MANIFEST_NAME))
    storage.delete(uri)
    num_rewritten = 0
    for entry, keys in concerned:
        try:
            entry.update(_rewrite_slice(folder, entry, keys))
            num_rewritten += 1
        except InputError as error:
            log.warning("a slice is made again: %s", error)
            unreadable.append(entry)
    for entry in unreadable:
        storage.delete(_record_of(folder, entry))
    if not unreadable:
        storage.write_json(uri, shard)
    return num_rewritten


def _keys_in(folder: str, entry: dict[str, Any]) -> set[str]:
    """Keys of a slice's rows. Raises: InputError if it has rows and can't be read."""
    if not entry["num_rows"]:
        return set()
    uri = storage.join(folder, entry["file"])
    return set(embedded.read_slice(_info(uri, entry), ["key"]).column("key").to_pylist())


def _rewrite_slice(folder: str, entry: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Write a slice without the rows of `keys` and enter it; gives what has changed in its entry.

    Raises: InputError if its rows, or those that it has in quarantine, can't be read; then nothing is written.
    """
    uri = storage.join(folder, entry["file"])
    quarantine_uri = storage.join(folder, embedded.QUARANTINE_FOLDER, entry["file"])
    table, rejected = drop_rows(embedded.read_slice(_info(uri, entry)), keys)
    rows = pa.Table.from_pylist([asdict(row) for row in rejected], schema=QUARANTINE_SCHEMA)
    if entry["quarantined"]:
        rows = pa.concat_tables([embedded.read_slice(_info(quarantine_uri, entry)), rows])
    data, quarantine = embedded.to_parquet(table), embedded.to_parquet(rows)
    if table.num_rows:
        storage.write_bytes_atomic(uri, data)
    else:
        storage.delete(uri)
    storage.write_bytes_atomic(quarantine_uri, quarantine)
    changed = {
        "num_rows": table.num_rows,
        "num_bytes": data.size if table.num_rows else 0,
        "quarantine_bytes": quarantine.size,
        "sha256": hashlib.sha256(data).hexdigest(),
        "dropped": sorted({*entry["dropped"], *keys}),
        "tasks": dict(Counter(table.column("task").to_pylist())),
        "quarantined": dict(Counter(entry["quarantined"]) + Counter({REASON_CODE: len(rejected)})),
    }
    storage.write_json(_record_of(folder, entry), entry | changed)
    return changed


def _record_of(folder: str, entry: dict[str, Any]) -> str:
    name = entry["file"].removesuffix(".parquet")
    return storage.join(folder, embedded.ENTRIES_FOLDER, f"{name}.json")


def _info(uri: str, entry: dict[str, Any]) -> SliceInfo:
    return SliceInfo(uri, entry["shard"], entry["index"], entry["num_rows"], entry["num_bytes"], entry["sha256"])


def drop_rows(table: pa.Table, keys: Iterable[str]) -> tuple[pa.Table, list[QuarantineRow]]:
    """The rows of other keys, and a quarantine row for each of those that go."""
    is_dropped = pc.is_in(table.column("key"), value_set=pa.array(list(keys), pa.string()))
    gone = table.filter(is_dropped).select(["shard", "key"]).to_pylist()
    rejected = [QuarantineRow(row["shard"], row["key"], "", REASON_CODE, "dropped on request") for row in gone]
    return (table.filter(pc.invert(is_dropped)), rejected) if gone else (table, [])
