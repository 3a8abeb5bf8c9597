"""The vision decoder: folders, names, released sizes, initialisation, positions and precision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from nexusgen.errors import ModelError, ShapeError
from nexusgen.model.conditioners import MergerConfig
from nexusgen.model.decoder import (
    DecoderConfig,
    VisionDecoder,
    initialise_for_training,
    is_quantised,
    load_decoder,
    pack_latents,
    released_decoder_config,
    save_decoder,
    sinusoid,
    unpack_latents,
)
from nexusgen.model.decoder_keys import from_released, to_released
from nexusgen.positions import flux_image_ids, flux_token_ids

TRANSFORMER: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}
CONFIG = DecoderConfig(embedding_dim=10, context_dim=12, token_grid=(2, 3), token_positions="grid")


EDITING = DecoderConfig(
    conditioner="editing",
    embedding_dim=16,
    context_dim=12,
    token_grid=(2, 3),
    token_positions="grid",
    merger=MergerConfig(
        reference_grid=(2, 2),
        intermediate_size=20,
        num_attention_heads=2,
        num_key_value_heads=1,
        mrope_section=(1, 1, 2),
    ),
)


@pytest.fixture
def decoder() -> VisionDecoder:
    torch.manual_seed(0)
    return VisionDecoder.from_config(CONFIG, TRANSFORMER).eval()


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(batch, 4, 4, 6, generator=generator),
        "timestep": torch.linspace(100, 900, batch),
        "embeddings": torch.randn(batch, 6, 10, generator=generator),
        "pooled": torch.randn(1, 6, generator=generator),
    }


def test_tokens_hold_channel_then_row_then_column() -> None:
    latents = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6).float()
    tokens = pack_latents(latents)
    assert tokens.shape == (1, 6, 8)
    expected = [latents[0, c, 2 + y, 4 + x] for c in range(2) for y in range(2) for x in range(2)]
    assert tokens[0, 5].tolist() == expected
    assert torch.equal(unpack_latents(tokens, (4, 6)), latents)


def test_flux_ids_lie_on_the_grid_or_at_zero() -> None:
    assert flux_image_ids((4, 6)).tolist() == [[0, r, c] for r in range(2) for c in range(3)]
    assert flux_token_ids((9, 9), (8, 12), "zeros").tolist() == [[0, 0, 0]] * 81
    grid = flux_token_ids((9, 9), (8, 12), "grid")
    torch.testing.assert_close(grid[10], torch.tensor([0, 8 / 18, 12 / 18]))
    # A token per 2x2 latent pixels: the ids of token and latent patch are the same.
    assert torch.equal(flux_token_ids((4, 4), (8, 8), "grid"), flux_image_ids((8, 8)))
    with pytest.raises(ShapeError, match="even"):
        flux_image_ids((5, 6))


def test_samples_do_not_depend_on_their_company(decoder: VisionDecoder) -> None:
    batch = inputs(3)
    with torch.no_grad():
        together = decoder(**batch)
        alone = decoder(batch["latents"][1:2], batch["timestep"][1:2], batch["embeddings"][1:2], batch["pooled"])
    assert together.shape == batch["latents"].shape
    torch.testing.assert_close(together[1:2], alone, atol=2e-6, rtol=1e-5)


def test_prediction_equals_plain_diffusers(decoder: VisionDecoder) -> None:
    batch = inputs()
    plain = FluxTransformer2DModel(**TRANSFORMER)
    plain.load_state_dict(decoder.transformer.state_dict())
    with torch.no_grad():
        tokens = plain(
            hidden_states=pack_latents(batch["latents"]),
            encoder_hidden_states=decoder.conditioner(batch["embeddings"]),
            pooled_projections=batch["pooled"].expand(2, -1),
            timestep=batch["timestep"] / 1000,
            guidance=torch.full((2,), 3.5),
            img_ids=flux_image_ids((4, 6)),
            txt_ids=flux_token_ids((2, 3), (4, 6), "grid"),
            return_dict=False,
        )[0]
        torch.testing.assert_close(decoder(**batch), unpack_latents(tokens, (4, 6)), atol=1e-4, rtol=1e-4)


def test_timestep_is_embedded_in_fp32_whatever_the_dtype(decoder: VisionDecoder) -> None:
    """bf16 rounds 613.25 to 612; both must not give the same modulation."""
    decoder.to(torch.bfloat16)
    embed = decoder.transformer.time_text_embed.embed
    exact, rounded = (embed(torch.tensor([t]), 3.5, torch.zeros(1, 6)) for t in (613.25, 612.0))
    assert exact.dtype == torch.bfloat16
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numerics_differ_in_bf16_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    as_released = VisionDecoder.from_config(EDITING, TRANSFORMER).eval().to(dtype)
    exact = VisionDecoder(EDITING, FluxTransformer2DModel(**TRANSFORMER), "exact").eval().to(dtype)
    exact.load_state_dict(as_released.state_dict())
    batch = inputs() | {"embeddings": torch.randn(2, 6, 16)}
    with torch.no_grad():
        one, other = (decoder(**batch, reference=torch.ones(2, 4, 16)) for decoder in (as_released, exact))
    assert ((one - other).abs().max() > 1e-4) == (dtype == torch.bfloat16)
    torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


def test_sinusoid_is_cosines_then_sines() -> None:
    got = sinusoid(torch.tensor([2.0]))
    assert got[0, 0].item() == pytest.approx(math.cos(2.0))
    assert got[0, 128].item() == pytest.approx(math.sin(2.0))
    assert got[0, 255].item() == pytest.approx(math.sin(2 * 10_000 ** (-127 / 128)))


def test_embeddings_of_another_shape_are_refused(decoder: VisionDecoder) -> None:
    with pytest.raises(ShapeError, match="2x3 tokens of 10"):
        decoder.context(torch.zeros(1, 5, 10))


def test_two_pass_guidance_needs_a_negative_context(decoder: VisionDecoder) -> None:
    batch = inputs()
    context = decoder.context(batch["embeddings"])
    with pytest.raises(ModelError, match="negative context"):
        decoder.velocity_function(context, batch["pooled"], None, true_cfg_scale=3.0)
    negative = torch.randn(1, 7, 12)
    with torch.no_grad():
        guided = decoder.velocity_function(context, batch["pooled"], negative, 3.0)(batch["latents"], batch["timestep"])
        positive = decoder.velocity_function(context, batch["pooled"])(batch["latents"], batch["timestep"])
        zeros = torch.zeros(7, 3)
        away = decoder.velocity(batch["latents"], batch["timestep"], negative.expand(2, -1, -1), batch["pooled"], zeros)
    torch.testing.assert_close(guided, away + 3 * (positive - away))


def test_folder_round_trip_and_plain_diffusers_opens_it(decoder: VisionDecoder, tmp_path: Path) -> None:
    save_decoder(decoder, tmp_path, torch.float32)
    again = load_decoder(tmp_path)
    assert again.config == CONFIG
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs()), decoder(**inputs()))  # threads may round differently
    plain, info = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(plain.proj_out.weight, decoder.transformer.proj_out.weight)
    assert str(tmp_path) not in (tmp_path / "transformer" / "config.json").read_text()


def test_an_editing_decoder_goes_through_a_folder_and_sees_its_reference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = VisionDecoder.from_config(EDITING, TRANSFORMER).eval()
    save_decoder(decoder, tmp_path, torch.float32)
    again = load_decoder(tmp_path)
    assert again.config == EDITING
    batch = inputs() | {"embeddings": torch.randn(2, 6, 16)}
    reference = torch.randn(2, 4, 16)
    with torch.no_grad():
        edited = decoder(**batch, reference=reference)
        torch.testing.assert_close(again(**batch, reference=reference), edited)
        assert (decoder(**batch) - edited).abs().max() > 1e-4
    assert decoder.context(batch["embeddings"], reference).shape == (2, 10, 12)
    with pytest.raises(ShapeError, match="2x2 tokens of 16"):
        decoder.context(batch["embeddings"], reference[:, :3])


def test_an_editing_decoder_to_be_trained_starts_by_predicting_zero() -> None:
    decoder = VisionDecoder.from_config(EDITING, TRANSFORMER)
    initialise_for_training(decoder, seed=0)
    assert not decoder(**(inputs() | {"embeddings": torch.randn(2, 6, 16)}), reference=torch.ones(2, 4, 16)).any()


def test_a_generation_decoder_takes_no_reference(decoder: VisionDecoder) -> None:
    with pytest.raises(ModelError, match="editing decoder"):
        decoder.context(inputs()["embeddings"], torch.zeros(2, 4, 10))
    with pytest.raises(ValidationError, match="merger"):
        DecoderConfig(merger=MergerConfig())


def test_saving_in_bf16_leaves_the_decoder_alone(decoder: VisionDecoder, tmp_path: Path) -> None:
    save_decoder(decoder, tmp_path, torch.bfloat16)
    assert decoder.dtype == torch.float32
    again = load_decoder(tmp_path, torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again(**inputs()).dtype == torch.bfloat16
    save_decoder(load_decoder(tmp_path), tmp_path / "again", torch.bfloat16)
    assert "_name_or_path" not in json.loads((tmp_path / "again" / "transformer" / "config.json").read_text())


def test_a_folder_that_does_not_fit_is_refused_by_name(decoder: VisionDecoder, tmp_path: Path) -> None:
    save_decoder(decoder, tmp_path, torch.float32)
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["proj_out.bias"]
    save_file({**state, "extra": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"missing transformer\.proj_out\.bias; unexpected transformer\.extra"):
        load_decoder(tmp_path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ModelError, match="safetensors"):
        load_decoder(tmp_path)
    with pytest.raises(ModelError, match=r"conditioner\.json"):
        load_decoder(tmp_path / "nowhere")


def test_quantisation_stores_the_blocks_linear_layers_in_a_byte(decoder: VisionDecoder, tmp_path: Path) -> None:
    save_decoder(decoder, tmp_path, torch.float32)
    small = load_decoder(tmp_path, torch.bfloat16, quantise="fp8")
    linears = [
        f"transformer.{name}.{kind}"
        for name, module in small.transformer.named_modules()
        if "blocks" in name and isinstance(module, torch.nn.Linear)
        for kind, _ in module.named_parameters()
    ]

    def stored() -> set[str]:
        return {name for name, tensor in small.state_dict().items() if tensor.dtype == torch.float8_e4m3fn}

    assert stored() == set(linears) == {name for name in small.state_dict() if is_quantised(name)}
    assert {tensor.dtype for name, tensor in small.state_dict().items() if name not in linears} == {torch.bfloat16}
    with torch.no_grad():
        plain, quantised = load_decoder(tmp_path, torch.bfloat16)(**inputs()), small(**inputs())
    assert quantised.dtype == torch.bfloat16
    assert 0 < (plain - quantised).abs().max() < 0.1 * plain.abs().max()
    assert stored() == set(linears)  # and are small again after they have computed


def test_released_names_go_both_ways_bit_for_bit(decoder: VisionDecoder, tmp_path: Path) -> None:
    ours = decoder.state_dict()
    released = to_released(ours)
    assert "pipe.dit.single_blocks.1.to_qkv_mlp.weight" in released
    assert released["pipe.dit.single_blocks.1.to_qkv_mlp.weight"].shape == (7 * 16, 16)
    back = from_released(released)
    assert set(back) == set(ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    with pytest.raises(ModelError, match=r"pipe\.dit\.nothing"):
        from_released({"pipe.dit.nothing.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match="without"):
        to_released({"transformer.transformer_blocks.0.attn.to_q.bias": torch.zeros(2)})
    with pytest.raises(ModelError, match="no name"):
        to_released({"transformer.nothing.weight": torch.zeros(1)})


def test_released_sizes_have_11_9_billion_parameters() -> None:
    with torch.device("meta"):
        decoder = VisionDecoder.from_config(*released_decoder_config())
    transformer = sum(p.numel() for p in decoder.transformer.parameters())
    conditioner = sum(p.numel() for p in decoder.conditioner.parameters())
    assert transformer == 11_901_408_320
    assert conditioner == 3584 * 4096 + 4096 * 4096 + 6 * 4096
    assert decoder.config.token_grid == (9, 9)
    with torch.device("meta"):
        editing = VisionDecoder.from_config(*released_decoder_config("editing"))
    assert sum(p.numel() for p in editing.transformer.parameters()) == transformer
    # One Qwen2.5-VL-7B layer (attention with its biases, MLP, two norms), then the projector, 16,384 numbers wide.
    layer = 2 * 3584 * 3584 + 3584 + 2 * (3584 * 512 + 512) + 3 * 3584 * 18944 + 2 * 3584
    projector = 3584 + 3584 * 16384 + 16384 + 16384 + 16384 * 4096 + 4096 + 4096
    assert sum(p.numel() for p in editing.conditioner.parameters()) == layer + projector
    assert editing.reference_grid == (18, 18)


def test_sizes_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ModelError, match="joint_attention_dim"):
        VisionDecoder.from_config(CONFIG, {**TRANSFORMER, "joint_attention_dim": 8})
    with pytest.raises(ModelError, match="guidance"):
        VisionDecoder.from_config(CONFIG, {**TRANSFORMER, "guidance_embeds": False})


def test_a_decoder_to_be_trained_starts_by_predicting_zero(decoder: VisionDecoder) -> None:
    initialise_for_training(decoder, seed=0)
    batch = inputs()
    prediction = decoder(**batch)
    assert torch.equal(prediction, torch.zeros_like(prediction))
    blocks = [*decoder.transformer.transformer_blocks, *decoder.transformer.single_transformer_blocks]
    for block in blocks:
        modulation = block.norm1 if hasattr(block, "norm1") else block.norm
        assert not modulation.linear.weight.any()
    weights = decoder.transformer.x_embedder.weight.clone()
    initialise_for_training(decoder, seed=0)
    assert torch.equal(weights, decoder.transformer.x_embedder.weight)


def test_a_few_steps_lower_the_loss(decoder: VisionDecoder) -> None:
    initialise_for_training(decoder, seed=0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    batch = inputs(4)
    target = batch["latents"].roll(1, dims=0)
    losses = []
    for _ in range(15):
        loss = (decoder(**batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
