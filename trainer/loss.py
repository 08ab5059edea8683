"""Cross-entropy of a linear head that never holds all logits.

The head is the largest product of a small GPT, and its logits, tokens × vocabulary, the largest tensor by far. Here they
exist for one chunk of tokens at a time: each chunk's loss and gradient are computed at once, in forward, and only the
gradients of the hidden states and of the weight are kept. The number of products is that of the plain way.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from trainer import flops

ROWS_IN_CACHE = 32
"""Rows of logits that a CPU takes through the softmax at a time: 6 MB of a vocabulary of 50,257."""


def softcap_(logits: Tensor, softcap: float | None) -> Tensor:
    """c·tanh(x/c), or x without a cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _real(logits_nv: Tensor, vocab_size: int) -> Tensor:
    """Which columns are of the vocabulary, (1, v). A GPU looks through whole rows, masked, a fifth sooner than through rows cut off."""
    return (torch.arange(logits_nv.shape[1], device=logits_nv.device) < vocab_size)[None]


def _chunk_loss(logits_nv: Tensor, targets_n: Tensor, vocab_size: int, softcap: float | None) -> Tensor:
    """Sum of a chunk's losses."""
    wide = softcap_(logits_nv.float(), softcap)
    picked = wide.gather(1, targets_n.clamp(min=0)[:, None])[:, 0]
    losses = torch.logsumexp(wide.masked_fill(~_real(logits_nv, vocab_size), -torch.inf), dim=1) - picked
    return torch.where(targets_n >= 0, losses, 0.0).sum()


