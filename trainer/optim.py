"""AdamW, and Muon beside it; one pass over the gradients clips them, and a non-finite step changes nothing.

No decision here is taken on the host: the gradients' norm, whether it is finite, and the clipping factor stay on the
device, so the processor never waits for the GPU within a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.model import GPT, plain_name

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al., Muon, 2024)."""
MOMENTUM = 0.95


class Optimizer:
    """Every parameter of a model in exactly one optimizer: AdamW, or Muon for the blocks' matrices (`optimizer: muon`)."""

    def __init__(self, model: GPT, train: TrainConfig) -> None:
        self.names = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
        matrices = [p for p, name in self.names.items() if p.ndim == 2 and name.startswith("blocks.")]
        by_muon = set(matrices) if train.optimizer == "muon" else set()
        rest = [p for p in self.names if p not in by_muon]
        groups = [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": train.weight_decay},
            {"params": [p for p in rest if p.ndim != 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, fused=True
        )
        self.muon = Muon(matrices, train.muon_learning_rate, train.weight_decay) if by_muon else None
        self.train = train
        assert len(self.names) == len(rest) + len(by_muon)

    @torch.no_grad()
    def step(self, factor: float) -> tuple[Tensor, Tensor]:
        """Clip, and update with the peak learning rates times `factor`, unless a gradient is not finite.

        Returns (gradient norm before clipping, 1.0 where the step was skipped else 0.0), scalars on the device, and
        leaves the gradients unset.
        """
        norm = gradient_norm(self.names)
        skipped = (~torch.isfinite(norm)).float()
        # AdamW's fused kernel divides gradients by `grad_scale` as it reads them, and does nothing where `found_inf`
        # is 1: the attributes are how torch.amp.GradScaler speaks to it.
        limit = self.train.grad_clip
        divisor = (norm / limit).clamp(min=1.0) if limit else torch.ones_like(norm)
        divisor = torch.where(skipped > 0, 1.0, divisor)
        for group in self.adamw.param_groups:
            group["lr"] = self.train.learning_rate * factor
        self.adamw.grad_scale, self.adamw.found_inf = divisor, skipped  # type: ignore[attr-defined]
        self.adamw.step()
        if self.muon is not None:
            self.muon.update(self.train.muon_learning_rate * factor, divisor, skipped)
        for parameter in self.names:
            parameter.grad = None
        return norm, skipped

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The state tensors of each parameter by its name."""
        optimizers: list[torch.optim.Optimizer] = [self.adamw, *([self.muon] if self.muon else [])]
        return {
            name: {key: value for key, value in one.state[parameter].items() if isinstance(value, Tensor)}
            for parameter, name in self.names.items()
            for one in optimizers
            if parameter in one.state
        }

    def prepare_state(self) -> None:
        """Create every state tensor as it is before the first step, so that a checkpoint can be copied into it."""
        for group in self.adamw.param_groups:
            for parameter in group["params"]:
                self.adamw.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        if self.muon is not None:
            self.muon.prepare_state()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients as one vector, a scalar on their device; over all ranks where they are sharded."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=gradients[0].device.type == "cuda" or None)
    gather = getattr(norm, "full_tensor", None)
    return gather() if gather is not None else norm


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., 2024): torch.optim.Muon's update, for all matrices of one shape at once
    and with the decision to skip left on the device. One batched product replaces dozens of small ones."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    def prepare_state(self) -> None:
        """Zero momentum for each matrix."""
        for parameter in self._parameters():
            self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update with the group's learning rate, unclipped."""
        assert closure is None
        one = torch.ones(())
        self.update(self.param_groups[0]["lr"], one, one - 1)

    @torch.no_grad()
    def update(self, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """One update of gradients / `divisor`; where `skipped` is 1, weights and momentum stay as they are."""
        self.prepare_state()
        alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in self._parameters():
            if parameter.grad is not None:
                alike[parameter.shape].append(parameter)
        decay = self.param_groups[0]["weight_decay"]
        for shape, parameters in alike.items():
            keep = skipped.to(parameters[0].device)
            gradients = [p.grad for p in parameters if p.grad is not None]
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            fresh = torch.stack(gradients) / divisor.to(keep.device)
            before = torch.stack(buffers)
            momentum = before.lerp(fresh, 1 - MOMENTUM)
            direction = orthogonalise(fresh.lerp(momentum, MOMENTUM)).to(before.dtype)
            weights = torch.stack(list(parameters))
            scale = lr * max(1.0, shape[0] / shape[1]) ** 0.5
            after = weights * (1 - lr * decay) - scale * direction
            torch._foreach_copy_(buffers, list(torch.where(keep > 0, before, momentum)))
            torch._foreach_copy_([p.data for p in parameters], list(torch.where(keep > 0, weights, after)))


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly U·Vᵀ of each matrix's singular value decomposition, by Newton–Schulz in bfloat16; (n, rows, columns)."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x
