"""Flow matching: noise levels, training table, loss, and Euler sampling; knows nothing of models or files.

A clean latent x_0 and noise are joined by a straight line, x = (1 - sigma) x_0 + sigma noise; the model learns the
velocity noise - x_0 and sampling follows it from sigma 1 to 0. Noise levels come from diffusers'
`FlowMatchEulerDiscreteScheduler`; a timestep is 1000 sigma. Sources: FLUX.1 [dev]; Nexus-Gen's released decoder
training with DiffSynth-Studio's `FlowMatchScheduler` (July 2025); Esser et al., arXiv 2403.03206.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor

from nexusgen import defaults
from nexusgen.errors import ShapeError
from nexusgen.losses import LossPart

FLOW_WEIGHTS: Mapping[str, float] = {"flow": 1.0}

LevelDensity = Literal["uniform", "logit_normal"]

# (noisy latents, timestep per sample in 0..1000) -> velocity
VelocityFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Levels:
    """Noise levels, one entry per sample or per row of a table: sigma in [0, 1], timestep = 1000 sigma, loss weight."""

    sigmas: Float[Tensor, " levels"]
    timesteps: Float[Tensor, " levels"]
    weights: Float[Tensor, " levels"]


def make_scheduler(shift: float = defaults.SCHEDULER_SHIFT) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of both decoders; a `shift` above 1 moves levels towards noise: shift s / (1 + (shift - 1) s)."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=defaults.NUM_TRAIN_TIMESTEPS, shift=shift)


def training_table(scheduler: FlowMatchEulerDiscreteScheduler) -> Levels:
    """The 1000 noise levels of training and their loss weights, from pure noise downwards.

    The weights are a bell over timesteps, y = exp(-2 ((t - 500) / 1000)^2), lowered to touch 0 and scaled to mean 1.
    Source: DiffSynth-Studio, `FlowMatchScheduler.set_timesteps(1000, training=True)`.
    """
    count = scheduler.config.num_train_timesteps
    sigmas = inference_sigmas(scheduler, count)[:-1]
    timesteps = sigmas * count
    bell = torch.exp(-2 * ((timesteps - count / 2) / count) ** 2)
    bell = bell - bell.min()
    return Levels(sigmas, timesteps, bell * (count / bell.sum()))


def sample_levels(table: Levels, num_samples: int, generator: torch.Generator, density: LevelDensity) -> Levels:
    """Draw one noise level per sample.

    `uniform`: rows of the table with equal chance, weighted by the table (the released training, which draws one level
    for a whole batch). `logit_normal`: rows by a standard logit-normal, all weights 1, because the density already
    favours the middle (arXiv 2403.03206, section 3.1).
    """
    rows = len(table.sigmas)
    if density == "uniform":
        index = torch.randint(rows, (num_samples,), generator=generator)
        return Levels(table.sigmas[index], table.timesteps[index], table.weights[index])
    position = torch.sigmoid(torch.randn(num_samples, generator=generator))
    index = (position * rows).long().clamp(max=rows - 1)
    return Levels(table.sigmas[index], table.timesteps[index], torch.ones(num_samples))


def interpolate(
    clean: Float[Tensor, "batch *latent"], noise: Float[Tensor, "batch *latent"], sigmas: Float[Tensor, " levels"]
) -> Float[Tensor, "batch *latent"]:
    """The point between a clean latent and noise: (1 - sigma) clean + sigma noise; sigma in [0, 1], 1 is pure noise.

    Raises: ShapeError if the shapes of latents and noise differ, or there isn't one sigma per sample.
    """
    if clean.shape != noise.shape or sigmas.shape != clean.shape[:1]:
        raise ShapeError(
            f"latents {tuple(clean.shape)}, noise {tuple(noise.shape)} and sigmas {tuple(sigmas.shape)} don't match"
        )
    sigma = _per_sample(sigmas, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_target(
    clean: Float[Tensor, "batch *latent"], noise: Float[Tensor, "batch *latent"]
) -> Float[Tensor, "batch *latent"]:
    """What the model learns to predict: the derivative of `interpolate` by sigma, noise - clean."""
    return noise - clean


def flow_loss(
    prediction: Float[Tensor, "batch *latent"],
    target: Float[Tensor, "batch *latent"],
    weights: Float[Tensor, " batch"],
) -> dict[str, LossPart]:
    """Squared error over all latent numbers, each sample times the weight of its noise level, in fp32."""
    errors = (prediction.float() - target.float()).square()
    return {"flow": LossPart((errors * _per_sample(weights, errors)).sum(), errors.numel())}


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "batch *latent"]:
    """Standard normal noise on the CPU, one generator per sample: no sample depends on its company in the batch."""
    return torch.stack([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def inference_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int) -> Float[Tensor, " levels"]:
    """The `num_steps` + 1 noise levels of sampling, the last one 0. The scheduler itself is left as it was.

    The unshifted levels are handed over, in fp32: bit for bit the reference's table. `set_timesteps(num_steps)` makes
    them in fp64 and differs in the last bit, which the timestep's embedding multiplies by 1000.
    """
    fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    fresh.set_timesteps(sigmas=torch.linspace(fresh.sigma_max, fresh.sigma_min, num_steps).tolist())
    return fresh.sigmas


def euler_step(
    latents: Float[Tensor, "batch *latent"],
    velocity: Float[Tensor, "batch *latent"],
    sigmas: Float[Tensor, " batch"],
    next_sigmas: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *latent"]:
    """One step along the velocity; each sample has its own levels, so samples at different steps share a batch.

    A step to level 0 gives the clean latent that the velocity predicts.
    """
    return latents + _per_sample(next_sigmas - sigmas, latents) * velocity.to(latents.dtype)


def timesteps_at(
    scheduler: FlowMatchEulerDiscreteScheduler, sigmas: Float[Tensor, " levels"]
) -> Float[Tensor, " levels"]:
    """What the model is told of noise levels of sampling."""
    timesteps: Tensor = sigmas * scheduler.config.num_train_timesteps
    return timesteps


def guide(
    conditional: VelocityFunction, unconditional: VelocityFunction, true_cfg_scale: float | Float[Tensor, " batch"]
) -> VelocityFunction:
    """Two-pass guidance: v = v_unconditional + true_cfg_scale (v_conditional - v_unconditional).

    The scale is one for all samples or one for each; where it is 1, the conditional pass is all that there is.
    """

    def velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
        positive = conditional(latents, timesteps)
        scales = torch.as_tensor(true_cfg_scale, dtype=torch.float32).expand(len(latents))
        rows = (scales != 1).nonzero().flatten()
        if not len(rows):
            return positive
        # In fp32 times a smaller dtype, then rounded: to the bit what torch does with a number and a tensor.
        scale = scales[rows].to(latents.device).reshape(-1, *[1] * (latents.ndim - 1))
        rows = rows.to(latents.device)
        negative = unconditional(latents[rows], timesteps[rows])
        difference = positive[rows] - negative
        return positive.index_copy(0, rows, negative + (scale * difference).to(difference.dtype))

    return velocity


def euler_sample(
    velocity: VelocityFunction,
    noise: Float[Tensor, "batch *latent"],
    scheduler: FlowMatchEulerDiscreteScheduler,
    num_steps: int,
    callback: Callable[[int, Float[Tensor, "batch *latent"]], None] | None = None,
) -> Float[Tensor, "batch *latent"]:
    """Follow the velocity from noise to a clean latent in `num_steps` Euler steps.

    Latents keep the dtype of `noise` whatever the dtype of the model (fp32 noise: no rounding between steps).
    `callback(step, latents)` is called after each step, counted from 0.
    """
    sigmas = inference_sigmas(scheduler, num_steps).to(noise.device)
    latents = noise
    for step in range(num_steps):
        here, there = sigmas[step].expand(len(noise)), sigmas[step + 1].expand(len(noise))
        latents = euler_step(latents, velocity(latents, timesteps_at(scheduler, here)), here, there)
        if callback is not None:
            callback(step, latents)
    return latents


def _per_sample(values: Float[Tensor, " batch"], like: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *ones"]:
    """One number per sample, shaped to broadcast over `like`."""
    return values.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))
