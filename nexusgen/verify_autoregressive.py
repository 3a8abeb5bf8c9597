"""The recorded cases of a golden `ar` folder: vision tower, training forward, loss, gradients, greedy generation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor

from nexusgen.comparison import (
    FP32_TOLERANCE,
    GRADIENT_TOLERANCE,
    TOKEN_MARGIN,
    Case,
    Recorded,
    compare,
    compare_exact,
    computed,
    not_compared,
    read_expected,
    say_nothing,
)
from nexusgen.errors import InputError
from nexusgen.images import to_patches
from nexusgen.losses import AUTOREGRESSIVE_WEIGHTS, autoregressive_losses, total_loss
from nexusgen.model.autoregressive import AutoregressiveModel, ConversationBatch, target_positions
from nexusgen.model.released import import_model
from nexusgen.model.tensors import weight_files
from nexusgen.model.weights import load_autoregressive, released_key
from nexusgen.positions import conversation_positions
from nexusgen.prompts import IGNORED_LABEL, Conversation
from nexusgen.replies import PostImagePositions, Prompt, generate_replies

_NAN = float("nan")
_VISION_FILES = ("vision.safetensors", "vision_targets.safetensors")
# Patches and patch grid of one image; sizes differ from image to image, so their axes have no names.
EncodedImage = tuple[Float[Tensor, "_ _"], Int[Tensor, "_ 3"]]


class _Training(BaseModel):
    """One entry of `train`: its images in order, and scalars that its file may hold, too."""

    images: tuple[str, ...]
    loss: float | None = None
    ce: float | None = None
    mse: float | None = None
    one_minus_cos: float | None = None
    grad_norm_total: float | None = None


class _Generation(BaseModel):
    """One entry of `generate`: the image in its prompt, and the tokens that follow the prompt."""

    image: str | None = None
    new_tokens: tuple[int, ...] | None = None


class _Expected(BaseModel):
    train: dict[str, _Training] = Field(default_factory=dict)
    generate: dict[str, _Generation] = Field(default_factory=dict)


def verify_autoregressive(folder: Path, skipped: Callable[[str], None] = say_nothing) -> Iterator[Case]:
    """Run every case recorded in `folder`: weights through the import path, fp32, one sample at a time.

    Every tensor of every recorded file is compared, or a case fails in its name. A set may lack files: `skipped` is
    told each case that `expected.json` names and no file holds.
    """
    expected = read_expected(folder, _Expected)
    model = _imported(folder)
    if (folder / "sharded").is_dir():
        yield from _same_weights(model, _imported(folder / "sharded"))
    known = {path.name for path in weight_files(folder)} | {"model.safetensors"}
    images: dict[str, EncodedImage] = {}
    visions = [Recorded(path) for name in _VISION_FILES if (path := folder / name).is_file()]
    for recorded in visions:
        yield from computed(f"vision ({recorded.path.name})", _vision_cases(model, recorded, images))
    for recorded in visions:
        is_whole = len(visions) == len(_VISION_FILES)
        yield from computed(f"vision.joint ({recorded.path.name})", _joint_cases(model, recorded, images, is_whole))
        yield from _unused(recorded)
    for kind, prefix, named in (("train", "train", expected.train), ("generate", "gen", expected.generate)):
        for case, told in named.items():
            path = folder / f"{prefix}_{case}.safetensors"
            if not path.is_file():
                skipped(f"{kind}.{case}: {path.name} isn't in this set")
                continue
            known.add(path.name)
            recorded, name = Recorded(path), f"{kind}.{case}"
            if isinstance(told, _Training):
                shown = [_find_image(images, image, path) for image in told.images]
                yield from computed(name, _training_cases(name, model, recorded, shown, told))
            else:
                image = _find_image(images, told.image, path) if told.image is not None else None
                yield from computed(name, _generation_cases(name, model, recorded, image, told))
            yield from _unused(recorded)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in known | set(_VISION_FILES):
            yield not_compared(path.name, "expected.json names no such case")


def _unused(recorded: Recorded) -> Iterator[Case]:
    for name in recorded.unused:
        reason = "a tensor that it goes with is missing, or the name is unknown"
        yield not_compared(f"{recorded.path.name}: {name}", reason)


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


def _require(recorded: Recorded, inputs: tuple[str, ...]) -> None:
    """Raises: InputError naming what a case can't be run without."""
    missing = [key for key in inputs if key not in recorded]
    if missing:
        raise InputError(f"{recorded.path} lacks {', '.join(missing)}, which its case is computed from")


