"""What turns image embeddings of the language model's space into the context of a vision decoder."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
)

from nexusgen import defaults
from nexusgen.config import Config
from nexusgen.positions import merger_positions

_REFERENCE_TOKENS_PER_SIDE = defaults.REFERENCE_SIZE // (defaults.PATCH_SIZE * defaults.MERGE_SIZE)


class GenerationConditioner(nn.Sequential):
    """Linear, LayerNorm, ReLU, Linear, LayerNorm: each embedding by itself, 3584 to 4096 numbers in the released model.

    Its parameters are named 0, 1, 3 and 4, as in the released checkpoint (`adapter.N`).
    Source: Nexus-Gen, `modeling/decoder` (`adapter`).
    """

    def __init__(self, embedding_dim: int, context_dim: int) -> None:
        super().__init__(
            nn.Linear(embedding_dim, context_dim),
            nn.LayerNorm(context_dim),
            nn.ReLU(),
            nn.Linear(context_dim, context_dim),
            nn.LayerNorm(context_dim),
        )

    def forward(self, embeddings: Float[Tensor, "batch tokens embedding"]) -> Float[Tensor, "batch tokens context"]:
        context: Tensor = super().forward(embeddings)
        return context


class MergerConfig(Config):
    """Sizes of an editing conditioner; the defaults are the released one's, whose layer is a Qwen2.5-VL-7B layer."""

    reference_grid: tuple[int, int] = (_REFERENCE_TOKENS_PER_SIDE, _REFERENCE_TOKENS_PER_SIDE)
    intermediate_size: int = 18944
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    expand_ratio: int = 4  # numbers between the projector's two layers, per number of the context


class EditingConditioner(nn.Module):
    """Target and reference embeddings through one language layer with full attention, then projected to the context.

    The target tokens come first; both images are laid over the same square of positions, so that tokens of the same
    place meet. Its parameters are named as in the released checkpoint (`embedding_merger.`).
    Source: Nexus-Gen, `modeling/decoder` (`embedding_merger`).
    """

    def __init__(self, embedding_dim: int, context_dim: int, config: MergerConfig) -> None:
        super().__init__()
        layer_config = Qwen2_5_VLTextConfig(
            hidden_size=embedding_dim,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                "mrope_section": list(config.mrope_section),
            },
        )
        layer_config._attn_implementation = "sdpa"
        layer = Qwen2_5_VLDecoderLayer(layer_config, 0)
        layer.self_attn.is_causal = False
        self.layers = nn.ModuleList([layer])
        wide, eps = config.expand_ratio * context_dim, config.rms_norm_eps
        self.projector = nn.Sequential(
            Qwen2_5_VLRMSNorm(embedding_dim, eps=eps),
            nn.Linear(embedding_dim, wide),
            Qwen2_5_VLRMSNorm(wide, eps=eps),
            nn.SiLU(),
            nn.Linear(wide, context_dim),
            Qwen2_5_VLRMSNorm(context_dim, eps=eps),
        )
        # Derived from the sizes, never stored; made outside any meta device that the weights wait on.
        with torch.device("cpu"):
            self.rotary = Qwen2_5_VLRotaryEmbedding(layer_config)

    def forward(
        self,
        embeddings: Float[Tensor, "batch target_tokens embedding"],
        target_grid: tuple[int, int],
        reference: Float[Tensor, "batch reference_tokens embedding"] | None = None,
        reference_grid: tuple[int, int] | None = None,
        *,
        frequency_dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "batch tokens context"]:
        """Context of all tokens, target before reference; grids are (height, width) in tokens.

        Rotary frequencies are rounded to `frequency_dtype`; their angles are always computed in fp32.
        """
        grids = [target_grid]
        hidden = embeddings
        if reference is not None and reference_grid is not None:
            grids.append(reference_grid)
            hidden = torch.cat([embeddings, reference], dim=1)
        positions = merger_positions(grids)[:, None].expand(3, len(hidden), -1)
        self.rotary.inv_freq = self.rotary.original_inv_freq.to(frequency_dtype).float()
        rotary = self.rotary(hidden, positions.to(hidden.device))
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotary)
        context: Tensor = self.projector(hidden)
        return context
