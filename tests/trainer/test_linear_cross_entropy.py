"""The chunked loss equals the plain one, in value and gradient, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import flops
from trainer.loss import linear_cross_entropy, softcap_

VOCAB, ROWS = 100, 128


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, 16, generator=generator, requires_grad=True)
    weight = torch.randn(ROWS, 16, generator=generator, requires_grad=True)
    targets = torch.randint(VOCAB, (count,), generator=generator)
    targets[::7] = -1
    return hidden, weight, targets


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("count", [1, 16, 50])
def test_equals_the_plain_loss(monkeypatch: pytest.MonkeyPatch, count: int, softcap: float | None) -> None:
    monkeypatch.setattr(flops, "head_chunk", lambda device: 16)
    hidden, weight, targets = inputs(count)
    targets[0] = 3
    counted = int((targets >= 0).sum())
    loss = linear_cross_entropy(
        hidden, weight, targets, vocab_size=VOCAB, softcap=softcap, denominator=counted
    )
    (2 * loss).backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    plain = F.cross_entropy(softcap_((hidden @ weight.t())[:, :VOCAB], softcap), targets, ignore_index=-1)
    (2 * plain).backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients[0], hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[1], weight.grad, rtol=1e-4, atol=1e-6)


def test_without_gradients_it_gives_the_same_loss() -> None:
    hidden, weight, targets = inputs(50)
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, denominator=1.0)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, denominator=1.0), loss
        )


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "head_chunk", lambda device: 16)
    hidden, weight, targets = inputs(512)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, denominator=1.0).backward()
    assert largest.elements <= max(16 * ROWS, hidden.numel(), weight.numel())
    with Largest() as plain:
        F.cross_entropy((hidden @ weight.t())[:, :VOCAB], targets, ignore_index=-1)
    assert plain.elements == 512 * ROWS  # the instrument sees what it should


def test_in_bf16_it_is_as_near_as_rounding_allows() -> None:
    hidden, weight, targets = inputs(64)
    narrow = hidden.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(narrow, weight, targets, vocab_size=VOCAB, denominator=64.0)
    loss.backward()
    assert narrow.grad is not None
    exact = linear_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, denominator=64.0)
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert hidden.grad is not None
    assert (narrow.grad.float() - hidden.grad).norm() / hidden.grad.norm() < 0.03
