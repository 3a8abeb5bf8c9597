"""The losses of training, sample by sample, so that an evaluation can tell how sure their means are.

Summed and divided by their counts they are those of `losses` and `flow_matching`; here each sample is divided by its
own count. A sample weighs as much as any other, however long its text is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from jaxtyping import Float
from torch import Tensor

from nexusgen.flow_matching import interpolate, sample_levels, training_table, velocity_target
from nexusgen.model.autoregressive import AutoregressiveOutput, ConversationBatch, target_positions
from nexusgen.prompts import IGNORED_LABEL
from nexusgen.sampling import DrawingParts

LEVELS_PER_SAMPLE = 8  # noise levels that a decoder's loss is the mean of: one alone is mostly noise


def text_losses(output: AutoregressiveOutput, batch: ConversationBatch, image_token_id: int) -> Float[Tensor, " batch"]:
    """Cross entropy of each conversation's learned text tokens, in nats a token; 0 where nothing is learned."""
    labels = batch.labels[:, 1:]
    is_text = (labels != IGNORED_LABEL) & ~target_positions(labels, image_token_id)
    losses = torch.zeros(is_text.shape, device=output.logits.device)
    losses[is_text] = F.cross_entropy(output.logits.float(), output.labels, reduction="none")
    return losses.sum(dim=1) / is_text.sum(dim=1).clamp(min=1)


@torch.no_grad()
def flow_losses(
    parts: DrawingParts,
    embeddings: Float[Tensor, "images tokens hidden"],
    latents: Float[Tensor, "images channels height width"],
    seeds: Sequence[int],
    reference: Float[Tensor, "images reference_tokens hidden"] | None = None,
) -> Float[Tensor, " images"]:
    """The decoder's flow-matching loss of each image: the mean over `LEVELS_PER_SAMPLE` draws of level and noise.

    Levels are drawn from the logit-normal density, weight 1 (`flow_matching.sample_levels`). An image's draws depend on
    its own seed alone.
    """
    table = training_table(parts.scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    total = torch.zeros(len(seeds), device=latents.device)
    for _ in range(LEVELS_PER_SAMPLE):
        drawn = [sample_levels(table, 1, generator, "logit_normal") for generator in generators]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        noise = noise.to(latents.device)
        noisy = interpolate(latents, noise, torch.cat([levels.sigmas for levels in drawn]).to(latents.device))
        timesteps = torch.cat([levels.timesteps for levels in drawn]).to(latents.device)
        velocity = parts.decoder(noisy, timesteps, embeddings, parts.pooled_prompt, reference)
        error = velocity.float() - velocity_target(latents, noise).float()
        total += error.square().flatten(1).mean(dim=1)
    return total / LEVELS_PER_SAMPLE
