import pytest
import torch

from nexusgen.losses import AUTOREGRESSIVE_WEIGHTS, LossPart, autoregressive_losses, total_loss


@pytest.fixture
def parts():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 7), torch.randint(7, (5,))
    return autoregressive_losses(logits, labels, torch.randn(4, 3), torch.randn(4, 3))


def test_counts_are_tokens_numbers_and_rows(parts):
    assert {name: part.count for name, part in parts.items()} == {"ce": 5, "mse": 12, "cosine": 4}


def test_total_is_the_papers_weighting(parts):
    ce, mse, cosine = (parts[name].mean for name in ("ce", "mse", "cosine"))
    torch.testing.assert_close(total_loss(parts, AUTOREGRESSIVE_WEIGHTS), 3 * ce + 3 * (0.5 * mse + 0.5 * cosine))


def test_two_halves_under_global_counts_equal_the_whole():
    torch.manual_seed(1)
    logits, labels = torch.randn(6, 7), torch.randint(7, (6,))
    predictions, targets = torch.randn(4, 3), torch.randn(4, 3)
    whole = autoregressive_losses(logits, labels, predictions, targets)
    counts = {name: part.count for name, part in whole.items()}
    halves = [
        autoregressive_losses(logits[:2], labels[:2], predictions[:3], targets[:3]),
        autoregressive_losses(logits[2:], labels[2:], predictions[3:], targets[3:]),
    ]
    summed = sum(total_loss(half, AUTOREGRESSIVE_WEIGHTS, counts) for half in halves)
    torch.testing.assert_close(summed, total_loss(whole, AUTOREGRESSIVE_WEIGHTS))


def test_a_part_without_terms_is_zero_and_still_gives_gradients():
    head = torch.nn.Linear(3, 3, bias=False)
    predictions = head(torch.zeros(0, 3))
    parts = autoregressive_losses(torch.randn(2, 7), torch.tensor([1, 2]), predictions, torch.zeros(0, 3))
    total_loss(parts, AUTOREGRESSIVE_WEIGHTS).backward()
    assert parts["mse"].mean == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_mean_of_nothing_is_zero():
    assert LossPart(torch.zeros(()), 0).mean == 0
