"""Continuous batching: replies of the autoregressive model for requests that join and leave between steps.

All requests share one KV cache, a slot each. A step feeds every request once: prompts that have just joined on their
own rows, the last token of those that write text in one pass, and a whole image in one pass for all that have reached
one; then each request chooses its next token. What a reply says is what `generate_replies` says for its prompt alone.
Requests may be for several versions of the model on one copy of its weights (`variants`): they share passes, too.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from nexusgen.errors import InputError, ResourceError
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.replies import image_block
from nexusgen.slot_cache import SlotCache
from nexusgen.variants import Variant, Variants
from nexusgen.writing import Piece, Prompt, Row, Rules, SamplingParams


class _Request(Row):
    """A request in its slot; its `number` is the ticket."""

    def __init__(self, rules: Rules, ticket: int, slot: int, variant: Variant) -> None:
        super().__init__(rules, ticket)
        self.slot = slot
        self.variant = variant
        self.unread: Prompt | None = None


class ReplyEngine:
    """Replies to at most `num_slots` requests at a time, each of at most `max_length` tokens with its prompt.

    With `deterministic`, every pass has one size whatever the company: text and image passes run over all slots and
    `max_length` keys, one for each version that is asked, and prompts are read one by one. A reply is then equal in
    every bit alone and in any company, on one machine with one number of threads. Without it token ids are equal but
    for ties within rounding, and embeddings close. Not for several threads at once. After a step that has raised, the
    engine must be given up.
    Raises: InputError for sizes out of range.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        tokenizer: PreTrainedTokenizerBase,
        num_slots: int,
        max_length: int,
        *,
        deterministic: bool = False,
        variants: Variants | None = None,
    ) -> None:
        self._rules = Rules(model, tokenizer)
        if num_slots < 1:
            raise InputError(f"num_slots is {num_slots}; it must be at least 1")
        if not 2 <= max_length <= self._rules.context:
            raise InputError(
                f"max_length is {max_length:,}; it must be from 2 to the model's context of {self._rules.context:,}"
            )
        self._model = model
        self._variants = variants if variants is not None else Variants(model)
        self._max_length = max_length
        self._deterministic = deterministic
        self._device = model.vision_head.weight.device
        self._requests: list[_Request | None] = [None] * num_slots
        self._tickets = itertools.count()
        # An image block at the very end writes its vision_end behind `max_length`, and padding its whole block.
        num_spare = self._rules.num_image_tokens + 2
        num_layers = int(model.text_config.num_hidden_layers)
        self._cache = SlotCache(num_layers, num_slots, max_length, num_spare, self._device)
        # At each slot's last token.
        self._last_hidden = torch.zeros(
            num_slots, model.hidden_size, dtype=model.vision_head.weight.dtype, device=self._device
        )

    @property
    def num_free(self) -> int:
        """Slots that a request can join."""
        return self._requests.count(None)

    def join(self, prompt: Prompt, params: SamplingParams, variant: str | None = None) -> int:
        """Take in a request; the next step reads its prompt. Returns its ticket, a number never given again.

        `variant` names the version that it is for, one of `variants`; None is the model itself.

        Raises: InputError and ShapeError as `generate_replies`, and InputError for a prompt that leaves no room within
        `max_length`; ResourceError if no slot is free. Nothing is changed then.
        """
        if not self.num_free:
            raise ResourceError(f"all {len(self._requests)} slots are taken: wait until num_free is above 0")
        slot = self._requests.index(None)
        request = _Request(self._rules, next(self._tickets), slot, self._variants[variant])
        room = request.check(prompt, params, self._max_length, "a slot of the engine")
        request.begin(prompt, params, room)
        request.unread = prompt
        self._requests[slot] = request
        return request.number

    def leave(self, ticket: int) -> None:
        """Abandon a request: its slot is free at once. Of one that is finished, nothing is left to abandon."""
        for request in self._present():
            if request.number == ticket:
                self._free(request)

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Take every request one step on. `Piece.row` is the ticket; a request's last piece has the whole reply, and
        its slot is then free."""
        pieces: list[Piece] = []
        present = self._present()
        writing = [request for request in present if request.unread is None and request.is_writing]
        for group in self._joined():
            pieces += self._read(group)
        for group in self._passes(writing):
            self._feed_text(group)
        for group in self._passes([request for request in present if request.is_waiting]):
            pieces += self._feed_images(group)
        choosing = [request for request in present if request.is_writing]
        if choosing:
            pieces += self._choose(choosing)
        for request in present:
            if request.is_done:
                self._free(request)
        return pieces

    def _present(self) -> list[_Request]:
        """In the order of their slots."""
        return [request for request in self._requests if request is not None]

    def _free(self, request: _Request) -> None:
        self._requests[request.slot] = None
        self._cache.clear(request.slot)

    def _joined(self) -> list[list[_Request]]:
        """Requests that haven't been read, in groups to be read together: of one version, which has its own query
        embeddings, and at most half of a group is padding."""
        groups: dict[tuple[int, Variant], list[_Request]] = {}
        for request in self._present():
            if request.unread is not None:
                length = len(request.unread.conversation.input_ids)
                size = request.slot if self._deterministic else length.bit_length()
                groups.setdefault((size, request.variant), []).append(request)
        return list(groups.values())

    def _passes(self, requests: Sequence[_Request]) -> list[list[_Request]]:
        """Requests that go on, by passes: one for all. With `deterministic` each version has its own, as an adapter
        would else multiply as many rows as it has requests, and round by their number."""
        if not self._deterministic:
            return [list(requests)] if requests else []
        return list(_by_variant(requests).values())

    def _read(self, requests: Sequence[_Request]) -> Iterator[Piece]:
        """Feed the prompts of requests that have just joined."""
        fed, prompts, inputs = [], [], []
        for request in requests:
            prompt, request.unread = request.unread, None
            assert prompt is not None
            read = request.read(prompt)
            if len(read.ids):  # a vision_start alone is fed with the image
                fed.append(request)
                prompts.append(prompt)
                inputs.append(read)
        if fed:
            variant = fed[0].variant
            padded = self._rules.embed(inputs, prompts, left=False, queries=variant.queries)
            slots, length = [request.slot for request in fed], padded.embeddings.shape[1]
            self._cache.begin(slots, [0] * len(fed), length, length)
            # The plain causal mask is enough: padding comes behind, and is overwritten.
            with self._variants.of_rows([variant] * len(fed)):
                hidden = self._model.run_layers(padded.embeddings, padded.positions.to(self._device), None, self._cache)
            for request, read, of_row in zip(fed, inputs, hidden, strict=True):
                request.num_read = len(read.ids)
                self._last_hidden[request.slot] = of_row[request.num_read - 1]
        for request in requests:
            if request.begins_at_image:
                yield from request.begin_image()

    def _feed_text(self, requests: Sequence[_Request]) -> None:
        """Feed the last token of each request."""
        tokens = torch.tensor([[request.reply.token_ids[-1]] for request in requests], device=self._device)
        positions = torch.tensor([[request.next_position] for request in requests]).expand(3, -1, -1)
        hidden, rows = self._run(requests, self._model.embed_tokens(tokens), positions)
        self._last_hidden[[request.slot for request in requests]] = hidden[rows, -1]
        for request in requests:
            request.num_read += 1
            request.next_position += 1

    def _feed_images(self, requests: Sequence[_Request]) -> Iterator[Piece]:
        """Predict the image that each request has reached."""
        count = self._rules.num_image_tokens
        queries = torch.stack([request.variant.queries for request in requests])
        block, positions = image_block(self._rules, [request.next_position for request in requests], queries)
        hidden, rows = self._run(requests, block, positions)
        self._last_hidden[[request.slot for request in requests]] = hidden[rows, -1]
        row_of = {request.slot: row for request, row in zip(requests, rows, strict=True)}
        for variant, group in _by_variant(requests).items():
            of_group = [row_of[request.slot] for request in group]
            is_whole = self._deterministic or len(group) == len(requests)  # then it is one version's pass
            states = hidden[:, :count] if is_whole else hidden[of_group, :count]
            predictions = nn.functional.linear(states, variant.vision_head)
            for place, (request, row) in enumerate(zip(group, of_group, strict=True)):
                request.num_read += count + 2
                request.next_position += self._rules.image_span + 2
                # A copy, or it would keep those of the whole pass.
                yield request.add_image(predictions[row if is_whole else place].clone())

    def _choose(self, requests: Sequence[_Request]) -> Iterator[Piece]:
        """Append the next token to each request."""
        rows = [request.slot for request in requests]
        hidden = self._last_hidden
        if not self._deterministic:
            hidden, rows = hidden[rows], list(range(len(rows)))
        logits = self._rules.only_sampled(self._model.qwen.lm_head(hidden).float())
        greedy = logits.argmax(dim=-1).tolist()
        for request, row in zip(requests, rows, strict=True):
            yield from request.write(logits[row], greedy[row])
            if request.is_writing and request.is_full:
                yield from request.finish("length")

    def _run(
        self,
        requests: Sequence[_Request],
        embeddings: Float[Tensor, "requests new hidden"],
        positions: Int[Tensor, "3 requests new"],
    ) -> tuple[Float[Tensor, "rows new hidden"], list[int]]:
        """One pass that goes on from what requests hold. Returns hidden states and each request's row in them."""
        slots, variants = [request.slot for request in requests], [request.variant for request in requests]
        starts = [request.num_read for request in requests]
        num_new = embeddings.shape[1]
        rows, num_keys = list(range(len(slots))), max(starts) + num_new
        if self._deterministic:
            # The other slots are fed as well, and write behind the end.
            rows, num_keys = slots, self._max_length
            slots = list(range(len(self._requests)))
            variants = variants[:1] * len(slots)
            all_starts, of_requests = [self._max_length] * len(slots), (embeddings, positions)
            embeddings = embeddings.new_zeros(len(slots), *embeddings.shape[1:])
            positions = positions.new_zeros(3, len(slots), num_new)
            embeddings[rows], positions[:, rows] = of_requests
            for row, start in zip(rows, starts, strict=True):
                all_starts[row] = start
            starts = all_starts
        self._cache.begin(slots, starts, num_new, num_keys)
        needs_mask = self._deterministic or num_new > 1 or len(set(starts)) > 1
        mask = self._cache.mask() if needs_mask else None
        # A CPU's fused attention rounds by how its threads' buffers lie in memory: differently from slot to slot.
        is_plain = self._deterministic and self._device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if is_plain else contextlib.nullcontext(), self._variants.of_rows(variants):
            return self._model.run_layers(embeddings, positions.to(self._device), mask, self._cache), rows


def _by_variant(requests: Sequence[_Request]) -> dict[Variant, list[_Request]]:
    groups: dict[Variant, list[_Request]] = {}
    for request in requests:
        groups.setdefault(request.variant, []).append(request)
    return groups
