"""Inference: texts to embeddings to pictures, pictures to texts; replies themselves are written by `replies`.

Each function calls for the half of the model that it needs (`Model.use`), so that all of them work on an offloaded one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nexusgen import defaults
from nexusgen.errors import InputError, ModelError
from nexusgen.flow_matching import euler_sample, initial_noise
from nexusgen.geometry import Geometry
from nexusgen.images import from_pixels, input_image, reference_image, to_patches
from nexusgen.model.autoencoder import ImageAutoencoder, decode_latents, latent_shape
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.decoder import ConditionerKind, VisionDecoder
from nexusgen.model.manifest import Manifest
from nexusgen.model.weights import Model
from nexusgen.prompts import TokenGrid, check_messages, encode_prompt
from nexusgen.replies import ImageMode, generate_replies, stream_replies
from nexusgen.schema import IMAGE_MARK, Message
from nexusgen.text_stream import decode_text
from nexusgen.writing import MAX_TEXT_BEFORE_IMAGE, Piece, Prompt, SamplingParams


def check_prompt(prompt: str) -> None:
    """Raises: InputError for a prompt that is empty, over-long or not Unicode; no model is needed to tell."""
    if not prompt.strip():
        raise InputError("the prompt is empty; say what to draw")
    check_messages([Message("user", prompt)])


def check_instruction(instruction: str) -> None:
    """Raises: InputError for an instruction of an edit, as `check_prompt`."""
    if not instruction.strip():
        raise InputError("the instruction is empty; say what to change")
    check_messages([Message("user", instruction)])


def check_size(size: tuple[int, int]) -> None:
    """Raises: InputError for a picture of a (height, width) in pixels that isn't drawn; no model is needed to tell."""
    height, width = size
    if height <= 0 or width <= 0 or height % 16 or width % 16 or height * width > defaults.MAX_OUTPUT_PIXELS:
        raise InputError(
            f"size {height}x{width}: both sides must be positive multiples of 16, and their product at most "
            f"{defaults.MAX_OUTPUT_PIXELS:,} pixels"
        )


@dataclass(frozen=True)
class DrawingParts:
    """What pictures are drawn with: one of a model's decoders, and what it needs."""

    decoder: VisionDecoder
    autoencoder: ImageAutoencoder
    scheduler: FlowMatchEulerDiscreteScheduler
    pooled_prompt: Float[Tensor, "1 pooled"]
    negative_context: Float[Tensor, "1 tokens context"] | None

    @property
    def latents_dtype(self) -> torch.dtype:
        """Of latents between the steps: the decoder's or, with numerics `exact`, fp32."""
        return self.decoder.dtype if self.decoder.numerics == "reference" else torch.float32


@dataclass(frozen=True)
class DrawingSettings:
    """How a picture is drawn; `size` is (height, width) in pixels."""

    steps: int
    size: tuple[int, int]
    true_cfg_scale: float


def drawing_parts(model: Model, decoder: ConditionerKind) -> DrawingParts:
    """The parts that draw. Raises: ModelError if the folder has no such decoder."""
    model.use("drawing")
    part = model.generation_decoder if decoder == "generation" else model.editing_decoder
    if part is None or model.autoencoder is None or model.scheduler is None:
        raise ModelError(f"{model.folder} has no {decoder} decoder; it holds {', '.join(model.manifest.parts)}")
    if model.pooled_prompt is None:
        raise ModelError(f"{model.folder} has no prompt constants, which its {decoder} decoder needs")
    return DrawingParts(part, model.autoencoder, model.scheduler, model.pooled_prompt, model.negative_context)


def drawing_settings(
    manifest: Manifest,
    decoder: ConditionerKind,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    true_cfg_scale: float | None = None,
) -> DrawingSettings:
    """What a picture is really drawn with: what isn't given is the model's own.

    Raises: InputError for no steps, or a size that isn't drawn.
    """
    height, width = size if size is not None else manifest.image_size
    check_size((height, width))
    num_steps = steps if steps is not None else manifest.num_inference_steps
    if num_steps < 1:
        raise InputError(f"steps {num_steps}: a picture takes at least 1")
    if true_cfg_scale is None:
        true_cfg_scale = defaults.EDITING_TRUE_CFG_SCALE if decoder == "editing" else manifest.true_cfg_scale
    return DrawingSettings(num_steps, (height, width), true_cfg_scale)


def predict_embeddings(
    model: Model, prompts: Sequence[str], image_mode: ImageMode = ImageMode.ONE_PASS
) -> Float[Tensor, "prompts tokens hidden"]:
    """The embeddings that the autoregressive model predicts for a picture of each prompt.

    Raises: ModelError if the folder has no autoregressive part; InputError for an empty or over-long prompt.
    """
    for prompt in prompts:
        check_prompt(prompt)
    requests = _read(model, [drawing_messages(prompt) for prompt in prompts], [])
    return predict_images(model, requests, image_mode)


