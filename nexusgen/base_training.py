"""How the shipped tiny base is made: what Qwen2.5-VL and FLUX.1-dev are to the released model, in the demo world.

The base is a vision tower and language model pre-trained on understanding (captions and questions, both resolutions at
once), a diffusion transformer pre-trained from captions, and an autoencoder. Its query embeddings, vision head and
conditioner stay random: it has seen no image-prediction target, no vision embedding as a condition, and no edit pair.

Two helps that the full-size base doesn't need, both gone from the shipped weights: auxiliary losses read scene and
pixels back from the image embeddings, and the embeddings are normalised per channel during training, which is folded
into the merger's last layer at the end. So stored embeddings have unit variance and the losses need no statistics.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from jaxtyping import Float, Int
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig

from nexusgen import defaults, shapes
from nexusgen.flow_matching import (
    flow_loss,
    interpolate,
    make_scheduler,
    sample_levels,
    training_table,
    velocity_target,
)
from nexusgen.geometry import Geometry
from nexusgen.images import to_patches, to_pixels
from nexusgen.losses import autoregressive_losses
from nexusgen.model.autoencoder import encode_latents, fit_patch_autoencoder, load_autoencoder
from nexusgen.model.autoregressive import AutoregressiveModel, collate_conversations
from nexusgen.model.decoder import DecoderConfig, VisionDecoder, initialise_for_training, save_decoder
from nexusgen.model.tensors import save_tensors
from nexusgen.model.weights import load_autoregressive, save_autoregressive, write_manifest
from nexusgen.prompts import encode_conversation, load_tokenizer
from nexusgen.schema import IMAGE_MARK, Message, Task

# One token covers one cell of the world's 3 x 3: what the language model predicts and the transformer attends to is a
# thing, not a part of four.
GEOMETRY = Geometry(
    patch_size=16, target_size=96, reference_size=192, min_input_pixels=96 * 96, max_input_pixels=192 * 192
)
IMAGE_SIZE = (96, 96)
PICTURES_PER_STEP = {GEOMETRY.target_size: 16, GEOMETRY.reference_size: 8}  # a large one costs four small ones
HIDDEN_SIZE = 128
# Rows take the middle third of the rotary frequencies and columns the lowest. Of 10,000 a step of one column would turn
# them by 0.003 at most, and cells of a 3 x 3 grid couldn't be told apart; of 10 it is 0.24.
ROPE_THETA = 10.0
LATENT_CHANNELS = 24  # at 1/8 of the image's side; 96 numbers per 16-pixel patch
POOLED_SIZE = 64
VOCABULARY_SIZE = 704
SCHEDULER_SHIFT = 1.0  # pictures of 36 tokens: nothing is gained by dwelling on noise, as 1,024 tokens need
SEED = 2504_21356

# Qwen's tokens in Qwen's order; the tiny vocabulary ends with them.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class BaseSchedule(NamedTuple):
    """Lengths of the two trainings, in steps; the shipped base used the defaults."""

    understanding_steps: int = 3500  # vision tower and language model together
    language_steps: tuple[int, ...] = (2500, 2500)  # language model alone, on the finished tower, round by round
    decoder_steps: int = 4000


def make_base(out: Path, schedule: BaseSchedule | None = None) -> None:
    """Train the base and write it as a model folder; about an hour on two cores. Both halves train side by side.

    Raises: OSError if `out` can't be written.
    """
    schedule = schedule if schedule is not None else BaseSchedule()
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(out / "autoregressive", _world_texts(6000))
    rng = np.random.default_rng(SEED)
    scenes = [shapes.sample_scene(rng) for _ in range(4000)]
    pictures = np.stack([shapes.draw(scene, IMAGE_SIZE[0]) for scene in scenes])
    fit_patch_autoencoder(pictures, num_components=4 * LATENT_CHANNELS).save_pretrained(out / "vae")
    make_scheduler(SCHEDULER_SHIFT).save_pretrained(out / "scheduler")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        halves = [
            pool.submit(_train_autoregressive, out, schedule.understanding_steps, schedule.language_steps),
            pool.submit(train_decoder, out, schedule.decoder_steps),
        ]
        for half in halves:
            half.result()
    write_manifest(
        out,
        geometry=GEOMETRY,
        image_size=IMAGE_SIZE,
        num_inference_steps=8,
        true_cfg_scale=1.0,
        lineage={"made_by": "nexusgen make-base", "seed": SEED, **schedule._asdict()},
    )


# ---------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Train a small Qwen2 tokenizer (byte-level BPE, so any text has tokens) and write it in Qwen's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t != "<|endoftext|>"],
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "chat_template": (
            "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + defaults.SYSTEM_PROMPT + "<|im_end|>\n"
            "{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _world_texts(count: int) -> Iterator[str]:
    """Texts for the tokenizer, Chinese cut into words: a token of two words would hide the pairs that are held out.

    Of replies with a picture only what all of them say: their other words are those of questions and instructions.
    """
    yield from ("system\n" + defaults.SYSTEM_PROMPT, "user\n", "assistant\n")
    tasks: tuple[Task, ...] = ("generation", "editing", "understanding")
    for task in tasks:
        for sample in shapes.training_samples(task, 0, count // len(tasks), SEED):
            for message in sample.messages:
                has_picture = message.role == "assistant" and IMAGE_MARK in message.content
                text = (shapes.DRAWN[sample.lang] if has_picture else message.content).replace(IMAGE_MARK, "")
                yield from [text] if sample.lang == "en" else shapes.chinese_words(text)


# ------------------------------------------------------------------------------------ vision tower and language model


def tiny_autoregressive_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
    """The demo's Qwen2.5-VL: 3 vision blocks of 96 and 4 language layers of 128, about 1.4 M parameters."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": VOCABULARY_SIZE,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": False,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": HIDDEN_SIZE,
            "patch_size": GEOMETRY.patch_size,
            "spatial_patch_size": GEOMETRY.patch_size,
            "spatial_merge_size": GEOMETRY.merge_size,
            "window_size": GEOMETRY.target_size,
            "fullatt_block_indexes": [0, 1, 2],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


