"""What one process holds while it trains, and how it comes to hold it: new, or from a checkpoint."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import resource
import shutil
import sys
import sysconfig
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import cache, checkpoint, clock, distributed, flops, gpus, loss, microbatch
from trainer import config as configuration
from trainer.batches import Reader, training_reader
from trainer.checkpoint import HostCopies, Writer
from trainer.config import ConfigError, TrainerConfig
from trainer.distributed import World
from trainer.model import GPT, fill, initial_weights, padded
from trainer.optim import Optimizer
from trainer.progress import Metrics, Status, Voice, log


@dataclass
class Run(Voice):
    """Everything that one process holds while it trains."""

    config: TrainerConfig
    out: Path
    here: World
    model: GPT
    module: nn.Module
    optimizer: Optimizer
    reader: Reader
    microbatch_size: int
    stop: threading.Event
    status: Status | None
    metrics: Metrics | None
    peak_flops: float | None
    writer: Writer | None = None
    copies: HostCopies | None = None
    step: int = 0
    skipped_in_a_row: int = 0
    best: tuple[int, float] | None = None
    """Step and validation loss of the best checkpoint."""
    saved_step: int | None = None
    saved_at: float = 0.0
    pending: list[Pending] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=51))


@dataclass
class Pending:
    """A step whose numbers are still on the device."""

    step: int
    learning_rate: float
    loss: Tensor
    norm: Tensor
    skipped: Tensor
    begun: Mark
    ended: Mark


class Mark:
    """An instant: the wall clock's on a CPU, the GPU's own stream of work on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.time = clock.now()
        self._counter = time.perf_counter()
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """Return once the device has come here."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_until(self, later: Mark) -> float:
        """Seconds from this mark to `later`, which the device has reached."""
        if self._event is not None and later._event is not None:
            return float(self._event.elapsed_time(later._event)) / 1000
        return later._counter - self._counter


def prepare(
    config: TrainerConfig,
    out: Path,
    here: World,
    *,
    resume: bool,
    status: Status | None,
    stop: threading.Event,
) -> Run:
    configuration.check_batch(config.train, here.size)
    checkpoints = out / "checkpoints"
    found = here.tell(_resume_from(checkpoints, config, resume=resume) if here.rank == 0 else None)
    facts = found[1] if found else {}
    recorded = facts.get("microbatch_size") if facts.get("world_size") == here.size else None
    size = microbatch.choose(config, here, recorded)
    configuration.check_batch(_with_microbatch(config, size).train, here.size)
    reader = training_reader(config.data, config.model.context_length, config.model.vocab_size)
    set_up_process(config)
    model, module, optimizer = build(config, here)
    metrics = Metrics(out / "metrics.jsonl") if here.rank == 0 else None
    gpu = gpu_of(here.device)
    peak = (
        gpu.bf16_flops * here.size
        if gpu is not None and gpu.bf16_flops and config.train.precision == "bf16"
        else None
    )
    run = Run(config, out, here, model, module, optimizer, reader, size, stop, status, metrics, peak)
    run.copies = HostCopies(here.device)
    if (
        config.train.microbatch_size == "auto"
        and recorded is None
        and here.device.type == "cuda"
        and config.train.sharding == "ddp"
    ):
        run.microbatch_size = size = microbatch.verified(
            size, config, here, lambda candidate: _attempt(run, candidate)
        )
        optimizer.reset()
    if found:
        _restore(run, Path(found[0]), facts)
    else:
        use_seed_weights(model, config)
    if here.rank == 0:
        run.writer = Writer(checkpoints, config)
        run.copies.reserve(checkpoint.held(model, optimizer))
        _announce(run, resume=resume, facts=facts)
    run.tell(microbatch_size=size, steps=config.steps, step=run.step, checkpoint_step=run.saved_step)
    run.saved_at = time.monotonic()
    return run


def _attempt(run: Run, size: int) -> None:
    """Two updates and a validation batch at a microbatch size, with meaningless weights and no collectives: afterwards the
    device has held whatever training will make it hold."""
    model, device = run.config.model, run.here.device
    tokens = torch.zeros(size, model.context_length + 1, dtype=torch.int64, device=device)
    for _ in range(2):
        for _ in range(min(2, run.config.train.global_batch_size // run.here.size // size)):
            with distributed.synchronised(run.module, wanted=False):
                run.module(tokens[:, :-1], tokens[:, 1:], 1.0).backward()
        run.optimizer.step(0.0)
    with torch.no_grad():
        run.module(tokens[:, :-1], tokens[:, 1:], 1.0)
    torch.cuda.synchronize(device)


def _with_microbatch(config: TrainerConfig, size: int) -> TrainerConfig:
    return replace(config, train=replace(config.train, microbatch_size=size))


def _resume_from(
    checkpoints: Path, config: TrainerConfig, *, resume: bool
) -> tuple[str, dict[str, Any]] | None:
    """Path and plain facts of the checkpoint to go on from; None: begin. Raises ConfigError."""
    if not resume:
        if checkpoints.is_dir() and checkpoint.steps(checkpoints):
            raise ConfigError(
                "--out", f"{checkpoints} already holds checkpoints; pass --resume, or another directory"
            )
        return None
    path = checkpoint.newest_whole(checkpoints, log)
    if path is None:
        return None
    checkpoint.check_same_model(path, config.model)
    state = checkpoint.load_state(path)
    return str(path), {key: value for key, value in state.items() if key != "optimizer"}


def build(config: TrainerConfig, here: World) -> tuple[GPT, nn.Module, Optimizer]:
    """The model with unset weights on the device, the module to call for its loss, and the optimizer with zero state."""
    train = config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = GPT(config.model, compute_dtype=dtype, recompute=train.activation_checkpointing)
    compiled = train.compile and can_compile(here.device)
    if compiled:
        cache.load_compiled(cache.key(config, here.device, here.size))
    if train.sharding == "ddp":
        model.allocate(here.device)
        _zero(model)
        if compiled:
            model.compile_blocks()
    loss.use_compiled(compiled)
    module = distributed.spread(model, train, here)
    if train.sharding == "fsdp":
        model.allocate(here.device)
        if compiled:
            model.compile_blocks()
    model.train()
    return model, module, Optimizer(model, train)


def use_seed_weights(model: GPT, config: TrainerConfig) -> None:
    """Fill the model, or this rank's part of it, with the first weights of `train.seed`."""
    place = distributed.place if config.train.sharding == "fsdp" else None
    fill(model, initial_weights(config.model, config.train.seed), place)