def predict_edits(
    model: Model, images: Sequence[Image.Image], instructions: Sequence[str]
) -> Float[Tensor, "images tokens hidden"]:
    """The embeddings that the autoregressive model predicts for each image after its instruction.

    Raises: as `predict_embeddings`.
    """
    for instruction in instructions:
        check_instruction(instruction)
    requests = _read(model, [edit_messages(instruction) for instruction in instructions], images)
    return predict_images(model, requests)


def predict_images(
    model: Model, requests: Sequence[Prompt], image_mode: ImageMode = ImageMode.ONE_PASS
) -> Float[Tensor, "prompts tokens hidden"]:
    """The embeddings of the first image of each reply, as at inference: the model writes what precedes it by itself.

    Raises: ModelError if the folder has no autoregressive part; InputError for a prompt that is too long.
    """
    autoregressive, tokenizer = _autoregressive_part(model)
    params = drawing_params(autoregressive.geometry)
    room = params.max_new_tokens
    sampling = [params] * len(requests)
    context = int(autoregressive.text_config.max_position_embeddings)
    for request in requests:
        length = len(request.conversation.input_ids)
        if length + room > context:
            raise InputError(
                f"the prompt has {length:,} tokens, images included; with the {room} of the reply they must fit the "
                f"model's context of {context:,}: shorten it"
            )
    images: dict[int, Tensor] = {}
    for piece in stream_replies(autoregressive, requests, sampling, tokenizer, image_mode=image_mode):
        if piece.image is not None:
            images.setdefault(piece.row, piece.image)
        if len(images) == len(requests):
            break  # nothing is wanted after the image
    return torch.stack([images[row] for row in range(len(requests))])


