"""The recorded cases of a golden `ar` folder: vision tower, training forward, loss, gradients, greedy generation."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from nexusgen.comparison import FP32_TOLERANCE, GRADIENT_TOLERANCE, TOKEN_MARGIN, Case, compare, compare_exact
from nexusgen.errors import InputError
from nexusgen.images import to_patches
from nexusgen.losses import AUTOREGRESSIVE_WEIGHTS, autoregressive_losses, total_loss
from nexusgen.model.autoregressive import AutoregressiveModel, ConversationBatch, target_positions
from nexusgen.model.released import import_model
from nexusgen.model.weights import load_autoregressive, released_key
from nexusgen.positions import conversation_positions
from nexusgen.prompts import IGNORED_LABEL, Conversation
from nexusgen.replies import PostImagePositions, Prompt, generate_replies

_NAN = float("nan")
# Patches and patch grid of one image; sizes differ from image to image, so their axes have no names.
EncodedImage = tuple[Float[Tensor, "_ _"], Int[Tensor, "_ 3"]]


def verify_autoregressive(folder: Path) -> Iterator[Case]:
    """Run every case recorded in `folder`: weights through the import path, fp32, one sample at a time."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    model = _imported(folder)
    if (folder / "sharded").is_dir():
        yield from _same_weights(model, _imported(folder / "sharded"))
    images: dict[str, EncodedImage] = {}
    for name in ("vision", "vision_targets"):
        if (folder / f"{name}.safetensors").is_file():
            yield from _vision_cases(model, load_file(folder / f"{name}.safetensors"), images)
    for case, recorded in expected.get("train", {}).items():
        path = folder / f"train_{case}.safetensors"
        if path.is_file():
            shown = [_find_image(images, name, path) for name in recorded["images"]]
            yield from _training_cases(f"train.{case}", model, load_file(path), shown, recorded.get("grad_norm_total"))
    for case, recorded in expected.get("generate", {}).items():
        path = folder / f"gen_{case}.safetensors"
        if path.is_file():
            image = _find_image(images, recorded["image"], path) if recorded["image"] else None
            yield from _generation_cases(f"generate.{case}", model, load_file(path), image)


def _find_image(images: dict[str, EncodedImage], name: str, needed_by: Path) -> EncodedImage:
    """Raises: InputError if the set has no such image."""
    if name not in images:
        raise InputError(
            f"{needed_by} was recorded with the image {name!r}, which neither vision.safetensors nor "
            f"vision_targets.safetensors beside it holds (they hold {', '.join(sorted(images)) or 'none'}): add it, or "
            f"leave {needed_by.name} out"
        )
    return images[name]


def _imported(folder: Path) -> AutoregressiveModel:
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        manifest = import_model(model, autoregressive=folder)
        return load_autoregressive(model / "autoregressive", manifest.geometry)


def _require(name: str, recorded: dict[str, Tensor], inputs: tuple[str, ...]) -> None:
    """Raises: InputError naming what a case can't be run without."""
    missing = [key for key in inputs if key not in recorded]
    if missing:
        raise InputError(f"the recorded case {name} lacks {', '.join(missing)}, which it is computed from")


def _same_weights(model: AutoregressiveModel, other: AutoregressiveModel) -> Iterator[Case]:
    differing = [
        n
        for (n, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True)
        if not torch.equal(a, b)
    ]
    yield compare_exact("sharded.differing_tensors", torch.tensor(len(differing)), torch.tensor(0))


def _vision_cases(
    model: AutoregressiveModel,
    recorded: dict[str, Tensor],
    images: dict[str, EncodedImage],
) -> Iterator[Case]:
    for key in sorted(recorded):
        kind, _, name = key.partition(".")
        if kind != "image_uint8":
            continue
        pixels, grid = to_patches([Image.fromarray(recorded[key].numpy())], model.geometry)
        images[name] = (pixels, grid)
        frame = pixels.reshape(len(pixels), 3, -1, model.geometry.patch_size**2)[:, :, 0].flatten(1)
        yield compare_exact(f"vision.{name}.grid", grid, recorded[f"grid_thw.{name}"])
        yield compare(f"vision.{name}.pixels", frame, recorded[f"pixels_frame0.{name}"], FP32_TOLERANCE)
        with torch.no_grad():
            embeddings = model.encode_images(pixels, grid)
        yield compare(f"vision.{name}.embeddings", embeddings, recorded[f"embeds.{name}"], FP32_TOLERANCE)
    for key in sorted(recorded):
        if key.startswith("embeds.joint_"):
            names = key.removeprefix("embeds.joint_").split("+")
            if all(name in images for name in names):
                joint = [images[name] for name in names]
                with torch.no_grad():
                    embeddings = model.encode_images(torch.cat([p for p, _ in joint]), torch.cat([g for _, g in joint]))
                yield compare(f"vision.joint.{'+'.join(names)}", embeddings, recorded[key], FP32_TOLERANCE)


