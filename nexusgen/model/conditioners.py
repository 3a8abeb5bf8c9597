"""What turns image embeddings of the language model's space into the context of a vision decoder."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


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