@torch.no_grad()
def _read(model: Model, conversations: Sequence[Sequence[Message]], images: Sequence[Image.Image]) -> list[Prompt]:
    """Conversations as prompts; `images` are those that their users give, in order. Raises: InputError, ModelError."""
    autoregressive, tokenizer = _autoregressive_part(model)
    geometry = model.manifest.geometry
    num_given = [
        sum(message.content.count(IMAGE_MARK) for message in messages if message.role != "assistant")
        for messages in conversations
    ]
    if sum(num_given) != len(images):
        raise InputError(
            f"the user says {sum(num_given)} {IMAGE_MARK} marks and gives {len(images)} images: mark each image once"
        )
    encoded: list[tuple[TokenGrid, Tensor]] = []
    if images:
        pixels, grids = to_patches([input_image(image, geometry) for image in images], geometry)
        device = autoregressive.vision_head.weight.device
        embeddings = autoregressive.encode_images(pixels.to(device), grids.to(device))
        merged = [(height // geometry.merge_size, width // geometry.merge_size) for _, height, width in grids.tolist()]
        encoded = list(zip(merged, embeddings.split([height * width for height, width in merged]), strict=True))
    prompts = []
    for messages, count in zip(conversations, num_given, strict=True):
        given, encoded = encoded[:count], encoded[count:]
        of_user = iter([grid for grid, _ in given])
        grids_in_order = [
            geometry.target_grid if message.role == "assistant" else next(of_user)
            for message in messages
            for _ in range(message.content.count(IMAGE_MARK))
        ]
        nothing = torch.zeros(0, autoregressive.hidden_size)
        of_images = torch.cat([tokens for _, tokens in given]) if given else nothing
        prompts.append(Prompt(encode_prompt(tokenizer, messages, grids_in_order), of_images))
    return prompts


@torch.no_grad()
def decode_embeddings(
    model: Model,
    embeddings: Float[Tensor, "images tokens hidden"],
    seeds: Sequence[int],
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    true_cfg_scale: float | None = None,
    decoder: ConditionerKind = "generation",
    reference: Float[Tensor, "images reference_tokens hidden"] | None = None,
) -> list[Image.Image]:
    """Pictures from image embeddings by a decoder; picture i depends on seed i alone, not on company.

    Between the steps latents have the dtype of the decoder or, with numerics `exact`, fp32.
    `size` is (height, width) in pixels; what isn't given comes from the model's manifest. `reference` holds the
    embeddings, at reference size, of the pictures that an editing decoder keeps to.
    Raises: ModelError if the folder has no such decoder; InputError for no steps, a size that isn't a multiple of 16,
    or beyond `defaults.MAX_OUTPUT_PIXELS`; as `VisionDecoder.context` and `velocity_function`.
    """
    parts = drawing_parts(model, decoder)
    settings = drawing_settings(model.manifest, decoder, steps, size, true_cfg_scale)
    velocity = parts.decoder.velocity_function(
        parts.decoder.context(embeddings, reference),
        parts.pooled_prompt,
        parts.negative_context,
        settings.true_cfg_scale,
        has_reference=reference is not None,
    )
    noise = initial_noise(seeds, latent_shape(parts.autoencoder, settings.size))
    noise = noise.to(embeddings.device, parts.latents_dtype)
    latents = euler_sample(velocity, noise, parts.scheduler, settings.steps)
    return from_pixels(decode_latents(parts.autoencoder, latents))


def generate_images(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    true_cfg_scale: float | None = None,
) -> list[Image.Image]:
    """A picture for each prompt: predicted embeddings, decoded. Errors as `predict_embeddings`, `decode_embeddings`."""
    check_size(size if size is not None else model.manifest.image_size)
    return decode_embeddings(model, predict_embeddings(model, prompts), seeds, steps, size, true_cfg_scale)


@torch.no_grad()
def edit_images(
    model: Model,
    images: Sequence[Image.Image],
    instructions: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    decoder: ConditionerKind = "editing",
) -> list[Image.Image]:
    """Each image, changed as its instruction says. Errors as `predict_edits` and `decode_embeddings`.

    The editing decoder sees the original beside the predicted embeddings; the generation decoder draws from these
    alone, so that what they don't hold is made anew.
    """
    check_size(size if size is not None else model.manifest.image_size)
    predicted = predict_edits(model, images, instructions)
    reference = encode_references(model, images) if decoder == "editing" else None
    return decode_embeddings(model, predicted, seeds, steps, size, decoder=decoder, reference=reference)


@torch.no_grad()
def encode_references(model: Model, images: Sequence[Image.Image]) -> Float[Tensor, "images tokens hidden"]:
    """The embeddings of images at reference size: what an editing decoder keeps to. Raises: ModelError."""
    autoregressive, _ = _autoregressive_part(model)
    geometry = model.manifest.geometry
    device = autoregressive.vision_head.weight.device
    pixels, grids = to_patches([reference_image(image, geometry, training=False) for image in images], geometry)
    return autoregressive.encode_images(pixels.to(device), grids.to(device)).unflatten(0, (len(images), -1))


def describe(
    model: Model, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int = 128
) -> list[str]:
    """Answers to questions, one about each image. Raises: as `predict_embeddings`."""
    autoregressive, tokenizer = _autoregressive_part(model)
    prompts = _read(model, [question_messages(question) for question in questions], images)
    replies = generate_replies(autoregressive, prompts, max_new_tokens=max_new_tokens)
    return [decode_text(tokenizer, reply.token_ids).strip() for reply in replies]


def respond(
    model: Model, messages: Sequence[Message], images: Sequence[Image.Image] = (), params: SamplingParams | None = None
) -> Iterator[Piece]:
    """The assistant's reply to a whole conversation, piece by piece: text, embeddings of images, and last the reply.

    `images` are those that the user gives, one for each `<image>` in the user's messages, in order. An `<image>` in an
    answer of the assistant is one that it predicted: it stays query embeddings, as it was then. `decode_embeddings`
    draws the image of a piece; of an offloaded model, do so when the reply is finished. Greedy without `params`.
    Raises: as `read_conversation` and `generate_replies`.
    """
    sampling = params if params is not None else SamplingParams()
    prompt = read_conversation(model, messages, images)
    autoregressive, tokenizer = _autoregressive_part(model)
    return stream_replies(autoregressive, [prompt], [sampling], tokenizer)


def read_conversation(model: Model, messages: Sequence[Message], images: Sequence[Image.Image] = ()) -> Prompt:
    """A whole conversation as the prompt of the assistant's next reply. `images` as in `respond`.

    Raises: InputError if the last message isn't the user's, marks and images don't match, or the text is too long;
    ModelError if the folder has no autoregressive part.
    """
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        raise InputError("the conversation must end in a message of the user that says something")
    (prompt,) = _read(model, [messages], images)
    return prompt


def drawing_messages(prompt: str) -> tuple[Message, ...]:
    """A conversation that asks for a picture."""
    return (Message("user", prompt.replace(IMAGE_MARK, " ")),)


def edit_messages(instruction: str) -> tuple[Message, ...]:
    """A conversation that asks for a change of one image."""
    return (Message("user", f"{IMAGE_MARK} {instruction.replace(IMAGE_MARK, ' ')}"),)


def drawing_params(geometry: Geometry) -> SamplingParams:
    """How a reply is drawn of which only the image is wanted: greedy, and no longer than it may take."""
    return SamplingParams(max_new_tokens=MAX_TEXT_BEFORE_IMAGE + 1 + geometry.num_target_tokens, needs_image=True)


def question_messages(question: str) -> tuple[Message, ...]:
    """A conversation that asks about one image."""
    return (Message("user", f"{IMAGE_MARK}\n{question.replace(IMAGE_MARK, ' ')}"),)


def _autoregressive_part(model: Model) -> tuple[AutoregressiveModel, PreTrainedTokenizerBase]:
    model.use("autoregressive")
    if model.autoregressive is None or model.tokenizer is None:
        raise ModelError(f"{model.folder} has no autoregressive part; it holds {', '.join(model.manifest.parts)}")
    return model.autoregressive, model.tokenizer