def _training_cases(
    name: str,
    model: AutoregressiveModel,
    recorded: dict[str, Tensor],
    images: list[EncodedImage],
    gradient_norm: float | None,
) -> Iterator[Case]:
    _require(name, recorded, ("input_ids", "attention_mask", "labels"))
    batch = _training_batch(model, recorded, images)
    valid = recorded["attention_mask"].bool()
    if "position_ids" in recorded:
        want = recorded["position_ids"][:, valid].to(torch.int64)
        yield compare_exact(f"{name}.positions", batch.position_ids[:, valid], want)
    output = model(batch)
    targets = batch.target_embeddings.detach()
    for part, key, got in (
        ("inputs", "inputs_embeds", model.embed_conversations(batch)[valid]),
        ("logits", "logits", model.qwen.lm_head(output.hidden)[valid]),
    ):
        if key in recorded:
            yield compare(f"{name}.{part}", got, recorded[key][valid], FP32_TOLERANCE)
    for part, key, got in (
        ("predictions", "pred_image_embeds", output.predictions),
        ("targets", "target_image_embeds", targets),
    ):
        if key in recorded:
            yield compare(f"{name}.{part}", got, recorded[key], FP32_TOLERANCE)
    parts = autoregressive_losses(output.logits, output.labels, output.predictions, targets)
    for part, key in (("ce", "ce"), ("mse", "mse"), ("cosine", "one_minus_cos")):
        if key in recorded:
            yield compare(f"{name}.{part}", parts[part].mean[None], recorded[key], FP32_TOLERANCE)
    loss = total_loss(parts, AUTOREGRESSIVE_WEIGHTS)
    if "loss" in recorded:
        yield compare(f"{name}.loss", loss[None], recorded["loss"], FP32_TOLERANCE)
    model.zero_grad()
    loss.backward()
    gradients = {released_key(n): p.grad for n, p in model.named_parameters()}
    for key in sorted(recorded):
        if key.startswith("grad."):
            released = key.removeprefix("grad.")
            gradient = gradients.get(released)
            want = recorded[key]
            got = gradient if gradient is not None else torch.zeros_like(want)
            yield compare(f"{name}.{key}", got, want, GRADIENT_TOLERANCE)
    if gradient_norm is not None:
        found = torch.stack([g.double().square().sum() for g in gradients.values() if g is not None]).sum().sqrt()
        yield compare(f"{name}.grad_norm_total", found[None], torch.tensor([gradient_norm]), GRADIENT_TOLERANCE)


