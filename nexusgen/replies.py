"""Replies of the autoregressive model: text and image embeddings, for a batch of prompts or along one conversation.

A whole batch is decoded on one KV cache: text token by token, each image in one pass. Rows that have reached an image
wait, their cache slots masked, until every live row waits or is done; then one block of query embeddings predicts all
waiting images at once. Source: Nexus-Gen, arXiv 2504.21356, section 3.2; that a single pass equals the released
token-by-token loop follows from inputs that don't depend on outputs, and `verify` shows it.

In a conversation, a picture that the assistant has made stays what it was when it was predicted: query embeddings at
its positions, as at the targets of training. A picture that the user gives is its vision embeddings. So a conversation
continued on its cache (`Chat`) equals one read anew from its start (`encode_prompt`); and a user who wants the model to
look at a picture that it has made gives it back in a message, which is what the editing data does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from nexusgen.errors import InputError, ShapeError
from nexusgen.messages import plain_text
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.positions import image_offsets
from nexusgen.prompts import Conversation, TokenGrid, encode_prompt, encode_turn
from nexusgen.schema import IMAGE_MARK, Message

MAX_TEXT_BEFORE_IMAGE = 32  # tokens: when an image is demanded, the model may say this much before it
MAX_NEW_TOKENS = 512
_UNFINISHED = "\ufffd"  # what bytes that don't make a whole character are decoded to


class ImageMode(StrEnum):
    """How the embeddings of an image are predicted.

    ONE_PASS feeds all query embeddings at once. SEQUENTIAL feeds them one by one over the KV cache, as the released
    inference does, with the same result. NAIVE is plain autoregression: the next input is the last predicted embedding
    instead of a query embedding. Source: arXiv 2504.21356, section 3.2, which compares NAIVE with the others.
    """

    ONE_PASS = "one_pass"
    SEQUENTIAL = "sequential"
    NAIVE = "naive"


class PostImagePositions(StrEnum):
    """Positions of the text after a generated image.

    RELEASED counts the image as one position per token, as the released inference does; TRAINED as its grid's larger
    side, as training does. The image's own embeddings are the same in both.
    """

    RELEASED = "released"
    TRAINED = "trained"


@dataclass(frozen=True)
class SamplingParams:
    """How one reply is drawn. Raises: InputError for a value out of range.

    `max_new_tokens` counts image tokens too. A `temperature` of 0 is greedy; above it, tokens are drawn from the most
    likely ones that together reach `top_p`, with the row's own random numbers, so that a reply doesn't depend on its
    company. The reply ends before the first of the strings in `stop`. `needs_image` makes a reply that would end
    without an image, or that says a lot before it, draw one; a stop string ends it even so.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    needs_image: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must be from 0 to 2**63 - 1")
        if not all(self.stop):
            raise InputError("stop holds an empty string, which every text contains; leave it out")


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt, and the embeddings of the images that the user gives in it, in order.

    Images that the assistant has made are in `conversation.labels` (see `encode_prompt`) and need no embeddings. A
    prompt that ends in `<|vision_start|>` has the reply begin with the image's embeddings.
    """

    conversation: Conversation
    input_embeddings: Float[Tensor, "tokens hidden"]


@dataclass
class Reply:
    """One generated reply.

    `logits[i]` are the raw logits at token i, None at image tokens and where they weren't asked for. `texts` is what
    the reply says before, between and after its images, without control tokens; it stays empty without a tokenizer.
    `finish_reason` is `stop` (the model's own end, or a stop string) or `length`. A reply that ends at a stop string
    holds the tokens that precede it; where it begins within a token, `texts` has the rest.
    """

    token_ids: list[int] = field(default_factory=list)
    images: list[Float[Tensor, "tokens hidden"]] = field(default_factory=list)
    logits: list[Float[Tensor, " vocabulary"] | None] = field(default_factory=list)
    texts: list[str] = field(default_factory=lambda: [""])
    finish_reason: str = ""

    @property
    def content(self) -> str:
        """The reply as a message's content: its text, with `<image>` at each image."""
        return IMAGE_MARK.join(plain_text(text) for text in self.texts)


@dataclass(frozen=True)
class Piece:
    """The next thing that the reply in `row` of a batch says: some text, or an image, or that it is finished."""

    row: int
    text: str = ""
    image: Float[Tensor, "tokens hidden"] | None = None
    reply: Reply | None = None


def sample_token(
    logits: Float[Tensor, " vocabulary"], temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """Draw a token at `temperature` > 0 from the smallest set of most likely tokens that reaches probability `top_p`.

    One random number chooses along the vocabulary's order, not by likelihood: there, tokens that are nearly equally
    likely would change places with the rounding of another batch size.
    """
    scaled = (logits.cpu().double() - logits.max().item()) / temperature
    probabilities = scaled.softmax(dim=0)
    likely, order = probabilities.sort(descending=True, stable=True)
    dropped = order[likely.cumsum(dim=0) - likely >= top_p]
    cumulative = probabilities.index_fill(0, dropped, 0).cumsum(dim=0)
    chosen = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    # The product may round up to the sum itself, beyond every token: then the last likely one is meant.
    return min(int((cumulative <= chosen).sum()), int(cumulative.argmax()))


class TextStream:
    """Tokens as text, given out as soon as it is certain: in whole characters, and never a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []  # tokens of a character that isn't finished
        self._held = ""  # may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """The text that one more token makes certain; sets `is_stopped` if a stop string follows it."""
        self._ids.append(token_id)
        text = decode_text(self._tokenizer, self._ids)
        if text.endswith(_UNFINISHED):
            return ""
        self._ids = []
        text = self._held + text
        self._held = ""
        found = [text.index(stop) for stop in self._stop if stop in text]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        certain = len(text) - _num_held(text, self._stop)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text held back, when no more of it can come. Bytes that make no character become U+FFFD."""
        text = self._held + decode_text(self._tokenizer, self._ids)
        self._ids, self._held = [], ""
        return text


def decode_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of tokens; control tokens have none."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _num_held(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of `stops` begins."""
    lengths = [length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])]
    return max(lengths, default=0)


