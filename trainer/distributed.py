"""The processes of one run: who they are, what they agree on, and how the model is spread over them.

Every collective here is called by every rank at the same place, or not at all. What one rank alone knows (a stop was
requested, a checkpoint is due by the clock) travels as flags over a gloo group of its own, without waiting for the GPU.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import ConfigError, TrainConfig
from trainer.model import GPT

FIRST_STEP_TIMEOUT = datetime.timedelta(minutes=30)
"""Compiling, and the first NCCL connection, happen within it."""
STEP_TIMEOUT = datetime.timedelta(minutes=5)
"""A collective that takes longer, once steps run, has lost a rank."""


@dataclass
class World:
    """This process among all. Without torchrun: the only one."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    flags: Any = None
    """The gloo group that flags travel on; None in a world of one."""

    def agree(self, *mine: bool) -> Agreement:
        """Start to find out, for each flag, whether any rank raised it."""
        votes = torch.tensor(mine, dtype=torch.int32)
        work = (
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.flags, async_op=True)
            if self.size > 1
            else None
        )
        return Agreement(votes, work)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def tell(self, value: Any) -> Any:
        """Rank 0's `value` (plain Python), on every rank."""
        if self.size == 1:
            return value
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self.flags)
        return box[0]

    def shorten_timeouts(self) -> None:
        """From the long time-out of the first step to that of all later ones."""
        if self.size > 1 and self.device.type == "cuda":
            setter = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
            if setter is not None:
                setter(STEP_TIMEOUT, dist.group.WORLD)


class Agreement:
    """Flags on their way; `result` waits for them."""

    def __init__(self, votes: Tensor, work: Any) -> None:
        self._votes, self._work = votes, work

    def result(self) -> Sequence[bool]:
        """For each flag, whether any rank raised it; the same on every rank."""
        if self._work is not None:
            self._work.wait()
        return [bool(vote) for vote in self._votes.tolist()]


@contextlib.contextmanager
def world(train: TrainConfig) -> Iterator[World]:
    """Join the world that torchrun describes in the environment, and leave it at the end.

    Raises ConfigError where `train.device` is not here: training never falls back to another device.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_size = (
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    device = _device(train, local_rank)
    here = World(rank, size, local_rank, local_size, device)
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=FIRST_STEP_TIMEOUT, device_id=device if backend == "nccl" else None
        )
        here.flags = dist.new_group(backend="gloo", timeout=FIRST_STEP_TIMEOUT)
    try:
        yield here
    finally:
        if size > 1:
            dist.destroy_process_group()


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # which macOS has not
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _device(train: TrainConfig, local_rank: int) -> torch.device:
    if train.device == "cpu":
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if local_size > 1:  # torchrun sets OMP_NUM_THREADS=1, whatever the machine has
            torch.set_num_threads(max(1, _processors() // local_size))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "train.device", "cuda, but torch sees no GPU here; fix the driver or choose device: cpu"
        )
    if local_rank >= torch.cuda.device_count():
        raise ConfigError("train.processes_per_node",
                          f"process {local_rank} has no GPU of its own; this machine has {torch.cuda.device_count()}")  # fmt: skip
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def spread(model: GPT, train: TrainConfig, here: World) -> nn.Module:
    """The module whose forward and backward keep all ranks' gradients equal: `model` itself, DDP around it, or
    FSDP2 inside it (parameters become sharded DTensors in place)."""
    if train.sharding == "fsdp":
        return _fully_shard(model, here)
    if here.size == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[here.device] if here.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def _fully_shard(model: GPT, here: World) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if here.size == 1:
        raise ConfigError("train.sharding", "fsdp needs more than one process; use ddp")
    mesh = init_device_mesh(here.device.type, (here.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


@contextlib.contextmanager
def synchronised(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Forward and backward with (the last microbatch) or without the exchange of gradients. DDP decides in forward, so
    both belong inside."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if wanted else module.no_sync():
            yield
        return
    setter = getattr(module, "set_requires_gradient_sync", None)
    if setter is not None:
        setter(wanted)
    yield


@torch.no_grad()
def place(parameter: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a parameter, or into this rank's part of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        full = value.to(parameter.device)
        parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor: gathered from all ranks where it is sharded (then every rank must call this)."""
    gather = getattr(tensor, "full_tensor", None)
    return cast(Tensor, gather()) if gather is not None else tensor


@torch.no_grad()
def from_rank_0(tensors: Sequence[Tensor], here: World) -> None:
    """Overwrite whole tensors on every rank with rank 0's."""
    if here.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
