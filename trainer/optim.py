"""AdamW, and Muon beside it; one pass over the gradients clips them, and a non-finite step changes nothing.

No decision here is taken on the host: the gradients' norm, whether it is finite, and the clipping factor stay on the
device, so the processor never waits for the GPU within a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trainer.config import TrainConfig
from trainer.model import GPT, plain_name

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al., Muon, 2024)."""
MOMENTUM = 0.95


class Optimizer:
    """Every parameter of a model in exactly one optimizer: AdamW, or Muon for the blocks' matrices (`optimizer: muon`).

    torch's update is called as a function, with state of our own: a torch.optim.Optimizer loads torch's compiler at its first
    use, a second of each process that compiles nothing.
    """

    def __init__(self, model: GPT, train: TrainConfig) -> None:
        self.names = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
        matrices = [p for p, name in self.names.items() if p.ndim == 2 and name.startswith("blocks.")]
        by_muon = set(matrices) if train.optimizer == "muon" else set()
        rest = [p for p in self.names if p not in by_muon]
        self.adamw = (
            (train.weight_decay, [p for p in rest if p.ndim == 2]),
            (0.0, [p for p in rest if p.ndim != 2]),
        )
        """(weight decay, the parameters that AdamW updates with it)."""
        self.muon = Muon(matrices, train.weight_decay) if by_muon else None
        self.train = train
        self._moments: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.reset()

    @torch.no_grad()
    def step(self, factor: float) -> tuple[Tensor, Tensor]:
        """Clip, and update with the peak learning rates times `factor`, unless a gradient is not finite.

        Returns (gradient norm before clipping, 1.0 where the step was skipped else 0.0), scalars on the device, and
        leaves the gradients unset.
        """
        norm = gradient_norm(self.names)
        skipped = (~torch.isfinite(norm)).float()
        limit = self.train.grad_clip
        divisor = (norm / limit).clamp(min=1.0) if limit else torch.ones_like(norm)
        divisor = torch.where(skipped > 0, 1.0, divisor)
        for decay, parameters in self.adamw:
            self._adamw(parameters, self.train.learning_rate * factor, decay, divisor, skipped)
        if self.muon is not None:
            self.muon.update(self.train.muon_learning_rate * factor, divisor, skipped)
        for parameter in self.names:
            parameter.grad = None
        return norm, skipped

    def _adamw(
        self, parameters: list[nn.Parameter], lr: float, decay: float, divisor: Tensor, skipped: Tensor
    ) -> None:
        """The fused kernel divides gradients by `grad_scale` as it reads them, and does nothing where `found_inf` is 1."""
        ready = [p for p in parameters if p.grad is not None]
        states = [self._moments[p] for p in ready]
        adamw(
            list(ready), [p.grad for p in ready if p.grad is not None], [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states], [], [state["step"] for state in states], fused=True,
            grad_scale=divisor, found_inf=skipped, amsgrad=False, beta1=self.train.betas[0], beta2=self.train.betas[1], lr=lr,
            weight_decay=decay, eps=self.train.eps, maximize=False,
        )  # fmt: skip

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The state tensors of each parameter by its name."""
        known = self._moments | (self.muon.state if self.muon is not None else {})
        return {name: known[parameter] for parameter, name in self.names.items()}

    def reset(self) -> None:
        """Every state tensor as it is before the first step."""
        for _, parameters in self.adamw:
            for parameter in parameters:
                self._moments[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        if self.muon is not None:
            self.muon.reset()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients as one vector, a scalar on their device; over all ranks where they are sharded."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=gradients[0].device.type == "cuda" or None)
    gather = getattr(norm, "full_tensor", None)
    return gather() if gather is not None else norm


class Muon:
    """Momentum, orthogonalised (Jordan et al., 2024): torch.optim.Muon's update, for all matrices of one shape at once
    and with the decision to skip left on the device. One batched product replaces dozens of small ones."""

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        self.parameters, self.weight_decay = parameters, weight_decay
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    def reset(self) -> None:
        """Zero momentum for each matrix; called before the first update."""
        for parameter in self.parameters:
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def update(self, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """One update of gradients / `divisor`; where `skipped` is 1, weights and momentum stay as they are."""
        alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in self.parameters:
            if parameter.grad is not None:
                alike[parameter.shape].append(parameter)
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
            after = weights * (1 - lr * self.weight_decay) - scale * direction
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
