"""Import of released files and export back: goldens byte for byte, FLUX.1 in both layouts, every misfit named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from nexusgen.base_training import ROPE_THETA
from nexusgen.errors import InputError, ModelError
from nexusgen.geometry import Geometry
from nexusgen.model.decoder import load_decoder, make_conditioner, read_decoder_config
from nexusgen.model.decoder_keys import from_released, original_name, original_to_released, to_released
from nexusgen.model.flux import default_axes
from nexusgen.model.manifest import demo_base, read_manifest
from nexusgen.model.released import DECODER_FILES, export_model, flat_config, import_model
from nexusgen.model.tensors import iterate_file, iterate_tensors, write_weights
from nexusgen.model.weights import (
    DECODER_FOLDERS,
    assemble_model,
    load_autoregressive,
    load_model,
    start_editing_decoder,
)

GOLDEN = Path(__file__).parents[1] / "golden"
AR = GOLDEN / "ar"
DECODERS = {
    "generation_decoder": GOLDEN / "gen_decoder" / "generation_decoder.bin",
    "editing_decoder": GOLDEN / "edit_decoder" / "edit_decoder.bin",
}
ADDED = {"vision_head.weight", "image_prefill_embeds.weight"}
# The goldens' transformer, so that a FLUX.1 folder of these sizes goes with their decoders.
TRANSFORMER: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "pooled_projection_dim": 24,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def assert_equal_bytes(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def flux_folder(folder: Path) -> Path:
    """A tiny random FLUX.1 in diffusers' layout: transformer, autoencoder, CLIP, T5 and their tokenizers."""
    torch.manual_seed(0)
    FluxTransformer2DModel(**TRANSFORMER).save_pretrained(folder / "transformer")
    AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")
    clip = CLIPTextConfig(
        vocab_size=8,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=10,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=3,
    )
    CLIPTextModel(clip).save_pretrained(folder / "text_encoder")
    t5 = T5Config(vocab_size=8, d_model=40, d_kv=8, d_ff=64, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu")
    # Several files, as T5-XXL has; T5's own initialisation leaves differences between layers small.
    encoder = T5EncoderModel(t5)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    encoder.save_pretrained(folder / "text_encoder_2", max_shard_size="20KB")
    vocabulary = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder / "tokenizer")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("a", -2.0)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer_2")
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def whole(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with every part."""
    out = tmp_path_factory.mktemp("whole") / "model"
    import_model(out, autoregressive=AR, **DECODERS, flux=flux)
    return out


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [AR, AR / "sharded"], ids=["single", "sharded"])
def test_the_autoregressive_model_comes_back_byte_for_byte(source: Path, tmp_path: Path) -> None:
    manifest = import_model(tmp_path / "model", autoregressive=source)
    assert manifest.parts == ("autoregressive",)
    assert manifest == read_manifest(tmp_path / "model")
    files = export_model(tmp_path / "model", tmp_path / "out")
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert_equal_bytes(dict(iterate_tensors(tmp_path / "out")), dict(iterate_tensors(source)))
    shards = {path.name for path in source.glob("model*.safetensors")}
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == shards
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        if (source / name).is_file():
            assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((source / name).read_text())


@pytest.mark.parametrize("part", DECODERS)
def test_decoders_come_back_byte_for_byte(part: str, tmp_path: Path) -> None:
    arguments = {part: DECODERS[part]}
    import_model(tmp_path / "model", autoregressive=AR, **arguments)
    export_model(tmp_path / "model", tmp_path / "out")
    exported = torch.load(tmp_path / "out" / DECODER_FILES[part], weights_only=True)
    assert_equal_bytes(exported, torch.load(DECODERS[part], weights_only=True))
    assert not list(tmp_path.rglob(".*"))  # neither scratch nor staging is left


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    state = {n: t.bfloat16() for n, t in torch.load(DECODERS["generation_decoder"], weights_only=True).items()}
    torch.save(state, tmp_path / "decoder.bin")
    import_model(tmp_path / "model", generation_decoder=tmp_path / "decoder.bin")
    export_model(tmp_path / "model", tmp_path / "out")
    assert_equal_bytes(torch.load(tmp_path / "out" / "generation_decoder.bin", weights_only=True), state)


def test_a_second_import_of_an_export_gives_the_same_model(whole: Path, flux: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(whole, out)
    files = {part: out / name for part, name in DECODER_FILES.items()}
    again = import_model(tmp_path / "model", autoregressive=out, **files, flux=flux)
    assert again.fingerprint == read_manifest(whole).fingerprint


def test_a_config_in_the_hubs_style(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(AR / "model.safetensors", source)
    shutil.copy(AR / "config_hub_style.json", source / "config.json")
    import_model(tmp_path / "model", autoregressive=source)
    assert_opens_as_qwen(tmp_path / "model" / "autoregressive")
    export_model(tmp_path / "model", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_what_was_trained_is_exported_with_a_config_that_4_49_reads() -> None:
    """4.49 wants the language model's sizes at the top level; 5.23 takes both and must read the same from each."""
    nested = json.loads((demo_base() / "autoregressive" / "config.json").read_text())
    flat = flat_config(nested)
    assert "text_config" not in flat
    assert flat["hidden_size"] == 128
    assert flat["rope_theta"] == ROPE_THETA
    assert flat["rope_scaling"] == {"type": "mrope", "mrope_section": [4, 6, 6]}
    assert flat["torch_dtype"] == "bfloat16"
    assert flat["model_type"] == "qwen2_5_vl"
    ours, theirs = (Qwen2_5_VLConfig.from_dict(config) for config in (flat, nested))
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "eos_token_id"):
        assert getattr(ours.text_config, name) == getattr(theirs.text_config, name), name
    assert ours.text_config.rope_parameters["mrope_section"] == theirs.text_config.rope_parameters["mrope_section"]
    assert ours.vision_config.to_dict() == theirs.vision_config.to_dict()
    assert ours.image_token_id == theirs.image_token_id
    assert flat_config(flat) == flat
    # Late versions of transformers 4 nest the language model's fields, but keep rope in two.
    rope = {"rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    text = {name: value for name, value in nested["text_config"].items() if name not in ("rope_parameters", "dtype")}
    late = {name: value for name, value in nested.items() if name != "dtype"}
    late |= {"text_config": text | rope, "torch_dtype": "bfloat16"}
    flat_late = flat_config(late)
    assert (flat_late["rope_theta"], flat_late["torch_dtype"]) == (10000.0, "bfloat16")
    assert flat_late["rope_scaling"] == rope["rope_scaling"]


def test_a_model_of_another_geometry_is_exported_and_imported_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained = {name: t.clone() for name, t in start_editing_decoder(demo_base()).editing_decoder.state_dict().items()}
    save_file(trained, tmp_path / "trained.safetensors")
    base = tmp_path / "base"
    before = assemble_model(demo_base(), base, editing_decoder=tmp_path / "trained.safetensors", lineage={})
    export_model(base, out)
    files = {part: out / name for part, name in DECODER_FILES.items()}
    settings: dict[str, Any] = {"geometry": before.geometry, "axes_dims_rope": (8, 16, 16)}
    again = import_model(tmp_path / "model", autoregressive=out, **files, **settings, token_positions="grid")
    parts = ("autoregressive", "vision", *DECODER_FILES)
    assert again.fingerprints == {part: before.fingerprints[part] for part in parts}
    assert load_model(tmp_path / "model", ["autoregressive"]).tokenizer is not None  # came along
    for place in DECODER_FOLDERS.values():
        assert read_decoder_config(tmp_path / "model" / place) == read_decoder_config(base / place)
    sampling = "scheduler shift 3.0, 50 steps, pictures of 512x512 pixels"
    assert [text for text in again.lineage["assumed"] if "blocks" not in text] == [sampling]
    merger = read_decoder_config(base / DECODER_FOLDERS["editing_decoder"]).merger
    assumed = import_model(tmp_path / "assumed", **files, **settings, merger=merger)
    assert assumed.lineage["assumed"][-2:] == ["generation_decoder: token positions zeros", sampling]
    other = merger.model_copy(update={"reference_grid": (4, 4)})
    message = refusal(tmp_path / "other", editing_decoder=files["editing_decoder"], **settings, merger=other)
    assert "reference_grid is (4, 4), but a reference of the geometry has (6, 6) tokens" in message


def test_a_model_of_another_geometry_says_how_it_can_be_imported(tmp_path: Path) -> None:
    export_model(demo_base(), tmp_path / "out")
    message = refusal(tmp_path / "model", autoregressive=tmp_path / "out")
    assert "patches of 16 pixels; the geometry's patch_size is 14" in message
    assert "call import_model with the model's geometry" in message
    geometry = Geometry(target_size=112)
    message = refusal(tmp_path / "model", autoregressive=AR, geometry=geometry)
    assert "image_prefill_embeds.weight has 81 rows, but an image of the geometry 16 tokens" in message


# --- plain libraries --------------------------------------------------------------------------------------------------


def assert_opens_as_qwen(folder: Path) -> None:
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == ADDED
    assert not info["mismatched_keys"]


def test_plain_transformers_and_diffusers_open_a_whole_model(whole: Path) -> None:
    assert read_manifest(whole).parts == ("autoregressive", "generation_decoder", "editing_decoder", "vae")
    assert_opens_as_qwen(whole / "autoregressive")
    places = [(FluxTransformer2DModel, whole / place / "transformer") for place in DECODER_FOLDERS.values()]
    for cls, folder in [*places, (AutoencoderKL, whole / "vae")]:
        opened, info = cls.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_equal_bytes(opened.state_dict(), dict(iterate_tensors(folder, "diffusion_pytorch_model")))
    assert json.loads((whole / "scheduler" / "scheduler_config.json").read_text())["shift"] == 3.0


def test_a_whole_model_loads_and_its_files_may_be_read_by_all(whole: Path) -> None:
    parts = ["generation_decoder", "editing_decoder", "vae"]
    model = load_model(whole, parts)
    assert model.pooled_prompt is not None
    assert model.negative_context is not None
    assert model.negative_context.shape == (1, 512, 40)
    assert {path.stat().st_mode & 0o777 for path in whole.rglob("*") if path.is_file()} == {0o644}


# --- what doesn't fit is named ----------------------------------------------------------------------------------------


def refusal(out: Path, **sources: Any) -> str:
    with pytest.raises(ModelError) as caught:
        import_model(out, **sources)
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    return str(caught.value)


def test_misfits_of_the_autoregressive_model_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(AR / "config.json", source)
    state = load_file(AR / "model.safetensors")
    state["model.layers.0.mlp.up_proj.extra"] = torch.zeros(1)
    state["vision_head.weight"] = torch.zeros(64, 63)
    del state["visual.blocks.1.norm2.weight"]
    save_file(state, source / "model.safetensors")
    message = refusal(tmp_path / "model", autoregressive=source)
    assert "missing visual.blocks.1.norm2.weight" in message
    assert "unexpected model.layers.0.mlp.up_proj.extra" in message
    assert "vision_head.weight has shape (64, 63), expected (64, 64)" in message


@pytest.mark.parametrize("part", DECODERS)
def test_misfits_of_a_decoder_are_named_as_in_its_file(part: str, tmp_path: Path) -> None:
    state = torch.load(DECODERS[part], weights_only=True)
    del state["pipe.dit.blocks.1.attn.a_to_qkv.bias"]
    state["pipe.dit.nothing.weight"] = torch.zeros(1)
    state["pipe.dit.final_proj_out.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "decoder.bin")
    message = refusal(tmp_path / "model", autoregressive=AR, **{part: tmp_path / "decoder.bin"})
    assert str(tmp_path / "decoder.bin") in message
    assert "missing pipe.dit.blocks.1.attn.a_to_qkv.bias" in message
    assert "unexpected pipe.dit.nothing.weight" in message
    assert "pipe.dit.final_proj_out.bias has shape (3,), expected (64,)" in message


@pytest.mark.parametrize("name", ["pipe.dit.x_embedder.weight", "adapter.0.weight"])
def test_a_missing_tensor_that_sizes_are_read_off_is_named(name: str, tmp_path: Path) -> None:
    state = torch.load(DECODERS["generation_decoder"], weights_only=True)
    del state[name]
    torch.save(state, tmp_path / "decoder.bin")
    assert f"missing {name}" in refusal(tmp_path / "model", generation_decoder=tmp_path / "decoder.bin")


def test_a_decoder_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "model", generation_decoder=DECODERS["editing_decoder"])
    assert "missing adapter.0.weight" in message


def test_pickles_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "decoder.bin"
    torch.save({"adapter.0.weight": Path("x")}, path)
    assert "plain tensors" in refusal(tmp_path / "model", generation_decoder=path)
    path.write_bytes(b"nothing")
    assert "plain tensors" in refusal(tmp_path / "model", generation_decoder=path)
    torch.save([torch.zeros(1)], path)
    assert "flat mapping" in refusal(tmp_path / "model", generation_decoder=path)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(AR / "config.json", source)
    (source / "model.safetensors").write_bytes((AR / "model.safetensors").read_bytes()[:5000])
    assert "readable safetensors" in refusal(tmp_path / "model", autoregressive=source)
    index = source / "model.safetensors.index.json"
    for text, said in (
        ("{", "not a readable index"),
        ("[]", "not a readable index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names of files in its own folder"),
    ):
        index.write_text(text)
        assert said in refusal(tmp_path / "model", autoregressive=source)
    index.unlink()
    (source / "config.json").write_text("[]")
    assert "not a config of Qwen2.5-VL" in refusal(tmp_path / "model", autoregressive=source)


def test_parts_of_different_models_are_refused(tmp_path: Path, flux: Path) -> None:
    state = torch.load(DECODERS["generation_decoder"], weights_only=True)
    state["adapter.0.weight"] = state["adapter.0.weight"][:, :32].clone()
    torch.save(state, tmp_path / "decoder.bin")
    message = refusal(tmp_path / "model", autoregressive=AR, generation_decoder=tmp_path / "decoder.bin")
    assert "64 numbers, but the generation decoder's conditioner takes 32" in message


@pytest.mark.parametrize("part", DECODERS)
def test_a_decoder_without_its_last_block_is_refused_or_said_to_be_whole(part: str, tmp_path: Path, flux: Path) -> None:
    state = torch.load(DECODERS[part], weights_only=True)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("pipe.dit.single_blocks.1.")}
    torch.save(state, tmp_path / "decoder.bin")
    sources: dict[str, Any] = {"autoregressive": AR, part: tmp_path / "decoder.bin"}
    message = refusal(tmp_path / "refused", **sources, flux=flux)
    assert "decoder.bin: 2 double and 1 single blocks, but the transformer of" in message
    assert "has 2 and 2: the file is incomplete" in message
    manifest = import_model(tmp_path / "model", **sources)
    assert f"{part}: 2 double and 1 single blocks are all" in manifest.lineage["assumed"]


