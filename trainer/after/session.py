"""The run that the scripts of this package share: epochs over examples, a validation after each, and the best one kept.

What is written, by which functions and under which names, is what `trainer.loop` writes; the exit codes are its too.
An epoch's order is a function of the seed and the epoch, so an interrupted run carries on exactly.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from trainer import checkpoint, clock, distributed, ending, flops
from trainer import config as configuration
from trainer.after import epochs, saving
from trainer.after.examples import Example, ExampleError
from trainer.after.work import Session, Trainable, Work
from trainer.checkpoint import HostCopies, Writer
from trainer.config import ConfigError
from trainer.distributed import World
from trainer.model import GPT
from trainer.optim import Optimizer
from trainer.progress import Metrics, Status, log
from trainer.session import peak_memory_gib, set_up_process

MICROBATCH = 8
"""Examples per forward where the configuration names no number."""


def microbatch(share: int, wanted: int | None) -> int:
    """Examples per forward: as wanted, or the largest divisor of a process's share up to MICROBATCH."""
    return wanted or max(number for number in configuration.divisors(share) if number <= MICROBATCH)


def run(build: Callable[[Path], Work[Example]], config_path: Path, out: Path, *, resume: bool) -> int:
    """Tune as `config_path` says, into `out`; the exit code. Every rank runs this."""

    def work(status: Status | None, stop: threading.Event) -> str:
        try:
            return _tune(build(config_path), out, resume=resume, status=status, stop=stop)
        except torch.OutOfMemoryError as error:
            hint = "choose a smaller train.microbatch_size or data.max_length"
            raise torch.OutOfMemoryError(f"out of memory: {hint}. {error}") from error

    return ending.carry(out, work, ExampleError)


def _tune(
    work: Work[Example], out: Path, *, resume: bool, status: Status | None, stop: threading.Event
) -> str:
    """The story of a run: prepare, step until the end, a rise or a stop, evaluate. Returns `finished` or `stopped`."""
    with distributed.world(work.config.train) as here:
        session = _prepare(work, out, here, resume=resume, status=status, stop=stop)
        stopped = epochs.train(session)
        if session.saved_step != session.step:
            saving.save(session, validation_loss=None, best=False)
        if session.writer is not None:
            session.writer.wait()
        if not stopped:
            stopped = not epochs.evaluate(session)
        session.record(
            {
                "kind": "system",
                "step": session.step,
                "time": clock.now(),
                "peak_memory_gib": peak_memory_gib(here.device),
            }
        )
        here.tell(None)  # nobody leaves while rank 0 still works
        return "stopped" if stopped else "finished"


def _prepare(
    work: Work[Example], out: Path, here: World, *, resume: bool, status: Status | None, stop: threading.Event
) -> Session[Example]:
    config, train = work.config, work.config.train
    configuration.check_batch(train, here.size)
    size = microbatch(train.global_batch_size // here.size, work.settings.microbatch_size)
    set_up_process(config)
    checkpoints = out / "checkpoints"
    if not resume and checkpoints.is_dir() and checkpoint.steps(checkpoints):
        raise ConfigError(
            "--out", f"{checkpoints} already holds checkpoints; pass --resume, or another directory"
        )
    path = checkpoint.newest_whole(checkpoints, log) if resume and here.rank == 0 else None
    work.module.to(here.device)
    work.begin(here)
    trainable = work.trainable()
    optimizer = Optimizer(cast(GPT, Trainable(trainable)), train)
    wrapped = distributed.spread(cast(GPT, work.module), train, here)
    first = here.rank == 0
    session = Session(
        work, out, here, wrapped, optimizer, size, stop, status, Metrics(out / "metrics.jsonl") if first else None,
        Writer(checkpoints, config) if first else None, HostCopies(here.device),
    )  # fmt: skip
    facts = here.tell(saving.restore(work, optimizer, path) if path is not None else None)
    if facts is not None:
        saving.share(session)
        session.step = session.saved_step = facts["step"]
        session.tokens, session.rises = facts["tokens"], facts["rises"]
        session.best = tuple(facts["best"]) if facts["best"] else None
    _announce(session, resumed=facts is not None)
    session.tell(
        microbatch_size=size, steps=config.steps, step=session.step, checkpoint_step=session.saved_step
    )
    return session


def _announce(session: Session[Example], *, resumed: bool) -> None:
    work, here = session.work, session.here
    trainable = sum(p.numel() for p in work.trainable().values())
    name = (
        torch.cuda.get_device_name(here.device)
        if here.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    session.record({
        "kind": "system", "step": session.step, "time": clock.now(), "device": name,
        "gpus": here.size if here.device.type == "cuda" else 0, "torch": torch.__version__, "python": platform.python_version(),
        "world_size": here.size, "microbatch_size": session.microbatch_size, "parameters": flops.parameters(work.model),
        "flops_per_token": flops.flops_per_token(work.model), "compile": False, "trainable_parameters": trainable,
        "examples": len(work.train), "tokens_per_epoch": sum(work.length(item) for item in work.train), **work.announce,
    })  # fmt: skip
    if resumed:
        session.record({"kind": "resume", "step": session.step, "time": clock.now(), "world_size": here.size,
                        "microbatch_size": session.microbatch_size})  # fmt: skip
    if here.rank == 0:
        log(
            f"{trainable:,} of {flops.parameters(work.model):,} parameters are trained, on {len(work.train)} examples"
        )
        log(
            f"{session.epoch_steps} steps an epoch, {work.settings.epochs} epochs at most; starting after step {session.step}"
        )
