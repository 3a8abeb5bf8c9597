"""Versions and aliases on a random tiny base; one test walks from a version to its tars with MLflow's client alone."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from servers import free_port, mlflow_server, s3_server

from nexusgen.errors import ConfigError, FingerprintError, GateError, InputError, ModelError, UsageError
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import load_model, start_editing_decoder
from nexusgen.statistics import mean_of_groups_interval
from pipelines import checkpoint, tracking
from pipelines.promote import PromoteConfig, promote
from pipelines.register import RegisterConfig, register
from pipelines.registry import attach_scores, measures_uri, resolve_model, root_base, scores_uri
from pipelines.storage import write_json

pytestmark = pytest.mark.usefixtures("no_server")
NAME = "shapes"
TAR_DIGESTS = {"/data/a.tar": "a" * 64, "/data/b.tar": "b" * 64}


def train_by_hand(storage: str, base: Path, stage: str, inputs: list[checkpoint.DataInput], shift: float) -> str:
    """A stage's MLflow run and checkpoint, as `train` leaves them; the weights are the base's, shifted."""
    with tracking.job_run(storage, NAME, "train", f"name: {NAME}\n", stage=stage) as run:
        for data in inputs:
            run.log_dataset_input(data.name, data.uri, data.digest, run_id=data.run_id)
    model = load_model(base)
    assert model.autoregressive is not None
    modules = {
        "ar": model.autoregressive,
        "generation_decoder": model.generation_decoder,
        "editing_decoder": start_editing_decoder(base).editing_decoder,
    }
    module = modules[stage]
    assert module is not None
    with torch.no_grad():
        model.autoregressive.vision_head.weight += shift
    meta = checkpoint.Meta(
        stage=stage,
        step=5,
        num_steps=5,
        run_id=run.run_id,
        seed=0,
        plan_digest="p",
        world_size=1,
        config={},
        base_fingerprint=model.manifest.fingerprint,
        inputs=tuple(inputs),
        num_samples=10,
        loss_first=2.0,
        loss_last=1.0,
        validation={},
    )
    saver = checkpoint.Saver(checkpoint.stage_folder(storage, NAME, stage), 0, 1, 1)
    saver.save(module, torch.optim.SGD(module.parameters()), None, meta)
    saver.close()
    return run.run_id


def road_by_hand(storage: str, base: Path, shift: float = 0.0) -> dict[str, str]:
    """The runs of embed and train, and two checkpoints. Returns the stages' run ids."""
    with tracking.job_run(storage, NAME, "embed", f"name: {NAME}\n") as embed:
        for uri, digest in TAR_DIGESTS.items():
            embed.log_dataset_input(uri.rpartition("/")[2], uri, digest, context="embed")
    vision = checkpoint.DataInput(name="shapes/vision", uri="/embedded", digest="e" * 64, run_id=embed.run_id)
    return {
        "ar": train_by_hand(storage, base, "ar", [vision], shift),
        "generation_decoder": train_by_hand(storage, base, "generation_decoder", [vision], shift),
    }


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[str, dict[str, str]]:
    """A storage with one registered version, and the run ids of its stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        storage = str(tmp_path_factory.mktemp("storage"))
        stage_runs = road_by_hand(storage, base)
        report = register(RegisterConfig(storage=storage, name=NAME, model=str(base)))
    assert (report.job, report.reused, report.outputs["version"]) == ("register", False, 1)
    return storage, stage_runs


def score(
    storage: str, fingerprint: str, overall: float, n: int = 572, editing: float = 0.4, understanding: float = 0.9
) -> None:
    """What `evaluate` leaves behind."""
    generation = {"overall": overall, "explicit_strict": 0.5}
    scores = {
        "n": n,
        "generation": generation,
        "editing": {"strict": editing},
        "understanding": {"overall": understanding},
    }
    shares = {
        "generation/overall": overall,
        "generation/explicit_strict": 0.5,
        "editing/strict": editing,
        "understanding/overall": understanding,
    }
    measures = {name: [[1.0] * round(100 * share) + [0.0] * round(100 * (1 - share))] for name, share in shares.items()}
    intervals = {name: mean_of_groups_interval(groups).to_json() for name, groups in measures.items()}
    made = {"fingerprint": fingerprint, "suite": "demo_world", "settings": {"seed": 0}}
    content = made | {"scores": scores, "intervals": intervals}
    write_json(scores_uri(storage, fingerprint, "demo_world"), content)
    write_json(measures_uri(storage, fingerprint, "demo_world"), measures)
    attach_scores(storage, fingerprint, "demo_world", scores, run_id="evaluate-run")


def score_base(storage: str, base: Path, understanding: float = 0.95) -> None:
    score(storage, read_manifest(base).fingerprint, 0.0, understanding=understanding)


def test_client_walks_from_version_to_tars(registered: tuple[str, dict[str, str]]) -> None:
    storage, stage_runs = registered
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    version = client.get_model_version("nexusgen", "1")
    assert version.source == f"{storage}/models/{version.tags['nexusgen.fingerprint']}"
    assert client.get_run(version.run_id).data.tags["nexusgen.job"] == "register"
    found = {}
    for stage in ("ar", "generation_decoder"):
        run = client.get_run(version.tags[f"nexusgen.run.{stage}"])
        assert run.info.run_id == stage_runs[stage]
        assert run.data.tags["nexusgen.stage"] == stage
        for given in run.inputs.dataset_inputs:
            embed = client.get_run({tag.key: tag.value for tag in given.tags}["nexusgen.parent"])
            assert embed.data.tags["nexusgen.job"] == "embed"
            for tar in embed.inputs.dataset_inputs:
                digest = {tag.key: tag.value for tag in tar.tags}["nexusgen.digest"]
                found[json.loads(tar.dataset.source)["uri"]] = digest
    assert found == TAR_DIGESTS
    from_register_run = client.get_run(version.run_id).inputs.dataset_inputs
    assert {t.value for i in from_register_run for t in i.tags if t.key == "nexusgen.parent"} == set(
        stage_runs.values()
    )
    assert {entry["digest"] for entry in json.loads(version.tags["nexusgen.inputs"])} == {"e" * 64}


def test_published_folder_is_the_trained_model(registered: tuple[str, dict[str, str]], base: Path) -> None:
    storage, stage_runs = registered
    folder = resolve_model("models:/nexusgen/1", storage)
    manifest = read_manifest(folder)
    assert folder.name == manifest.fingerprint != read_manifest(base).fingerprint
    assert {s: v["run_id"] for s, v in manifest.lineage["stages"].items()} == stage_runs
    assert (folder / "config.yaml").is_file()
    assert json.loads((folder / "run.json").read_text())["run_id"] == manifest.lineage["register_run_id"]
    assert load_model(folder, ["autoregressive"]).autoregressive is not None
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_same_weights_get_no_second_version(registered: tuple[str, dict[str, str]], base: Path) -> None:
    storage, _ = registered
    again = register(RegisterConfig(storage=storage, name=NAME, model=str(base)))
    assert (again.reused, again.outputs["version"]) == (True, 1)
    shutil.copytree(Path(storage, "checkpoints", NAME), Path(storage, "checkpoints", "copy"))
    copied = register(RegisterConfig(storage=storage, name="copy", model=str(base)))  # another recipe, same weights
    assert (copied.reused, copied.outputs["version"]) == (True, 1)


def test_gate_aliases_and_rollback(tmp_path: Path, base: Path) -> None:
    storage = str(tmp_path)
    fingerprints = []
    for shift in (0.0, 1.0, 2.0):
        road_by_hand(storage, base, shift)
        report = register(RegisterConfig(storage=storage, name=NAME, model=str(base)))
        fingerprints.append(report.outputs["fingerprint"])
    assert len(set(fingerprints)) == 3
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")

    def champion() -> str:
        return str(client.get_model_version_by_alias("nexusgen", "champion").version)

    with pytest.raises(GateError, match="no evaluation"):
        promote(PromoteConfig(storage=storage, version=1, to="candidate"))
    with pytest.raises(InputError, match="no version has the alias"):
        resolve_model("models:/nexusgen@champion", storage)
    score(storage, fingerprints[0], 0.9)
    with pytest.raises(GateError, match=r"the base model \w+ has no evaluation to compare with .*: evaluate it"):
        promote(PromoteConfig(storage=storage, version=1))
    score_base(storage, base)
    score(storage, fingerprints[0], 0.9, n=50)
    with pytest.raises(GateError, match="n is 50, wanted >= 572"):  # a smaller evaluation opens no gate
        promote(PromoteConfig(storage=storage, version=1))
    score(storage, fingerprints[0], 0.9, editing=0.2)
    with pytest.raises(GateError, match=r"editing.strict is 0.2, wanted >= 0.3"):
        promote(PromoteConfig(storage=storage, version=1))
    score(storage, fingerprints[0], 0.9)
    score(storage, fingerprints[1], 0.3)
    score(storage, fingerprints[2], 0.95)
    passed = promote(PromoteConfig(storage=storage, version=1)).outputs
    assert passed["previous"] is None
    assert passed["gate"].startswith("understanding against the base model's -0.050 (")
    passed_tag = client.get_model_version("nexusgen", "1").tags["nexusgen.gate.champion"]
    assert passed_tag == f"passed: {passed['gate']}"
    with pytest.raises(GateError, match=r"generation.overall is 0.3, wanted >= 0.85"):
        promote(PromoteConfig(storage=storage, version=2))
    assert champion() == "1"
    refused = client.get_model_version("nexusgen", "2").tags
    assert refused["nexusgen.gate.champion"].startswith("refused: generation.overall")
    assert refused["nexusgen.eval.demo_world.generation.overall"] == "0.3000"
    assert refused["nexusgen.run.evaluate"] == "evaluate-run"
    promote(PromoteConfig(storage=storage, version=2, to="candidate"))  # evaluated is enough
    score(storage, fingerprints[2], 0.95, editing=0.31)
    score(storage, fingerprints[0], 0.9, editing=0.6)
    with pytest.raises(
        GateError, match=r"editing.strict is 0.310, worse than the champion's 0.600 beyond noise \(-0.29"
    ):
        promote(PromoteConfig(storage=storage, version=3))
    score(storage, fingerprints[2], 0.95, editing=0.6, understanding=0.71)
    lenient = {"storage": storage, "version": 3, "understanding_drop": 0.3}
    score(storage, fingerprints[0], 0.9, understanding=0.71)
    with pytest.raises(GateError, match=r"understanding.overall is 0.710, worse than its base model's 0.950 beyond"):
        promote(PromoteConfig(**lenient | {"understanding_drop": 0.1}))
    assert promote(PromoteConfig(**lenient)).outputs["version"] == 3
    promote(PromoteConfig(storage=storage, rollback=True))
    run = client.get_run(client.get_model_version("nexusgen", "3").run_id).info.experiment_id
    said = [r.data.tags.get("nexusgen.gate.champion", "") for r in client.search_runs([run])]
    assert any(text.startswith("refused: editing.strict is 0.310") for text in said)
    score(storage, fingerprints[0], 0.9)
    score(storage, fingerprints[2], 0.95)
    with pytest.raises(GateError, match=r"understanding.strict is nan"):
        promote(PromoteConfig(storage=storage, version=3, thresholds={"understanding.strict": 0.1}))
    assert promote(PromoteConfig(storage=storage, version=3)).outputs["previous"] == 1
    assert promote(PromoteConfig(storage=storage, version=3)).reused
    assert resolve_model("models:/nexusgen@champion", storage).name == fingerprints[2]
    with pytest.raises(UsageError, match="at version 3 and came from 1"):
        promote(PromoteConfig(storage=storage, version=2, rollback=True))
    assert promote(PromoteConfig(storage=storage, rollback=True)).outputs["version"] == 1
    assert champion() == "1"
    with pytest.raises(UsageError, match="no earlier version"):
        promote(PromoteConfig(storage=storage, rollback=True))
    assert client.get_model_version_by_alias("nexusgen", "candidate").version in (2, "2")


def test_editing_decoder_is_published_on_the_model_that_it_learned_from(tmp_path: Path, base: Path) -> None:
    storage = str(tmp_path)
    stage_runs = road_by_hand(storage, base)
    first = register(RegisterConfig(storage=storage, name=NAME, model=str(base))).outputs
    score(storage, first["fingerprint"], 0.9)
    score_base(storage, base)
    promote(PromoteConfig(storage=storage, version=1))
    champion = resolve_model("models:/nexusgen@champion", storage)
    predicted = checkpoint.DataInput(name="shapes/predicted", uri="/predicted", digest="f" * 64, run_id="embed")
    stage_runs["editing_decoder"] = train_by_hand(storage, champion, "editing_decoder", [predicted], 0.0)

    wanted = {"model": "models:/nexusgen@champion", "ar": None, "generation_decoder": None, "editing_decoder": "latest"}
    config = RegisterConfig(storage=storage, name=NAME, **wanted)
    with pytest.raises(FingerprintError, match=r"ar=latest would be published in its place: set ar=null"):
        register(config.model_copy(update={"ar": "latest"}))
    with pytest.raises(FingerprintError, match="trained from base"):
        register(config.model_copy(update={"model": str(base)}))
    report = register(config)
    assert (report.reused, report.outputs["version"]) == (False, 2)
    before, after = read_manifest(champion), read_manifest(Path(report.outputs["model"]))
    assert "editing_decoder" not in before.parts
    assert after.parts == ("autoregressive", "generation_decoder", "editing_decoder", "vae")
    assert {**after.fingerprints, **before.fingerprints} == after.fingerprints
    assert load_model(Path(report.outputs["model"]), ["editing_decoder"]).editing_decoder is not None
    version = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db").get_model_version("nexusgen", "2")
    assert {stage: version.tags[f"nexusgen.run.{stage}"] for stage in stage_runs} == stage_runs  # the base's, too
    inputs = json.loads(version.tags["nexusgen.inputs"])
    assert {(entry["stage"], entry["name"]) for entry in inputs} == {
        ("ar", "shapes/vision"),
        ("generation_decoder", "shapes/vision"),
        ("editing_decoder", "shapes/predicted"),
    }
    assert register(config).reused
    assert root_base(storage, after.fingerprint) == read_manifest(base).fingerprint  # not the first version


def test_scores_of_other_weights_open_no_gate(registered: tuple[str, dict[str, str]]) -> None:
    storage, _ = registered
    fingerprint = resolve_model("models:/nexusgen/1", storage).name
    score(storage, fingerprint, 0.99)
    path = Path(scores_uri(storage, fingerprint, "demo_world"))
    path.write_text(path.read_text().replace(fingerprint, "0" * 16))
    with pytest.raises(GateError, match="belongs to other weights"):
        promote(PromoteConfig(storage=storage, version=1))


def test_moved_storage_still_finds_its_models(registered: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    storage, _ = registered
    moved = tmp_path / "moved"
    shutil.copytree(storage, moved)
    assert moved in resolve_model("models:/nexusgen/1", str(moved)).parents


def test_messages_for_what_is_not_there(tmp_path: Path, base: Path) -> None:
    storage = str(tmp_path)
    with pytest.raises(InputError, match=r"no checkpoint of stage ar .*train it first"):
        register(RegisterConfig(storage=storage, name=NAME, model=str(base)))
    with pytest.raises(ConfigError, match="nothing to publish"):
        register(RegisterConfig(storage=storage, name=NAME, model=str(base), ar=None, generation_decoder=None))
    with pytest.raises(InputError, match="not a checkpoint"):
        register(RegisterConfig(storage=storage, name=NAME, model=str(base), ar=str(tmp_path)))
    with pytest.raises(UsageError, match="run register first"):
        promote(PromoteConfig(storage=storage, version=1))
    with pytest.raises(UsageError, match="run register first"):
        resolve_model("models:/nexusgen@champion", storage)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        resolve_model("models:/nexusgen/1")
    with pytest.raises(UsageError, match="ALIAS"):
        resolve_model("models:/nexusgen/one", storage)
    with pytest.raises(ModelError, match=r"nexusgen\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        resolve_model(str(tmp_path / "nothing"))


def test_unknown_version_names_the_known_ones(registered: tuple[str, dict[str, str]]) -> None:
    storage, _ = registered
    with pytest.raises(UsageError, match="no version 7 of nexusgen; it has 1"):
        promote(PromoteConfig(storage=storage, version=7))


def test_checkpoint_of_another_base_is_refused(
    registered: tuple[str, dict[str, str]], base: Path, tmp_path: Path
) -> None:
    storage, _ = registered
    other = tmp_path / "other"
    shutil.copytree(base, other)
    changed = json.loads((other / "nexusgen.json").read_text()) | {"fingerprint": "0" * 16}
    (other / "nexusgen.json").write_text(json.dumps(changed))
    with pytest.raises(FingerprintError, match="trained from base"):
        register(RegisterConfig(storage=storage, name=NAME, model=str(other)))


def test_tracking_server_with_local_and_with_s3_storage(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, s3_port = free_port(), free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where folders from elsewhere are kept
    local, remote = str(tmp_path / "storage"), "s3://road/storage"
    with mlflow_server(tmp_path, port), s3_server(tmp_path, s3_port, "road"):
        road_by_hand(local, base)
        config = RegisterConfig(storage=local, name=NAME, model=str(base))
        with monkeypatch.context() as small:
            small.setattr("pipelines.register.MAX_ARTIFACT_BYTES", 1000)
            with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} .*{local}.*s3://"):
                register(config)
        first = register(config).outputs
        assert resolve_model("models:/nexusgen/1", local) == Path(local, "models", first["fingerprint"])
        shutil.rmtree(Path(local, "models"))
        fetched = resolve_model("models:/nexusgen/1")  # from the server's artefacts
        assert read_manifest(fetched).fingerprint == first["fingerprint"]
        assert load_model(fetched, ["generation_decoder"]).generation_decoder is not None

        road_by_hand(remote, base, shift=1.0)
        second = register(RegisterConfig(storage=remote, name=NAME, model=str(base))).outputs
        version = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}").get_model_version("nexusgen", "2")
        assert version.source == f"{remote}/models/{second['fingerprint']}" == second["model"]
        score(remote, second["fingerprint"], 0.9)
        score_base(remote, base)
        promote(PromoteConfig(storage=remote, version=2))
        folder = resolve_model("models:/nexusgen@champion", remote)
        assert tmp_path in folder.parents
        assert load_model(folder, ["autoregressive"]).autoregressive is not None
