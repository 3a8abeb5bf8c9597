"""Rows of an evaluation at rest: those of each finished unit as they are made, and in the end all of them.

An actor writes a unit's rows as soon as it has them, as a file of its own that is seen whole or not at all. A killed
evaluation that is started again finds them and makes only the other units. The files' folder bears a digest of what the
rows depend on beside the weights: the suite's settings and columns. `results.parquet` bears the same digest.

    STORAGE/evaluations/FINGERPRINT/SUITE/parts-DIGEST/KIND-FIRST-LAST.parquet   until the suite is done
    STORAGE/evaluations/FINGERPRINT/SUITE/results.parquet
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from nexusgen.errors import InputError
from pipelines import storage
from pipelines.suites import EvaluationSuite, Row, Unit

RESULTS_NAME = "results.parquet"
_DIGEST_KEY = b"nexusgen.settings"


@dataclass(frozen=True)
class UnitRows:
    """Where a suite's rows of one model are. `folder` is that of the suite; travels to the actors."""

    folder: str
    schema: pa.Schema
    digest: str

    @classmethod
    def of(cls, suite: EvaluationSuite, folder: str) -> UnitRows:
        """Those of a suite, in its folder."""
        depends_on = [suite.path, suite.settings, str(suite.schema)]
        return cls(folder, suite.schema, hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest())

    @property
    def parts(self) -> str:
        """Folder of the finished units' files."""
        return storage.join(self.folder, f"parts-{self.digest[:16]}")

    def write(self, unit: Unit, rows: Sequence[Row]) -> None:
        """Keep a unit's rows. Raises: ResourceError if they can't be written."""
        self._write(self._uri(unit), rows)

    def read(self, unit: Unit) -> list[Row]:
        """Rows that an actor has just kept. Raises: InputError if they aren't there."""
        rows = self._read(self._uri(unit))
        if rows is None:
            raise InputError(
                f"{self._uri(unit)} was written by an actor but isn't seen here: on a cluster of several machines the "
                "storage must be one that all of them share"
            )
        return rows

    def finished(self, units: Sequence[Unit]) -> dict[Unit, list[Row]]:
        """The units whose rows are kept, whole and as many as they should be, with these rows."""
        there = {storage.name_of(uri) for uri in storage.list_files(self.parts)}
        found = {unit: self._read(self._uri(unit)) for unit in units if storage.name_of(self._uri(unit)) in there}
        return {unit: rows for unit, rows in found.items() if rows and len(rows) == unit.last - unit.first}

    def write_all(self, rows: Sequence[Row]) -> None:
        """Write the suite's rows. Raises: ResourceError if they can't be written."""
        self._write(storage.join(self.folder, RESULTS_NAME), rows)

    def read_all(self) -> list[Row] | None:
        """All rows of the suite; None if it wasn't finished, or was run under other settings since."""
        return self._read(storage.join(self.folder, RESULTS_NAME))

    def has_all(self) -> bool:
        """Whether `read_all` would find rows; reads no more than the file's end."""
        uri = storage.join(self.folder, RESULTS_NAME)
        if not storage.exists(uri):
            return False
        try:
            with storage.open_random(uri) as stream:
                return self._is_ours(pq.read_schema(stream))
        except (pa.ArrowInvalid, InputError):
            return False

    def remove_parts(self) -> None:
        """Remove the finished units' files, which nobody needs when all rows are written."""
        for uri in storage.list_files(self.parts):
            storage.delete(uri)
        if not storage.is_remote(self.parts) and storage.exists(self.parts):
            storage.remove_temporary(self.parts, before_ns=2**63 - 1)
            storage.local_path(self.parts).rmdir()

    def _uri(self, unit: Unit) -> str:
        return storage.join(self.parts, f"{unit.kind}-{unit.first:06d}-{unit.last:06d}.parquet")

    def _write(self, uri: str, rows: Sequence[Row]) -> None:
        table = pa.Table.from_pylist(list(rows), schema=self.schema.with_metadata({_DIGEST_KEY: self.digest.encode()}))
        data = pa.BufferOutputStream()
        pq.write_table(table, data)
        storage.write_bytes_atomic(uri, data.getvalue())

    def _read(self, uri: str) -> list[Row] | None:
        if not storage.exists(uri):
            return None
        try:
            table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
        except (pa.ArrowInvalid, OSError):
            return None  # damaged: made again
        rows: list[Row] = table.to_pylist()
        return rows if self._is_ours(table.schema) else None

    def _is_ours(self, schema: pa.Schema) -> bool:
        return (schema.metadata or {}).get(_DIGEST_KEY) == self.digest.encode()
