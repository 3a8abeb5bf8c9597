import json
import weakref
from pathlib import Path

import pytest
import torch
from plain_libraries import open_with_plain_libraries
from safetensors.torch import load_file, save_file

from nexusgen.base_training import BaseSchedule, make_base
from nexusgen.errors import ModelError
from nexusgen.model.manifest import demo_base, read_manifest
from nexusgen.model.weights import assemble_model, load_model, module_key, released_key, tensors_fingerprint


def test_plain_transformers_and_diffusers_open_the_shipped_base(tmp_path):
    open_with_plain_libraries(demo_base(), tmp_path)


def test_the_shipped_base_is_small_whole_and_bf16():
    base = demo_base()
    assert sum(f.stat().st_size for f in base.rglob("*.safetensors")) <= 12_000_000
    assert read_manifest(base).parts == ("autoregressive", "generation_decoder", "vae")
    assert read_manifest(base).token_counts == {"target": 9, "reference": 36}
    tensors = load_file(base / "autoregressive" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    load_model(base)


def test_released_names_and_module_names_map_both_ways():
    for name in ("visual.blocks.0.norm1.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        assert released_key(module_key(name)) == name
        assert module_key(name).startswith("qwen.")
    assert module_key("vision_head.weight") == "vision_head.weight"


def test_make_base_writes_a_loadable_base(tmp_path):
    make_base(tmp_path / "base", BaseSchedule(understanding_steps=2, language_steps=(1, 1), decoder_steps=2))
    model = load_model(tmp_path / "base")
    assert model.manifest.lineage["understanding_steps"] == 2
    assert {p.name for p in (tmp_path / "base").iterdir()} == {p.name for p in demo_base().iterdir()}


def test_assembled_folder_holds_trained_weights_and_the_bases_rest(tmp_path):
    base = load_model(demo_base(), ["autoregressive"]).autoregressive
    trained = {n: t for n, t in base.state_dict().items() if not n.startswith("qwen.model.visual")}
    trained["vision_head.weight"] = torch.eye(128)
    save_file(trained, tmp_path / "trained.safetensors")
    out = tmp_path / "model"
    lineage = {"runs": ["abc"]}
    manifest = assemble_model(
        demo_base(), out, autoregressive=tmp_path / "trained.safetensors", generation_decoder=None, lineage=lineage
    )
    before = read_manifest(demo_base())
    assert manifest.fingerprints["vision"] == before.fingerprints["vision"]
    assert manifest.fingerprints["autoregressive"] != before.fingerprints["autoregressive"]
    assert manifest.fingerprint != before.fingerprint
    assert read_manifest(out).lineage == lineage
    made = load_model(out, ["autoregressive"]).autoregressive
    assert torch.equal(made.vision_head.weight, torch.eye(128))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_tensor_without_a_place_is_named(tmp_path):
    save_file({"qwen.surplus": torch.zeros(1)}, tmp_path / "trained.safetensors")
    with pytest.raises(ModelError, match=r"qwen\.surplus"):
        assemble_model(
            demo_base(),
            tmp_path / "model",
            autoregressive=tmp_path / "trained.safetensors",
            generation_decoder=None,
            lineage={},
        )
    assert not (tmp_path / "model").exists()


def test_fingerprint_is_of_names_and_bytes_not_of_order():
    a, b = ("a", torch.ones(2)), ("b", torch.zeros(2))
    assert tensors_fingerprint([a, b]) == tensors_fingerprint([b, a])
    assert tensors_fingerprint([a, b]) != tensors_fingerprint([("b", torch.ones(2)), ("a", torch.zeros(2))])
    assert tensors_fingerprint([a]) != tensors_fingerprint([("a", torch.ones(2, dtype=torch.float64))])


def test_folders_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"nexusgen\.json"):
        read_manifest(tmp_path)
    (tmp_path / "nexusgen.json").write_text(json.dumps({"parts": 3}))
    with pytest.raises(ModelError, match="manifest"):
        load_model(tmp_path)


def test_an_absent_part_is_named():
    with pytest.raises(ModelError, match="editing_decoder"):
        load_model(Path(demo_base()), ["editing_decoder"])


def test_an_offloaded_model_holds_one_half_at_a_time():
    model = load_model(demo_base(), dtype=torch.bfloat16, offload=True, quantise="fp8", numerics="exact")
    assert (model.autoregressive, model.generation_decoder, model.autoencoder) == (None, None, None)
    assert model.tokenizer is not None
    assert model.negative_context is not None
    model.use("autoregressive")
    gone = weakref.ref(model.autoregressive)
    model.use("autoregressive")
    assert gone() is model.autoregressive  # not loaded again
    model.use("drawing")
    assert gone() is None
    assert model.autoregressive is None
    assert model.autoencoder.dtype == torch.bfloat16
    assert model.generation_decoder.numerics == "exact"
    assert torch.float8_e4m3fn in {tensor.dtype for tensor in model.generation_decoder.state_dict().values()}
    gone = weakref.ref(model.generation_decoder.transformer)
    model.use("autoregressive")
    assert gone() is None
    assert (model.generation_decoder, model.autoencoder) == (None, None)


def test_a_model_in_memory_keeps_both_halves_and_the_manifests_numerics():
    model = load_model(demo_base())
    parts = (model.autoregressive, model.generation_decoder, model.autoencoder)
    assert model.generation_decoder.numerics == model.manifest.numerics
    model.use("drawing")
    model.use("autoregressive")
    assert (model.autoregressive, model.generation_decoder, model.autoencoder) == parts
    only = load_model(demo_base(), ["generation_decoder"], offload=True)
    only.use("drawing")
    assert only.generation_decoder is not None
    assert only.autoencoder is None  # wasn't asked for
