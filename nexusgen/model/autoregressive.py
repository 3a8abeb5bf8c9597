"""The autoregressive model: Qwen2.5-VL plus a vision head and query embeddings, with prefilled autoregression.

The input at every image position to be predicted is a learned embedding of that position (a query embedding), never an
earlier prediction: a whole image is therefore predicted in one forward pass, in training and at inference alike.
Source: Nexus-Gen, arXiv 2504.21356, section 3.2 (prefilled autoregression).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLTextConfig

from nexusgen.geometry import Geometry
from nexusgen.prompts import IGNORED_LABEL, Conversation


@dataclass(frozen=True)
class ConversationBatch:
    """Right-padded conversations with the embeddings of their images, input and target, in order of appearance.

    `labels` is -100 where nothing is learned; the image token stands at the positions of targets.
    """

    input_ids: Int[Tensor, "batch length"]
    attention_mask: Int[Tensor, "batch length"]
    labels: Int[Tensor, "batch length"]
    position_ids: Int[Tensor, "3 batch length"]
    input_embeddings: Float[Tensor, "inputs hidden"]
    target_embeddings: Float[Tensor, "targets hidden"]

    def to(self, device: torch.device | str) -> ConversationBatch:
        return ConversationBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def collate_conversations(
    conversations: Sequence[Conversation],
    input_embeddings: Float[Tensor, "inputs hidden"],
    target_embeddings: Float[Tensor, "targets hidden"],
    pad_token_id: int,
) -> ConversationBatch:
    """Pad conversations on the right into one batch; embeddings come already in the batch's order."""
    length = max(len(c.input_ids) for c in conversations)
    shape = (len(conversations), length)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    position_ids = np.zeros((3, *shape), dtype=np.int64)
    for row, conversation in enumerate(conversations):
        end = len(conversation.input_ids)
        input_ids[row, :end] = conversation.input_ids
        labels[row, :end] = conversation.labels
        attention_mask[row, :end] = 1
        position_ids[:, row, :end] = conversation.position_ids
    return ConversationBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        input_embeddings=input_embeddings,
        target_embeddings=target_embeddings,
    )


@dataclass(frozen=True)
class AutoregressiveOutput:
    """One teacher-forced forward. Logits are computed only where a text token is learned."""

    hidden: Float[Tensor, "batch length hidden"]
    logits: Float[Tensor, "texts vocabulary"]
    labels: Int[Tensor, " texts"]
    predictions: Float[Tensor, "targets hidden"]


