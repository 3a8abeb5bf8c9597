"""Every query of every dashboard and alert, asked of a real Prometheus while jobs and a server really run.

    python benchmarks/watching.py --prometheus /usr/bin/prometheus [--keep 600] [--json]

On a local Ray cluster: the demo world is packed (one shard is truncated), embedded and trained for some steps, and
`demo-base` is served and asked, also wrongly. Prometheus (Debian: apt-get install prometheus) reads the shipped
configuration and rules, with its targets replaced. A query passes if it has a series at some time of the run. One that
has none passes only if it is legal and either of a metric that nothing here has cause to export (MAY_BE_SILENT), or
has series with any values of its labels, as there are of other answers than 429. Of an alert each side is asked,
without its threshold. `--keep` leaves all of it running for so many seconds, for a look.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cluster")]  # the walk through dashboards and rules is the tests'

from report import Report  # noqa: E402
from watched import PROMETHEUS, exported_names, metrics_of, queries, rays_gauges, sides  # noqa: E402

KEY = "a-key-of-the-benchmark"
CONFIGS = ROOT / "jobs" / "configs" / "demo"
SERVE_PORT, PROMETHEUS_PORT = 18473, 18474
SCRAPE_S = 3
RAY_REPORTS_S = 10
MAY_BE_SILENT = {
    "ray_node_gpus_utilization",  # no GPU
    "ray_nexusgen_train_mfu_ratio",  # nor its peak
    "ray_nexusgen_train_skipped_steps_total",  # no bad gradient
    "ray_spill_manager_objects_bytes",  # nothing spilled
}


def main() -> int:
    """Run it; 1 if a query isn't answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="prometheus", help="the program (default: on PATH)")
    parser.add_argument("--keep", type=float, default=0, metavar="SECONDS", help="leave all running, at the end")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["NEXUSGEN_API_KEYS"] = KEY

    import ray

    from pipelines import runtime, serve
    from pipelines.serve import ServeConfig

    talk = contextlib.redirect_stdout(sys.stderr)  # Ray's; what is printed is the report
    with talk, tempfile.TemporaryDirectory() as name, runtime.ray_cluster(1, "watching"):
        folder = Path(name)
        agent = ray.nodes()[0]["MetricsExportPort"]
        config = folder / "prometheus.yml"
        config.write_text(_configuration(folder, agent))
        command = [
            arguments.prometheus,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}",
        ]
        with (folder / "prometheus.log").open("w") as log, subprocess.Popen(command, stderr=log) as prometheus:
            try:
                started = time.time()
                _run_jobs(folder / "storage")
                settings = {"storage": str(folder / "storage"), "model": "demo-base", "port": SERVE_PORT}
                serve.serve(ServeConfig.model_validate(settings), block=False)
                _ask()
                time.sleep(3 * SCRAPE_S)
                report = Report()
                _check(report, started)
                print(f"Prometheus: http://127.0.0.1:{PROMETHEUS_PORT}", file=sys.stderr, flush=True)
                _keep_busy(arguments.keep)
                serve.shutdown()
            finally:
                prometheus.send_signal(signal.SIGTERM)
    return report.finish(arguments.json)


def _configuration(folder: Path, agent: int) -> str:
    """The shipped configuration with this machine's targets."""
    (folder / "api_key").write_text(KEY)
    text = (ROOT / "cluster" / "prometheus" / "prometheus.yml").read_text()
    text = text.replace("/run/secrets/api_key", str(folder / "api_key"))
    text = text.replace("/etc/prometheus", str(ROOT / "cluster" / "prometheus"))
    text = re.sub(r"scrape_interval: \w+", f"scrape_interval: {SCRAPE_S}s", text)
    text = re.sub(r"ray-head:8000", f"127.0.0.1:{SERVE_PORT}", text)
    text, count = re.subn(
        r"dns_sd_configs:.*\n.*- \{names.*\}", f'static_configs: [{{targets: ["127.0.0.1:{agent}"]}}]', text
    )
    assert count == 1
    return text


