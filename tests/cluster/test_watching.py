"""Dashboards and alerts ask for metrics that exist; the rules are legal; each alert has its place in the runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import CLUSTER
from watched import exported_names, metrics_of, queries, rays_gauges, scraped_names, sides, unknown_metrics

PATIENCE_S = 60


def scrape() -> set[str]:
    """Names of what the agent of the suite's own Ray cluster exports."""
    import ray

    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=20) as answer:
        return scraped_names(answer.read().decode())


def test_metrics_of_queries_are_exported(ray_cluster: Any) -> None:
    """By our code, or by the cluster of this suite, whose processes tell of themselves only after some seconds."""
    deadline = time.monotonic() + PATIENCE_S
    while problems := list(unknown_metrics(scraped=scrape())):
        assert time.monotonic() < deadline, problems
        time.sleep(1)


def test_wrong_metric_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "cluster"
    shutil.copytree(CLUSTER, copy, ignore=shutil.ignore_patterns("secrets"))
    for file, right, wrong in (
        ("prometheus/rules.yml", "nexusgen_train_data_wait_ratio", "nexusgen_train_data_wait_fraction"),
        ("grafana/dashboards/serving.json", "nexusgen_engine_batch_rows_total", "nexusgen_engine_batch_total"),
    ):
        text = (copy / file).read_text()
        assert right in text
        (copy / file).write_text(text.replace(right, wrong))
        assert any(wrong in problem for problem in unknown_metrics(copy)), file


def test_metrics_are_found_in_queries() -> None:
    query = 'sum by (name, le) (rate(a_bucket{x="y by (z)"}[5m])) / (b_total + c) > 10e9'
    assert metrics_of(query) == {"a_bucket", "b_total", "c"}
    assert metrics_of("label_values(a_total, name)") == {"a_total"}
    assert sum(1 for _ in queries()) > 40
    assert {"nexusgen_requests_total", "ray_nexusgen_train_checkpoint_seconds_sum"} <= exported_names()
    assert "ray_node_gpus_utilization" in rays_gauges()


def test_dashboards_are_whole() -> None:
    """What Grafana's provisioning asks of a file: an identity, a place and a data source for each panel."""
    source = yaml.safe_load((CLUSTER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][
        0
    ]
    identities = set()
    for path in (CLUSTER / "grafana" / "dashboards").glob("*.json"):
        dashboard = json.loads(path.read_text())
        identities.add(dashboard["uid"])
        places = set()
        for panel in dashboard["panels"]:
            places.add((panel["gridPos"]["x"], panel["gridPos"]["y"]))
            assert panel["title"]
            for target in panel["targets"]:
                assert target["datasource"] == {"type": "prometheus", "uid": source["uid"]}
        assert len(places) == len(dashboard["panels"])
    assert len(identities) == 3


def test_every_alert_is_in_the_runbook() -> None:
    runbook = (CLUSTER / "README.md").read_text()
    rules = yaml.safe_load((CLUSTER / "prometheus" / "rules.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in rules for rule in group["rules"]}
    assert alerts == set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^### .*$", runbook, re.M)))) & alerts
    for group in rules:
        for rule in group["rules"]:
            assert {"alert", "expr", "labels", "annotations"} <= rule.keys()
            assert rule["labels"]["severity"] in ("warning", "critical")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on PATH: apt-get install prometheus")
def test_promtool_accepts_configuration_and_rules(tmp_path: Path) -> None:
    config = tmp_path / "prometheus.yml"
    text = (CLUSTER / "prometheus" / "prometheus.yml").read_text()
    (tmp_path / "api_key").write_text("key")
    text = text.replace("/run/secrets/api_key", str(tmp_path / "api_key"))
    config.write_text(text.replace("/etc/prometheus", str(CLUSTER / "prometheus")))
    done = subprocess.run(["promtool", "check", "config", config], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on PATH: apt-get install prometheus")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """Series that are made up, through the real rules, for what has ended, hangs, is lost or was never there."""
    text = (Path(__file__).parent / "rules_test.yml").read_text()
    cases = tmp_path / "rules_test.yml"
    cases.write_text(text.replace("[rules.yml]", f"[{CLUSTER / 'prometheus' / 'rules.yml'}]"))
    done = subprocess.run(["promtool", "test", "rules", cases], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_sides_of_a_comparison_are_asked_for() -> None:
    assert list(sides('sum(rate(a{x="b == 1"}[5m])) / sum(b) > 0.01')) == ['sum(rate(a{x="b == 1"}[5m])) / sum(b)']
    assert list(sides("(count(up == 1) or vector(0)) < max_over_time(count(up)[1h:])")) == [
        "(count(up == 1) or vector(0))",
        "max_over_time(count(up)[1h:])",
    ]
    assert list(sides("max by (x) (a) == 0 and on (x, y) max by (x) (b)")) == ["max by (x) (a)", "max by (x) (b)"]