class AutoregressiveModel(nn.Module):
    """Qwen2.5-VL (`qwen`), `vision_head` (hidden to hidden, no bias) and `image_prefill_embeds` (the query embeddings).

    Sizes come from `config` (transformers' Qwen2.5-VL) and `geometry` (image sizes); patch and merge must agree.
    """

    def __init__(self, config: Qwen2_5_VLConfig, geometry: Geometry) -> None:
        super().__init__()
        self.config = config
        self.geometry = geometry
        self.qwen = Qwen2_5_VLForConditionalGeneration(config)
        hidden = self.hidden_size
        self.vision_head = nn.Linear(hidden, hidden, bias=False)
        self.image_prefill_embeds = nn.Embedding(geometry.num_target_tokens, hidden)
        nn.init.normal_(self.image_prefill_embeds.weight, std=self.text_config.initializer_range)

    @property
    def text_config(self) -> Qwen2_5_VLTextConfig:
        config = self.config.text_config
        assert isinstance(config, Qwen2_5_VLTextConfig)
        return config

    @property
    def image_token_id(self) -> int:
        return int(self.config.image_token_id)

    @property
    def hidden_size(self) -> int:
        return int(self.text_config.hidden_size)

    def encode_images(
        self, pixel_values: Float[Tensor, "patches pixels"], grid_thw: Int[Tensor, "images 3"]
    ) -> Float[Tensor, "tokens hidden"]:
        """Embeddings of images by the vision tower and merger, images one after another, tokens in raster order.

        `pixel_values` and `grid_thw` (time, height, width in patches) come from `images.to_patches`.
        """
        visual = self.qwen.model.visual
        output: Any = visual(pixel_values.to(visual.dtype), grid_thw=grid_thw)
        return output.pooler_output

    def embed_tokens(self, input_ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length hidden"]:
        return self.qwen.model.language_model.embed_tokens(input_ids)

    def embed_conversations(self, batch: ConversationBatch) -> Float[Tensor, "batch length hidden"]:
        """Token embeddings with input images spliced in and query embeddings at the positions of targets."""
        is_target = target_positions(batch.labels, self.image_token_id)
        num_targets = batch.target_embeddings.shape[0] // self.geometry.num_target_tokens
        return self.splice_images(batch.input_ids, is_target, batch.input_embeddings, num_targets)

    def splice_images(
        self,
        input_ids: Int[Tensor, "batch length"],
        is_target: Bool[Tensor, "batch length"],
        input_embeddings: Float[Tensor, "inputs hidden"],
        num_targets: int,
        queries: Float[Tensor, "tokens hidden"] | None = None,
    ) -> Float[Tensor, "batch length hidden"]:
        """Token embeddings, with the query embeddings (the model's, unless others are given) at each of the
        `num_targets` target images and, at the other image tokens, `input_embeddings` in order."""
        embeddings = self.embed_tokens(input_ids)
        is_input = (input_ids == self.image_token_id) & ~is_target
        queries = self.image_prefill_embeds.weight if queries is None else queries
        queries = queries.repeat(num_targets, 1).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(is_input[..., None], input_embeddings.to(embeddings.dtype))
        return embeddings.masked_scatter(is_target[..., None], queries)

    def run_layers(
        self,
        embeddings: Float[Tensor, "batch length hidden"],
        position_ids: Int[Tensor, "3 batch length"],
        attention_mask: Int[Tensor, "batch total"] | Bool[Tensor, "batch 1 length total"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch length hidden"]:
        """The language model's layers and final norm; `attention_mask` covers the cached positions too, as ones at
        tokens or as what each new token sees."""
        output: Any = self.qwen.model.language_model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def forward(
        self, batch: ConversationBatch, embeddings: Float[Tensor, "batch length hidden"] | None = None
    ) -> AutoregressiveOutput:
        """Teacher-forced forward over whole conversations. The embedding of image token i is predicted one position
        earlier, as the next token is. `embeddings` are fed in place of what `embed_conversations` makes."""
        if embeddings is None:
            embeddings = self.embed_conversations(batch)
        hidden = self.run_layers(embeddings, batch.position_ids, batch.attention_mask)
        is_text = (batch.labels != IGNORED_LABEL) & ~target_positions(batch.labels, self.image_token_id)
        return AutoregressiveOutput(
            hidden=hidden,
            logits=self.qwen.lm_head(hidden[:, :-1][is_text[:, 1:]]),
            labels=batch.labels[:, 1:][is_text[:, 1:]],
            predictions=self._predictions(hidden, batch),
        )

    def predict_targets(self, batch: ConversationBatch) -> Float[Tensor, "targets hidden"]:
        """The `predictions` of `forward` alone."""
        hidden = self.run_layers(self.embed_conversations(batch), batch.position_ids, batch.attention_mask)
        return self._predictions(hidden, batch)

    def _predictions(
        self, hidden: Float[Tensor, "batch length hidden"], batch: ConversationBatch
    ) -> Float[Tensor, "targets hidden"]:
        is_target = target_positions(batch.labels, self.image_token_id)
        return self.vision_head(hidden[:, :-1][is_target[:, 1:]])


def target_positions(labels: Int[Tensor, "batch length"], image_token_id: int) -> Bool[Tensor, "batch length"]:
    """Where an image embedding is to be predicted: the image token kept as label."""
    return labels == image_token_id
