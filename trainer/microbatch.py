"""How many sequences one process takes at a time. The loss does not depend on it; memory and speed do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainer import cache, flops
from trainer.config import ConfigError, TrainerConfig
from trainer.distributed import World


def candidates(config: TrainerConfig, processes: int) -> list[int]:
    """Microbatch sizes that divide a process's share of the global batch, largest first, none longer than useful."""
    return flops.microbatch_sizes(config.model, config.train, processes)


def predicted(config: TrainerConfig, processes: int, memory_gib: float | None) -> int:
    """The largest candidate that is predicted to fit into `memory_gib` (None: no limit). Raises ConfigError where not
    even one sequence would."""
    size = flops.largest_microbatch(config.model, config.train, processes, memory_gib)
    if size is not None:
        return size
    needed = flops.memory_gib(config.model, config.train, 1, processes)
    raise ConfigError("train.microbatch_size",
                      f"one sequence needs about {needed:.1f} GiB, the device has {memory_gib:.1f}; choose sharding: fsdp, "
                      "activation_checkpointing: true, or a smaller model")  # fmt: skip


def device_memory_gib(device: torch.device) -> float | None:
    """Memory of a GPU; None on a CPU, where nothing is predicted to be short."""
    if device.type != "cuda":
        return None
    return float(torch.cuda.get_device_properties(device).total_memory) / 2**30


def would_fit(config: TrainerConfig, here: World, size: int) -> str:
    """What to try after running out of memory at `size`: a sentence."""
    smaller = [other for other in candidates(config, here.size) if other < size]
    needed = flops.memory_gib(config.model, config.train, size, here.size)
    text = f"microbatch_size {size} was predicted to need {needed:.1f} GiB"
    total = device_memory_gib(here.device)
    if total is not None:
        text += f" of the device's {total:.1f}"
        smaller = [
            n for n in smaller if flops.memory_gib(config.model, config.train, n, here.size) <= 0.85 * total
        ]
    return text + (
        f"; microbatch_size {smaller[0]} would fit" if smaller else "; no smaller one is predicted to fit"
    )


def choose(config: TrainerConfig, here: World, recorded: int | None) -> int:
    """The microbatch size to begin with, the same on every rank: the spec's; or the one that the checkpoint was trained
    with, so that a resumed run is bit-identical; or one that held on this kind of machine before; or the predicted."""
    wanted = config.train.microbatch_size
    if wanted != "auto":
        return wanted
    share = config.train.global_batch_size // here.size
    if recorded is not None and share % recorded == 0:
        return recorded
    size: int = here.tell(_known_or_predicted(config, here) if here.rank == 0 else None)
    return size


def _known_or_predicted(config: TrainerConfig, here: World) -> int:
    known = cache.recall(cache.key(config, here.device, here.size), "microbatch_size")
    return known if isinstance(known, int) else predicted(config, here.size, device_memory_gib(here.device))


def verified(size: int, config: TrainerConfig, here: World, attempt: Callable[[int], None]) -> int:
    """`size` where `attempt(size)`, real steps without collectives, does not run out of memory on any rank; otherwise
    the next smaller candidate, tried likewise. The result is remembered. Raises OutOfMemoryError where that fails too.
    """
    smaller = [other for other in candidates(config, here.size) if other < size]
    for candidate in [size, *smaller[:1]]:
        failed = False
        try:
            attempt(candidate)
        except torch.OutOfMemoryError:
            failed = True
        if not here.agree(failed).result()[0]:
            if here.rank == 0:
                cache.remember(cache.key(config, here.device, here.size), "microbatch_size", candidate)
            return candidate
        if here.device.type == "cuda":
            torch.cuda.empty_cache()
    raise torch.OutOfMemoryError(f"out of memory before the first step: {would_fit(config, here, size)}")