def _run_jobs(storage: Path) -> None:
    """Pack, embed and train, long enough to be seen."""
    from nexusgen.config import load_config
    from pipelines.embed import EmbedConfig, embed
    from pipelines.pack import PackConfig, pack
    from pipelines.train import TrainConfig, train

    common = [f"storage={storage}", "name=watched"]
    counts = "counts={generation: 1600, editing: 0, understanding: 0}"
    pack(load_config(PackConfig, CONFIGS / "pack.yaml", [*common, counts]))
    shards = sorted((storage / "tars" / "watched").glob("*.tar"))
    shards[-1].write_bytes(shards[-1].read_bytes()[: shards[-1].stat().st_size // 2])
    tars = f"input={storage}/tars/watched"
    embed(load_config(EmbedConfig, CONFIGS / "embed_vision.yaml", [*common, tars, "max_quarantine_fraction=1"]))
    time.sleep(RAY_REPORTS_S + 2 * SCRAPE_S)
    steps = ["mixture=null", "num_steps=200", "batch_samples=8", "log_every=5", "checkpoint_every=50"]
    train(load_config(TrainConfig, CONFIGS / "train_ar.yaml", [*common, *steps]))


def _ask() -> None:
    """Some pictures, an answer, and two mistakes of a client."""
    for seed in range(4):
        _post("/v1/images/generations", {"prompt": "a red circle", "seed": seed, "steps": 4})
        time.sleep(SCRAPE_S)
    _post("/v1/chat/completions", {"model": "nexusgen", "messages": [{"role": "user", "content": "Draw two stars."}]})
    _post("/v1/images/generations", {"prompt": 1})
    _post("/v1/nothing", {})


def _post(path: str, body: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{SERVE_PORT}{path}", json.dumps(body).encode(), headers)
    try:
        urllib.request.urlopen(request, timeout=300).read()
    except urllib.error.HTTPError as error:
        error.read()


def _check(report: Report, started: float) -> None:
    """Ask each query over the whole run."""
    for found in queries():
        if metric := re.fullmatch(r"label_values\((\w+), \w+\)", found.value):
            asked = [metric[1]]
        else:
            asked = list(sides(found.value.strip()))
        for query in asked:
            count = _count(query, started)
            is_excused = count == 0 and _may_be_silent(query, started)
            note = ", silent with cause" if is_excused else ""
            report.at_least(f"{found.where}: series of {' '.join(query.split())}{note}", count, 0 if is_excused else 1)
    rules = json.load(urllib.request.urlopen(f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/rules", timeout=30))
    states = [rule for group in rules["data"]["groups"] for rule in group["rules"]]
    report.at_most("rules that Prometheus calls unhealthy", sum(rule["health"] != "ok" for rule in states), 0)


def _count(query: str, started: float) -> int:
    return len(_query(query, started).get("data", {}).get("result", []))


def _may_be_silent(query: str, started: float) -> bool:
    """Whether a legal query without series has none for want of a cause, and not for a wrong metric or label."""
    metrics = metrics_of(query)
    known = exported_names() | rays_gauges() | PROMETHEUS | MAY_BE_SILENT
    if _query(query, started)["status"] != "success" or not metrics <= known:
        return False
    if metrics & MAY_BE_SILENT:
        return True
    any_value = re.sub(r'(\w+)(?:=~|!~|!=|=)"[^"]*"', r'\1=~".+"', query)
    return any_value != query and _count(any_value, started) > 0


def _query(query: str, started: float) -> dict[str, Any]:
    values = {"query": query, "start": started, "end": time.time(), "step": SCRAPE_S}
    url = f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/query_range?{urllib.parse.urlencode(values)}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def _keep_busy(seconds: float) -> None:
    """Ask for pictures now and then."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        _post("/v1/images/generations", {"prompt": "a blue star", "seed": 1, "steps": 4})
        time.sleep(2)


if __name__ == "__main__":
    sys.exit(main())
