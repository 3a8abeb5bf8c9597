from pathlib import Path

import numpy as np
import pytest
import torch

from nexusgen.geometry import Geometry
from nexusgen.losses import AUTOREGRESSIVE_WEIGHTS, autoregressive_losses, total_loss
from nexusgen.model.autoregressive import collate_conversations
from nexusgen.model.weights import hollow_autoregressive, load_autoregressive, released_key
from nexusgen.positions import conversation_positions
from nexusgen.prompts import IGNORED_LABEL, Conversation

GOLDEN = Path(__file__).parent.parent / "golden" / "ar"
IMAGE, PAD = 308, 300


@pytest.fixture(scope="module")
def model():
    return load_autoregressive(GOLDEN, Geometry())


def conversation(parts):
    """`parts`: ("text", n, learned) or ("image", learned) in order."""
    ids, labels, grids = [], [], []
    for kind, *rest in parts:
        new = [IMAGE] * 81 if kind == "image" else list(range(10, 10 + rest[0]))
        grids += [(9, 9)] if kind == "image" else []
        ids += new
        labels += new if rest[-1] else [IGNORED_LABEL] * len(new)
    array = np.array(ids)
    positions, following = conversation_positions(array, grids, IMAGE)
    return Conversation(array, np.array(labels), positions, following)


def run(model, conversations, inputs, targets):
    batch = collate_conversations(conversations, inputs, targets, PAD)
    return batch, model(batch)


def test_a_target_is_predicted_without_being_seen(model):
    torch.manual_seed(0)
    talk = conversation([("text", 5, False), ("text", 2, True), ("image", True), ("text", 1, True)])
    nothing = torch.zeros(0, 64)
    _, first = run(model, [talk], nothing, torch.randn(81, 64))
    _, second = run(model, [talk], nothing, torch.randn(81, 64))
    torch.testing.assert_close(first.predictions, second.predictions, atol=0, rtol=0)
    assert first.predictions.shape == (81, 64)


def test_input_images_are_spliced_in_and_matter(model):
    torch.manual_seed(0)
    talk = conversation([("text", 2, False), ("image", False), ("text", 3, False), ("image", True)])
    _, first = run(model, [talk], torch.randn(81, 64), torch.randn(81, 64))
    _, second = run(model, [talk], torch.randn(81, 64), torch.randn(81, 64))
    assert (first.predictions - second.predictions).abs().max() > 1e-3


def test_padding_changes_nothing(model):
    short = conversation([("text", 3, False), ("text", 4, True)])
    long = conversation([("text", 30, False), ("text", 9, True)])
    nothing = torch.zeros(0, 64)
    _, alone = run(model, [short], nothing, nothing)
    _, together = run(model, [short, long], nothing, nothing)
    torch.testing.assert_close(together.logits[: len(alone.logits)], alone.logits, atol=5e-6, rtol=0)


def test_a_batch_without_targets_gives_zero_gradients_not_none(model):
    nothing = torch.zeros(0, 64)
    batch, output = run(model, [conversation([("text", 3, False), ("text", 4, True)])], nothing, nothing)
    parts = autoregressive_losses(output.logits, output.labels, output.predictions, batch.target_embeddings)
    model.zero_grad()
    total_loss(parts, AUTOREGRESSIVE_WEIGHTS).backward()
    for parameter in (model.vision_head.weight, model.image_prefill_embeds.weight):
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize(
    ("size", "hidden", "count"),
    [
        ("7b", 3584, 8_292_166_656),  # of Qwen2.5-VL, without what Nexus-Gen adds
        ("3b", 2048, 3_754_622_976),  # one matrix is both token embeddings and output layer
    ],
)
def test_released_sizes_fit_the_published_architecture(size, hidden, count):
    model = hollow_autoregressive(Path(__file__).parent / f"qwen2_5_vl_{size}", Geometry())
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    extra = sum(counts.pop(name) for name in ("vision_head.weight", "image_prefill_embeds.weight"))
    assert extra == hidden * hidden + 81 * hidden  # 13.1 M and 4.4 M
    assert sum(counts.values()) == count
    parts = {released_key(name).split(".")[0] for name in counts}
    assert parts == {"visual", "model"} | ({"lm_head"} if size == "7b" else set())