def _same_weights(model: AutoregressiveModel, other: AutoregressiveModel) -> Iterator[Case]:
    differing = [
        n
        for (n, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True)
        if not torch.equal(a, b)
    ]
    yield compare_exact("sharded.differing_tensors", torch.tensor(len(differing)), torch.tensor(0))


def _vision_cases(
    model: AutoregressiveModel,
    recorded: Recorded,
    images: dict[str, EncodedImage],
) -> Iterator[Case]:
    """Each image by itself; adds it to `images`."""
    for name in sorted(key.removeprefix("image_uint8.") for key in recorded if key.startswith("image_uint8.")):
        pixels, grid = to_patches([Image.fromarray(recorded[f"image_uint8.{name}"].numpy())], model.geometry)
        images[name] = (pixels, grid)
        yield from computed(f"vision.{name}", _image_cases(name, model, recorded, pixels, grid))


def _image_cases(
    name: str,
    model: AutoregressiveModel,
    recorded: Recorded,
    pixels: Float[Tensor, "_ _"],
    grid: Int[Tensor, "_ 3"],
) -> Iterator[Case]:
    frame = pixels.reshape(len(pixels), 3, -1, model.geometry.patch_size**2)[:, :, 0].flatten(1)
    with torch.no_grad():
        embeddings = model.encode_images(pixels, grid)
    for part, key, got, tolerance in (
        ("grid", "grid_thw", grid, 0.0),
        ("pixels", "pixels_frame0", frame, FP32_TOLERANCE),
        ("embeddings", "embeds", embeddings, FP32_TOLERANCE),
    ):
        if f"{key}.{name}" in recorded:
            yield compare(f"vision.{name}.{part}", got, recorded[f"{key}.{name}"], tolerance)
        else:
            yield not_compared(f"vision.{name}.{part}", f"{recorded.path.name} lacks {key}.{name}")


@torch.no_grad()
def _joint_cases(
    model: AutoregressiveModel, recorded: Recorded, images: dict[str, EncodedImage], is_whole: bool
) -> Iterator[Case]:
    """Several images in one call; they may lie in both files, so a set without one of them may lack them."""
    for key in sorted(key for key in recorded if key.startswith("embeds.joint_")):
        names = key.removeprefix("embeds.joint_").split("+")
        if all(name in images for name in names):
            joint = [images[name] for name in names]
            embeddings = model.encode_images(torch.cat([p for p, _ in joint]), torch.cat([g for _, g in joint]))
            yield compare(f"vision.joint.{'+'.join(names)}", embeddings, recorded[key], FP32_TOLERANCE)
        elif not is_whole:
            _ = recorded[key]  # isn't wanted


def _training_cases(
    name: str,
    model: AutoregressiveModel,
    recorded: Recorded,
    images: list[EncodedImage],
    told: _Training,
) -> Iterator[Case]:
    _require(recorded, ("input_ids", "attention_mask", "labels"))
    batch = _training_batch(model, recorded, images)
    valid = recorded["attention_mask"].bool()
    if "position_ids" in recorded:
        want = recorded["position_ids"][:, valid].to(torch.int64)
        yield compare_exact(f"{name}.positions", batch.position_ids[:, valid], want)
    if "image_grid_thw" in recorded:
        grids = torch.cat([torch.zeros(0, 3, dtype=torch.int64), *(grid for _, grid in images)])
        yield compare_exact(f"{name}.grids", grids, recorded["image_grid_thw"])
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
    loss = total_loss(parts, AUTOREGRESSIVE_WEIGHTS)
    losses = {"ce": parts["ce"].mean, "mse": parts["mse"].mean, "one_minus_cos": parts["cosine"].mean, "loss": loss}
    for key, value in losses.items():
        if key in recorded:
            yield compare(f"{name}.{key}", value[None], recorded[key], FP32_TOLERANCE)
        stated = getattr(told, key)
        if stated is not None:
            yield compare(f"{name}.expected.{key}", value, torch.tensor(stated), FP32_TOLERANCE)
    model.zero_grad()
    loss.backward()
    # A head that is tied to the token embeddings is one parameter of two names.
    gradients = {released_key(n): p.grad for n, p in model.named_parameters(remove_duplicate=False)}
    for key in sorted(key for key in recorded if key.startswith("grad.")):
        released = key.removeprefix("grad.")
        if released in gradients:
            gradient, want = gradients[released], recorded[key]
            got = gradient if gradient is not None else torch.zeros_like(want)
            yield compare(f"{name}.{key}", got, want, GRADIENT_TOLERANCE)
    if told.grad_norm_total is not None:
        found = torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None])
        want = torch.tensor([told.grad_norm_total])
        yield compare(f"{name}.grad_norm_total", found.sum().sqrt()[None], want, GRADIENT_TOLERANCE)