class _Row:
    """The state of one reply while its batch is decoded, and of its conversation between replies."""

    def __init__(self) -> None:
        self.next_position = 0
        self.num_read = 0  # tokens of the conversation that are in the cache

    def begin(self, params: SamplingParams, room: int, stream: TextStream | None, at_image: bool) -> None:
        self.params = params
        self.room = room  # new tokens that the reply may have
        self.stream = stream
        self.generator = torch.Generator().manual_seed(params.seed)
        self.reply = Reply()
        self.begins_at_image = at_image
        self.is_waiting = False
        self.is_done = False

    @property
    def is_writing(self) -> bool:
        return not (self.is_waiting or self.is_done)


class _Decoder:
    """Decoding of a batch of prompts, padded on the left, over one KV cache.

    `read` and `decode` in turn, so often as the conversations have turns.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        tokenizer: PreTrainedTokenizerBase | None,
        num_rows: int,
        image_mode: ImageMode,
        post_image_positions: PostImagePositions,
        keep_logits: bool,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_mode = image_mode
        self.post_image_positions = post_image_positions
        self.keep_logits = keep_logits
        self.device = model.vision_head.weight.device
        self.rows = [_Row() for _ in range(num_rows)]
        config = model.config
        self.vision_start, self.vision_end = int(config.vision_start_token_id), int(config.vision_end_token_id)
        eos = model.text_config.eos_token_id
        self.end_tokens = set(eos if isinstance(eos, list) else [eos])
        self.cache = DynamicCache()
        self.mask = torch.zeros(num_rows, 0, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def read(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> None:
        """Feed one prompt to each row. Raises: InputError or ShapeError, before anything is fed."""
        for row, prompt, params in zip(self.rows, prompts, sampling, strict=True):
            room = self._check(prompt, row, params)
            stream = TextStream(self.tokenizer, params.stop) if self.tokenizer is not None else None
            # A vision_start at the end isn't read yet: it is the first input of the image's block.
            at_image = int(prompt.conversation.input_ids[-1]) == self.vision_start
            row.begin(params, room, stream, at_image)
        ids, targets, positions = [], [], []
        for row, prompt in zip(self.rows, prompts, strict=True):
            end = len(prompt.conversation.input_ids) - int(row.begins_at_image)
            is_target = _target_positions(prompt.conversation, self.model.image_token_id)
            shifts = self._shifts(is_target)
            ids.append(prompt.conversation.input_ids[:end])
            targets.append(is_target[:end])
            positions.append((row.next_position + prompt.conversation.position_ids + shifts)[:, :end])
            row.next_position += prompt.conversation.next_position + int(shifts[-1]) - int(row.begins_at_image)
        length = max(1, *(len(row_ids) for row_ids in ids))
        target_mask = _pad_left(targets, length, 0)
        embeddings = self.model.splice_images(
            _pad_left(ids, length, self.vision_end).to(self.device),
            target_mask.to(self.device),
            torch.cat([p.input_embeddings for p in prompts]).to(self.device),
            int(target_mask.sum()) // self.model.geometry.num_target_tokens,
        )
        mask = _pad_left([np.ones_like(row_ids) for row_ids in ids], length, 0)
        self.last_hidden = self._feed(embeddings, _pad_left(positions, length, 0).transpose(0, 1), mask)[:, -1]

    def decode(self) -> Iterator[Piece]:
        """Write all replies to their ends."""
        for index, row in enumerate(self.rows):
            if row.begins_at_image:
                yield from self._begin_image(index)
        while not all(row.is_done for row in self.rows):
            # Gradients are off while a piece is made, not while its reader has it.
            with torch.no_grad():
                chosen = list(self._choose())
            yield from chosen
            with torch.no_grad():
                drawn = list(self._feed_next())
            yield from drawn

    def _check(self, prompt: Prompt, row: _Row, params: SamplingParams) -> int:
        """The number of new tokens that the reply may have. Raises: InputError or ShapeError."""
        input_ids = prompt.conversation.input_ids
        if not len(input_ids):
            raise InputError("the prompt has no tokens; expected at least one")
        image_token_id, count = self.model.image_token_id, self.model.geometry.num_target_tokens
        if input_ids[-1] == image_token_id:
            raise InputError(
                f"the prompt ends inside an image: its last token is <|image_pad|> (id {image_token_id}), with no "
                "<|vision_end|> after it; close the image with <|vision_end|>, or end the prompt at <|vision_start|> "
                "to have the image predicted"
            )
        num_targets = int(_target_positions(prompt.conversation, image_token_id).sum())
        if num_targets % count:
            raise ShapeError(
                f"the assistant's earlier images have {num_targets} tokens; expected a multiple of the model's {count}"
            )
        if num_targets and self.image_mode is ImageMode.NAIVE:
            raise InputError(
                "the prompt holds an image that the assistant made, which naive autoregression can't read anew: it "
                "was made without query embeddings; use another image mode, or continue the conversation with a Chat"
            )
        num_inputs = int((input_ids == image_token_id).sum()) - num_targets
        if num_inputs != len(prompt.input_embeddings):
            raise ShapeError(
                f"the prompt's images have {num_inputs} tokens, but {len(prompt.input_embeddings)} embeddings are given"
            )
        if params.stop and self.tokenizer is None:
            raise InputError("stop strings are found in text: give the tokenizer too")
        context = int(self.model.text_config.max_position_embeddings)
        num_tokens = row.num_read + len(input_ids)
        if num_tokens >= context:
            raise InputError(
                f"the conversation has {num_tokens:,} tokens, images included; the model's context holds {context:,}, "
                "the reply included: shorten it"
            )
        return min(params.max_new_tokens, context - num_tokens)

    def _shifts(self, is_target: Bool[np.ndarray, " length"]) -> Int[np.ndarray, " length"]:
        """What earlier generated images add to each token's training position."""
        count, side = self.model.geometry.num_target_tokens, max(self.model.geometry.target_grid)
        added = count - side if self.post_image_positions is PostImagePositions.RELEASED else 0
        return (is_target.cumsum() - is_target) // count * added

    def _feed(
        self,
        embeddings: Float[Tensor, "batch length hidden"],
        positions: Int[Tensor, "3 batch length"],
        mask: Int[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length hidden"]:
        self.mask = torch.cat([self.mask, mask.to(self.device)], dim=1)
        for row, num_new in zip(self.rows, mask.sum(dim=1).tolist(), strict=True):
            row.num_read += num_new
        return self.model.run_layers(embeddings, positions.to(self.device), self.mask, self.cache)

    def _choose(self) -> Iterator[Piece]:
        """Append the next token to every row that is writing, and move rows on to waiting or done."""
        logits = self.model.qwen.lm_head(self.last_hidden).float()
        raw = logits.clone() if self.keep_logits else None
        # Only ever forced: an image's tokens stand for embeddings, and its end follows them.
        logits[:, [self.vision_end, self.model.image_token_id]] = -torch.inf
        greedy = logits.argmax(dim=-1).tolist()
        for index, row in enumerate(self.rows):
            if not row.is_writing:
                continue
            reply, params = row.reply, row.params
            if len(reply.token_ids) >= row.room:
                yield from self._finish(index, "length")
                continue
            token = greedy[index]
            if params.temperature:
                token = sample_token(logits[index], params.temperature, params.top_p, row.generator)
            if params.needs_image and not reply.images:
                has_said_enough = len(reply.token_ids) >= MAX_TEXT_BEFORE_IMAGE
                token = self.vision_start if token in self.end_tokens or has_said_enough else token
            reply.token_ids.append(token)
            reply.logits.append(raw[index] if raw is not None else None)
            if token in self.end_tokens:
                yield from self._finish(index, "stop")
            elif token == self.vision_start:
                yield from self._begin_image(index)
            elif row.stream is not None:
                yield from self._say(index, row.stream.push(token))
                if row.stream.is_stopped:
                    self._drop_stop_string(index)
                    yield from self._finish(index, "stop")

    def _begin_image(self, index: int) -> Iterator[Piece]:
        """At a vision_start: have the row wait for its image, or end the reply if the image has no room."""
        row = self.rows[index]
        if len(row.reply.token_ids) + self.model.geometry.num_target_tokens > row.room:
            yield from self._finish(index, "length")
        else:
            yield from self._flush(index)
            row.is_waiting = True

    def _finish(self, index: int, reason: str) -> Iterator[Piece]:
        row = self.rows[index]
        yield from self._flush(index)
        row.is_done = True
        row.reply.finish_reason = reason
        yield Piece(index, reply=row.reply)

    def _flush(self, index: int) -> Iterator[Piece]:
        stream = self.rows[index].stream
        if stream is not None:
            yield from self._say(index, stream.flush())

    def _say(self, index: int, text: str) -> Iterator[Piece]:
        if text:
            self.rows[index].reply.texts[-1] += text
            yield Piece(index, text=text)

    def _drop_stop_string(self, index: int) -> None:
        """Take the tokens from the one in which the stop string begins out of the reply, and out of the cache."""
        row, reply = self.rows[index], self.rows[index].reply
        assert self.tokenizer is not None
        ids, text = reply.token_ids, reply.texts[-1]
        begin = len(ids) - ids[::-1].index(self.vision_end) if reply.images else 0  # of the text after the last image
        kept = len(ids) - 1
        while kept > begin and not text.startswith(decode_text(self.tokenizer, ids[begin:kept])):
            kept -= 1
        num_fed = len(ids) - 1 - kept  # the last token has not been fed
        if num_fed:
            slots = self.mask[index].nonzero()[-num_fed:, 0]
            self.mask[index, slots] = 0
            row.next_position -= num_fed
            row.num_read -= num_fed
        del ids[kept:], reply.logits[kept:]

    def _feed_next(self) -> Iterator[Piece]:
        """Feed the rows that are writing or, once there are none, predict the images that rows wait for."""
        if any(row.is_writing for row in self.rows):
            self._feed_text()
        elif any(row.is_waiting for row in self.rows):
            yield from self._feed_images()

    def _feed_text(self) -> None:
        """Feed the last token of each writing row; the slots of all others are masked."""
        tokens = [row.reply.token_ids[-1] if row.is_writing else self.vision_end for row in self.rows]
        positions = torch.tensor([row.next_position for row in self.rows]).expand(3, 1, -1).transpose(1, 2)
        mask = torch.tensor([[int(row.is_writing)] for row in self.rows])
        embeddings = self.model.embed_tokens(torch.tensor(tokens, device=self.device)[:, None])
        self.last_hidden = self._feed(embeddings, positions, mask)[:, -1]
        for row in self.rows:
            row.next_position += int(row.is_writing)

    def _feed_images(self) -> Iterator[Piece]:
        """Feed `vision_start, queries, vision_end` to every waiting row, and so predict each one's whole image."""
        count = self.model.geometry.num_target_tokens
        height, width = self.model.geometry.target_grid
        offsets = torch.from_numpy(image_offsets(height, width))
        span = count if self.post_image_positions is PostImagePositions.RELEASED else max(height, width)
        positions = torch.zeros(3, len(self.rows), count + 2, dtype=torch.int64)
        for index, row in enumerate(self.rows):
            start = row.next_position
            positions[:, index, 0] = start
            positions[:, index, 1:-1] = start + 1 + offsets
            positions[:, index, -1] = start + 1 + span
            if row.is_waiting:
                row.next_position = start + 1 + span + 1
        mask = torch.tensor([[int(row.is_waiting)] * (count + 2) for row in self.rows])
        ends = self.model.embed_tokens(torch.tensor([[self.vision_start, self.vision_end]], device=self.device))
        queries = self.model.image_prefill_embeds.weight[None].to(ends.dtype)
        block = torch.cat([ends[:, :1], queries, ends[:, 1:]], dim=1).expand(len(self.rows), -1, -1)
        hidden = self._feed_block(block, positions, mask)
        predictions = self.model.vision_head(hidden[:, :count])
        self.last_hidden = hidden[:, -1]
        for index, row in enumerate(self.rows):
            if row.is_waiting:
                reply, room = row.reply, row.room - len(row.reply.token_ids)
                reply.images.append(predictions[index])
                reply.texts.append("")
                reply.token_ids += [*([self.model.image_token_id] * count), self.vision_end][:room]
                at_end = self.model.qwen.lm_head(hidden[index, count]).float() if self.keep_logits else None
                reply.logits += [*([None] * count), at_end][:room]
                row.is_waiting = False
                yield Piece(index, image=predictions[index])

    def _feed_block(
        self,
        block: Float[Tensor, "batch length hidden"],
        positions: Int[Tensor, "3 batch length"],
        mask: Int[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length hidden"]:
        """Feed the inputs of an image, from vision_start to vision_end, in the way of the image mode."""
        if self.image_mode is ImageMode.ONE_PASS:
            return self._feed(block, positions, mask)
        steps: list[Tensor] = []
        for place in range(block.shape[1]):
            step = slice(place, place + 1)
            is_image = 0 < place < block.shape[1] - 1
            is_naive = is_image and self.image_mode is ImageMode.NAIVE
            embeddings = self.model.vision_head(steps[-1]) if is_naive else block[:, step]
            steps.append(self._feed(embeddings, positions[..., step], mask[:, step]))
        return torch.cat(steps, dim=1)


def _pad_left(rows: Sequence[np.ndarray], length: int, value: int) -> Tensor:
    """Arrays of any length on their last axis, stacked behind their padding."""
    widths = [[(0, 0)] * (row.ndim - 1) + [(length - row.shape[-1], 0)] for row in rows]
    padded = [np.pad(row, width, constant_values=value) for row, width in zip(rows, widths, strict=True)]
    return torch.from_numpy(np.stack(padded))


def _target_positions(conversation: Conversation, image_token_id: int) -> Bool[np.ndarray, " length"]:
    return np.asarray(conversation.labels == image_token_id)


def generate_replies(
    model: AutoregressiveModel,
    prompts: Sequence[Prompt],
    sampling: Sequence[SamplingParams] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    image_mode: ImageMode = ImageMode.ONE_PASS,
    post_image_positions: PostImagePositions = PostImagePositions.RELEASED,
    keep_logits: bool = False,
) -> list[Reply]:
    """Replies to a batch of prompts, of any tasks. Without `sampling`, one per prompt: greedy, up to `max_new_tokens`.

    A reply with no room left for an image that it has begun ends with finish reason `length`; so does one that fills
    the model's context. With a tokenizer, replies have `texts`.
    Raises: InputError for a prompt that is empty, ends inside an image or doesn't fit the context, and for stop strings
    without a tokenizer; ShapeError if images and embeddings don't agree.
    """
    sampling = sampling if sampling is not None else [SamplingParams(max_new_tokens=max_new_tokens)] * len(prompts)
    decoder = _Decoder(model, tokenizer, len(prompts), image_mode, post_image_positions, keep_logits)
    decoder.read(prompts, sampling)
    for _ in decoder.decode():
        pass
    return [row.reply for row in decoder.rows]


def stream_replies(
    model: AutoregressiveModel,
    prompts: Sequence[Prompt],
    sampling: Sequence[SamplingParams],
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_mode: ImageMode = ImageMode.ONE_PASS,
    post_image_positions: PostImagePositions = PostImagePositions.RELEASED,
) -> Iterator[Piece]:
    """The replies of `generate_replies`, piece by piece as they are written; each row ends with its whole reply.

    Text comes in whole characters, held back while it may be the beginning of a stop string. Raises: as
    `generate_replies`, at the first piece.
    """
    decoder = _Decoder(model, tokenizer, len(prompts), image_mode, post_image_positions, keep_logits=False)
    decoder.read(prompts, sampling)
    yield from decoder.decode()


class Chat:
    """One conversation continued on one KV cache: each turn reads only what is new.

    What has been said stays as it was, tokens and images; a stop string, and an image that found no room, weren't said.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_mode: ImageMode = ImageMode.ONE_PASS,
        post_image_positions: PostImagePositions = PostImagePositions.RELEASED,
        keep_logits: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = _Decoder(model, tokenizer, 1, image_mode, post_image_positions, keep_logits)

    def reply(
        self,
        content: str,
        grids: Sequence[TokenGrid],
        input_embeddings: Float[Tensor, "tokens hidden"],
        sampling: SamplingParams | None = None,
    ) -> Reply:
        """The assistant's reply to the user's next message: `content` with `<image>` at each image, the token grids
        (h, w) and the embeddings of these. Greedy without `sampling`.

        Raises: as `encode_prompt` and `generate_replies`; the conversation is then as it was before.
        """
        message = Message("user", content)
        has_begun = self._decoder.rows[0].num_read > 0
        encoded = (
            encode_turn(self._tokenizer, message, grids)
            if has_begun
            else encode_prompt(self._tokenizer, [message], grids)
        )
        self._decoder.read(
            [Prompt(encoded, input_embeddings)], [sampling if sampling is not None else SamplingParams()]
        )
        for _ in self._decoder.decode():
            pass
        return self._decoder.rows[0].reply
