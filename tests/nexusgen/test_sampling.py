from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nexusgen.images import Geometry
from nexusgen.model.weights import load_autoregressive
from nexusgen.positions import conversation_positions
from nexusgen.prompts import IGNORED_LABEL, Conversation
from nexusgen.sampling import PostImagePositions, Prompt, generate_replies

GOLDEN = Path(__file__).parent.parent / "golden" / "ar"


@pytest.fixture(scope="module")
def model():
    return load_autoregressive(GOLDEN, Geometry())


@pytest.fixture(scope="module")
def prompts(model):
    """The four recorded prompts, of different lengths and both tasks."""
    vision = load_file(GOLDEN / "vision.safetensors")
    made = []
    for name in ("t2i0", "edit0", "t2i1", "t2i2"):
        ids = load_file(GOLDEN / f"gen_{name}.safetensors")["prompt_ids"].numpy()
        is_edit = name == "edit0"
        embeddings = vision["embeds.edit_source"] if is_edit else torch.zeros(0, model.hidden_size)
        grid = vision["grid_thw.edit_source"][0].tolist()
        grids = [(grid[1] // 2, grid[2] // 2)] if is_edit else []
        positions, following = conversation_positions(ids, grids, model.image_token_id)
        conversation = Conversation(ids, np.full_like(ids, IGNORED_LABEL), positions, following)
        made.append(Prompt(conversation, embeddings))
    return made


def test_a_mixed_left_padded_batch_equals_single_runs(model, prompts):
    together = generate_replies(model, prompts, max_new_tokens=104)
    for prompt, batched in zip(prompts, together, strict=True):
        (alone,) = generate_replies(model, [prompt], max_new_tokens=104)
        assert batched.token_ids == alone.token_ids
        assert len(batched.images) == len(alone.images) == 1
        torch.testing.assert_close(batched.images[0], alone.images[0], atol=3e-6, rtol=0)


def test_text_after_the_image_depends_on_the_positions_chosen(model, prompts):
    options = {"max_new_tokens": 104, "keep_logits": True}
    (released,) = generate_replies(model, prompts[:1], post_image_positions=PostImagePositions.RELEASED, **options)
    (trained,) = generate_replies(model, prompts[:1], post_image_positions=PostImagePositions.TRAINED, **options)
    torch.testing.assert_close(released.images[0], trained.images[0])
    recorded = load_file(GOLDEN / "gen_t2i0.safetensors")
    after = trained.logits[89]  # chosen from the hidden state of vision_end
    torch.testing.assert_close(after, recorded["teacher_logits_after_image"][0], atol=5e-6, rtol=0)
    assert (released.logits[89] - after).abs().max() > 0.05


def test_no_room_for_an_image_ends_the_reply(model, prompts):
    (reply,) = generate_replies(model, prompts[:1], max_new_tokens=20)
    assert reply.finish_reason == "length"
    assert reply.images == []
    assert len(reply.token_ids) <= 20


def test_an_image_can_be_demanded(model, prompts):
    start = model.config.vision_start_token_id
    weight = model.qwen.lm_head.weight
    silenced = weight[start].clone()
    with torch.no_grad():
        weight[start] = 0  # this model would now go on writing
        try:
            (free,) = generate_replies(model, prompts[:1], max_new_tokens=130)
            (demanded,) = generate_replies(model, prompts[:1], max_new_tokens=130, needs_image=True)
        finally:
            weight[start] = silenced
    assert free.images == []
    assert len(demanded.images) == 1
    assert demanded.images[0].shape == (81, model.hidden_size)
