"""One reply of the autoregressive model while it is written: what is asked, what comes out, and what follows a token.

Whoever runs the model (`replies` a whole batch, `reply_engine` requests that come and go) feeds tokens and gives each
row its logits and image embeddings; the row chooses its next token, streams its text and knows when it is finished.
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
from transformers import PreTrainedTokenizerBase

from nexusgen.errors import InputError, ShapeError
from nexusgen.messages import plain_text
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.prompts import Conversation
from nexusgen.schema import IMAGE_MARK
from nexusgen.text_stream import TextStream, decode_text

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
class SamplingParams:
    """How one reply is drawn. Raises: InputError for a value out of range.

    `max_new_tokens` counts image tokens too. A `temperature` of 0 is greedy; above it, tokens are drawn from the most
    likely ones that together reach `top_p`, with the row's own random numbers, so that a reply doesn't depend on its
    company. The reply ends before the first of the strings in `stop`. `needs_image` makes a reply that would end
    without an image, or that says a lot before it, draw one; a stop string ends it even so. One that may not draw is
    text alone.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    needs_image: bool = False
    may_draw: bool = True

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
        if self.needs_image and not self.may_draw:
            raise InputError("needs_image demands an image, which may_draw=False forbids; set one of them")


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


class Rules:
    """What holds for every reply of one model: its control tokens, and how images count. Stateless."""

    def __init__(
        self,
        model: AutoregressiveModel,
        tokenizer: PreTrainedTokenizerBase | None,
        post_image_positions: PostImagePositions = PostImagePositions.RELEASED,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        config = model.config
        self.vision_start, self.vision_end = int(config.vision_start_token_id), int(config.vision_end_token_id)
        self.image_token_id = model.image_token_id
        eos = model.text_config.eos_token_id
        self.end_tokens = set(eos if isinstance(eos, list) else [eos])
        self.context = int(model.text_config.max_position_embeddings)
        self.num_image_tokens = model.geometry.num_target_tokens
        self._trained_span = max(model.geometry.target_grid)
        is_released = post_image_positions is PostImagePositions.RELEASED
        self.image_span = self.num_image_tokens if is_released else self._trained_span  # positions of a generated image

    def target_positions(self, conversation: Conversation) -> Bool[np.ndarray, " length"]:
        """Where the pictures are that the assistant has made."""
        return np.asarray(conversation.labels == self.image_token_id)

    def shifts(self, is_target: Bool[np.ndarray, " length"]) -> Int[np.ndarray, " length"]:
        """What earlier generated images add to each token's training position."""
        return (is_target.cumsum() - is_target) // self.num_image_tokens * (self.image_span - self._trained_span)

    def embed(
        self,
        rows: Sequence[PromptInputs],
        prompts: Sequence[Prompt],
        left: bool,
        queries: Float[Tensor, "tokens hidden"] | None = None,
    ) -> PaddedInputs:
        """What is fed of several prompts, padded on the left or on the right to the longest. Without `queries` the
        query embeddings are the model's."""
        length = max(1, *(len(row.ids) for row in rows))
        device = self.model.vision_head.weight.device
        is_target = _pad([row.is_target for row in rows], length, 0, left)
        embeddings = self.model.splice_images(
            _pad([row.ids for row in rows], length, self.vision_end, left).to(device),
            is_target.to(device),
            torch.cat([prompt.input_embeddings.to(device) for prompt in prompts]),
            int(is_target.sum()) // self.num_image_tokens,
            queries,
        )
        positions = _pad([row.positions for row in rows], length, 0, left).transpose(0, 1)
        mask = _pad([np.ones_like(row.ids) for row in rows], length, 0, left)
        return PaddedInputs(embeddings, positions, mask)

    def only_sampled(self, logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
        """Logits, changed in place, without the tokens that are only ever forced: an image's stand for embeddings, and
        its end follows them."""
        logits[:, [self.vision_end, self.image_token_id]] = -torch.inf
        return logits


@dataclass(frozen=True)
class PromptInputs:
    """What is fed of one prompt: all but a `<|vision_start|>` at its end, which is the image block's first input."""

    ids: Int[np.ndarray, " length"]
    is_target: Bool[np.ndarray, " length"]
    positions: Int[np.ndarray, "3 length"]


@dataclass(frozen=True)
class PaddedInputs:
    """What is fed of several prompts; the mask is 1 at tokens and 0 at padding."""

    embeddings: Float[Tensor, "batch length hidden"]
    positions: Int[Tensor, "3 batch length"]
    mask: Int[Tensor, "batch length"]


def _pad(rows: Sequence[np.ndarray], length: int, value: int, left: bool) -> Tensor:
    """Arrays of any length on their last axis, stacked with padding before (`left`) or behind them."""
    padded = []
    for row in rows:
        missing = length - row.shape[-1]
        widths = [(0, 0)] * (row.ndim - 1) + [(missing, 0) if left else (0, missing)]
        padded.append(np.pad(row, widths, constant_values=value))
    return torch.from_numpy(np.stack(padded))


class Row:
    """The state of one reply while it is written, and of its conversation between replies.

    `number` is what its pieces call it. Whoever feeds the model counts `num_read` and `next_position` up.
    """

    def __init__(self, rules: Rules, number: int) -> None:
        self.rules = rules
        self.number = number
        self.next_position = 0
        self.num_read = 0  # tokens of the conversation that are in the cache
        self.num_taken_back = 0  # of them, the last ones that a stop string has just unsaid

    @property
    def is_writing(self) -> bool:
        return not (self.is_waiting or self.is_done)

    @property
    def is_full(self) -> bool:
        return len(self.reply.token_ids) >= self.room

    def check(self, prompt: Prompt, params: SamplingParams, capacity: int, holder: str) -> int:
        """The number of new tokens that the reply may have, of the `capacity` of tokens that `holder` holds.

        Raises: InputError or ShapeError.
        """
        input_ids = prompt.conversation.input_ids
        if not len(input_ids):
            raise InputError("the prompt has no tokens; expected at least one")
        image_token_id, count = self.rules.image_token_id, self.rules.num_image_tokens
        if input_ids[-1] == image_token_id:
            raise InputError(
                f"the prompt ends inside an image: its last token is <|image_pad|> (id {image_token_id}), with no "
                "<|vision_end|> after it; close the image with <|vision_end|>, or end the prompt at <|vision_start|> "
                "to have the image predicted"
            )
        num_targets = int(self.rules.target_positions(prompt.conversation).sum())
        if num_targets % count:
            raise ShapeError(
                f"the assistant's earlier images have {num_targets} tokens; expected a multiple of the model's {count}"
            )
        num_inputs = int((input_ids == image_token_id).sum()) - num_targets
        if num_inputs != len(prompt.input_embeddings):
            raise ShapeError(
                f"the prompt's images have {num_inputs} tokens, but {len(prompt.input_embeddings)} embeddings are given"
            )
        if params.stop and self.rules.tokenizer is None:
            raise InputError("stop strings are found in text: give the tokenizer too")
        num_tokens = self.num_read + len(input_ids)
        if num_tokens >= capacity:
            raise InputError(
                f"the conversation has {num_tokens:,} tokens, images included; {holder} holds {capacity:,}, "
                "the reply included: shorten it"
            )
        return min(params.max_new_tokens, capacity - num_tokens)

    def begin(self, prompt: Prompt, params: SamplingParams, room: int) -> None:
        """Begin a reply of at most `room` tokens."""
        self.params = params
        self.room = room
        tokenizer = self.rules.tokenizer
        self.stream = TextStream(tokenizer, params.stop) if tokenizer is not None else None
        self.generator = torch.Generator().manual_seed(params.seed)
        self.reply = Reply()
        # A vision_start at the end isn't read yet: it is the first input of the image's block.
        self.begins_at_image = int(prompt.conversation.input_ids[-1]) == self.rules.vision_start
        self.is_waiting = False
        self.is_done = False

    def read(self, prompt: Prompt) -> PromptInputs:
        """What is to be fed of the prompt that the reply has begun with; counts its positions, not its tokens."""
        conversation = prompt.conversation
        end = len(conversation.input_ids) - int(self.begins_at_image)
        is_target = self.rules.target_positions(conversation)
        shifts = self.rules.shifts(is_target)
        positions = (self.next_position + conversation.position_ids + shifts)[:, :end]
        self.next_position += conversation.next_position + int(shifts[-1]) - int(self.begins_at_image)
        return PromptInputs(conversation.input_ids[:end], is_target[:end], positions)

    def write(
        self, logits: Float[Tensor, " vocabulary"], greedy: int, raw: Float[Tensor, " vocabulary"] | None = None
    ) -> Iterator[Piece]:
        """Append the next token, and move on to waiting for an image or to the reply's end.

        `greedy` is the most likely token by the `logits`; `raw` are those to be kept in the reply, if any.
        """
        reply, params = self.reply, self.params
        if self.is_full:
            yield from self.finish("length")
            return
        token = greedy
        if not params.may_draw:
            logits = logits.index_fill(0, torch.tensor([self.rules.vision_start], device=logits.device), -torch.inf)
            token = int(logits.argmax())
        if params.temperature:
            token = sample_token(logits, params.temperature, params.top_p, self.generator)
        if params.needs_image and not reply.images:
            has_said_enough = len(reply.token_ids) >= MAX_TEXT_BEFORE_IMAGE
            token = self.rules.vision_start if token in self.rules.end_tokens or has_said_enough else token
        reply.token_ids.append(token)
        reply.logits.append(raw)
        if token in self.rules.end_tokens:
            yield from self.finish("stop")
        elif token == self.rules.vision_start:
            yield from self.begin_image()
        elif self.stream is not None:
            yield from self._say(self.stream.push(token))
            if self.stream.is_stopped:
                self._drop_stop_string()
                yield from self.finish("stop")

    def begin_image(self) -> Iterator[Piece]:
        """At a vision_start: wait for the image, or end the reply if the image has no room."""
        if len(self.reply.token_ids) + self.rules.num_image_tokens > self.room:
            yield from self.finish("length")
        else:
            yield from self._flush()
            self.is_waiting = True

    def add_image(
        self, embeddings: Float[Tensor, "tokens hidden"], logits_at_end: Float[Tensor, " vocabulary"] | None = None
    ) -> Piece:
        """Take in the image that the row waited for. `logits_at_end`, those at vision_end, are kept in the reply."""
        count, room = self.rules.num_image_tokens, self.room - len(self.reply.token_ids)
        self.reply.images.append(embeddings)
        self.reply.texts.append("")
        self.reply.token_ids += [*([self.rules.image_token_id] * count), self.rules.vision_end][:room]
        self.reply.logits += [*([None] * count), logits_at_end][:room]
        self.is_waiting = False
        return Piece(self.number, image=embeddings)

    def finish(self, reason: str) -> Iterator[Piece]:
        """End the reply."""
        yield from self._flush()
        self.is_done = True
        self.reply.finish_reason = reason
        yield Piece(self.number, reply=self.reply)

    def _flush(self) -> Iterator[Piece]:
        if self.stream is not None:
            yield from self._say(self.stream.flush())

    def _say(self, text: str) -> Iterator[Piece]:
        if text:
            self.reply.texts[-1] += text
            yield Piece(self.number, text=text)

    def _drop_stop_string(self) -> None:
        """Take the tokens from the one in which the stop string begins out of the reply; `num_taken_back` of them have
        been fed."""
        reply, tokenizer = self.reply, self.rules.tokenizer
        assert tokenizer is not None
        ids, text = reply.token_ids, reply.texts[-1]
        # Of the text after the last image.
        begin = len(ids) - ids[::-1].index(self.rules.vision_end) if reply.images else 0
        kept = len(ids) - 1
        while kept > begin and not text.startswith(decode_text(tokenizer, ids[begin:kept])):
            kept -= 1
        self.num_taken_back = len(ids) - 1 - kept  # the last token has not been fed
        del ids[kept:], reply.logits[kept:]
