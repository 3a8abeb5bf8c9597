"""Model cards: of a version that was registered by hand, on embedded data with real rows, and of made-up sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from test_registry import NAME, road_by_hand, score, score_base, train_by_hand

from nexusgen.model.manifest import read_manifest
from nexusgen.schema import MANIFEST_NAME
from pipelines import checkpoint, embedded, model_card
from pipelines.embed import EmbedConfig, embed
from pipelines.pack import PackConfig, pack
from pipelines.promote import PromoteConfig, promote
from pipelines.register import RegisterConfig, register

pytestmark = pytest.mark.usefixtures("no_server")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[str, str, MlflowClient]:
    """The storage of a version that was trained on tars, evaluated and promoted; its card; MLflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        storage = str(tmp_path_factory.mktemp("carded"))
        counts = {"generation": 5, "editing": 3, "understanding": 4}
        pack(PackConfig(storage=storage, name=NAME, samples_per_shard=8, counts=counts))
        vision = EmbedConfig(storage=storage, name=NAME, mode="vision", model=str(base), input=f"{storage}/tars/{NAME}")
        embed(vision)
        manifest = embedded.read_manifest(storage, NAME, "vision")
        data = checkpoint.DataInput(
            name=f"{NAME}/vision", uri=f"{storage}/embedded", digest=manifest.digest, run_id=manifest.run_id
        )
        gone = checkpoint.DataInput(name="gone/latents", uri="/gone", digest="0", run_id="r")
        train_by_hand(storage, base, "ar", [data], 0.0)
        train_by_hand(storage, base, "generation_decoder", [data, gone], 0.0)
        made = register(RegisterConfig(storage=storage, name=NAME, model=str(base))).outputs
        folder = Path(made["model"])
        first = (folder / "README.md").read_text(encoding="utf-8")
        assert "None: it hasn't been evaluated." in first
        score_base(storage, base)
        score(storage, made["fingerprint"], 0.9)
        promote(PromoteConfig(storage=storage, version=1))
    text = (folder / "README.md").read_text(encoding="utf-8")
    return storage, text, MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")


def test_data_is_counted_by_source_and_licence_of_the_tars_own_fields(card: tuple[str, str, MlflowClient]) -> None:
    storage, text, _ = card
    assert "`shapes/vision` (read by ar, generation_decoder)" in text
    rows = [line for line in text.splitlines() if line.startswith("| nexusgen demo world | Apache-2.0 |")]
    assert sum(int(row.split("|")[5]) for row in rows) == 12
    assert "| nexusgen demo world | Apache-2.0 | editing | en | 2 |" in rows
    assert "`gone/latents` (read by generation_decoder): no longer in the storage, so not counted" in text
    assert "find out before the weights are passed on" in text  # of the data that is gone nobody knows
    kept = json.loads(Path(storage, "embedded", NAME, "vision", "sources.json").read_text())
    assert sum(part["samples"] for part in kept["parts"]) == 12


def test_card_tells_scores_with_intervals_gate_and_training(card: tuple[str, str, MlflowClient]) -> None:
    _, text, _ = card
    assert "| generation/overall | 0.900 | 0.826 to 0.945 | 100 | 0.000 |" in text
    assert "- gate of `champion`: passed: understanding against the base model's -0.050" in text
    assert "understands pictures worse than the base model: understanding/overall has lost 0.050" in text
    assert "| ar | 5 | 10 | 2 -> 1 |" in text
    assert "It has no editing decoder" in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["language"] == ["en", "zh"]


def test_mlflow_holds_the_card(card: tuple[str, str, MlflowClient]) -> None:
    _, text, client = card
    version = client.get_model_version("nexusgen", "1")
    assert version.description.startswith("# nexusgen, version 1")
    assert len(version.description) <= 5000
    assert "generation/overall | 0.900" in version.description
    path = client.download_artifacts(version.run_id, "README.md")
    assert Path(path).read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("hidden_size", "guidance_embeds", "licences", "is_barred"),
    [
        (3584, True, ("from Qwen2.5-VL-7B. Apache-2.0", "FLUX.1 [dev] Non-Commercial License"), True),
        (2048, True, ("from Qwen2.5-VL-3B. Qwen Research License", "FLUX.1 [dev] Non-Commercial License"), True),
        (3584, False, ("from Qwen2.5-VL-7B. Apache-2.0", "from a transformer of 19 + 38 blocks. not told"), False),
    ],
)
def test_licences_follow_the_sizes_of_the_parts(
    tmp_path: Path, base: Path, hidden_size: int, guidance_embeds: bool, licences: tuple[str, ...], is_barred: bool
) -> None:
    values = json.loads((base / MANIFEST_NAME).read_text()) | {"lineage": {"origin": {"made_by": "nexusgen import"}}}
    decoder = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": guidance_embeds}
    for place, content in (
        (MANIFEST_NAME, values),
        ("autoregressive/config.json", {"text_config": {"hidden_size": hidden_size}}),
        ("decoders/generation/transformer/config.json", decoder),
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(json.dumps(content))
    facts = model_card.collect(str(tmp_path), "7", str(tmp_path), "base", {})
    text = model_card.render(facts)
    assert all(licence in text for licence in licences)
    assert ("This model is not for commercial use" in text) is is_barred
    assert yaml.safe_load(text.split("---")[1])["license"] == "other"


def test_origin_of_a_sample_is_what_its_fields_say() -> None:
    assert model_card._origin('{"source": "a", "license": "CC0"}') == ("a", "CC0")
    assert model_card._origin('{"url": "https://example.org/x.jpg"}') == ("example.org", "not told")
    assert model_card._origin("[1]") == model_card._origin(None) == model_card._origin("{") == ("not told", "not told")


def test_card_of_a_version_by_hand_has_its_road(tmp_path: Path, base: Path) -> None:
    storage = str(tmp_path)
    road_by_hand(storage, base)
    made = register(RegisterConfig(storage=storage, name=NAME, model=str(base))).outputs
    manifest = read_manifest(Path(made["model"]))
    assert manifest.lineage["origin"] == read_manifest(base).lineage
    assert "no longer in the storage" in Path(made["model"], "README.md").read_text()
