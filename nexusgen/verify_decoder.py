"""Equality of the generation decoder with the reference: conditioner, prediction, training step and Euler sampling."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors.torch import load_file
from torch import Tensor

from nexusgen import flow_matching
from nexusgen.comparison import (
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    GRADIENT_TOLERANCE,
    Case,
    compare,
    compare_exact,
    compare_l2,
)
from nexusgen.losses import total_loss
from nexusgen.model.decoder import DecoderConfig, VisionDecoder, load_released_weights
from nexusgen.model.decoder_keys import to_released
from nexusgen.positions import flux_image_ids, flux_token_ids

Recorded = Mapping[str, Shaped[Tensor, "..."]]


def verify_generation_decoder(folder: Path) -> Iterator[Case]:
    """Run every case of a golden set of the generation decoder; the README in the set gives the mathematics."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    recorded = load_file(folder / "io.safetensors")
    decoder = golden_decoder(folder, torch.float32)
    yield from _weights(decoder, folder)
    yield from _prediction(decoder, golden_decoder(folder, torch.bfloat16), recorded, tuple(expected["latent"]))
    yield from _schedule(recorded)
    for index, step in enumerate(expected["train"]):
        yield from _training_step(decoder, recorded, f"train{index}", step["timestep_id"])
    for name in ("euler.nocfg", "euler.cfg3"):
        yield from _sampling(decoder, recorded, name, expected[name])


def golden_decoder(folder: Path, dtype: torch.dtype) -> VisionDecoder:
    """The tiny decoder of a golden set, from its `generation_decoder.bin`."""
    sizes = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["dit"]
    recorded = load_file(folder / "io.safetensors")
    config = DecoderConfig(embedding_dim=recorded["embeds"].shape[-1], context_dim=sizes["ctx"])
    with torch.device("meta"):
        decoder = VisionDecoder.from_config(config, _transformer_sizes(sizes, recorded["pred.latents"].shape[1]))
    load_released_weights(decoder, folder / "generation_decoder.bin", dtype)
    return decoder.eval()


def _transformer_sizes(sizes: Mapping[str, Any], latent_channels: int) -> dict[str, Any]:
    return {
        "in_channels": 4 * latent_channels,
        "num_layers": sizes["nb"],
        "num_single_layers": sizes["ns"],
        "attention_head_dim": sizes["dim"] // sizes["heads"],
        "num_attention_heads": sizes["heads"],
        "joint_attention_dim": sizes["ctx"],
        "pooled_projection_dim": sizes["pooled"],
        "guidance_embeds": True,
        "axes_dims_rope": tuple(sizes["axes"]),
    }


def _weights(decoder: VisionDecoder, folder: Path) -> Iterator[Case]:
    """Released names to ours and back must give the file again, bit for bit."""
    exported = to_released(decoder.state_dict())
    want = load_file(folder / "weights.safetensors")
    names = sorted(want)
    complete = torch.tensor(float(names == sorted(exported)))
    yield compare_exact("generation_decoder.weights.names", complete, torch.ones(()))
    same = [torch.equal(exported[name], want[name]) for name in names if name in exported]
    yield compare_exact("generation_decoder.weights.tensors", torch.tensor(same), torch.ones(len(names)))


@torch.no_grad()
def _prediction(
    decoder: VisionDecoder, decoder_bf16: VisionDecoder, recorded: Recorded, latent_hw: tuple[int, int]
) -> Iterator[Case]:
    context = decoder.context(recorded["embeds"])
    yield compare("generation_decoder.context", context, recorded["context"], FP32_TOLERANCE)
    image_ids = flux_image_ids(latent_hw)
    yield compare_exact("generation_decoder.image_ids", image_ids, recorded["train.image_ids"][0])
    token_ids = flux_token_ids(decoder.config.token_grid, latent_hw, decoder.config.token_positions)
    yield compare_exact("generation_decoder.text_ids", token_ids, recorded["train.text_ids"][0])

    latents, timestep = recorded["pred.latents"], recorded["pred.timestep"].expand(len(recorded["pred.latents"]))
    got = decoder.velocity(latents, timestep, recorded["context"], recorded["pooled_clip"], token_ids)
    yield compare("generation_decoder.pred.out", got, recorded["pred.out"], FP32_TOLERANCE)
    got = decoder_bf16.velocity(latents, timestep, recorded["context"], recorded["pooled_clip"], token_ids)
    yield compare_l2("generation_decoder.pred.out_bf16", got, recorded["pred.out_bf16"], BF16_TOLERANCE)


