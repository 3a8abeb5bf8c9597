"""A cluster whose autoscaler starts nodes, really: Ray's own provider for tests, whose nodes are processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from ray._private.services import get_node_ip_address as node_ip_address
from ray_nodes import Nodes

from pipelines import autoscaling

GRANTED = """
import sys
from pipelines import autoscaling, runtime

runtime.JOIN_PATIENCE_S, autoscaling.HOLD_S = float(sys.argv[1]), 1
with runtime.ray_cluster(4, "the job") as cluster:
    print("has", cluster.free_cpus)
"""
REFUSED = """
import json, sys, threading, time
from nexusgen.errors import ResourceError
from pipelines import runtime

def requested():
    from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
    from ray.experimental.internal_kv import _internal_kv_get
    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL))

def watch():
    time.sleep(2)
    seen.append(len(requested()))

seen = []
runtime.JOIN_PATIENCE_S = float(sys.argv[1])
with runtime.ray_cluster(0, "nothing yet"):
    threading.Thread(target=watch).start()
    try:
        runtime.require_cpus(5, "the job")
    except ResourceError as error:
        print(error)
    print(f"asked for {seen[0]}, then for {requested()}")
"""


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head without CPUs, and up to two workers of 2 CPUs, which go after 6 idle seconds."""
    folder = tmp_path_factory.mktemp("growing")
    made = Nodes(folder, {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"})
    config = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 20,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{node_ip_address()}:{made.port}",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 2, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "head_node_type": "ray.head.default",
        **{key: {} for key in ("auth", "docker", "file_mounts", "head_node", "worker_nodes")},
        **{key: [] for key in ("initialization_commands", "setup_commands", "head_setup_commands")},
        **{key: [] for key in ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }
    (folder / "autoscaling.json").write_text(json.dumps(config))
    try:
        made.start_head(f"--autoscaling-config={folder / 'autoscaling.json'}")
        yield made
    finally:
        made.close()


def drive(growing: Nodes, program: str, patience_s: float) -> tuple[str, str]:
    """What a submitted job prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_ADDRESS": f"127.0.0.1:{growing.port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(growing.token_path),
        "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}",
    }
    words = [sys.executable, "-c", program, str(patience_s)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.mark.nodes
@pytest.mark.timeout(900)
def test_a_submitted_job_brings_up_the_nodes_it_needs_and_lets_them_go(growing: Nodes) -> None:
    assert growing.num_alive() == 1
    out, err = drive(growing, GRANTED, 150)
    assert out == "has 4.0\n", err[-3000:]
    assert "the job needs 4 CPUs, 0 of the cluster's 0 are free: asking for more, waiting 150 s" in err
    deadline = time.monotonic() + 200
    while growing.num_alive() > 1:
        assert time.monotonic() < deadline, "the request was left behind, and holds nodes without work"
        time.sleep(1)


@pytest.mark.nodes
@pytest.mark.timeout(900)
def test_what_never_comes_is_refused_with_the_numbers_and_holds_nothing(growing: Nodes) -> None:
    out, err = drive(growing, REFUSED, 5)
    assert "asking for more, waiting 5 s" in err
    assert out.startswith("the job needs 5 CPUs, but only ")
    assert out.endswith("asked for 5, then for []\n")


def test_a_request_that_wasnt_made_is_not_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job's would be, as a cluster has one."""
    asked: list[object] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda **words: asked.append(words))
    request = autoscaling.CpuRequest()
    request.take_back()
    assert asked == []
    request.make(2.5)
    request.take_back()
    request.take_back()
    assert asked == [{"num_cpus": 3}, {"bundles": []}]
