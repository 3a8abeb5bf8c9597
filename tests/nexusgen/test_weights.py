import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from plain_libraries import open_with_plain_libraries
from safetensors.torch import load_file, save_file

from nexusgen.base_training import BaseSchedule, make_base
from nexusgen.errors import ModelError
from nexusgen.model.manifest import demo_base, read_manifest
from nexusgen.model.tensors import write_weights
from nexusgen.model.weights import (
    assemble_model,
    load_autoregressive,
    load_model,
    module_key,
    released_key,
    start_editing_decoder,
    tensors_fingerprint,
    write_manifest,
)


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
    manifest = assemble_model(demo_base(), out, autoregressive=tmp_path / "trained.safetensors", lineage=lineage)
    before = read_manifest(demo_base())
    assert manifest.fingerprints["vision"] == before.fingerprints["vision"]
    assert manifest.fingerprints["autoregressive"] != before.fingerprints["autoregressive"]
    assert manifest.fingerprint != before.fingerprint
    assert read_manifest(out).lineage == lineage
    made = load_model(out, ["autoregressive"]).autoregressive
    assert torch.equal(made.vision_head.weight, torch.eye(128))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_trained_weights_replace_a_base_in_several_files(tmp_path):
    base = shutil.copytree(demo_base(), tmp_path / "base")
    tensors = load_file(base / "autoregressive" / "model.safetensors")
    (base / "autoregressive" / "model.safetensors").unlink()
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    write_weights(tensors, base / "autoregressive", "model", max_file_bytes=num_bytes // 2)
    assert len(list((base / "autoregressive").glob("model-*.safetensors"))) == 3
    save_file({"vision_head.weight": torch.eye(128)}, tmp_path / "trained.safetensors")
    out = tmp_path / "model"
    manifest = assemble_model(base, out, autoregressive=tmp_path / "trained.safetensors", lineage={})
    assert manifest.fingerprints["autoregressive"] != read_manifest(base).fingerprints["autoregressive"]
    assert torch.equal(load_model(out, ["autoregressive"]).autoregressive.vision_head.weight, torch.eye(128))
    assert [path.name for path in (out / "autoregressive").glob("model*")] == ["model.safetensors"]


def test_an_editing_decoder_starts_from_the_generation_decoder_and_the_language_model():
    random_state = torch.get_rng_state()
    started = start_editing_decoder(demo_base())
    assert torch.equal(torch.get_rng_state(), random_state)  # another's chance isn't touched
    assert (started.parts, started.generation_decoder) == (("editing_decoder", "vae"), None)
    assert None not in (started.autoencoder, started.scheduler, started.pooled_prompt, started.negative_context)
    base = load_model(demo_base())
    decoder = started.editing_decoder
    state, transformer = decoder.transformer.state_dict(), base.generation_decoder.transformer.state_dict()
    assert state.keys() == transformer.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in transformer.items())
    layer = base.autoregressive.qwen.model.language_model.layers[0].state_dict()
    assert layer.keys() == decoder.conditioner.layers[0].state_dict().keys()
    assert all(torch.equal(decoder.conditioner.layers[0].state_dict()[name], tensor) for name, tensor in layer.items())
    again = start_editing_decoder(demo_base()).editing_decoder
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in decoder.state_dict().items())
    assert (decoder.config.token_grid, decoder.reference_grid) == ((3, 3), (6, 6))
    assert (decoder.config.conditioner, decoder.config.token_positions) == ("editing", "grid")


def test_a_trained_editing_decoder_is_assembled_onto_a_base_without_one_and_with_one(tmp_path):
    trained = start_editing_decoder(demo_base()).editing_decoder.state_dict()
    for number, base in enumerate((demo_base(), tmp_path / "model-0")):
        trained["conditioner.projector.4.bias"] = torch.full((128,), float(number))
        save_file({name: tensor.clone() for name, tensor in trained.items()}, tmp_path / "trained.safetensors")
        out = tmp_path / f"model-{number}"
        manifest = assemble_model(base, out, editing_decoder=tmp_path / "trained.safetensors", lineage={})
        assert manifest.parts == ("autoregressive", "generation_decoder", "editing_decoder", "vae")
        before = read_manifest(base).fingerprints
        assert all(manifest.fingerprints[part] == before[part] for part in ("autoregressive", "generation_decoder"))
        made = start_editing_decoder(out).editing_decoder.state_dict()
        assert made.keys() == trained.keys()
        assert all(torch.equal(made[name], tensor.bfloat16().float()) for name, tensor in trained.items())


def test_an_editing_decoder_cannot_start_from_nothing(tmp_path):
    shutil.copytree(demo_base(), tmp_path / "model")
    content = json.loads((tmp_path / "model" / "nexusgen.json").read_text())
    content["parts"] = ["autoregressive", "vae"]
    (tmp_path / "model" / "nexusgen.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="has no part generation_decoder"):
        start_editing_decoder(tmp_path / "model")


def test_a_tensor_without_a_place_is_named(tmp_path):
    save_file({"qwen.surplus": torch.zeros(1)}, tmp_path / "trained.safetensors")
    with pytest.raises(ModelError, match=r"qwen\.surplus"):
        assemble_model(demo_base(), tmp_path / "model", autoregressive=tmp_path / "trained.safetensors", lineage={})
    assert not (tmp_path / "model").exists()


def fingerprinted(folder):
    return write_manifest(folder, **read_manifest(folder).model_dump(exclude={"parts", "fingerprints", "fingerprint"}))


def test_the_shipped_base_has_the_fingerprint_of_its_files(tmp_path):
    folder = shutil.copytree(demo_base(), tmp_path / "model")
    assert fingerprinted(folder) == read_manifest(demo_base())


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"])
def test_the_tokenizers_small_files_are_part_of_the_fingerprint(tmp_path, name):
    folder = shutil.copytree(demo_base(), tmp_path / "model")
    path = folder / "autoregressive" / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, "eos_token": "<|endoftext|>"}))
    assert fingerprinted(folder).fingerprint != read_manifest(demo_base()).fingerprint


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("prompt_constants.safetensors", None),
        ("autoregressive/tokenizer.json", None),
        ("autoregressive/tokenizer_config.json", None),
        ("scheduler/scheduler_config.json", None),
        ("scheduler/scheduler_config.json", b"[]"),
    ],
)
def test_a_damaged_small_file_is_named(tmp_path, file, content):
    folder = shutil.copytree(demo_base(), tmp_path / "model")
    path = folder / file
    path.write_bytes(content if content is not None else path.read_bytes()[: path.stat().st_size // 2])
    named = str(path.parent if "tokenizer" in file else path)
    with pytest.raises(ModelError, match=re.escape(named)):
        load_model(folder)


def test_constants_without_the_pooled_prompt_are_refused(tmp_path):
    folder = shutil.copytree(demo_base(), tmp_path / "model")
    save_file({"negative_context": torch.zeros(1)}, folder / "prompt_constants.safetensors")
    with pytest.raises(ModelError, match="lacks pooled_prompt"):
        load_model(folder)


def test_missing_token_embeddings_are_named_though_the_head_is_tied_to_them(tmp_path):
    folder = shutil.copytree(demo_base() / "autoregressive", tmp_path / "autoregressive")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"missing qwen\.model\.language_model\.embed_tokens\.weight"):
        load_autoregressive(folder, read_manifest(demo_base()).geometry)


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
