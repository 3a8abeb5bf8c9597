"""The generation conditioner's shape, names and per-token nature."""

from __future__ import annotations

import torch

from nexusgen.model.conditioners import GenerationConditioner


def test_parameters_have_the_released_names() -> None:
    conditioner = GenerationConditioner(6, 10)
    expected = {f"{layer}.{leaf}" for layer in (0, 1, 3, 4) for leaf in ("weight", "bias")}
    assert set(conditioner.state_dict()) == expected


def test_each_embedding_is_conditioned_by_itself_and_normalised() -> None:
    conditioner = GenerationConditioner(6, 10)
    embeddings = torch.randn(2, 5, 6)
    context = conditioner(embeddings)
    assert context.shape == (2, 5, 10)
    torch.testing.assert_close(conditioner(embeddings[:, 3:4]), context[:, 3:4])
    torch.testing.assert_close(context.mean(dim=-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
