"""LoRA (Hu et al., 2021): the weight of a linear map becomes W + alpha/rank · B·A, with W frozen.

The sum is formed in weight space, by a parametrization of the map's `weight`. So whatever reads `weight` (the attention
joins three of them) sees the adapted one, a merged model computes with the very same numbers, and unmerging puts the very
same W back. B begins at zero: an adapter changes nothing until it is trained.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainer.after.settings import TARGETS, LoraConfig
from trainer.config import ConfigError
from trainer.model import GPT


class LowRank(nn.Module):
    """W ↦ W + scale · B·A; `a` is (rank, in), `b` (out, rank)."""

    def __init__(self, weight: Tensor, lora: LoraConfig, seed: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(columns)  # what Kaiming's uniform distribution with a = √5 comes to
        first = (torch.rand(lora.rank, columns, generator=generator) * 2 - 1) * bound
        self.a = nn.Parameter(first.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, lora.rank, device=weight.device))
        self.scale = lora.alpha / lora.rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


@dataclass
class _Adapted:
    linear: nn.Linear
    low_rank: LowRank
    base: Tensor | None = None
    """W, while the map is merged."""


class Adapters:
    """The adapters of one model. Creating them freezes every other weight."""

    def __init__(self, gpt: GPT, lora: LoraConfig, seed: int) -> None:
        gpt.requires_grad_(requires_grad=False)
        self.config = lora
        self._adapted: dict[str, _Adapted] = {}
        for name, linear in _targets(gpt, lora):
            low_rank = LowRank(linear.weight, lora, zlib.crc32(name.encode()) + (seed << 32))
            self._adapted[name] = _Adapted(linear, low_rank)
            parametrize.register_parametrization(linear, "weight", low_rank)

    @property
    def merged(self) -> bool:
        """Whether the maps hold W + scale · B·A as plain weights now."""
        return any(item.base is not None for item in self._adapted.values())

    def merge(self) -> None:
        """Make the adapted weights plain ones; the model is then as any other."""
        for item in self._adapted.values():
            if item.base is None:
                item.base = _original(item.linear)
                parametrize.remove_parametrizations(item.linear, "weight", leave_parametrized=True)
                item.linear.weight.requires_grad = False

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit, with the adapters beside them."""
        for item in self._adapted.values():
            if item.base is not None:
                item.linear.weight = nn.Parameter(item.base, requires_grad=False)
                item.base = None
                parametrize.register_parametrization(item.linear, "weight", item.low_rank)

    def tensors(self) -> dict[str, Tensor]:
        """`NAME.a` and `NAME.b` of each adapted map."""
        return {
            f"{name}.{part}": getattr(item.low_rank, part).detach()
            for name, item in self._adapted.items()
            for part in ("a", "b")
        }

    def save(self, path: Path) -> None:
        """The adapters alone, as a safetensors file."""
        named = {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}
        save_file(named, path, metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Fill the adapters from a file that `save` wrote. Raises ConfigError where it is of other maps or ranks."""
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        mine = self.tensors()
        if {name: tensor.shape for name, tensor in found.items()} != {
            name: tensor.shape for name, tensor in mine.items()
        }:
            raise ConfigError("lora", f"{path} holds adapters of other maps or another rank")
        if self.merged:
            raise ConfigError("lora", "the model is merged; unmerge it first")
        for name, tensor in found.items():
            mine[name].copy_(tensor)


def _targets(gpt: GPT, lora: LoraConfig) -> Iterator[tuple[str, nn.Linear]]:
    for index, block in enumerate(gpt.blocks):
        for target in lora.targets:
            if target not in TARGETS:
                raise ConfigError("lora.targets", f"{target!r} is none of {', '.join(TARGETS)}")
            name = TARGETS[target]
            owner, _, attribute = name.partition(".")
            linear = getattr(getattr(block, owner), attribute)
            if linear is None:
                raise ConfigError(
                    "lora.targets", f"the model has no {target}; only activation: swiglu has a gate"
                )
            yield f"blocks.{index}.{name}", linear


def _original(linear: nn.Linear) -> Tensor:
    holder = cast(nn.ModuleDict, linear.parametrizations)["weight"]
    return cast(Tensor, holder.original).detach()


def plain_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a module by the name it has without adapters, adapted ones merged."""
    for name, parameter in module.named_parameters():
        if ".parametrizations." not in name:
            yield name, parameter.detach()
        elif name.endswith(".parametrizations.weight.original"):
            owner = name.removesuffix(".parametrizations.weight.original")
            with torch.no_grad():
                yield f"{owner}.weight", cast(nn.Linear, module.get_submodule(owner)).weight.detach()