def keep_memory() -> None:
    """Have glibc keep freed memory. By default every large tensor is mapped anew in each step, and the kernel zeroes
    its pages one by one: a tenth of the time of a small model's step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


@torch.no_grad()
def _zero(model: GPT) -> None:
    for parameter in model.parameters():
        parameter.zero_()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs here, a C++ compiler and for a GPU Python's headers; says so where not."""
    compiler = os.environ.get("CXX", "g++")
    missing = None
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        missing = f"C++ compiler ({compiler})"
    elif device.type == "cuda" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing = f"Python.h in {sysconfig.get_path('include')} (python3-dev)"  # Triton builds its launchers with it
    if missing is not None and int(os.environ.get("RANK", "0")) == 0:
        log(f"train.compile is on, but there is no {missing} for {device.type}: not compiled")
    return missing is None


def set_up_process(config: TrainerConfig) -> None:
    """Switches that hold for the whole process: TF32, determinism, and an allocator that keeps its memory."""
    if config.train.device == "cpu":
        keep_memory()
    torch.set_float32_matmul_precision(
        "high"
    )  # TF32 on a GPU for what is left in float32; nothing changes on a CPU
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        inductor: Any = importlib.import_module("torch._inductor.config")
        if hasattr(inductor, "deterministic"):  # torch 2.10 and newer
            # Reductions are otherwise laid out by timing candidates, which another process may decide differently.
            inductor.deterministic = True
        torch.use_deterministic_algorithms(mode=True)
        torch.backends.cudnn.benchmark = False


def restore_model(run: Run, path: Path) -> None:
    """The weights of the checkpoint at `path`, which only rank 0 needs to have. Every rank calls it."""
    here = run.here
    if run.config.train.sharding != "fsdp":
        if here.rank == 0:
            checkpoint.restore_weights(run.model, checkpoint.weights(path), distributed.place)
        distributed.from_rank_0([p.data for p in run.model.parameters()], here)
        return
    named = checkpoint.weights(path) if here.rank == 0 or path.is_dir() else None
    checkpoint.restore_weights(run.model, _everywhere(named, here), distributed.place)