class _ReadBack(nn.Module):
    """Auxiliary heads on image embeddings, dropped after training: what each cell holds, and the pixels themselves."""

    def __init__(self, num_shapes: int, num_colours: int, num_sizes: int, num_backgrounds: int) -> None:
        super().__init__()
        self.sizes = (num_shapes, num_colours, num_sizes)
        self.cell = nn.Linear(HIDDEN_SIZE, sum(self.sizes))
        self.background = nn.Linear(HIDDEN_SIZE, num_backgrounds)
        self.pixels = nn.Linear(HIDDEN_SIZE, 3 * GEOMETRY.factor**2)

    def forward(
        self,
        embeddings: Float[Tensor, "images tokens hidden"],
        pixels: Float[Tensor, "images 3 height width"],
        labels: Int[Tensor, "images 9 3"],
        backgrounds: Int[Tensor, " images"],
    ) -> tuple[Tensor, Tensor]:
        side = math.isqrt(embeddings.shape[1])
        grid = embeddings.transpose(1, 2).unflatten(2, (side, side))
        # A cell is one token of a small picture, four of a large one; linear, so that what is read is laid out plainly.
        cells = F.adaptive_avg_pool2d(grid, shapes.NUM_CELLS).flatten(2).transpose(1, 2)
        logits = self.cell(cells).split(self.sizes, dim=-1)
        is_full = labels[..., 0] > 0
        loss = F.cross_entropy(logits[0].flatten(0, 1), labels[..., 0].flatten())
        loss = loss + F.cross_entropy(logits[1][is_full], labels[..., 1][is_full])
        loss = loss + F.cross_entropy(logits[2][is_full], labels[..., 2][is_full])
        loss = loss + F.cross_entropy(self.background(embeddings.mean(dim=1)), backgrounds)
        patches = F.unfold(pixels, GEOMETRY.factor, stride=GEOMETRY.factor).transpose(1, 2)
        return loss, F.mse_loss(self.pixels(embeddings), patches)


