"""Inference: replies with text and images from the autoregressive model, pictures from embeddings.

Replies are decoded for a whole batch on one KV cache: text token by token, each image in one pass. Rows that have
reached an image wait, their cache slots masked, until every live row waits or is done; then one block of query
embeddings predicts all waiting images at once. Source: Nexus-Gen, arXiv 2504.21356, section 3.2; that a single pass
equals the released token-by-token loop follows from inputs that don't depend on outputs, and `verify` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from nexusgen.errors import InputError, ModelError
from nexusgen.flow_matching import euler_sample, initial_noise
from nexusgen.images import from_pixels, input_image, to_patches
from nexusgen.model.autoencoder import decode_latents, latent_shape
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.weights import Model
from nexusgen.positions import image_offsets
from nexusgen.prompts import Conversation, encode_prompt
from nexusgen.schema import IMAGE_MARK, Message

MAX_TEXT_BEFORE_IMAGE = 32  # tokens: when an image is demanded, the model may say this much before it
MAX_NEW_TOKENS = 512


class PostImagePositions(StrEnum):
    """Positions of the text after a generated image.

    RELEASED counts the image as one position per token, as the released inference does; TRAINED as its grid's larger
    side, as training does. The image's own embeddings are the same in both.
    """

    RELEASED = "released"
    TRAINED = "trained"


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and the embeddings of its images, in order."""

    conversation: Conversation
    input_embeddings: Float[Tensor, "tokens hidden"]


@dataclass
class Reply:
    """One generated reply. `logits[i]` are the raw logits at token i (None at image tokens)."""

    token_ids: list[int] = field(default_factory=list)
    images: list[Float[Tensor, "tokens hidden"]] = field(default_factory=list)
    logits: list[Float[Tensor, " vocabulary"] | None] = field(default_factory=list)
    finish_reason: str = ""


class _Row:
    """The state of one reply while its batch is decoded."""

    def __init__(self, next_position: int) -> None:
        self.reply = Reply()
        self.next_position = next_position
        self.is_waiting = False
        self.is_done = False

    @property
    def is_writing(self) -> bool:
        return not (self.is_waiting or self.is_done)

    def finish(self, reason: str) -> None:
        self.is_done = True
        self.reply.finish_reason = reason