def _everywhere(found: dict[str, Tensor] | None, here: World) -> dict[str, Tensor]:
    """`found`, or where this rank's node has no copy, tensors of the same shapes: every rank takes part in spreading each
    tensor, and what is spread is rank 0's."""
    told = here.tell(checkpoint.outline(found) if here.rank == 0 and found is not None else None)
    return found if found is not None else checkpoint.hollow(told)


def _restore(run: Run, path: Path, facts: dict[str, Any]) -> None:
    """Weights and optimizer state of the checkpoint at `path`, which only rank 0 needs to have."""
    here, states = run.here, run.optimizer.state()
    sharded = run.config.train.sharding == "fsdp"
    restore_model(run, path)
    saved: dict[str, Tensor] | None = None
    if here.rank == 0 or (sharded and path.is_dir()):
        kept = checkpoint.load_state(path)["optimizer"]
        saved = {f"{name}/{key}": kept[name][key] for name, state in states.items() for key in state}
    if sharded:
        saved = _everywhere(saved, here)
    if saved is not None:
        for name, state in states.items():
            for key, tensor in state.items():
                value = saved[f"{name}/{key}"]
                distributed.place(tensor, padded(name, value, run.config.model) if value.ndim else value)
    if not sharded:
        distributed.from_rank_0([tensor for state in states.values() for tensor in state.values()], here)
    run.step = facts["step"]
    run.saved_step = run.step
    run.best = tuple(facts["best"]) if facts["best"] else None
    run.skipped_in_a_row = facts["skipped_in_a_row"]


def _announce(run: Run, *, resume: bool, facts: dict[str, Any]) -> None:
    """The facts of this run, once, in the log and in the metrics."""
    model, train, here = run.config.model, run.config.train, run.here
    gpu = gpu_of(here.device)
    name = (
        torch.cuda.get_device_name(here.device)
        if here.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    run.record({
        "kind": "system", "step": run.step, "time": clock.now(), "gpu": gpu.key if gpu else None, "device": name,
        "gpus": here.size if here.device.type == "cuda" else 0, "torch": torch.__version__, "python": platform.python_version(),
        "world_size": here.size, "microbatch_size": run.microbatch_size, "parameters": flops.parameters(model),
        "flops_per_token": flops.flops_per_token(model), "flops_formula": flops.FORMULA, "peak_flops": run.peak_flops,
        "peak_source": gpu.source if gpu and run.peak_flops else None, "compile": train.compile and can_compile(here.device),
        "tokens_per_epoch": run.reader.order.sequences * model.context_length,
    })  # fmt: skip
    if resume and (run.step or (run.out / "metrics.jsonl").stat().st_size > 0):
        run.record({
            "kind": "resume", "step": run.step, "time": clock.now(), "world_size": here.size,
            "microbatch_size": run.microbatch_size, "from_world_size": facts.get("world_size"),
        })  # fmt: skip
    log(
        f"{flops.parameters(model):,} parameters, {flops.flops_per_token(model) / 1e6:,.1f} MFLOP/token ({flops.FORMULA})"
    )
    peak = (
        f"{run.peak_flops / 1e12:,.0f} TFLOP/s ({gpu.source})"
        if run.peak_flops and gpu
        else "unknown, so no MFU"
    )
    log(f"{here.size} x {name}, dense bf16 peak {peak}; torch {torch.__version__}")
    accumulation = train.global_batch_size // here.size // run.microbatch_size
    log(
        f"{train.global_batch_size} sequences a step = {here.size} processes x {accumulation} x microbatch {run.microbatch_size}"
    )
    log(
        f"{run.reader.order.sequences:,} sequences an epoch; {run.config.steps} steps, starting after step {run.step}"
    )


def gpu_of(device: torch.device) -> gpus.Gpu | None:
    """The row of the GPU table for this device, or None."""
    if device.type != "cuda":
        return None
    return gpus.lookup(torch.cuda.get_device_name(device), microbatch.device_memory_gib(device))


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: reserved on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