def _schedule(recorded: Recorded) -> Iterator[Case]:
    scheduler = flow_matching.make_scheduler()
    table = flow_matching.training_table(scheduler)
    for name, got in (
        ("sched1000.timesteps", table.timesteps),
        ("sched1000.weights", table.weights),
        ("sched50.sigmas", flow_matching.inference_sigmas(scheduler, 50)[:-1]),
        ("sched50.timesteps", flow_matching.inference_sigmas(scheduler, 50)[:-1] * 1000),
    ):
        yield compare(f"generation_decoder.{name}", got, recorded[name], FP32_TOLERANCE)


def _training_step(decoder: VisionDecoder, recorded: Recorded, name: str, level: int) -> Iterator[Case]:
    clean, noise = recorded["train.latents"], recorded["train.noise"]
    table = flow_matching.training_table(flow_matching.make_scheduler())
    levels = torch.full((len(clean),), level)
    noisy = flow_matching.interpolate(clean, noise, table.sigmas[levels])
    yield compare(f"generation_decoder.{name}.noisy", noisy, recorded[f"{name}.noisy"], FP32_TOLERANCE)

    decoder.zero_grad()
    prediction = decoder(noisy, table.timesteps[levels], recorded["embeds"], recorded["pooled_clip"])
    yield compare(f"generation_decoder.{name}.pred", prediction, recorded[f"{name}.pred"], FP32_TOLERANCE)
    target = flow_matching.velocity_target(clean, noise)
    parts = flow_matching.flow_loss(prediction, target, table.weights[levels])
    loss = total_loss(parts, flow_matching.FLOW_WEIGHTS)
    yield compare(f"generation_decoder.{name}.loss", loss.reshape(1), recorded[f"{name}.loss"], FP32_TOLERANCE)

    loss.backward()
    gradients = to_released({key: p.grad for key, p in decoder.named_parameters() if p.grad is not None})
    prefix = f"{name}.grad."
    for key in sorted(key for key in recorded if key.startswith(prefix)):
        got = gradients[key.removeprefix(prefix)]
        yield compare(f"generation_decoder.{key}", got, recorded[key], GRADIENT_TOLERANCE)


@torch.no_grad()
def _sampling(decoder: VisionDecoder, recorded: Recorded, name: str, run: Mapping[str, Any]) -> Iterator[Case]:
    scheduler, num_steps = flow_matching.make_scheduler(), run["num_inference_steps"]
    sigmas = flow_matching.inference_sigmas(scheduler, num_steps)
    yield compare(f"generation_decoder.{name}.sigmas", sigmas, recorded[f"{name}.sigmas"], FP32_TOLERANCE)
    start = recorded["euler.start_noise_seed42"]
    noise = flow_matching.initial_noise([42], tuple(start.shape[1:]))
    yield compare_exact(f"generation_decoder.{name}.start_noise", noise, start)

    velocity = decoder.velocity_function(
        decoder.context(recorded["embeds"][:1]), recorded["pooled_clip"], recorded["neg_prompt_emb"], run["cfg_scale"]
    )
    trajectory: list[Tensor] = []
    final = flow_matching.euler_sample(velocity, noise, scheduler, num_steps, lambda _, x: trajectory.append(x))
    got = torch.cat(trajectory)
    yield compare(f"generation_decoder.{name}.trajectory", got, recorded[f"{name}.trajectory"], FP32_TOLERANCE)
    yield compare(f"generation_decoder.{name}.final", final, recorded[f"{name}.final"], FP32_TOLERANCE)
