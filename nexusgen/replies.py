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

from collections.abc import Iterator, Sequence
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from nexusgen.errors import InputError
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.positions import image_offsets
from nexusgen.prompts import TokenGrid, encode_prompt, encode_turn
from nexusgen.schema import Message
from nexusgen.text_stream import TextStream
from nexusgen.writing import (
    MAX_NEW_TOKENS,
    Piece,
    PostImagePositions,
    Prompt,
    Reply,
    Row,
    Rules,
    SamplingParams,
    sample_token,
)

__all__ = [
    "MAX_NEW_TOKENS",
    "Chat",
    "ImageMode",
    "Piece",
    "PostImagePositions",
    "Prompt",
    "Reply",
    "SamplingParams",
    "TextStream",
    "generate_replies",
    "image_block",
    "sample_token",
    "stream_replies",
]


class ImageMode(StrEnum):
    """How the embeddings of an image are predicted.

    ONE_PASS feeds all query embeddings at once. SEQUENTIAL feeds them one by one over the KV cache, as the released
    inference does, with the same result. NAIVE is plain autoregression: the next input is the last predicted embedding
    instead of a query embedding. Source: arXiv 2504.21356, section 3.2, which compares NAIVE with the others.
    """

    ONE_PASS = "one_pass"
    SEQUENTIAL = "sequential"
    NAIVE = "naive"


def image_block(
    rules: Rules, starts: Sequence[int], queries: Float[Tensor, "rows tokens hidden"] | None = None
) -> tuple[Float[Tensor, "rows block hidden"], Int[Tensor, "3 rows block"]]:
    """The inputs `vision_start, queries, vision_end` that predict a whole image in each row, and their positions from
    `starts` on. Image token i is predicted at place i; the text goes on after `rules.image_span + 2` positions. Without
    `queries` of each row's own they are the model's."""
    model = rules.model
    height, width = model.geometry.target_grid
    places = torch.zeros(3, rules.num_image_tokens + 2, dtype=torch.int64)
    places[:, 1:-1] = 1 + torch.from_numpy(image_offsets(height, width))
    places[:, -1] = 1 + rules.image_span
    device = model.vision_head.weight.device
    ends = model.embed_tokens(torch.tensor([[rules.vision_start, rules.vision_end]], device=device))
    if queries is None:
        queries = model.image_prefill_embeds.weight[None]
    queries, ends = queries.to(ends.dtype).expand(len(starts), -1, -1), ends.expand(len(starts), -1, -1)
    block = torch.cat([ends[:, :1], queries, ends[:, 1:]], dim=1)
    return block, places[:, None] + torch.tensor(starts)[None, :, None]


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
        self.image_mode = image_mode
        self.keep_logits = keep_logits
        self.device = model.vision_head.weight.device
        self.rules = Rules(model, tokenizer, post_image_positions)
        self.rows = [Row(self.rules, index) for index in range(num_rows)]
        self.cache = DynamicCache()
        self.mask = torch.zeros(num_rows, 0, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def read(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> None:
        """Feed one prompt to each row. Raises: InputError or ShapeError, before anything is fed."""
        for row, prompt, params in zip(self.rows, prompts, sampling, strict=True):
            room = row.check(prompt, params, self.rules.context, "the model's context")
            if self.image_mode is ImageMode.NAIVE and self.rules.target_positions(prompt.conversation).any():
                raise InputError(
                    "the prompt holds an image that the assistant made, which naive autoregression can't read anew: it "
                    "was made without query embeddings; use another image mode, or continue the conversation with a "
                    "Chat"
                )
            row.begin(prompt, params, room)
        inputs = [row.read(prompt) for row, prompt in zip(self.rows, prompts, strict=True)]
        padded = self.rules.embed(inputs, prompts, left=True)
        self.last_hidden = self._feed(padded.embeddings, padded.positions, padded.mask)[:, -1]

    def decode(self) -> Iterator[Piece]:
        """Write all replies to their ends."""
        for row in self.rows:
            if row.begins_at_image:
                yield from row.begin_image()
        while not all(row.is_done for row in self.rows):
            # Gradients are off while a piece is made, not while its reader has it.
            with torch.no_grad():
                chosen = list(self._choose())
            yield from chosen
            with torch.no_grad():
                drawn = list(self._feed_next())
            yield from drawn

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
        greedy = self.rules.only_sampled(logits).argmax(dim=-1).tolist()
        for index, row in enumerate(self.rows):
            if row.is_writing:
                yield from row.write(logits[index], greedy[index], raw[index] if raw is not None else None)
                self._take_back(index)

    def _take_back(self, index: int) -> None:
        """Hide what has been fed of a stop string."""
        row = self.rows[index]
        if row.num_taken_back:
            slots = self.mask[index].nonzero()[-row.num_taken_back :, 0]
            self.mask[index, slots] = 0
            row.next_position -= row.num_taken_back
            row.num_read -= row.num_taken_back
            row.num_taken_back = 0

    def _feed_next(self) -> Iterator[Piece]:
        """Feed the rows that are writing or, once there are none, predict the images that rows wait for."""
        if any(row.is_writing for row in self.rows):
            self._feed_text()
        elif any(row.is_waiting for row in self.rows):
            yield from self._feed_images()

    def _feed_text(self) -> None:
        """Feed the last token of each writing row; the slots of all others are masked."""
        tokens = [row.reply.token_ids[-1] if row.is_writing else self.rules.vision_end for row in self.rows]
        positions = torch.tensor([row.next_position for row in self.rows]).expand(3, 1, -1).transpose(1, 2)
        mask = torch.tensor([[int(row.is_writing)] for row in self.rows])
        embeddings = self.model.embed_tokens(torch.tensor(tokens, device=self.device)[:, None])
        self.last_hidden = self._feed(embeddings, positions, mask)[:, -1]
        for row in self.rows:
            row.next_position += int(row.is_writing)

    def _feed_images(self) -> Iterator[Piece]:
        """Feed an image's block to every waiting row, and so predict each one's whole image."""
        count = self.rules.num_image_tokens
        block, positions = image_block(self.rules, [row.next_position for row in self.rows])
        mask = torch.tensor([[int(row.is_waiting)] * (count + 2) for row in self.rows])
        hidden = self._feed_block(block, positions, mask)
        predictions = self.model.vision_head(hidden[:, :count])
        self.last_hidden = hidden[:, -1]
        for index, row in enumerate(self.rows):
            if row.is_waiting:
                row.next_position += self.rules.image_span + 2
                at_end = self.model.qwen.lm_head(hidden[index, count]).float() if self.keep_logits else None
                yield row.add_image(predictions[index], at_end)

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
