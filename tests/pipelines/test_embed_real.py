"""One embed job over real tars, good and faulty, against an independent reading of them by `tarfile`."""

from __future__ import annotations

import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
from mlflow import MlflowClient

from nexusgen.schema import REASON_CODES
from pipelines import embedded, tracking
from pipelines.embed import EmbedConfig, embed
from pipelines.runtime import RayCluster


def keys_of_tar(path: Path) -> set[str]:
    """Keys of a good shard by WebDataset's rule: a member's name up to the first dot of its base name."""
    with tarfile.open(path) as tar:
        names = [Path(member.name) for member in tar if member.isfile()]
    return {str(name.with_name(name.name.partition(".")[0])) for name in names}


def test_every_sample_of_real_tars_is_embedded_or_quarantined(
    test_data: Path, tmp_path: Path, ray_cluster: RayCluster, no_server: None
) -> None:
    data = test_data / "data"
    good = [*sorted((data / "emoji").glob("*.tar")), *sorted((data / "photos").glob("*.tar"))]
    faulty = [*sorted((data / "broken" / "tars").glob("*")), *sorted((data / "broken" / "tars_others").glob("*"))]
    wild = [path for path in sorted((data / "wild").iterdir()) if path.suffix in (".tar", ".tgz")]
    config = EmbedConfig(
        storage=str(tmp_path),
        name="real",
        input=[str(path) for path in (*good, *faulty, *wild)],
        mode="vision",
        max_quarantine_fraction=1,
        num_encoders=2,
    )
    report = embed(config)

    rows: dict[str, list[str]] = defaultdict(list)
    for info in embedded.list_slices(str(tmp_path), "real", "vision"):
        rows[info.shard] += embedded.read_slice(info, ["key"]).column("key").to_pylist()
    lost: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in pq.read_table(f"{report.outputs['data']}/quarantine").to_pylist():
        lost[row["shard"]].append(row)
        assert row["reason_code"] in REASON_CODES
        assert row["reason"]

    # Good shards: every sample is in the data, once.
    for path in good:
        assert sorted(rows[str(path)]) == sorted(keys_of_tar(path)), path.name
        assert not lost[str(path)], path.name
    # Faulty ones: the good keys are in the data, the bad ones in quarantine; a shard without a key has its own row.
    expected = json.loads((data / "broken" / "expected.json").read_text(encoding="utf-8"))
    for path in faulty:
        wanted = expected[f"{path.parent.name}/{path.name}"]
        found = Counter(rows[str(path)])
        assert set(wanted.get("good_keys", [])) <= set(found), path.name
        assert max(found.values(), default=1) == 1, path.name
        refused = {row["key"] for row in lost[str(path)]}
        for key in wanted.get("bad_keys", []):
            name = key.partition("(")[0].strip()  # "(rest)" has no name, "KEY (2nd)" is the second of that key
            assert name in refused or (name in found and name == key) or (not name and refused), (path.name, key)
        assert found or refused, path.name
    # Made by other projects: whatever isn't a sample of ours is accounted for by its key.
    for path in wild:
        kept, refused = set(rows[str(path)]), {row["key"] for row in lost[str(path)]}
        assert not kept & refused, path.name
        assert kept | refused, path.name
    # The account agrees with the files, in the report and in MLflow.
    codes = Counter(row["reason_code"] for of_shard in lost.values() for row in of_shard)
    assert report.outputs["quarantined"] == dict(codes)
    assert report.outputs["embedded"] == sum(map(len, rows.values()))
    run = MlflowClient(tracking_uri=tracking.mlflow_uri(str(tmp_path))).get_run(report.outputs["run_id"])
    counted = {name: value for name, value in run.data.metrics.items() if name.startswith("data/quarantine/")}
    assert counted == {f"data/quarantine/{code}": count for code, count in codes.items()}