def test_an_autoencoder_of_other_latents_is_refused(tmp_path: Path, flux: Path) -> None:
    other = shutil.copytree(flux, tmp_path / "flux")
    shutil.rmtree(other / "vae")
    config = {**AutoencoderKL.load_config(flux / "vae"), "latent_channels": 8}
    AutoencoderKL.from_config(config).save_pretrained(other / "vae")
    message = refusal(tmp_path / "model", generation_decoder=DECODERS["generation_decoder"], flux=other)
    assert "2x2 packed into a token: 32 numbers, but the generation decoder's transformer takes 64" in message


def test_heads_that_nothing_tells_must_be_given(tmp_path: Path) -> None:
    message = refusal(tmp_path / "model", editing_decoder=DECODERS["editing_decoder"])
    assert "import the autoregressive model with it" in message


def test_rope_axes(tmp_path: Path, flux: Path) -> None:
    assert default_axes(128) == (16, 56, 56)
    decoder = DECODERS["generation_decoder"]
    message = refusal(tmp_path / "model", generation_decoder=decoder, axes_dims_rope=(4, 4, 4))
    assert "(4, 4, 4) must add up to the size of an attention head, 16" in message
    assumed = import_model(tmp_path / "assumed", generation_decoder=decoder)
    blocks = "generation_decoder: 2 double and 2 single blocks are all"
    assert assumed.lineage["assumed"] == ["generation_decoder: rope axes (4, 6, 6)", blocks]
    stated = import_model(tmp_path / "stated", generation_decoder=decoder, flux=flux)
    assert "assumed" not in stated.lineage
    given = import_model(tmp_path / "given", generation_decoder=decoder, axes_dims_rope=(8, 4, 4))
    assert given.fingerprints == assumed.fingerprints  # the weights are the same,
    assert given.fingerprint != assumed.fingerprint  # the model isn't
    assert given.lineage["assumed"] == [blocks]
    assert load_decoder(tmp_path / "given" / "decoders" / "generation").transformer.config.axes_dims_rope == [8, 4, 4]


