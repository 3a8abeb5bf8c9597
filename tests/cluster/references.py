"""What the manifests name must exist. Each function gives the problems of a folder like `cluster/`, one text each."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import click
import manifests
import ray
import yaml
from manifests import CLUSTER, OVERLAYS, ROOT
from ray._private import ray_constants
from sqlalchemy.engine import make_url

from jobs import cli
from nexusgen import __version__
from nexusgen.config import load_config
from nexusgen.errors import ConfigError
from pipelines import embed

# Ports that a program listens on of itself: no option of ours names them.
OWN_PORTS = {"postgres": 5432, "prometheus": 9090, "grafana": 3000}
# Variables that the images of others read, from their documentation; ours are looked up in source.
OTHERS_VARIABLES = {
    "postgres": {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD_FILE"},
    "grafana/grafana": {
        "GF_SECURITY_ADMIN_PASSWORD__FILE",
        "GF_ANALYTICS_REPORTING_ENABLED",
        "GF_ANALYTICS_CHECK_FOR_UPDATES",
    },
}
PIPS_AND_PYTHONS = {"PIP_NO_CACHE_DIR", "PIP_DISABLE_PIP_VERSION_CHECK", "PIP_ROOT_USER_ACTION", "PYTHONUNBUFFERED"}
CPUS = {"m7i.4xlarge": 16}  # of AWS's instances
KUBERAY_PORTS = {"dashboard": 8265, "agent": ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT, "gcs": 6379}


def wrong_images(cluster: Path = CLUSTER) -> Iterator[str]:
    """Ours have the version and a target of the Dockerfile, those of others a version."""
    targets = manifests.stages(cluster)
    for found in manifests.images(cluster):
        name, _, tag = found.value.rpartition(":")
        ours = name.rpartition("/")[2]
        if ours == "nexusgen":
            version, _, target = tag.rpartition("-")
            if version != __version__ or target not in targets:
                yield f"{found.where}: image {found.value}, wanted {__version__}-TARGET, TARGET of {sorted(targets)}"
        elif ours == "nexusgen-mlflow":
            if tag != __version__:
                yield f"{found.where}: image {found.value}, wanted the version {__version__}"
        elif not re.match(r"v?\d+\.\d+", tag):
            yield f"{found.where}: image {found.value} isn't pinned to a version"
    for service, values in manifests.compose(cluster)["services"].items():
        target = values.get("build", {}).get("target")
        if target is not None and target not in targets:
            yield f"compose {service}: target {target} isn't a stage of the Dockerfile"


def wrong_commands(cluster: Path = CLUSTER) -> Iterator[str]:
    """Every command is parsed by the program that it calls; configurations are read, with their overrides."""
    for found in manifests.commands(cluster):
        for problem in wrong_words(found.value):
            yield f"{found.where}: {problem}"


def wrong_words(words: Sequence[str]) -> Iterator[str]:
    """Problems of one command, as words."""
    program, *rest = words
    parse = {"nexusgen": _parse_nexusgen, "ray": _parse_ray, "serve": _parse_serve, "mlflow": _parse_mlflow}
    if program in parse:
        if problem := parse[program](rest):
            yield f"{shlex.join(words)}: {problem}"
    elif program == "python":
        if rest[0] == "-c":
            compile(rest[1], "manifest", "exec")
    elif program not in ("wget", "pg_isready", "server") and not program.startswith("--"):
        yield f"{shlex.join(words)}: nothing is known of {program}"


def _parse_nexusgen(words: list[str]) -> str | None:
    words = [word.replace("/app/", f"{ROOT}/") if word.startswith("/app/jobs/") else word for word in words]
    if words == ["--version"]:
        return None
    parser = argparse.ArgumentParser(prog="nexusgen", exit_on_error=False)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in cli.COMMANDS:
        command.add_arguments(subparsers.add_parser(command.NAME, exit_on_error=False))
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            arguments, extra = parser.parse_known_args(words)
    except (argparse.ArgumentError, SystemExit) as error:
        return f"{error} {told.getvalue()}"
    overrides = [*getattr(arguments, "overrides", []), *(word for word in extra if "=" in word)]
    if unknown := [word for word in extra if "=" not in word or word.startswith("-")]:
        return f"unrecognized arguments: {unknown}"
    job = getattr(arguments, "job", arguments.command)
    if job not in config_classes() or not hasattr(arguments, "config"):
        return None
    path = Path(arguments.config)
    try:
        load_config(config_classes()[job], path if path.is_absolute() else ROOT / path, overrides)
    except ConfigError as error:
        return str(error)
    return None


@lru_cache
def config_classes() -> dict[str, type]:
    """The configuration class of each job that has one of its own."""
    from pipelines.embed import EmbedConfig
    from pipelines.evaluate import EvaluateConfig
    from pipelines.pack import PackConfig
    from pipelines.register import RegisterConfig
    from pipelines.serve import ServeConfig
    from pipelines.train import TrainConfig

    return {
        "embed": EmbedConfig,
        "evaluate": EvaluateConfig,
        "pack": PackConfig,
        "register": RegisterConfig,
        "serve": ServeConfig,
        "train": TrainConfig,
    }


def _parse_ray(words: list[str]) -> str | None:
    from ray.scripts.scripts import cli as ray_cli

    return _parse_click(ray_cli, words)


def _parse_serve(words: list[str]) -> str | None:
    from ray.serve.scripts import cli as serve_cli

    return _parse_click(serve_cli, words)


def _parse_mlflow(words: list[str]) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own annotations, when it is imported
        from mlflow.cli import cli as mlflow_cli

    return _parse_click(mlflow_cli, words)


def _parse_click(group: click.Group, words: list[str]) -> str | None:
    command: click.Command = group
    while isinstance(command, click.Group):
        name = words.pop(0)
        known = command.get_command(click.Context(command), name)
        if known is None:
            return f"no command {name}"
        command = known
    context = click.Context(command, info_name=command.name)
    try:
        command.make_parser(context).parse_args(list(words))
    except click.UsageError as error:
        return error.format_message()
    return None


def wrong_ports(cluster: Path = CLUSTER) -> Iterator[str]:
    """Published ports are bound to loopback and listened on; addresses name a service and a port of it."""
    services = manifests.compose(cluster)["services"]
    listened = {name: _listened(name, values) for name, values in services.items()}
    for name, values in services.items():
        for entry in values.get("ports", []):
            host, outside, inside = entry.split(":")
            if host != "127.0.0.1":
                yield f"compose {name}: port {entry} isn't bound to loopback alone"
            if int(inside) not in listened[name] or outside != inside:
                yield f"compose {name}: port {entry}, but it listens on {sorted(listened[name])}"
        texts = [str(value) for value in values.get("environment", {}).values()]
        texts += shlex.split(values["command"]) if isinstance(values.get("command"), str) else []
        for text in texts:
            yield from _wrong_address(f"compose {name}", text, listened)
        for text in values.get("healthcheck", {}).get("test", []):
            if text.startswith("http") and urlsplit(text).port not in listened[name]:
                yield f"compose {name}: its health is asked at {text}, but it listens on {sorted(listened[name])}"
    for path in ("secrets/mlflow.env",):
        for line in manifests.made_secrets(cluster)[path].splitlines():
            yield from _wrong_address(path, line.partition("=")[2], listened)
    scraped = yaml.safe_load((cluster / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    for config in scraped:
        targets = [target for static in config.get("static_configs", []) for target in static["targets"]]
        targets += [f"{name}:{dns['port']}" for dns in config.get("dns_sd_configs", []) for name in dns["names"]]
        for target in targets:
            yield from _wrong_address(f"prometheus {config['job_name']}", f"http://{target}", listened)
    for path in (cluster / "grafana" / "provisioning" / "datasources").glob("*.yaml"):
        for source in yaml.safe_load(path.read_text())["datasources"]:
            yield from _wrong_address(f"grafana {source['name']}", source["url"], listened)
    yield from _wrong_policy(cluster)


def _listened(name: str, values: dict[str, object]) -> set[int]:
    command = str(values.get("command", ""))
    ports = {int(port) for port in re.findall(r"port[= ](\d+)", command)}
    if "--head" in command:
        ports |= {ray_constants.DEFAULT_DASHBOARD_PORT, _serve_port()}
    return ports | ({OWN_PORTS[name]} if name in OWN_PORTS else set())


def _serve_port() -> int:
    return int(yaml.safe_load((ROOT / "jobs" / "configs" / "demo" / "serve.yaml").read_text())["port"])


def _wrong_address(where: str, text: str, listened: dict[str, set[int]]) -> Iterator[str]:
    """Of a URL, or of HOST:PORT or an option with either."""
    candidates = re.findall(r"(?:://(?:[^@/]*@)?|^|=)([a-z][a-z-]+):(\d{2,5})\b", text)
    for host, port in candidates:
        if host in ("localhost",):
            continue
        if host not in listened:
            yield f"{where}: {text}: there is no service {host}"
        elif int(port) not in listened[host]:
            yield f"{where}: {text}: {host} listens on {sorted(listened[host])}"


def _wrong_policy(cluster: Path) -> Iterator[str]:
    """The network policy lets through ports that containers have, or that KubeRay asks."""
    for overlay in OVERLAYS:
        resources = manifests.kustomized(overlay, cluster)
        containers = [
            c for resource in resources for pod in manifests.pods(resource) for c in pod["spec"]["containers"]
        ]
        known = {port["containerPort"] for c in containers for port in c.get("ports", [])} | set(KUBERAY_PORTS.values())
        for resource in resources:
            if resource["kind"] == "NetworkPolicy":
                for rule in resource["spec"]["ingress"]:
                    for port in rule.get("ports", []):
                        if port["port"] not in known:
                            yield f"{overlay} network policy: nothing listens on {port['port']}"
            if resource["kind"] == "RayService":
                port = yaml.safe_load(resource["spec"]["serveConfigV2"])["http_options"]["port"]
                if port not in known:
                    yield f"{overlay} RayService: port {port} isn't a port of a container"


def wrong_variables(cluster: Path = CLUSTER) -> Iterator[str]:
    """Each variable is read somewhere: in our source, Ray's, MLflow's, botocore's, or by the image that gets it."""
    for found in manifests.variables(cluster):
        variable, image = found.value
        name = image.rpartition(":")[0] or image
        if name in OTHERS_VARIABLES:
            is_known = variable in OTHERS_VARIABLES[name]
        else:
            is_known = variable in PIPS_AND_PYTHONS or is_read(variable)
        if not is_known:
            yield f"{found.where}: nothing reads the variable {variable}"