def _train_autoregressive(folder: Path, understanding_steps: int, language_steps: Sequence[int]) -> None:
    train_understanding(folder, understanding_steps)
    for number, num_steps in enumerate(language_steps):
        train_language(folder, num_steps, number)


def train_understanding(folder: Path, num_steps: int) -> None:
    """Pre-train vision tower and language model on captions and questions about pictures of both sizes."""
    torch.set_num_threads(1)  # a second thread on two cores slows steps of this size down
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(folder / "autoregressive")
    model = AutoregressiveModel(tiny_autoregressive_config(tokenizer), GEOMETRY)
    read_back = _ReadBack(
        1 + len(shapes.SHAPES), 1 + len(shapes.COLOURS), 1 + len(shapes.SIZES), len(shapes.BACKGROUNDS)
    )
    normalise = nn.BatchNorm1d(HIDDEN_SIZE, affine=False, momentum=0.02)
    trained = [p for n, p in model.named_parameters() if not n.startswith(("vision_head", "image_prefill"))]
    groups = parameter_groups([*trained, *read_back.parameters()], weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98), fused=True)
    schedule = cosine_schedule(optimizer, num_steps, warmup_steps=100)
    batches = _understanding_batches(tokenizer, SEED + 1)
    started = time.monotonic()
    for step in range(num_steps):
        if step == int(0.8 * num_steps):
            normalise.eval()  # fixed statistics from here on, as after folding
        pictures, conversations, labels, backgrounds = next(batches)
        # The auxiliary losses lead at first and fade to a fifth: seeing comes before speaking.
        auxiliary_weight = 1.0 - 0.8 * min(1.0, 2 * step / num_steps)
        embeddings: list[Tensor] = []
        auxiliary = torch.zeros(())
        seen = 0
        for images in pictures:
            pixel_values, grid = to_patches([Image.fromarray(image) for image in images], GEOMETRY)
            tokens = normalise(model.encode_images(pixel_values, grid).float())
            embeddings.append(tokens)
            count = len(images)
            place = slice(seen, seen + count)
            seen += count
            cells, pixels = read_back(
                tokens.unflatten(0, (count, -1)),
                to_pixels([Image.fromarray(image) for image in images]),
                labels[place],
                backgrounds[place],
            )
            auxiliary = auxiliary + cells + 4 * pixels
        batch = collate_conversations(
            conversations, torch.cat(embeddings), torch.zeros(0, HIDDEN_SIZE), tokenizer.pad_token_id
        )
        output = model(batch)
        parts = autoregressive_losses(output.logits, output.labels, output.predictions, batch.target_embeddings)
        loss = parts["ce"].mean + auxiliary_weight * auxiliary
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps - 1:
            _report("understanding", step, num_steps, started, ce=parts["ce"].mean, cells=cells, pixels=pixels)
    fold_normalisation(model, normalise)
    save_autoregressive(model, folder / "autoregressive", tokenizer, torch.bfloat16)