class _Decoder:
    """Greedy decoding of a batch of prompts, padded on the left, over one KV cache."""

    def __init__(
        self,
        model: AutoregressiveModel,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        post_image_positions: PostImagePositions,
        needs_image: bool,
        keep_logits: bool,
    ) -> None:
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.post_image_positions = post_image_positions
        self.needs_image = needs_image
        self.keep_logits = keep_logits
        self.device = model.vision_head.weight.device
        self.rows = [_Row(p.conversation.next_position) for p in prompts]
        config = model.config
        self.vision_start, self.vision_end = int(config.vision_start_token_id), int(config.vision_end_token_id)
        eos = model.text_config.eos_token_id
        self.end_tokens = set(eos if isinstance(eos, list) else [eos])
        self.cache = DynamicCache()
        self.mask = torch.zeros(len(prompts), 0, dtype=torch.int64, device=self.device)
        self.last_hidden = self._read_prompts(prompts)

    def run(self) -> list[Reply]:
        while not all(row.is_done for row in self.rows):
            self._choose()
            if any(row.is_writing for row in self.rows):
                self._feed_text()
            elif any(row.is_waiting for row in self.rows):
                self._feed_images()
        return [row.reply for row in self.rows]

    def _read_prompts(self, prompts: Sequence[Prompt]) -> Float[Tensor, "batch hidden"]:
        length = max(len(p.conversation.input_ids) for p in prompts)
        shape = (len(prompts), length)
        input_ids = np.full(shape, self.vision_end, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        positions = np.zeros((3, *shape), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            start = length - len(prompt.conversation.input_ids)
            input_ids[row, start:] = prompt.conversation.input_ids
            mask[row, start:] = 1
            positions[:, row, start:] = prompt.conversation.position_ids
        ids = torch.from_numpy(input_ids).to(self.device)
        embeddings = self.model.embed_tokens(ids)
        images = torch.cat([p.input_embeddings for p in prompts]).to(embeddings)
        embeddings = embeddings.masked_scatter((ids == self.model.image_token_id)[..., None], images)
        return self._feed(embeddings, torch.from_numpy(positions), torch.from_numpy(mask))[:, -1]

    def _feed(
        self,
        embeddings: Float[Tensor, "batch length hidden"],
        positions: Tensor,
        mask: Tensor,
    ) -> Float[Tensor, "batch length hidden"]:
        self.mask = torch.cat([self.mask, mask.to(self.device)], dim=1)
        return self.model.run_layers(embeddings, positions.to(self.device), self.mask, self.cache)

    def _choose(self) -> None:
        """Append the next token to every row that is writing, and move rows on to waiting or done."""
        logits = self.model.qwen.lm_head(self.last_hidden).float()
        if self.keep_logits:
            raw = logits.clone()
        logits[:, self.vision_end] = -torch.inf  # only ever forced, after an image
        tokens = logits.argmax(dim=-1).tolist()
        for index, row in enumerate(self.rows):
            if not row.is_writing:
                continue
            reply = row.reply
            if len(reply.token_ids) >= self.max_new_tokens:
                row.finish("length")
                continue
            token = tokens[index]
            if self.needs_image and not reply.images:
                has_said_enough = len(reply.token_ids) >= MAX_TEXT_BEFORE_IMAGE
                token = self.vision_start if token in self.end_tokens or has_said_enough else token
            reply.token_ids.append(token)
            reply.logits.append(raw[index] if self.keep_logits else None)
            if token in self.end_tokens:
                row.finish("stop")
            elif token == self.vision_start:
                has_room = len(reply.token_ids) + self.model.geometry.num_target_tokens <= self.max_new_tokens
                if has_room:
                    row.is_waiting = True
                else:
                    row.finish("length")

    def _feed_text(self) -> None:
        """Feed the last token of each writing row; the slots of all others are masked."""
        tokens = [row.reply.token_ids[-1] if row.is_writing else self.vision_end for row in self.rows]
        positions = torch.tensor([row.next_position for row in self.rows]).expand(3, 1, -1).transpose(1, 2)
        mask = torch.tensor([[int(row.is_writing)] for row in self.rows])
        embeddings = self.model.embed_tokens(torch.tensor(tokens, device=self.device)[:, None])
        self.last_hidden = self._feed(embeddings, positions, mask)[:, -1]
        for row in self.rows:
            row.next_position += int(row.is_writing)

    def _feed_images(self) -> None:
        """Feed `vision_start, queries, vision_end` to every waiting row: one pass predicts each one's whole image."""
        count = self.model.geometry.num_target_tokens
        height, width = self.model.geometry.target_grid
        offsets = torch.from_numpy(image_offsets(height, width))
        positions = torch.zeros(3, len(self.rows), count + 2, dtype=torch.int64)
        for index, row in enumerate(self.rows):
            start = row.next_position
            after = (
                start + 1 + (count if self.post_image_positions is PostImagePositions.RELEASED else max(height, width))
            )
            positions[:, index, 0] = start
            positions[:, index, 1:-1] = start + 1 + offsets
            positions[:, index, -1] = after
            if row.is_waiting:
                row.next_position = after + 1
        mask = torch.tensor([[int(row.is_waiting)] * (count + 2) for row in self.rows])
        batch = len(self.rows)
        ends = self.model.embed_tokens(torch.tensor([[self.vision_start, self.vision_end]], device=self.device))
        queries = self.model.image_prefill_embeds.weight[None].to(ends.dtype)
        block = torch.cat([ends[:, :1], queries, ends[:, 1:]], dim=1).expand(batch, -1, -1)
        hidden = self._feed(block, positions, mask)
        predictions = self.model.vision_head(hidden[:, :count])
        self.last_hidden = hidden[:, -1]
        for index, row in enumerate(self.rows):
            if row.is_waiting:
                forced = [self.model.image_token_id] * count + [self.vision_end]
                row.reply.images.append(predictions[index])
                room = self.max_new_tokens - len(row.reply.token_ids)
                row.reply.token_ids += forced[:room]
                at_end = self.model.qwen.lm_head(hidden[index, count]).float() if self.keep_logits else None
                row.reply.logits += [*([None] * count), at_end][:room]
                row.is_waiting = False


@torch.no_grad()
def generate_replies(
    model: AutoregressiveModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    post_image_positions: PostImagePositions = PostImagePositions.RELEASED,
    needs_image: bool = False,
    keep_logits: bool = False,
) -> list[Reply]:
    """Greedy replies to a batch of prompts. `max_new_tokens` counts image tokens too.

    `needs_image` makes a reply that would end without an image draw one. A reply with no room left for an image that
    it has begun ends with finish reason `length`.
    """
    return _Decoder(model, prompts, max_new_tokens, post_image_positions, needs_image, keep_logits).run()


def predict_embeddings(model: Model, prompts: Sequence[str]) -> Float[Tensor, "prompts tokens hidden"]:
    """The embeddings that the autoregressive model predicts for a picture of each prompt.

    Raises: ModelError if the folder has no autoregressive part; InputError for an empty or over-long prompt.
    """
    autoregressive, tokenizer = _autoregressive_part(model)
    requests = []
    nothing = torch.zeros(0, autoregressive.hidden_size)
    for prompt in prompts:
        if not prompt.strip():
            raise InputError("the prompt is empty; say what to draw")
        message = Message("user", prompt.replace(IMAGE_MARK, " "))
        requests.append(Prompt(encode_prompt(tokenizer, [message], []), nothing))
    # Nothing is wanted after the image; a model that has not learned to stop would write on to the limit.
    room = MAX_TEXT_BEFORE_IMAGE + 1 + autoregressive.geometry.num_target_tokens
    replies = generate_replies(autoregressive, requests, needs_image=True, max_new_tokens=room)
    return torch.stack([reply.images[0] for reply in replies])


@torch.no_grad()
def decode_embeddings(
    model: Model,
    embeddings: Float[Tensor, "images tokens hidden"],
    seeds: Sequence[int],
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    true_cfg_scale: float | None = None,
) -> list[Image.Image]:
    """Pictures from image embeddings by the generation decoder; picture i depends on seed i alone, not on company.

    `size` is (height, width) in pixels; what isn't given comes from the model's manifest.
    Raises: ModelError if the folder has no decoder; InputError for a size that isn't a multiple of 16.
    """
    if model.generation_decoder is None or model.autoencoder is None or model.scheduler is None:
        raise ModelError(f"{model.folder} has no generation decoder; it holds {', '.join(model.manifest.parts)}")
    height, width = size if size is not None else model.manifest.image_size
    if height <= 0 or width <= 0 or height % 16 or width % 16:
        raise InputError(f"size {height}x{width}: both sides must be positive multiples of 16")
    assert model.pooled_prompt is not None  # loaded with the decoder
    velocity = model.generation_decoder.velocity_function(
        model.generation_decoder.context(embeddings),
        model.pooled_prompt,
        model.negative_context,
        true_cfg_scale if true_cfg_scale is not None else model.manifest.true_cfg_scale,
    )
    noise = initial_noise(seeds, latent_shape(model.autoencoder, (height, width)))
    num_steps = steps if steps is not None else model.manifest.num_inference_steps
    latents = euler_sample(velocity, noise.to(embeddings), model.scheduler, num_steps)
    return from_pixels(decode_latents(model.autoencoder, latents))


def generate_images(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    true_cfg_scale: float | None = None,
) -> list[Image.Image]:
    """A picture for each prompt: predicted embeddings, decoded. Errors as `predict_embeddings`, `decode_embeddings`."""
    return decode_embeddings(model, predict_embeddings(model, prompts), seeds, steps, size, true_cfg_scale)


@torch.no_grad()
def describe(
    model: Model, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int = 128
) -> list[str]:
    """Answers to questions, one about each image. Raises: as `predict_embeddings`."""
    autoregressive, tokenizer = _autoregressive_part(model)
    geometry = model.manifest.geometry
    device = autoregressive.vision_head.weight.device
    pixels, grids = to_patches([input_image(image, geometry) for image in images], geometry)
    embeddings = autoregressive.encode_images(pixels.to(device), grids.to(device))
    prompts = []
    for question, (_, height, width) in zip(questions, grids.tolist(), strict=True):
        grid = (height // geometry.merge_size, width // geometry.merge_size)
        message = Message("user", f"{IMAGE_MARK}\n{question.replace(IMAGE_MARK, ' ')}")
        count = grid[0] * grid[1]
        prompts.append(Prompt(encode_prompt(tokenizer, [message], [grid]), embeddings[:count]))
        embeddings = embeddings[count:]
    replies = generate_replies(autoregressive, prompts, max_new_tokens=max_new_tokens)
    return [str(tokenizer.decode(reply.token_ids, skip_special_tokens=True)).strip() for reply in replies]


def _autoregressive_part(model: Model) -> tuple[AutoregressiveModel, PreTrainedTokenizerBase]:
    if model.autoregressive is None or model.tokenizer is None:
        raise ModelError(f"{model.folder} has no autoregressive part; it holds {', '.join(model.manifest.parts)}")
    return model.autoregressive, model.tokenizer