def test_what_is_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    import_model(out, autoregressive=AR)  # empty: fine
    with pytest.raises(InputError, match="not an empty folder"):
        import_model(out, autoregressive=AR)
    with pytest.raises(InputError, match="not an empty folder"):
        export_model(out, out)
    assert read_manifest(out).parts == ("autoregressive",)


def test_nothing_to_import_or_export(tmp_path: Path, flux: Path) -> None:
    with pytest.raises(InputError, match="nothing to import"):
        import_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"absent\.bin doesn't exist"):
        import_model(tmp_path / "model", generation_decoder=tmp_path / "absent.bin")
    (tmp_path / "empty").mkdir()
    assert "no FLUX.1-dev folder" in refusal(tmp_path / "model", autoregressive=AR, flux=tmp_path / "empty")
    assert "config.json" in refusal(tmp_path / "model", autoregressive=tmp_path / "empty")
    with pytest.raises(ModelError, match=r"nexusgen\.json"):
        export_model(tmp_path / "empty", tmp_path / "out")


def test_a_folder_without_constants_says_so_when_a_decoder_is_wanted(tmp_path: Path) -> None:
    manifest = import_model(tmp_path / "model", generation_decoder=DECODERS["generation_decoder"])
    assert [text.split(" ")[0] for text in manifest.lineage["lacks"]] == ["vae", "prompt"]
    with pytest.raises(ModelError, match="--flux"):
        load_model(tmp_path / "model")