def train_language(folder: Path, num_steps: int, round_number: int) -> None:
    """Go on with the language model alone: reading what the finished tower sees is learned last, and cheaply.

    Later rounds are faster and ask everything about each picture: shapes, the hardest, come up in every conversation.
    """
    learning_rate, num_questions = (1e-3, 3) if round_number == 0 else (1.5e-3, len(shapes.QUESTION_KINDS))
    torch.set_num_threads(1)
    torch.manual_seed(SEED + 3 + round_number)
    tokenizer = load_tokenizer(folder / "autoregressive")
    model = load_autoregressive(folder / "autoregressive", GEOMETRY).train()
    trained = [p for n, p in model.named_parameters() if n.startswith(("qwen.model.language_model", "qwen.lm_head"))]
    groups = parameter_groups(trained, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = cosine_schedule(optimizer, num_steps, warmup_steps=100)
    batches = _understanding_batches(tokenizer, SEED + 4 + round_number, num_questions)
    started = time.monotonic()
    for step in range(num_steps):
        pictures, conversations, _, _ = next(batches)
        with torch.no_grad():
            embeddings = [
                model.encode_images(*to_patches([Image.fromarray(image) for image in images], GEOMETRY))
                for images in pictures
            ]
        batch = collate_conversations(
            conversations, torch.cat(embeddings), torch.zeros(0, HIDDEN_SIZE), tokenizer.pad_token_id
        )
        output = model(batch)
        parts = autoregressive_losses(output.logits, output.labels, output.predictions, batch.target_embeddings)
        optimizer.zero_grad()
        parts["ce"].mean.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps - 1:
            _report("language", step, num_steps, started, ce=parts["ce"].mean)
    save_autoregressive(model, folder / "autoregressive", tokenizer, torch.bfloat16)


def fold_normalisation(model: AutoregressiveModel, normalise: nn.BatchNorm1d) -> None:
    """Fold fixed per-channel statistics into the merger's last layer: (W x + b - mean) / std."""
    last = model.qwen.model.visual.merger.mlp[2]
    assert normalise.running_mean is not None
    assert normalise.running_var is not None
    std = (normalise.running_var + normalise.eps).sqrt()
    with torch.no_grad():
        last.weight.div_(std[:, None])
        last.bias.sub_(normalise.running_mean).div_(std)


def _understanding_batches(
    tokenizer: PreTrainedTokenizerBase, seed: int, num_questions: int = 3
) -> Iterator[tuple[Any, ...]]:
    """Batches of (pictures by size, conversations, cell labels, backgrounds): one conversation per picture."""
    rng = np.random.default_rng(seed)
    while True:
        scenes, pictures, conversations = [], [], []
        for size, count in PICTURES_PER_STEP.items():
            group = [shapes.sample_scene(rng) for _ in range(count)]
            scenes += group
            pictures.append([shapes.draw(scene, size) for scene in group])
            side = size // GEOMETRY.factor
            conversations += [
                encode_conversation(tokenizer, _conversation(scene, rng, num_questions), [(side, side)])
                for scene in group
            ]
        labels = torch.from_numpy(np.stack([np.stack(shapes.cell_labels(scene), axis=-1) for scene in scenes]))
        backgrounds = torch.tensor([list(shapes.BACKGROUNDS).index(scene.background) for scene in scenes])
        yield pictures, conversations, labels.long(), backgrounds


def _conversation(scene: shapes.Scene, rng: np.random.Generator, num_questions: int) -> tuple[Message, ...]:
    lang: shapes.Lang = "en" if rng.random() < 0.5 else "zh"
    return shapes.understanding_conversation(scene, lang, rng, num_questions)


# ---------------------------------------------------------------------------------------------- diffusion transformer


def tiny_decoder_config() -> DecoderConfig:
    """The demo's conditioner and FLUX sizes: 1 double and 3 single blocks of 160, about 2.4 M parameters."""
    return DecoderConfig(
        conditioner="generation",
        embedding_dim=HIDDEN_SIZE,
        context_dim=HIDDEN_SIZE,
        token_grid=GEOMETRY.target_grid,
        token_positions="grid",
    )


TRANSFORMER_SIZES: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4 * LATENT_CHANNELS,
    "num_layers": 1,
    "num_single_layers": 3,
    "attention_head_dim": 40,
    "num_attention_heads": 4,
    "joint_attention_dim": HIDDEN_SIZE,
    "pooled_projection_dim": POOLED_SIZE,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 16, 16),
}