def _training_batch(
    model: AutoregressiveModel,
    recorded: dict[str, Tensor],
    images: list[EncodedImage],
) -> ConversationBatch:
    """Images come in order of appearance; whether each is a target shows in the labels at its place."""
    input_ids, labels = recorded["input_ids"], recorded["labels"]
    is_image = input_ids == model.image_token_id
    is_target = target_positions(labels, model.image_token_id)
    flags = is_target[is_image]
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    seen = 0
    grids: list[tuple[int, int]] = []
    merge = model.geometry.merge_size
    for pixels, grid in images:
        embeddings = model.encode_images(pixels, grid)
        (targets if flags[seen] else inputs).append(embeddings)
        seen += len(embeddings)
        grids.append((int(grid[0, 1]) // merge, int(grid[0, 2]) // merge))
    positions = torch.zeros(3, *input_ids.shape, dtype=torch.int64)
    for row, ids in enumerate(input_ids):
        length = int(recorded["attention_mask"][row].sum())
        of_row: list[tuple[int, int]] = []
        remaining = int((ids == model.image_token_id).sum())
        while remaining:
            of_row.append(grids.pop(0))
            remaining -= of_row[-1][0] * of_row[-1][1]
        positions[:, row, :length] = torch.from_numpy(
            conversation_positions(ids[:length].numpy(), of_row, model.image_token_id)[0]
        )
    nothing = torch.zeros(0, model.hidden_size)
    return ConversationBatch(
        input_ids=input_ids,
        attention_mask=recorded["attention_mask"],
        labels=labels,
        position_ids=positions,
        input_embeddings=torch.cat(inputs) if inputs else nothing,
        target_embeddings=torch.cat(targets) if targets else nothing,
    )


def _generation_cases(
    name: str,
    model: AutoregressiveModel,
    recorded: dict[str, Tensor],
    image: EncodedImage | None,
) -> Iterator[Case]:
    _require(name, recorded, ("prompt_ids", "sequence", "step_index", "step_logits"))
    prompt_ids = recorded["prompt_ids"].numpy()
    grids: list[tuple[int, int]] = []
    embeddings = nothing = torch.zeros(0, model.hidden_size)
    merge = model.geometry.merge_size
    with torch.no_grad():
        if image is not None:
            embeddings = model.encode_images(*image)
            grids = [(int(image[1][0, 1]) // merge, int(image[1][0, 2]) // merge)]
    sequence = recorded["sequence"]
    positions, next_position = conversation_positions(prompt_ids, grids, model.image_token_id)
    conversation = Conversation(prompt_ids, np.full_like(prompt_ids, IGNORED_LABEL), positions, next_position)
    fed: list[Tensor] = []
    hook = model.qwen.model.language_model.register_forward_pre_hook(
        lambda _, __, inputs: fed.append(inputs["position_ids"][:, 0]), with_kwargs=True
    )
    try:
        (reply,) = generate_replies(
            model,
            [Prompt(conversation, embeddings)],
            max_new_tokens=len(sequence) - len(prompt_ids),
            post_image_positions=PostImagePositions.RELEASED,
            keep_logits=True,
        )
    finally:
        hook.remove()
    if "position_ids_fed" in recorded:
        want = recorded["position_ids_fed"]  # the reference leaves the last token unread
        yield compare_exact(f"{name}.position_ids_fed", torch.cat(fed, dim=1)[:, : want.shape[1]], want)
    new = sequence[len(prompt_ids) :]
    wrong = _decided_mismatches(torch.tensor(reply.token_ids), new, recorded["step_index"], recorded["step_logits"])
    yield compare_exact(f"{name}.token_ids_decided", torch.tensor(wrong), torch.tensor(0))
    # Where the reference leaves a token open, the two may go different ways; what follows can't be compared.
    agreed = _num_agreed(reply.token_ids, new.tolist())
    start = next((i for i, token in enumerate(new.tolist()) if token == model.image_token_id), len(new))
    if "image_embeds" in recorded and start <= agreed:
        got = torch.cat([*reply.images, nothing])
        yield compare(f"{name}.image_embeddings", got, recorded["image_embeds"], FP32_TOLERANCE)
    steps = [step for step in recorded["step_index"].tolist() if step <= agreed]
    want = recorded["step_logits"][: len(steps)]
    finite = want.isfinite()
    chosen = [reply.logits[step] if step < len(reply.logits) else None for step in steps]
    logits = torch.stack([torch.full_like(finite[0], _NAN, dtype=torch.float32) if c is None else c for c in chosen])
    yield compare(f"{name}.step_logits", logits[finite], want[finite], FP32_TOLERANCE)
    if "teacher_position_ids" in recorded:
        yield from _teacher_forced_cases(name, model, recorded, grids, embeddings)


@torch.no_grad()
def _teacher_forced_cases(
    name: str,
    model: AutoregressiveModel,
    recorded: dict[str, Tensor],
    input_grids: list[tuple[int, int]],
    input_embeddings: Float[Tensor, "inputs hidden"],
) -> Iterator[Case]:
    """One forward over the whole generated sequence, at the positions of training."""
    sequence, start = recorded["sequence"], len(recorded["prompt_ids"])
    grids = [*input_grids, model.geometry.target_grid]
    positions, _ = conversation_positions(sequence.numpy(), grids, model.image_token_id)
    yield compare_exact(f"{name}.teacher_positions", torch.from_numpy(positions), recorded["teacher_position_ids"])
    is_target = (sequence == model.image_token_id) & (torch.arange(len(sequence)) >= start)
    batch = ConversationBatch(
        input_ids=sequence[None],
        attention_mask=torch.ones_like(sequence)[None],
        labels=torch.where(is_target, sequence, IGNORED_LABEL)[None],
        position_ids=torch.from_numpy(positions)[:, None],
        input_embeddings=input_embeddings,
        target_embeddings=torch.zeros(int(is_target.sum()), model.hidden_size),
    )
    output = model(batch)
    want = recorded["teacher_image_embeds"]
    yield compare(f"{name}.teacher_image_embeddings", output.predictions, want, FP32_TOLERANCE)
    after = recorded["teacher_logits_after_image"]
    logits = model.qwen.lm_head(output.hidden[0, len(sequence) - len(after) :])
    yield compare(f"{name}.teacher_logits", logits, after, FP32_TOLERANCE)


def _num_agreed(got: Sequence[int], want: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(got, want, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(got), len(want)))


def _decided_mismatches(
    got: Int[Tensor, " got"],
    want: Int[Tensor, " new"],
    steps: Int[Tensor, " steps"],
    logits: Float[Tensor, "steps vocabulary"],
) -> int:
    """Number of new tokens that differ, up to the first step that the reference itself leaves open (a near tie)."""
    if len(got) != len(want):
        return len(want)
    top = logits.topk(2, dim=-1).values
    open_steps = steps[(top[:, 0] - top[:, 1]) <= TOKEN_MARGIN]
    end = int(open_steps[0]) if len(open_steps) else len(want)
    return int((got[:end] != want[:end]).sum())
