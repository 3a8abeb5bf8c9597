"""Dashboards and alert rules: their queries, the metrics that these name, and what is known of each metric."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import ray
import yaml
from manifests import CLUSTER, Found

from pipelines import exported
from pipelines.api_metrics import Metrics
from pipelines.serve_metrics import replica_metrics

# Words of a query that aren't metrics: those of PromQL, and what stands in braces or after `by` is taken out before.
PROMQL = {
    "sum",
    "max",
    "count",
    "rate",
    "increase",
    "histogram_quantile",
    "by",
    "and",
    "or",
    "unless",
    "on",
    "vector",
    "max_over_time",
    "ignoring",
}
# Prometheus' own, of every target that it scrapes.
PROMETHEUS = {"up"}


def queries(cluster: Path = CLUSTER) -> Iterator[Found]:
    """Every query of every dashboard and alert; a dashboard's variable stands for anything."""
    for path in sorted((cluster / "grafana" / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield Found(target["expr"].replace("$name", ".*"), f"{path.name}: {panel['title']}")
        for variable in dashboard["templating"]["list"]:
            yield Found(variable["query"]["query"], f"{path.name}: ${variable['name']}")
    for group in yaml.safe_load((cluster / "prometheus" / "rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield Found(rule["expr"], f"rules.yml: {rule['alert']}")


def metrics_of(query: str) -> set[str]:
    """Names of metrics in a query."""
    if named := re.fullmatch(r"label_values\((\w+), \w+\)", query):
        return {named[1]}
    bare = re.sub(r'"[^"]*"', "", query)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|on)\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"(?<![\w.])[a-z_:]\w*", bare)) - PROMQL


def sides(query: str) -> Iterator[str]:
    """What a query compares or joins at its top, without numbers: an alert is silent until it fires, these aren't."""
    side, depth = "", 0
    operator = re.compile(r"\s+(?:and|or|unless|==|!=|[<>]=?)(?:\s+on\s*\([^)]*\))?\s+")
    position, is_quoted = 0, False
    while position < len(query):
        found = operator.match(query, position) if depth == 0 and not is_quoted else None
        if found:
            yield from _no_number(side)
            side, position = "", found.end()
            continue
        character = query[position]
        is_quoted ^= character == '"'
        if not is_quoted:
            depth += (character in "([{") - (character in ")]}")
        side, position = side + character, position + 1
    yield from _no_number(side)


def _no_number(side: str) -> Iterator[str]:
    if not re.fullmatch(r"[\d.e]+", side.strip()):
        yield side.strip()


@lru_cache
def exported_names() -> set[str]:
    """Names that our code exports, as they are scraped: of jobs, of the door, of the engines behind it."""
    names: set[str] = set()
    for one in exported.ALL:
        parts = ("_bucket", "_sum", "_count") if one.kind == "histogram" else ("",)
        names |= {f"ray_{one.name}{part}" for part in parts}
    replica = defaultdict(int, pid=1, loops=[defaultdict(int, units={"token": 1})])  # every count is there, and 0
    door = Metrics()
    door.requests.labels("/", "200").inc()
    for histogram in (door.seconds, door.first_event):
        histogram.labels("/").observe(1)
    door.pictures.labels("/").inc()
    door.tokens.labels("prompt").inc()
    return names | scraped_names(door.text().decode()) | scraped_names(replica_metrics(0, {"ar": [replica]}))


def scraped_names(text: str) -> set[str]:
    """Names of the series in what a target answered."""
    return set(re.findall(r"^([a-zA-Z_:][\w:]*)(?:\{| )", text, re.M))


@lru_cache
def rays_gauges() -> set[str]:
    """What Ray's agent says of a node: as its reporter, which knows GPUs even where there are none, lists them."""
    reporter = Path(ray.__file__).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    return {f"ray_{name}" for name in re.findall(r'^    "(\w+)": Gauge\($', reporter.read_text(), re.M)}


def unknown_metrics(cluster: Path = CLUSTER, scraped: set[str] | None = None) -> Iterator[str]:
    """Metrics in queries that nobody exports: neither our code nor Ray's reporter, nor, if given, a real scrape."""
    known = exported_names() | rays_gauges() | PROMETHEUS | (scraped or set())
    for found in queries(cluster):
        for name in sorted(metrics_of(found.value) - known):
            yield f"{found.where}: nobody exports {name}"