class _CaptionEncoder(nn.Module):
    """Stands in for T5 and CLIP while the base's transformer learns to draw from captions; dropped afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY_SIZE, HIDDEN_SIZE)
        self.positions = nn.Embedding(128, HIDDEN_SIZE)
        self.layer = nn.TransformerEncoderLayer(
            HIDDEN_SIZE, 4, 2 * HIDDEN_SIZE, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(HIDDEN_SIZE)
        self.pooled = nn.Linear(HIDDEN_SIZE, POOLED_SIZE)

    def forward(self, ids: Int[Tensor, "batch length"]) -> tuple[Tensor, Tensor]:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = self.norm(self.layer(x))
        return x, self.pooled(x.mean(dim=1))


def train_decoder(folder: Path, num_steps: int, batch_size: int = 32) -> None:
    """Pre-train the diffusion transformer to draw scenes from explicit captions, by flow matching."""
    torch.set_num_threads(1)  # a second thread on two cores slows steps of this size down
    torch.manual_seed(SEED + 2)
    rng = np.random.default_rng(SEED + 2)
    generator = torch.Generator().manual_seed(SEED + 2)
    tokenizer = load_tokenizer(folder / "autoregressive")
    autoencoder = load_autoencoder(folder / "vae")
    decoder = VisionDecoder.from_config(tiny_decoder_config(), TRANSFORMER_SIZES)
    initialise_for_training(decoder, SEED)
    table = training_table(make_scheduler(SCHEDULER_SHIFT))
    captions = _CaptionEncoder()
    trained = [*decoder.transformer.parameters(), *captions.parameters()]
    optimizer = torch.optim.AdamW(parameter_groups(trained, weight_decay=0.01), lr=2e-3, betas=(0.9, 0.98), fused=True)
    schedule = cosine_schedule(optimizer, num_steps, warmup_steps=100)
    started = time.monotonic()
    for step in range(num_steps):
        scenes = [shapes.sample_scene(rng) for _ in range(batch_size)]
        pixels = to_pixels([Image.fromarray(shapes.draw(scene, IMAGE_SIZE[0])) for scene in scenes])
        clean = encode_latents(autoencoder, pixels)
        ids = _caption_ids(tokenizer, scenes, rng)
        noise = torch.randn(clean.shape, generator=generator)
        levels = sample_levels(table, batch_size, generator, "logit_normal")
        context, pooled = captions(ids)
        noisy = interpolate(clean, noise, levels.sigmas)
        text_ids = torch.zeros(ids.shape[1], 3)
        predicted = decoder.velocity(noisy, levels.timesteps, context, pooled, text_ids)
        part = flow_loss(predicted, velocity_target(clean, noise), levels.weights)["flow"]
        optimizer.zero_grad()
        part.mean.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == num_steps - 1:
            _report("decoder", step, num_steps, started, flow=part.mean)
    save_decoder(decoder, folder / "decoders" / "generation", torch.bfloat16)
    with torch.no_grad():
        negative, pooled = captions(torch.full((1, 1), tokenizer.pad_token_id))
    constants = {"pooled_prompt": pooled, "negative_context": negative}
    save_tensors(constants, folder / "prompt_constants.safetensors", torch.bfloat16)


def _caption_ids(
    tokenizer: PreTrainedTokenizerBase, scenes: Sequence[shapes.Scene], rng: np.random.Generator
) -> Int[Tensor, "batch length"]:
    """Explicit captions, padded; one in ten is empty, as the prompt always is once embeddings take over."""
    texts = [
        "" if rng.random() < 0.1 else shapes.explicit_caption(scene, "en" if rng.random() < 0.5 else "zh")
        for scene in scenes
    ]
    encoded: Any = tokenizer(texts, add_special_tokens=False)
    length = max(1, *(len(ids) for ids in encoded["input_ids"]))
    padded = [ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids in encoded["input_ids"]]
    return torch.tensor(padded)


# ------------------------------------------------------------------------------------------------------------- shared


def parameter_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def cosine_schedule(
    optimizer: torch.optim.Optimizer, num_steps: int, warmup_steps: int, final_fraction: float = 0.02
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to `final_fraction` of the learning rate."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _report(part: str, step: int, num_steps: int, started: float, **losses: Tensor) -> None:
    values = " ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
    print(f"{part} {step + 1}/{num_steps} {values} {time.monotonic() - started:.0f} s", flush=True)