def is_read(variable: str) -> bool:
    """Whether a source that runs in our image names the variable."""
    return re.search(rf"\b{variable}\b", _sources()) is not None


@lru_cache
def _sources() -> str:
    """Where our own modules, Ray, MLflow and botocore read their environment."""
    packages = Path(ray.__file__).parents[1]
    patterns = (
        "ray/_private/ray_constants.py",
        "ray/_private/authentication/*.py",
        "ray/_private/runtime_env/image_uri.py",
        "ray/_private/usage/*.py",
        "ray/serve/_private/constants.py",
        "ray/dashboard/modules/metrics/metrics_head.py",
        "ray/dashboard/modules/job/job_supervisor.py",
        "mlflow/environment_variables.py",
        "mlflow/cli/__init__.py",
        "botocore/configprovider.py",
        "botocore/credentials.py",
    )
    paths = [path for pattern in patterns for path in packages.glob(pattern)]
    return "\n".join(path.read_text() for path in [*paths, *(ROOT / "pipelines").glob("*.py")])


def wrong_files(cluster: Path = CLUSTER) -> Iterator[str]:
    """Files that are mounted exist or are made by secrets.sh; secrets that are read are given to who reads them."""
    composed = manifests.compose(cluster)
    made = manifests.made_secrets(cluster)
    for name, secret in composed["secrets"].items():
        if secret["file"] not in made:
            yield f"compose secret {name}: secrets.sh makes no {secret['file']}"
    for name, values in composed["services"].items():
        for entry in values.get("env_file", []):
            if entry["path"] not in made:
                yield f"compose {name}: secrets.sh makes no {entry['path']}"
        for volume in values.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith(".") and not (cluster / source).exists():
                yield f"compose {name}: {source} doesn't exist"
            elif not source.startswith(".") and source not in composed["volumes"]:
                yield f"compose {name}: no volume {source}"
        texts = [str(values.get("command", "")), *map(str, values.get("environment", {}).values())]
        if name == "prometheus":
            texts.append((cluster / "prometheus" / "prometheus.yml").read_text())
        for secret in re.findall(r"/run/secrets/(\w+)", "\n".join(texts)):
            if secret not in values.get("secrets", []):
                yield f"compose {name}: reads the secret {secret}, which it isn't given"
    prometheus = (cluster / "prometheus" / "prometheus.yml").read_text()
    for path in re.findall(r"/etc/prometheus/([\w.]+)", prometheus):
        if not (cluster / "prometheus" / path).exists():
            yield f"prometheus.yml: {path} doesn't exist"
    for overlay in OVERLAYS:
        resources = manifests.kustomized(overlay, cluster)
        maps = {resource["metadata"]["name"] for resource in resources if resource["kind"] == "ConfigMap"}
        for resource in resources:
            for pod in manifests.pods(resource):
                for container in pod["spec"]["containers"]:
                    for source in container.get("envFrom", []):
                        reference = source.get("configMapRef")
                        if reference and reference["name"] not in maps:
                            yield f"{overlay} {resource['kind']}: no ConfigMap {reference['name']}"