def _chunk_top(
    logits_nv: Tensor, targets_n: Tensor, vocab_size: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """What each row's exponents are taken from, so that none overflows, and the logit of its target, (n, 1) each: the largest
    logit, or a low cap itself, which spares the look for it. The cap is monotonous, so it comes after."""
    picked_n1 = softcap_(logits_nv.gather(1, targets_n.clamp(min=0)[:, None]).float(), softcap)
    if flops.capped(softcap):
        return torch.full_like(picked_n1, softcap), picked_n1
    top_n1 = logits_nv.masked_fill(~_real(logits_nv, vocab_size), -torch.inf).amax(dim=1, keepdim=True)
    return softcap_(top_n1.float(), softcap), picked_n1


def _exponentials(
    logits_nv: Tensor, top_n1: Tensor, vocab_size: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """E = exp(logit − top), 0 in the padding, and E times the cap's derivative."""
    wide = softcap_(logits_nv.float(), softcap)
    exponentials = torch.where(_real(logits_nv, vocab_size), torch.exp(wide - top_n1), 0.0)
    slope = exponentials if softcap is None else exponentials * (1 - (wide / softcap).square())
    return exponentials, slope


def _chunk_in_one_(logits_nv: Tensor, top_n1: Tensor, vocab_size: int, softcap: float | None) -> Tensor:
    """`logits_nv` becomes its exponentials times the cap's derivative; returns the rows' sums of exponentials, (n, 1)."""
    exponentials, slope = _exponentials(logits_nv, top_n1, vocab_size, softcap)
    logits_nv.copy_(slope)
    return exponentials.sum(dim=1, keepdim=True)


def _chunk_sums(
    logits_nv: Tensor, targets_n: Tensor, vocab_size: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_chunk_top` returns, and the rows' sums of exponentials: all that one look at the logits can tell."""
    top_n1, picked_n1 = _chunk_top(logits_nv, targets_n, vocab_size, softcap)
    exponentials, _ = _exponentials(logits_nv, top_n1, vocab_size, softcap)
    return top_n1, picked_n1, exponentials.sum(dim=1, keepdim=True)


def _chunk_write_(logits_nv: Tensor, top_n1: Tensor, vocab_size: int, softcap: float | None) -> None:
    """`logits_nv` becomes its exponentials times the cap's derivative."""
    logits_nv.copy_(_exponentials(logits_nv, top_n1, vocab_size, softcap)[1])


def _chunk_factors(  # noqa: PLR0917  tensors by position, as the compiler likes them
    top_n1: Tensor, picked_n1: Tensor, total_n1: Tensor, targets_n: Tensor, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of the chunk's losses, the row factors scale/S (0 without a target), and E − S at the targets."""
    counted_n1 = (targets_n >= 0)[:, None]
    loss = torch.where(counted_n1, total_n1.log() + top_n1 - picked_n1, 0.0).sum()
    at_target_n1 = torch.exp(picked_n1 - top_n1) - total_n1
    if softcap is not None:  # the derivative of c·tanh(x/c) is 1 − tanh²
        at_target_n1 = at_target_n1 * (1 - (picked_n1 / softcap).square())
    return loss, torch.where(counted_n1, scale / total_n1, 0.0), at_target_n1


def _slope_(
    logits_nv: Tensor, targets_n: Tensor, vocab_size: int, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Sum of a chunk's losses, and the gradient by the logits in two factors: one overwrites `logits_nv`, the other,
    returned, is one number a row. So the softmax is never divided by its sum, which saves a pass over the logits.

    With E = exp(x − max) and S = ΣE the gradient is scale/S · (E − S·[target]).
    """
    if logits_nv.device.type == "cuda" and not flops.capped(softcap):
        # Where the largest must be found first, two looks are as quick as three, and what only writes needs no second chunk.
        top_n1, picked_n1, total_n1 = _fused(_chunk_sums)(logits_nv, targets_n, vocab_size, softcap)
        _fused(_chunk_write_)(logits_nv, top_n1, vocab_size, softcap)
    else:
        top_n1, picked_n1, total_n1 = _by_rows_(logits_nv, targets_n, vocab_size, softcap)
    loss, factor_n1, at_target_n1 = _fused(_chunk_factors)(
        top_n1, picked_n1, total_n1, targets_n, softcap, scale
    )
    # Outside the compiled parts: within them, these few elements would cost a copy of everything.
    logits_nv.scatter_(1, targets_n.clamp(min=0)[:, None], at_target_n1.to(logits_nv.dtype))
    return loss, factor_n1


def _by_rows_(
    logits_nv: Tensor, targets_n: Tensor, vocab_size: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_chunk_sums` and `_chunk_write_`. On a CPU a few rows at a time, so that the second look at them finds them in its cache."""
    rows = ROWS_IN_CACHE if logits_nv.device.type == "cpu" else logits_nv.shape[0]
    tops, picked, totals = [], [], []
    for some_nv, target_n in zip(torch.split(logits_nv, rows), torch.split(targets_n, rows), strict=True):
        top_n1, picked_n1 = _fused(_chunk_top)(some_nv, target_n, vocab_size, softcap)
        totals.append(_fused(_chunk_in_one_)(some_nv, top_n1, vocab_size, softcap))
        tops.append(top_n1)
        picked.append(picked_n1)
    return torch.cat(tops), torch.cat(picked), torch.cat(totals)


_compiled: dict[Any, Any] = {}


def _fused(function: Any) -> Any:
    """`function` compiled once, where blocks are compiled too; see `use_compiled`."""
    return _compiled.get(function, function)


def use_compiled(wanted: bool) -> None:
    """Whether the chunks' arithmetic is compiled from now on."""
    _compiled.clear()
    if wanted:
        for function in (_chunk_loss, _chunk_top, _chunk_in_one_, _chunk_sums, _chunk_write_, _chunk_factors):
            _compiled[function] = torch.compile(function, dynamic=False)


def _accumulate(gradient_vd: Tensor, slope_nv: Tensor, chunk_nd: Tensor, *, first: bool) -> None:
    """gradient += slopeᵀ · chunk, in the gradient's own type; the first time it is set."""
    if gradient_vd.dtype == slope_nv.dtype:
        torch.addmm(gradient_vd, slope_nv.t(), chunk_nd, beta=0 if first else 1, out=gradient_vd)
    elif first:
        gradient_vd.copy_(slope_nv.t() @ chunk_nd)
    else:
        gradient_vd += slope_nv.t() @ chunk_nd


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any,
        hidden_nd: Tensor,
        weight_vd: Tensor,
        targets_n: Tensor,
        vocab_size: int,
        softcap: float | None,
        scale: float,
    ) -> Tensor:
        count = hidden_nd.shape[0]
        rows = min(count, flops.head_chunk(hidden_nd.device.type))
        cast_vd = weight_vd.to(hidden_nd.dtype)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        gradient_nd = torch.empty_like(hidden_nd) if wanted else None
        gradient_vd = torch.empty_like(weight_vd) if wanted else None
        total = torch.zeros((), device=hidden_nd.device, dtype=torch.float32)
        buffer = hidden_nd.new_empty(rows, weight_vd.shape[0])
        for start in range(0, count, rows):
            chunk_nd, target_n = hidden_nd[start : start + rows], targets_n[start : start + rows]
            logits_nv = torch.mm(chunk_nd, cast_vd.t(), out=buffer[: chunk_nd.shape[0]])
            if gradient_nd is None or gradient_vd is None:
                total += _fused(_chunk_loss)(logits_nv, target_n, vocab_size, softcap)
                continue
            loss, factor_n1 = _slope_(logits_nv, target_n, vocab_size, softcap, scale)
            total += loss
            torch.mm(logits_nv, cast_vd, out=gradient_nd[start : start + rows])
            gradient_nd[start : start + rows] *= factor_n1
            _accumulate(gradient_vd, logits_nv, (chunk_nd * factor_n1).to(chunk_nd.dtype), first=start == 0)
        if wanted:
            ctx.save_for_backward(gradient_nd, gradient_vd)
        return total * scale

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient_nd, gradient_vd = ctx.saved_tensors
        return (
            gradient_nd.mul_(outputs[0].to(gradient_nd.dtype)),
            gradient_vd.mul_(outputs[0]),
            None,
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    targets_n: Tensor,
    *,
    vocab_size: int,
    softcap: float | None = None,
    denominator: float,
) -> Tensor:
    """Sum over tokens of −log softmax(hidden · weightᵀ)[target], divided by `denominator`; a float32 scalar.

    `weight_vd` may have more rows than `vocab_size`: they are no part of the softmax. Targets of −1 do not count.
    """
    scale = 1.0 / denominator
    return cast(
        Tensor,
        _LinearCrossEntropy.apply(hidden_nd, weight_vd, targets_n, vocab_size, softcap, scale),  # type: ignore[no-untyped-call]
    )