def _training_batch(
    model: AutoregressiveModel,
    recorded: Recorded,
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
    recorded: Recorded,
    image: EncodedImage | None,
    told: _Generation,
) -> Iterator[Case]:
    _require(recorded, ("prompt_ids", "sequence", "step_index", "step_logits"))
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
    if "image_grid_thw" in recorded:
        given = image[1] if image is not None else torch.zeros(0, 3, dtype=torch.int64)
        yield compare_exact(f"{name}.grids", given, recorded["image_grid_thw"])
    new = sequence[len(prompt_ids) :]
    if told.new_tokens is not None:
        yield compare_exact(f"{name}.expected.new_tokens", torch.tensor(told.new_tokens), new)
    wrong = _decided_mismatches(torch.tensor(reply.token_ids), new, recorded["step_index"], recorded["step_logits"])
    yield compare_exact(f"{name}.token_ids_decided", torch.tensor(wrong), torch.tensor(0))
    # Where the reference leaves a token open, the two may go different ways; what follows can't be compared.
    agreed = _num_agreed(reply.token_ids, new.tolist())
    start = next((i for i, token in enumerate(new.tolist()) if token == model.image_token_id), len(new))
    if "image_embeds" in recorded:
        want = recorded["image_embeds"]
        if start <= agreed:
            yield compare(f"{name}.image_embeddings", torch.cat([*reply.images, nothing]), want, FP32_TOLERANCE)
    steps = [step for step in recorded["step_index"].tolist() if step <= agreed]
    if steps:
        want = recorded["step_logits"][: len(steps)]
        chosen = [reply.logits[step] if step < len(reply.logits) else None for step in steps]
        unlike = torch.full_like(want[0], _NAN, dtype=torch.float32)
        logits = torch.stack([unlike if c is None else c for c in chosen])
        is_open = want != -torch.inf  # what the reference forbids is left out; a NaN isn't
        yield compare(f"{name}.step_logits", logits[is_open], want[is_open], FP32_TOLERANCE)
    yield from _teacher_forced_cases(name, model, recorded, grids, embeddings)


@torch.no_grad()
def _teacher_forced_cases(
    name: str,
    model: AutoregressiveModel,
    recorded: Recorded,
    input_grids: list[tuple[int, int]],
    input_embeddings: Float[Tensor, "inputs hidden"],
) -> Iterator[Case]:
    """One forward over the whole generated sequence, at the positions of training."""
    keys = ("teacher_position_ids", "teacher_image_embeds", "teacher_logits_after_image")
    if not any(key in recorded for key in keys):
        return
    sequence, start = recorded["sequence"], len(recorded["prompt_ids"])
    grids = [*input_grids, model.geometry.target_grid]
    positions, _ = conversation_positions(sequence.numpy(), grids, model.image_token_id)
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
    num_after = len(recorded[keys[2]]) if keys[2] in recorded else 0
    logits = model.qwen.lm_head(output.hidden[0, len(sequence) - num_after :])
    for part, key, got, tolerance in (
        ("teacher_positions", keys[0], torch.from_numpy(positions), 0.0),
        ("teacher_image_embeddings", keys[1], output.predictions, FP32_TOLERANCE),
        ("teacher_logits", keys[2], logits, FP32_TOLERANCE),
    ):
        if key in recorded:
            yield compare(f"{name}.{part}", got, recorded[key], tolerance)
        else:
            yield not_compared(f"{name}.{part}", f"{recorded.path.name} lacks {key}")


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