def wrong_versions(cluster: Path = CLUSTER) -> Iterator[str]:
    """Ray's version in the manifests is the one that is installed, and so is the database's driver in its image."""
    database = manifests.made_secrets(cluster)["secrets/mlflow.env"].partition("MLFLOW_BACKEND_STORE_URI=")[2].strip()
    driver = make_url(database).get_driver_name()
    if not re.search(rf"\b{driver}\b", (cluster / "Dockerfile").read_text()):
        yield f"secrets/mlflow.env: SQLAlchemy opens this URI by {driver}, which the Dockerfile doesn't install"
    for overlay in OVERLAYS:
        for resource in manifests.kustomized(overlay, cluster):
            if resource["kind"] in manifests.CLUSTER_SPECS:
                version = manifests.cluster_spec(resource)["rayVersion"]
                if version != ray.__version__:
                    yield f"{overlay} {resource['kind']}: rayVersion {version}, installed is {ray.__version__}"


def wrong_programs(cluster: Path = CLUSTER) -> Iterator[str]:
    """The image has the programs that others call in it: KubeRay's probes, and Ray's launcher on head and workers."""
    listed = re.findall(r"--no-install-recommends (.*) \\\n", (cluster / "Dockerfile").read_text())
    installed = set(" ".join(listed).split())
    called = {"wget": "KubeRay's probes"}
    launcher = (Path(ray.__file__).parent / "autoscaler" / "_private" / "command_runner.py").read_text()
    for program, package in (("rsync", "rsync"), ("ssh", "openssh-client")):
        if f'["{program}"' in launcher and "docker" in manifests.ray_up(cluster):
            called[package] = f"the launcher of `ray up`, which calls {program}"
    for package in sorted(called.keys() - installed):
        yield f"Dockerfile: doesn't install {package}, for {called[package]}"


