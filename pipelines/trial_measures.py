"""What trials are measured by: errors of predicted embeddings by image position, and the demo world's scores.

Everything is measured in fp32, on samples and prompts that no training has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nexusgen import scoring, shapes
from nexusgen.embedding_error import PositionErrors, position_errors
from nexusgen.images import target_image, to_patches
from nexusgen.model.weights import Model
from nexusgen.prompts import Conversation
from nexusgen.replies import ImageMode, Prompt, generate_replies
from nexusgen.sampling import decode_embeddings, predict_embeddings
from nexusgen.schema import TASKS, Task
from nexusgen.writing import SamplingParams
from pipelines.arms import PrefilledArm
from pipelines.stage_data import StageData, StageSource
from pipelines.stages import PreparedConversation

BATCH_SIZE = 32
Scored = Mapping[str, Sequence[float]]  # 0 or 1 of each prompt, by category; "explicit" are explicit captions
Drawn = shapes.Prompt | shapes.Scene


@torch.no_grad()
def measure_errors(stage: PrefilledArm, data: StageData, num_samples: int) -> dict[Task, dict[str, Any]]:
    """Errors on at most `num_samples` held-out samples of each task that draws, see `_errors_of`.

    Teacher-forced: each embedding is predicted from the true beginning of its conversation. Free-running: as at
    inference; only the conversation's text up to the image is given, so that errors are the image's own.
    """
    source: StageSource[Any, Any] = StageSource(data, stage)
    stage.module.eval()
    measured: dict[Task, dict[str, Any]] = {}
    tasks: tuple[Task, ...] = ("generation", "editing")
    for task in tasks:
        of_task = data.validation[data.table.tasks[data.validation] == TASKS.index(task)]
        samples: list[PreparedConversation] = source.samples(of_task[:num_samples])
        if samples:
            measured[task] = _errors_of(stage, samples)
    return measured


def _errors_of(stage: PrefilledArm, samples: Sequence[PreparedConversation]) -> dict[str, Any]:
    """{"n", "mean_embedding", "teacher_forced", "free_running"}; of each of the latter three `mse` and `cosine`, means
    over the samples by position, and `mse_by_sample`, means over the positions. `mean_embedding` is always predicting
    the mean of these very targets, the best constant."""
    count = stage.module.geometry.num_target_tokens
    targets = torch.cat([sample.targets.float()[-count:][None] for sample in samples])
    forced, free = [], []
    for first in range(0, len(samples), BATCH_SIZE):
        batch = samples[first : first + BATCH_SIZE]
        predictions = stage.output(stage.collate(batch)).predictions
        by_sample = predictions.split([len(sample.targets) for sample in batch])
        forced.append(torch.stack([prediction[-count:] for prediction in by_sample]))
        free.append(predict_freely(stage, batch))
    return {
        "n": len(samples),
        "mean_embedding": _by_position(position_errors(targets.mean(dim=0, keepdim=True).expand_as(targets), targets)),
        "teacher_forced": _by_position(position_errors(torch.cat(forced), targets)),
        "free_running": _by_position(position_errors(torch.cat(free), targets)),
    }


def predict_freely(
    stage: PrefilledArm, samples: Sequence[PreparedConversation]
) -> Float[Tensor, "samples tokens hidden"]:
    """What the arm's model predicts at inference for the last image of each sample."""
    model = stage.module
    prompts = [_before_image(sample, model.image_token_id, model.geometry.num_target_tokens) for sample in samples]
    params = SamplingParams(max_new_tokens=model.geometry.num_target_tokens)
    replies = generate_replies(model, prompts, [params] * len(prompts), image_mode=stage.image_mode)
    return torch.stack([reply.images[0] for reply in replies])


def _before_image(sample: PreparedConversation, image_token_id: int, count: int) -> Prompt:
    """The sample's conversation up to the vision_start of its last target. Earlier targets would be read as queries,
    which no sample of the demo world has."""
    whole = sample.conversation
    end = int(np.flatnonzero(whole.labels == image_token_id)[-count])
    labels = np.where(whole.labels == image_token_id, whole.labels, -100)[:end]
    begun = Conversation(whole.input_ids[:end], labels, whole.position_ids[:, :end], int(whole.position_ids[0, end]))
    return Prompt(begun, sample.inputs.float())


def _by_position(errors: PositionErrors) -> dict[str, Any]:
    return {
        "mse": errors.mse.mean(dim=0).tolist(),
        "cosine": errors.cosine.mean(dim=0).tolist(),
        "mse_by_sample": errors.mse.mean(dim=1).tolist(),
    }


@torch.no_grad()
def score_predictions(
    model: Model, image_mode: ImageMode, per_category: int, num_explicit: int, seed: int = 0
) -> dict[str, list[float]]:
    """Held-out prompts, predicted and drawn: 0 or 1 of each, by category.

    The prompts, and the seeds of their noise, are those of `evaluate`.
    """

    def predict(batch: Sequence[tuple[str, Drawn]]) -> Float[Tensor, "prompts tokens hidden"]:
        return predict_embeddings(model, [text for text, _ in batch], image_mode)

    return _score(model, predict, per_category, num_explicit, seed)


@torch.no_grad()
def score_true_embeddings(model: Model, per_category: int, num_explicit: int, seed: int = 0) -> dict[str, list[float]]:
    """The same pictures, drawn from the encoder's embeddings of what the prompts ask for: the decoder's own part."""
    autoregressive = model.autoregressive
    assert autoregressive is not None
    geometry, size = model.manifest.geometry, model.manifest.image_size[0]

    def encode(batch: Sequence[tuple[str, Drawn]]) -> Float[Tensor, "prompts tokens hidden"]:
        scenes = [wanted.scene if isinstance(wanted, shapes.Prompt) else wanted for _, wanted in batch]
        pictures = [target_image(Image.fromarray(shapes.draw(scene, size)), geometry) for scene in scenes]
        return autoregressive.encode_images(*to_patches(pictures, geometry)).unflatten(0, (len(batch), -1))

    return _score(model, encode, per_category, num_explicit, seed)


def _score(
    model: Model,
    embed: Callable[[Sequence[tuple[str, Drawn]]], Float[Tensor, "prompts tokens hidden"]],
    per_category: int,
    num_explicit: int,
    seed: int,
) -> dict[str, list[float]]:
    by_category = shapes.evaluation_prompts(per_category, seed)
    in_rounds = [prompt for start in range(per_category) for prompt in by_category[start::per_category]]
    short: list[tuple[str, Drawn]] = [(prompt.text, prompt) for prompt in in_rounds]
    explicit: list[tuple[str, Drawn]] = [
        (text, scene) for text, _, scene in shapes.explicit_prompts(num_explicit, seed)
    ]
    scores: dict[str, list[float]] = {}
    for asked in (short, explicit):
        for first, batch in _batches(asked):
            seeds = range(seed + first, seed + first + len(batch))
            for (_, wanted), picture in zip(batch, decode_embeddings(model, embed(batch), seeds), strict=True):
                pixels = np.asarray(picture.convert("RGB"))
                if isinstance(wanted, shapes.Prompt):
                    scores.setdefault(wanted.category, []).append(float(scoring.score_prompt(wanted, pixels)))
                else:
                    scores.setdefault("explicit", []).append(float(scoring.score_explicit(wanted, pixels).strict))
    return scores


def _batches(asked: Sequence[tuple[str, Drawn]]) -> Iterator[tuple[int, Sequence[tuple[str, Drawn]]]]:
    for first in range(0, len(asked), BATCH_SIZE):
        yield first, asked[first : first + BATCH_SIZE]
