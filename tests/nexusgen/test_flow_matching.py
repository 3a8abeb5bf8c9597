"""Noise levels, loss and sampling, against hand-worked values and diffusers' own scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from nexusgen.errors import ShapeError
from nexusgen.flow_matching import (
    Levels,
    euler_sample,
    euler_step,
    flow_loss,
    guide,
    inference_sigmas,
    initial_noise,
    interpolate,
    make_scheduler,
    sample_levels,
    training_table,
    velocity_target,
)


@pytest.fixture(scope="module")
def table() -> Levels:
    return training_table(make_scheduler())


def test_interpolation_runs_from_the_clean_latent_to_noise() -> None:
    clean, noise = torch.full((3, 2, 4, 4), 2.0), torch.full((3, 2, 4, 4), -1.0)
    noisy = interpolate(clean, noise, torch.tensor([0.0, 0.5, 1.0]))
    assert noisy[:, 0, 0, 0].tolist() == [2.0, 0.5, -1.0]
    assert torch.equal(velocity_target(clean, noise), noise - clean)


def test_interpolation_refuses_another_number_of_levels() -> None:
    with pytest.raises(ShapeError, match="sigmas"):
        interpolate(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2))


def test_training_table_falls_from_noise_and_weighs_the_middle(table: Levels) -> None:
    assert len(table.sigmas) == 1000
    assert table.sigmas[0] == 1.0
    assert (table.sigmas.diff() < 0).all()
    assert torch.equal(table.timesteps, table.sigmas * 1000)
    assert table.weights.mean() == pytest.approx(1.0, rel=1e-5)
    assert table.weights.min() == 0
    assert abs(table.timesteps[table.weights.argmax()] - 500) < 2


def test_levels_are_rows_of_the_table_and_repeat_with_the_seed(table: Levels) -> None:
    drawn = sample_levels(table, 500, torch.Generator().manual_seed(3), "uniform")
    again = sample_levels(table, 500, torch.Generator().manual_seed(3), "uniform")
    assert torch.equal(drawn.sigmas, again.sigmas)
    row = (table.sigmas[:, None] == drawn.sigmas).float().argmax(dim=0)
    assert torch.equal(table.sigmas[row], drawn.sigmas)
    assert torch.equal(table.weights[row], drawn.weights)
    assert 400 < row.float().mean() < 600


def test_logit_normal_levels_crowd_the_middle_with_equal_weights(table: Levels) -> None:
    drawn = sample_levels(table, 2000, torch.Generator().manual_seed(0), "logit_normal")
    assert torch.equal(drawn.weights, torch.ones(2000))
    # Half of a standard logit-normal lies between sigmoid(-0.674) = 0.338 and 0.662.
    middle = (drawn.sigmas < table.sigmas[338]) & (drawn.sigmas > table.sigmas[662])
    assert middle.float().mean() == pytest.approx(0.5, abs=0.05)


def test_flow_loss_weighs_samples_and_counts_numbers() -> None:
    prediction, target = torch.zeros(2, 3, 2, 2), torch.stack([torch.ones(3, 2, 2), torch.full((3, 2, 2), 2.0)])
    part = flow_loss(prediction, target, torch.tensor([1.0, 0.5]))["flow"]
    assert part.count == 24
    assert part.sum.item() == 12 * 1.0 + 12 * 4.0 * 0.5


def test_initial_noise_of_a_sample_does_not_depend_on_its_company() -> None:
    alone = initial_noise([7], (4, 2, 2))
    company = initial_noise([1, 7, 9], (4, 2, 2))
    assert torch.equal(alone[0], company[1])


def test_euler_sampling_matches_the_scheduler_s_own_steps() -> None:
    scheduler, noise = make_scheduler(), initial_noise([0, 1], (2, 4, 4))

    def velocity(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return latents * 0.3 + timesteps[:, None, None, None] / 1000

    seen: list[torch.Tensor] = []
    got = euler_sample(velocity, noise, scheduler, 6, lambda step, latents: seen.append(latents))

    reference, latents = FlowMatchEulerDiscreteScheduler(shift=3.0), noise
    reference.set_timesteps(6)
    for timestep in reference.timesteps:
        latents = reference.step(velocity(latents, timestep.expand(2)), timestep, latents).prev_sample
    torch.testing.assert_close(got, latents)
    assert len(seen) == 6
    assert torch.equal(seen[-1], got)


def test_a_perfect_velocity_leads_to_the_clean_latent() -> None:
    clean, noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(5)), initial_noise([0], (2, 4, 4))
    got = euler_sample(lambda *_: velocity_target(clean, noise), noise, make_scheduler(), 4)
    torch.testing.assert_close(got, clean)


def test_samples_at_different_steps_share_a_batch() -> None:
    sigmas = inference_sigmas(make_scheduler(), 4)
    latents, velocity = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    together = euler_step(latents, velocity, sigmas[[0, 2]], sigmas[[1, 3]])
    apart = [
        euler_step(latents[i : i + 1], velocity[i : i + 1], sigmas[[j]], sigmas[[j + 1]]) for i, j in ((0, 0), (1, 2))
    ]
    assert torch.equal(together, torch.cat(apart))


def test_sampling_leaves_the_scheduler_as_it_was() -> None:
    scheduler = make_scheduler()
    before = scheduler.timesteps.clone()
    inference_sigmas(scheduler, 3)
    assert torch.equal(scheduler.timesteps, before)


def test_guidance_goes_from_the_negative_through_the_positive() -> None:
    velocity = guide(lambda x, t: x + 1, lambda x, t: x, true_cfg_scale=3.0)
    assert velocity(torch.zeros(1, 2), torch.zeros(1)).tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sample_has_its_own_guidance_and_those_of_scale_1_one_pass(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(4, 3, 5, generator=generator).to(dtype) for _ in range(2))
    timesteps = torch.arange(4.0)
    passed: list[list[float]] = []

    def unconditional(_latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        passed.append(times.tolist())
        return negative[times.long()]

    def guided(scale: float | torch.Tensor) -> torch.Tensor:
        return guide(lambda *_: positive, unconditional, scale)(torch.zeros(4, 3, 5, dtype=dtype), timesteps)

    scales = [3.3, 1.0, -0.7, 3.0]
    together = guided(torch.tensor(scales))
    assert passed == [[0, 2, 3]]
    for row, scale in enumerate(scales):
        plain = negative + scale * (positive - negative) if scale != 1 else positive
        assert torch.equal(together[row], plain[row])
        assert torch.equal(guided(scale), plain)
    assert together.dtype == dtype