def wrong_names(cluster: Path = CLUSTER) -> Iterator[str]:
    """No two resources make a service of the same name, and services and secrets that the runbook names exist."""
    runbook = (cluster / "README.md").read_text()
    for overlay in OVERLAYS:
        made: dict[str, str] = {}
        tokens: set[str] = set()
        for resource in manifests.kustomized(overlay, cluster):
            kind, name = resource["kind"], resource["metadata"]["name"]
            suffixes = {"RayCluster": ("head",), "RayService": ("head", "serve")}.get(kind, ())
            for service in (f"{name}-{suffix}-svc" for suffix in suffixes):
                if service in made:
                    yield f"{overlay}: {made[service]} and {kind} {name} both make the service {service}"
                made[service] = f"{kind} {name}"
            if kind == "RayCluster":
                tokens.add(name)
        for service in re.findall(r"\bservice/([\w-]+)", runbook):
            if service not in made:
                yield f"README.md: {overlay} has no service {service}"
        for secret in re.findall(r"\bget secret ([\w-]+)", runbook):
            if secret not in tokens:
                yield f"README.md: {overlay} has no cluster {secret} whose token that would be"


def wrong_sizes(cluster: Path = CLUSTER) -> Iterator[str]:
    """What autoscalers may start has the CPUs of every full-size job, which would wait in vain for more."""
    needed = {path.name: _cpus_needed(path) for path in sorted((ROOT / "jobs" / "configs" / "7b").glob("*.yaml"))}
    kinds = manifests.ray_up(cluster)["available_node_types"]
    # Nodes without GPUs are preferred; those with one come when an actor asks for it.
    sizes = {"ray up": CPUS[kinds["cpu"]["node_config"]["InstanceType"]] * kinds["cpu"]["max_workers"]}
    for resource in manifests.kustomized("gpu", cluster):
        if resource["kind"] == "RayCluster":
            workers = manifests.groups(resource)[1:]
            sizes["gpu RayCluster"] = sum(
                int(one["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]) * one["maxReplicas"]
                for one in workers
            )
    if kinds["cpu"]["max_workers"] + kinds["gpu"]["max_workers"] > manifests.ray_up(cluster)["max_workers"]:
        yield "ray up: max_workers is below what its node types allow together"
    for where, size in sizes.items():
        for name, cpus in needed.items():
            if cpus > size:
                yield f"{where}: {size} CPUs at most, but {name} needs {cpus:g}"


def _cpus_needed(path: Path) -> float:
    """As the job itself reckons, of an embedding or a training with all its readers; 0 for anything else."""
    values = yaml.safe_load(path.read_text())
    if "num_encoders" in values:
        return values["num_readers"] * embed.READER_CPUS + values["num_encoders"] * values.get("decode_threads", 1)
    workers = values.get("num_workers", 0)
    return float(max(workers) if isinstance(workers, list) else workers) * values.get("cpus_per_worker", 1)


def wrong_object_stores(cluster: Path = CLUSTER) -> Iterator[str]:
    """Each node's object store has a size, and fits its /dev/shm: Ray takes the disk for one that doesn't."""
    found: list[tuple[str, str | None, str]] = []
    for name, values in manifests.compose(cluster)["services"].items():
        command = str(values.get("command", ""))
        if command.startswith("ray start"):
            found.append((f"compose {name}", _option(command), values["shm_size"]))
    config = manifests.ray_up(cluster)
    (room,) = (option.partition("=")[2] for option in config["docker"]["run_options"] if "--shm-size" in option)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        found += [(f"ray up {key}", _option(command), room) for command in config[key]]
    for overlay in OVERLAYS:
        for resource in manifests.kustomized(overlay, cluster):
            for group in manifests.groups(resource) if resource["kind"] in manifests.CLUSTER_SPECS else []:
                (shm,) = (one for one in group["template"]["spec"]["volumes"] if one["name"] == "shm")
                where = f"{overlay} {resource['kind']} {group.get('groupName', 'head')}"
                size = group["rayStartParams"].get("object-store-memory")
                found.append((where, size, shm["emptyDir"]["sizeLimit"]))
    for where, size, room in found:
        amount, unit = re.fullmatch(r"(\d+)(\D+)", room).groups()  # type: ignore[union-attr]
        limit = int(amount) << {"g": 30, "m": 20}[unit[0].lower()]
        if size is None:
            yield f"{where}: no object-store-memory, so Ray takes 30 % of the memory, whatever /dev/shm has"
        elif int(size) > 0.95 * limit:
            yield f"{where}: object-store-memory {size}, wanted at most 95 % of the {room} of /dev/shm"


def _option(command: str) -> str | None:
    given = re.search(r"--object-store-memory=(\d+)", command)
    return given[1] if given else None


CHECKS = (
    wrong_images,
    wrong_commands,
    wrong_ports,
    wrong_variables,
    wrong_files,
    wrong_versions,
    wrong_names,
    wrong_programs,
    wrong_sizes,
    wrong_object_stores,
)
