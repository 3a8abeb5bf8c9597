"""Every image, command, port, variable, path and version that a manifest names exists; mistakes are found."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from manifests import CLUSTER, ROOT, kustomized
from references import (
    CHECKS,
    wrong_commands,
    wrong_files,
    wrong_images,
    wrong_names,
    wrong_object_stores,
    wrong_ports,
    wrong_programs,
    wrong_sizes,
    wrong_variables,
    wrong_versions,
)

from nexusgen.config import load_config
from pipelines.serve import ServeConfig, serve_config

Check = Callable[[Path], Iterator[str]]

MISTAKES = [
    (wrong_images, "compose.yaml", "nexusgen:0.1.0-cpu", "nexusgen:0.1.0-gpu", "0.1.0-gpu"),
    (wrong_images, "compose.yaml", "prom/prometheus:v3.7.3", "prom/prometheus:latest", "isn't pinned"),
    (wrong_images, "compose.yaml", "target: mlflow", "target: tracking", "target tracking"),
    (wrong_images, "Dockerfile", "python:3.11.14-slim-bookworm", "python:slim", "python:slim isn't pinned"),
    (wrong_images, "ray-up-aws.yaml", "nexusgen:0.1.0-cuda", "nexusgen:0.0.9-cuda", "0.0.9-cuda"),
    (wrong_commands, "compose.yaml", "--metrics-export-port=8080", "--metric-port=8080", "--metric-port"),
    (wrong_commands, "compose.yaml", "--artifacts-destination", "--artefacts-destination", "--artefacts-destination"),
    (wrong_commands, "compose.yaml", "ray, health-check", "ray, health", "no command health"),
    (wrong_commands, "kuberay/base/ray-job.yaml", "nexusgen train ", "nexusgen trian ", "trian"),
    (wrong_commands, "kuberay/base/ray-job.yaml", "train_ar.yaml", "train_arr.yaml", "train_arr.yaml"),
    (wrong_commands, "kuberay/base/ray-job.yaml", "storage=s3", "storrage=s3", "storrage"),
    (wrong_commands, "kuberay/base/ray-cluster.yaml", "num-cpus:", "num-cpu-cores:", "num-cpu-cores"),
    (wrong_ports, "compose.yaml", "127.0.0.1:8265:8265", "8265:8265:8265", "isn't bound to loopback"),
    (wrong_ports, "compose.yaml", "127.0.0.1:8000:8000", "127.0.0.1:8001:8001", "8001"),
    (wrong_ports, "compose.yaml", "http://mlflow:5000", "http://tracking:5000", "no service tracking"),
    (wrong_ports, "compose.yaml", "http://127.0.0.1:5000/health", "http://127.0.0.1:5001/health", "5001"),
    (wrong_ports, "prometheus/prometheus.yml", "port: 8080", "port: 9100", "9100"),
    (wrong_ports, "grafana/provisioning/datasources/prometheus.yaml", ":9090", ":9091", "9091"),
    (wrong_ports, "kuberay/base/network-policy.yaml", "port: 52365", "port: 52366", "52366"),
    (wrong_variables, "compose.yaml", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_URL", "MLFLOW_TRACKING_URL"),
    (wrong_variables, "compose.yaml", "POSTGRES_PASSWORD_FILE", "POSTGRES_PASS_FILE", "POSTGRES_PASS_FILE"),
    (wrong_variables, "secrets.sh", "NEXUSGEN_API_KEYS", "NEXUSGEN_API_KEY", "NEXUSGEN_API_KEY"),
    (wrong_variables, "ray-up-aws.yaml", "RAY_AUTH_MODE", "RAY_AUTHENTICATION", "RAY_AUTHENTICATION"),
    (wrong_variables, "kuberay/base/environment.yaml", "MLFLOW_TRACKING_URI", "MLFLOW_SERVER", "MLFLOW_SERVER"),
    (wrong_variables, "Dockerfile", "MLFLOW_ALLOW_PICKLE_", "MLFLOW_ALLOW_PICKLED_", "MLFLOW_ALLOW_PICKLED"),
    (wrong_files, "compose.yaml", "secrets/grafana_password", "secrets/grafana", "secrets/grafana"),
    (wrong_files, "compose.yaml", "./grafana/dashboards", "./grafana/boards", "./grafana/boards"),
    (wrong_files, "compose.yaml", "secrets: [api_key]", "secrets: [ray_token]", "secret api_key"),
    (wrong_files, "kuberay/base/ray-job.yaml", "name: nexusgen-environment", "name: nexusgen-env", "nexusgen-env"),
    (wrong_versions, "secrets.sh", "postgresql+psycopg2://", "postgresql://", "by psycopg,"),
    (wrong_names, "kuberay/base/ray-service.yaml", "name: nexusgen-api", "name: nexusgen", "both make the service"),
    (wrong_names, "README.md", "service/nexusgen-api-serve-svc", "service/nexusgen-serve-svc", "nexusgen-serve-svc"),
    (wrong_names, "README.md", "get secret nexusgen ", "get secret nexusgen-api ", "no cluster nexusgen-api"),
    (wrong_programs, "Dockerfile", "openssh-client rsync wget", "openssh-client wget", "calls rsync"),
    (wrong_programs, "Dockerfile", "openssh-client rsync wget", "rsync wget", "calls ssh"),
    (wrong_sizes, "ray-up-aws.yaml", "max_workers: 8 #", "max_workers: 4 #", "embed_vision.yaml needs 72"),
    (
        wrong_sizes,
        "kuberay/overlays/gpu/kustomization.yaml",
        "maxReplicas, value: 8",
        "maxReplicas, value: 4",
        "48 CPUs",
    ),
    (
        wrong_object_stores,
        "compose.yaml",
        "--object-store-memory=1900000000",
        "",
        "compose ray-head: no object-store-memory",
    ),
    (wrong_object_stores, "kuberay/base/ray-job.yaml", '"1900000000"', '"4000000000"', "cpu-smoke RayJob workers"),
    (
        wrong_object_stores,
        "kuberay/overlays/gpu/kustomization.yaml",
        '"15000000000"',
        '"18000000000"',
        "gpu RayCluster",
    ),
    (wrong_object_stores, "ray-up-aws.yaml", "--shm-size=16g", "--shm-size=8g", "ray up worker_start"),
    (wrong_versions, "kuberay/base/ray-service.yaml", "rayVersion: 2.60.0", "rayVersion: 2.59.0", "2.59.0"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_manifests_name_exists(check: Check) -> None:
    assert list(check(CLUSTER)) == []


@pytest.mark.parametrize(("check", "file", "right", "wrong", "told"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistake_is_found(check: Check, file: str, right: str, wrong: str, told: str, tmp_path: Path) -> None:
    copy = tmp_path / "cluster"
    shutil.copytree(CLUSTER, copy, ignore=shutil.ignore_patterns("secrets"))
    text = (copy / file).read_text()
    assert right in text
    (copy / file).write_text(text.replace(right, wrong))
    problems = list(check(copy))
    assert any(told in problem for problem in problems), problems


def test_serve_configurations_are_what_the_command_writes() -> None:
    """`nexusgen serve jobs/configs/demo/serve.yaml ... --write-serve-config`, as the files say."""
    gpu = [f"{part}={{cpus: 4, gpus: 1}}" for part in ("ar", "generation_decoder", "editing_decoder")]
    overrides = {
        "cpu-smoke": ["storage=s3://nexusgen/demo", "host=0.0.0.0"],
        "gpu": ["storage=s3://bucket/nexusgen", "name=train", "host=0.0.0.0", *gpu],
    }
    for overlay, given in overrides.items():
        config = load_config(ServeConfig, ROOT / "jobs" / "configs" / "demo" / "serve.yaml", given)
        service = next(resource for resource in kustomized(overlay) if resource["kind"] == "RayService")
        assert yaml.safe_load(service["spec"]["serveConfigV2"]) == yaml.safe_load(serve_config(config))
