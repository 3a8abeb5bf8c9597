"""Losses of single samples: summed up, they are those that the training computes of whole batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nexusgen
from nexusgen.losses import autoregressive_losses
from nexusgen.model.autoregressive import collate_conversations
from nexusgen.model.weights import Model, load_model
from nexusgen.prompts import IGNORED_LABEL, encode_conversation
from nexusgen.sample_losses import flow_losses, text_losses
from nexusgen.sampling import drawing_parts
from nexusgen.schema import Message

BASE = Path(nexusgen.__file__).parent / "demo_base"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(BASE)


@torch.inference_mode()
def test_text_losses_add_up_to_that_of_the_batch(model: Model) -> None:
    assert model.autoregressive is not None
    assert model.tokenizer is not None
    geometry = model.manifest.geometry
    talks = [
        [Message("user", "a red circle"), Message("assistant", "Here is the image: <image>")],
        [Message("user", "What is it?"), Message("assistant", "A circle.")],
    ]
    grids = [[geometry.target_grid], []]
    conversations = [encode_conversation(model.tokenizer, *each) for each in zip(talks, grids, strict=True)]
    targets = torch.randn(geometry.num_target_tokens, model.autoregressive.hidden_size)
    batch = collate_conversations(conversations, targets[:0], targets, 0)
    output = model.autoregressive(batch)
    losses = text_losses(output, batch, model.autoregressive.image_token_id)
    counts = [
        sum(label not in (IGNORED_LABEL, model.autoregressive.image_token_id) for label in each.labels[1:])
        for each in conversations
    ]
    whole = autoregressive_losses(output.logits, output.labels, output.predictions, targets)["ce"]
    assert sum(counts) == whole.count
    assert sum(loss * count for loss, count in zip(losses.tolist(), counts, strict=True)) == pytest.approx(
        whole.sum.item(), rel=1e-5
    )
    alone = collate_conversations(conversations[1:], targets[:0], targets[:0], 0)
    again = text_losses(model.autoregressive(alone), alone, model.autoregressive.image_token_id)
    assert again[0].item() == pytest.approx(losses[1].item(), rel=1e-4)


def test_flow_losses_depend_on_their_own_image_and_seed_alone(model: Model) -> None:
    assert model.autoregressive is not None
    parts = drawing_parts(model, "generation")
    generator = torch.Generator().manual_seed(0)
    count = model.manifest.geometry.num_target_tokens
    embeddings = torch.randn(3, count, model.autoregressive.hidden_size, generator=generator)
    latents = torch.randn(3, 24, 12, 12, generator=generator)
    together = flow_losses(parts, embeddings, latents, [1, 2, 3])
    alone = flow_losses(parts, embeddings[1:2], latents[1:2], [2])
    assert alone[0].item() == pytest.approx(together[1].item(), rel=1e-4)
    assert flow_losses(parts, embeddings[1:2], latents[1:2], [5])[0].item() != pytest.approx(
        together[1].item(), rel=1e-3
    )