# --- starting points for training -------------------------------------------------------------------------------------


def plain_qwen(folder: Path, drop: set[str], **config: Any) -> Path:
    folder.mkdir()
    settings = json.loads((AR / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    state = {name: tensor for name, tensor in iterate_file(AR / "model.safetensors") if name not in drop}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_plain_qwen_gets_a_fresh_head_and_queries(tmp_path: Path) -> None:
    source = plain_qwen(tmp_path / "source", ADDED)
    first = import_model(tmp_path / "first", autoregressive=source)
    second = import_model(tmp_path / "second", autoregressive=source)
    assert set(first.lineage["initialised"]) == ADDED
    assert first.fingerprint == second.fingerprint
    state = dict(iterate_tensors(tmp_path / "first" / "autoregressive"))
    assert_equal_bytes({n: t for n, t in state.items() if n not in ADDED}, load_file(source / "model.safetensors"))
    assert 0.9 < state["image_prefill_embeds.weight"].std() / 0.02 < 1.1
    assert state["vision_head.weight"].abs().max() <= 64**-0.5
    assert_opens_as_qwen(tmp_path / "first" / "autoregressive")
    load_autoregressive(tmp_path / "first" / "autoregressive", Geometry())


def test_half_of_what_nexus_gen_adds_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    source = plain_qwen(tmp_path / "source", {"vision_head.weight"})
    assert "missing vision_head.weight" in refusal(tmp_path / "model", autoregressive=source)


def test_a_head_tied_to_the_token_embeddings(tmp_path: Path) -> None:
    source = plain_qwen(tmp_path / "source", {"lm_head.weight"}, tie_word_embeddings=True)
    import_model(tmp_path / "model", autoregressive=source)
    qwen = load_autoregressive(tmp_path / "model" / "autoregressive", Geometry()).qwen
    assert qwen.lm_head.weight is qwen.model.language_model.embed_tokens.weight
    untied = plain_qwen(tmp_path / "untied", {"lm_head.weight"})
    assert "missing lm_head.weight" in refusal(tmp_path / "other", autoregressive=untied)


def test_a_plain_tied_base_comes_in_and_goes_out_with_one_matrix(tmp_path: Path) -> None:
    """As the 3B of Qwen2.5-VL: no output layer in its files, and nothing that Nexus-Gen adds."""
    source = plain_qwen(tmp_path / "source", {"lm_head.weight", *ADDED}, tie_word_embeddings=True)
    manifest = import_model(tmp_path / "model", autoregressive=source)
    assert set(manifest.lineage["initialised"]) == ADDED
    state = dict(iterate_tensors(tmp_path / "model" / "autoregressive"))
    assert state.keys() == load_file(source / "model.safetensors").keys() | ADDED
    export_model(tmp_path / "model", tmp_path / "released")
    assert_equal_bytes(dict(iterate_tensors(tmp_path / "released")), state)
    qwen = load_autoregressive(tmp_path / "released", Geometry()).qwen
    assert qwen.lm_head.weight is qwen.model.language_model.embed_tokens.weight


def test_flux_alone_makes_both_decoders_under_fresh_conditioners(flux: Path, tmp_path: Path) -> None:
    manifest = import_model(tmp_path / "model", autoregressive=AR, flux=flux)
    places = list(DECODER_FOLDERS.values())
    assert manifest.lineage["initialised"] == [f"{place}/conditioner" for place in places]
    want = load_file(flux / "transformer" / "diffusion_pytorch_model.safetensors")
    for place in places:
        folder = tmp_path / "model" / place
        assert_equal_bytes(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"), want)
        decoder = load_decoder(folder)
        assert decoder.config.embedding_dim == 64  # of the language model
        torch.manual_seed(0)
        wanted = make_conditioner(decoder.config).state_dict()
        assert_equal_bytes(decoder.conditioner.state_dict(), wanted)  # made module by module, the same as at once
    again = import_model(tmp_path / "again", autoregressive=AR, flux=flux)
    assert again.fingerprint == manifest.fingerprint


# --- FLUX.1 -----------------------------------------------------------------------------------------------------------


def test_prompt_constants_are_the_whole_encoders(flux: Path, whole: Path) -> None:
    constants = load_file(whole / "prompt_constants.safetensors")
    with torch.no_grad():
        clip = CLIPTextModel.from_pretrained(flux / "text_encoder").eval()
        pooled = clip(torch.tensor([[2] + [3] * 9])).pooler_output
        t5 = T5EncoderModel.from_pretrained(flux / "text_encoder_2").eval()
        context = t5(torch.tensor([[1] + [0] * 511])).last_hidden_state
    assert_equal_bytes(constants, {"pooled_prompt": pooled, "negative_context": context})


def test_a_text_encoder_that_does_not_fit_is_named(flux: Path, tmp_path: Path) -> None:
    broken = tmp_path / "flux"
    shutil.copytree(flux, broken)
    path = broken / "text_encoder" / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("final_layer_norm.bias"))
    del state[name]
    save_file(state, path)
    assert "final_layer_norm.bias" in refusal(tmp_path / "model", flux=broken)


def test_encoders_of_another_width_are_refused(flux: Path, tmp_path: Path) -> None:
    other = tmp_path / "flux"
    shutil.copytree(flux, other)
    shutil.rmtree(other / "transformer")
    FluxTransformer2DModel(**{**TRANSFORMER, "pooled_projection_dim": 20}).save_pretrained(other / "transformer")
    message = refusal(tmp_path / "model", flux=other, autoregressive=AR)
    assert "CLIP's pooled prompt: 24 numbers" in message


def original_transformer(transformer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' names back to Black Forest Labs'."""
    released = to_released({f"transformer.{name}": tensor for name, tensor in transformer.items()})
    original = {original_name(name): tensor for name, tensor in released.items()}
    for name in original:
        if name.startswith("final_layer.adaLN_modulation"):
            original[name] = original[name].roll(len(original[name]) // 2, 0).clone()
    return original


def original_autoencoder(state: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Diffusers' names back to those of latent diffusion, which FLUX.1's `ae.safetensors` has."""
    attention = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    original = {}
    for name, tensor in state.items():
        renamed = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{num_levels - 1 - int(m[1])}", name)
        renamed = renamed.replace("down_blocks.", "down.").replace("mid_block.resnets.0", "mid.block_1")
        renamed = renamed.replace("mid_block.resnets.1", "mid.block_2").replace("resnets.", "block.")
        renamed = renamed.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        renamed = renamed.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "attentions.0" in renamed:
            stem, leaf = renamed.split("attentions.0.")[1].rsplit(".", 1)
            renamed = f"{renamed.split('.')[0]}.mid.attn_1.{attention[stem]}.{leaf}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        original[renamed] = tensor.clone()
    return original


def test_the_original_layout_gives_the_same_model(flux: Path, tmp_path: Path) -> None:
    original = tmp_path / "original"
    shutil.copytree(flux, original)
    for place in ("transformer", "vae"):
        shutil.rmtree(original / place)
    stem = "diffusion_pytorch_model.safetensors"
    transformer, autoencoder = (load_file(flux / place / stem) for place in ("transformer", "vae"))
    save_file(original_transformer(transformer), original / "flux1-dev.safetensors")
    save_file(original_autoencoder(autoencoder, 2), original / "ae.safetensors")
    import_model(tmp_path / "theirs", flux=original)
    assert_equal_bytes(load_file(tmp_path / "theirs" / "vae" / stem), autoencoder)
    converted = load_file(tmp_path / "theirs" / "decoders" / "generation" / "transformer" / stem)
    assert_equal_bytes(converted, transformer)
    opened = AutoencoderKL.from_pretrained(tmp_path / "theirs" / "vae").config
    want = AutoencoderKL.load_config(flux / "vae")
    for name in ("block_out_channels", "layers_per_block", "latent_channels", "scaling_factor", "shift_factor"):
        assert getattr(opened, name) == want[name], name


@pytest.mark.parametrize(
    ("file", "name"),
    [("flux1-dev.safetensors", "double_blocks.1.img_attn.norm.query_norm.scale"), ("ae.safetensors", None)],
)
def test_misfits_of_the_original_layout_are_named(flux: Path, tmp_path: Path, file: str, name: str | None) -> None:
    stem = "diffusion_pytorch_model.safetensors"
    if name is not None:
        state = original_transformer(load_file(flux / "transformer" / stem))
    else:
        state = original_autoencoder(load_file(flux / "vae" / stem), 2)
    if name is not None:
        missing = {n: t for n, t in state.items() if n != name}
        save_file(missing, tmp_path / file)
        assert f"missing {name}" in refusal(tmp_path / "model", flux=tmp_path)
    save_file({**state, "surplus.weight": torch.zeros(2)}, tmp_path / file)
    assert "surplus.weight" in refusal(tmp_path / "model", flux=tmp_path)


def test_original_names_are_read_as_diffusers_reads_them() -> None:
    """Its converter knows one width; only rows matter to it, so thin matrices will do."""
    sizes = {**TRANSFORMER, "num_layers": 1, "num_single_layers": 1}
    sizes |= {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
    with torch.device("meta"):
        shapes = FluxTransformer2DModel(**sizes).state_dict()
    generator = torch.Generator().manual_seed(0)
    thin = {
        name: torch.randn(len(tensor), *[2] * (tensor.ndim - 1), generator=generator) for name, tensor in shapes.items()
    }
    original = original_transformer(thin)
    ours = {n.removeprefix("transformer."): t for n, t in from_released(original_to_released(original)).items()}
    assert_equal_bytes(ours, convert_flux_transformer_checkpoint_to_diffusers(dict(original)))
    assert_equal_bytes(ours, thin)


def test_large_weights_are_written_into_files_with_an_index(tmp_path: Path) -> None:
    state = {f"t{number}": torch.full((10,), float(number)) for number in range(5)}
    write_weights(state, tmp_path, "model", max_file_bytes=100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert_equal_bytes(dict(iterate_tensors(tmp_path)), state)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
