"""What stands in the manifests of a folder like `cluster/`, for the tests that look at it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
OVERLAYS = ("cpu-smoke", "gpu")
CLUSTER_SPECS = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}


@dataclass(frozen=True)
class Found:
    """Something that a manifest names, and where."""

    value: Any
    where: str


def compose(cluster: Path = CLUSTER) -> dict[str, Any]:
    """compose.yaml, with its merge keys resolved."""
    return yaml.safe_load((cluster / "compose.yaml").read_text())


def ray_up(cluster: Path = CLUSTER) -> dict[str, Any]:
    """The configuration of `ray up`."""
    return yaml.safe_load((cluster / "ray-up-aws.yaml").read_text())


def kustomized(overlay: str, cluster: Path = CLUSTER) -> list[dict[str, Any]]:
    """What kustomize makes of the three features that the overlays use: resources, images, and JSON patches by kind.

    `test_kustomize_makes_what_the_tests_take_it_for` holds it against kustomize itself.
    """
    folder = cluster / "kuberay" / "overlays" / overlay
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    base = folder / settings["resources"][0]
    base_settings = yaml.safe_load((base / "kustomization.yaml").read_text())
    # Through JSON, as YAML's anchors give the same object twice, and a patch is of one place.
    read = [yaml.safe_load((base / name).read_text()) for name in base_settings["resources"]]
    documents: list[dict[str, Any]] = json.loads(json.dumps(read))
    images = {image["name"]: f"{image['newName']}:{image['newTag']}" for image in settings["images"]}
    for document in documents:
        document["metadata"]["namespace"] = base_settings["namespace"]
        for patch in settings["patches"]:
            if patch["target"] == {"kind": document["kind"]}:
                for operation in yaml.safe_load(patch["patch"]):
                    _apply(document, **operation)
        for pod in pods(document):
            for container in pod["spec"]["containers"]:
                container["image"] = images.get(container["image"], container["image"])
    return documents


def _apply(document: Any, op: str, path: str, value: Any) -> None:
    *parents, last = path.strip("/").split("/")
    for part in parents:
        document = document[int(part) if isinstance(document, list) else part.replace("~1", "/")]
    key = int(last) if isinstance(document, list) else last
    if op == "replace":
        assert isinstance(document, list) or key in document, f"{path} isn't there to be replaced"
    document[key] = value


def cluster_spec(resource: Mapping[str, Any]) -> dict[str, Any]:
    """The RayCluster part of one of KubeRay's resources."""
    spec = resource["spec"]
    for key in CLUSTER_SPECS[resource["kind"]]:
        spec = spec[key]
    return spec


def groups(resource: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Head and workers of one of KubeRay's resources."""
    spec = cluster_spec(resource)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods(resource: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All pod templates of a resource; none of one that isn't KubeRay's."""
    if resource["kind"] not in CLUSTER_SPECS:
        return []
    submitter = resource["spec"].get("submitterPodTemplate")
    return [group["template"] for group in groups(resource)] + ([submitter] if submitter else [])


def images(cluster: Path = CLUSTER) -> Iterator[Found]:
    """All images that are run or built upon."""
    for name, service in compose(cluster)["services"].items():
        yield Found(service["image"], f"compose {name}")
    yield Found(ray_up(cluster)["docker"]["image"], "ray up")
    for overlay in OVERLAYS:
        for resource in kustomized(overlay, cluster):
            for pod in pods(resource):
                for container in pod["spec"]["containers"]:
                    yield Found(container["image"], f"{overlay} {resource['kind']} {container['name']}")
    for base in stages(cluster).values():
        yield Found(base, "Dockerfile")


def stages(cluster: Path = CLUSTER) -> dict[str, str]:
    """Names of the Dockerfile's stages, and the image from outside that each is built upon in the end."""
    text = (cluster / "Dockerfile").read_text()
    by_name = {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", text, re.M)}

    def origin(base: str) -> str:
        return origin(by_name[base]) if base in by_name else base

    return {name: origin(base) for name, base in by_name.items()}


def commands(cluster: Path = CLUSTER) -> Iterator[Found]:
    """All commands, as lists of words. A compose command given as a text is cut as a shell would."""
    for name, service in compose(cluster)["services"].items():
        for key in ("command", "healthcheck"):
            value = service.get(key, [])
            value = value["test"] if isinstance(value, dict) else value
            words = shlex.split(value) if isinstance(value, str) else list(value)
            if words:
                yield Found(words[1:] if words[0] == "CMD" else words, f"compose {name} {key}")
    config = ray_up(cluster)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[key]:
            yield Found(shlex.split(command), f"ray up {key}")
    for overlay in OVERLAYS:
        for resource in kustomized(overlay, cluster):
            where = f"{overlay} {resource['kind']}"
            if resource["kind"] == "RayJob":
                yield Found(shlex.split(resource["spec"]["entrypoint"]), where)
            for group in groups(resource) if resource["kind"] in CLUSTER_SPECS else []:
                options = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
                yield Found(["ray", "start", *options], f"{where} rayStartParams")
            for pod in pods(resource):
                for container in pod["spec"]["containers"]:
                    if "readinessProbe" in container:
                        yield Found(container["readinessProbe"]["exec"]["command"], f"{where} readinessProbe")


def variables(cluster: Path = CLUSTER) -> Iterator[Found]:
    """Names of all environment variables that are set, with the image that is to know them."""
    made = made_secrets(cluster)
    for name, service in compose(cluster)["services"].items():
        listed = list(service.get("environment", {}))
        for entry in service.get("env_file", []):
            listed += [line.partition("=")[0] for line in made[entry["path"]].splitlines()]
        for variable in listed:
            yield Found((variable, service["image"]), f"compose {name}")
    docker = ray_up(cluster)["docker"]
    for option in docker["run_options"]:
        if found := re.match(r"-e (\w+)=", option):
            yield Found((found[1], docker["image"]), "ray up")
    for lines in re.findall(r"^ENV ((?:.*\\\n)*.*)$", (cluster / "Dockerfile").read_text(), re.M):
        for variable in re.findall(r"\b([A-Z][A-Z0-9_]+)=", lines):
            yield Found((variable, "nexusgen"), "Dockerfile")
    for overlay in OVERLAYS:
        for resource in kustomized(overlay, cluster):
            if resource["kind"] == "ConfigMap":
                for name in resource["data"]:
                    yield Found((name, "nexusgen"), f"{overlay} ConfigMap")
            if resource["kind"] == "RayJob":
                for name in yaml.safe_load(resource["spec"]["runtimeEnvYAML"])["env_vars"]:
                    yield Found((name, "nexusgen"), f"{overlay} RayJob")


def made_secrets(cluster: Path = CLUSTER) -> dict[str, str]:
    """What secrets.sh makes: contents by the paths that compose.yaml gives them."""
    return _run_secrets((cluster / "secrets.sh").read_text())


@lru_cache
def _run_secrets(script: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "secrets"
        subprocess.run(["bash", "-s", place], input=script, text=True, check=True, capture_output=True, timeout=60)
        return {f"secrets/{path.name}": path.read_text() for path in place.iterdir()}
