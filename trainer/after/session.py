"""The run that the scripts of this package share: epochs over examples, a validation after each, and the best one kept.

What is written, by which functions and under which names, is what `trainer.loop` writes; the exit codes are its too.
An epoch's order is a function of the seed and the epoch, so an interrupted run carries on exactly.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, cast

import torch
from torch import Tensor, nn

from trainer import checkpoint, distributed, flops, schedule
from trainer import config as configuration
from trainer.after import examples, lora
from trainer.after.examples import Example, ExampleError
from trainer.after.settings import TuneTrain, steps_per_epoch
from trainer.checkpoint import HostCopies, Saved, Snapshot, Writer
from trainer.config import ConfigError, ModelConfig, TrainerConfig
from trainer.distributed import World
from trainer.loop import (
    EXIT_MEMORY,
    EXIT_NON_FINITE,
    EXIT_REFUSED,
    SKIPPED_IN_A_ROW,
    NonFiniteError,
)
from trainer.model import GPT, padded, unpadded
from trainer.optim import Optimizer
from trainer.progress import (
from trainer.session import Mark, peak_memory_gib, set_up_process
    FAILURE,
    STOP,
    Metrics,
    Status,
    finite,
    log,
    report_failure,
    step_line,
    write_json,
)

MICROBATCH = 8
"""Examples per forward where the configuration names no number."""


@dataclass
class Work(Generic[Example]):
    """What one script gives to the session."""

    config: TrainerConfig
    """What a checkpoint says it is."""
    settings: TuneTrain
    module: nn.Module
    """forward(*batch, denominator) → one number per column; see `trainer.after.heads`."""
    columns: tuple[str, ...]
    """Names of these numbers, `loss` first."""
    train: Sequence[Example]
    validation: Sequence[Example]
    test: dict[str, Sequence[Example]]
    weigh: Callable[[Example], int]
    """How much an example counts in the mean."""
    length: Callable[[Example], int]
    """Tokens of an example that are computed with."""
    collate: Callable[[Sequence[Example | None]], tuple[Tensor, ...]]
    """Examples as one batch on the CPU; None fills up and counts nothing."""
    begin: Callable[[World], None] = lambda _here: None
    """Called once the base's weights are on the device, before anything is trained."""
    announce: dict[str, Any] = field(default_factory=dict)
    """More facts for the metrics' first line."""

    @property
    def model(self) -> ModelConfig:
        """The base's configuration."""
        return self.config.model

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by the names of a checkpoint."""
        return {_plain(name): p for name, p in self.module.named_parameters() if p.requires_grad}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds: every weight, adapters merged."""
        for name, tensor in lora.plain_weights(self.module):
            yield _plain(name), unpadded(_plain(name), tensor, self.model)


def _plain(name: str) -> str:
    return name.removeprefix("gpt.")


class _Trainable:
    """The part of a model that an optimizer sees."""

    def __init__(self, named: dict[str, nn.Parameter]) -> None:
        self._named = named

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._named.items())


@dataclass
class Session(Generic[Example]):
    """Everything that one process holds while it tunes."""

    work: Work[Example]
    out: Path
    here: World
    wrapped: nn.Module
    optimizer: Optimizer
    microbatch_size: int
    stop: threading.Event
    status: Status | None
    metrics: Metrics | None
    writer: Writer | None
    copies: HostCopies
    step: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0
    best: tuple[int, float] | None = None
    """Step and validation loss of the best epoch."""
    rises: int = 0
    """Epochs in a row that were not better."""
    saved_step: int | None = None
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def epoch_steps(self) -> int:
        """Steps of one epoch."""
        return steps_per_epoch(self.work.settings, len(self.work.train))

    @property
    def over(self) -> bool:
        """Whether nothing is left to train."""
        return self.step >= self.work.config.steps or self.rises >= self.work.settings.patience

    @property
    def stopping(self) -> bool:
        """Whether this rank knows of a request to stop."""
        return self.stop.is_set() or (self.status is not None and self.status.stop.is_set())

    def tell(self, **fields: Any) -> None:
        """Update status.json, on the rank that owns it."""
        if self.status is not None:
            self.status.update(**fields)

    def record(self, *records: dict[str, Any]) -> None:
        """Append to metrics.jsonl, on the rank that owns it."""
        if self.metrics is not None:
            self.metrics.write(*records)


def run(build: Callable[[Path], Work[Example]], config_path: Path, out: Path, *, resume: bool) -> int:
    """Tune as `config_path` says, into `out`; the exit code. Every rank runs this."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    out.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    status = None
    if int(os.environ.get("RANK", "0")) == 0:
        (out / FAILURE).unlink(missing_ok=True)
        status = Status(out, world_size=int(os.environ.get("WORLD_SIZE", "1")), microbatch_size=None)
    try:
        state = _tune(build(config_path), out, resume=resume, status=status, stop=stop)
    except (ConfigError, ExampleError, NonFiniteError, OSError, RuntimeError) as error:
        code, reason, message = _verdict(error, out)
        _end_failed(out, status, reason, message)
        if code is None:
            raise
        os.write(2, f"trainer: {message}\n".encode())
        return code
    except BaseException as error:
        _end_failed(out, status, "crash", f"{type(error).__name__}: {error}")
        raise
    if status is not None:
        status.end(state)
        if state == "stopped":
            (out / STOP).unlink(missing_ok=True)
    return 0


def _verdict(error: BaseException, out: Path) -> tuple[int | None, str, str]:
    """(exit code, reason, message) of a failure; no code: a crash, worth another start."""
    if isinstance(error, ConfigError):
        return EXIT_REFUSED, "config", str(error)
    if isinstance(error, ExampleError):
        return EXIT_REFUSED, "data", str(error)
    if isinstance(error, NonFiniteError):
        return EXIT_NON_FINITE, "non_finite", str(error)
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return EXIT_REFUSED, "disk_full", f"{error.filename or out}: {error.strerror}; make room and resume"
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return (
            EXIT_MEMORY,
            "out_of_memory",
            f"out of memory: choose a smaller train.microbatch_size or data.max_length. {error}",
        )
    return None, "crash", f"{type(error).__name__}: {error}"


def _end_failed(out: Path, status: Status | None, reason: str, message: str) -> None:
    if status is not None:
        status.end("failed", reason=reason, message=message)
    else:
        report_failure(out, reason, message)


def _tune(
    work: Work[Example], out: Path, *, resume: bool, status: Status | None, stop: threading.Event
) -> str:
    """The story of a run: prepare, step until the end, a rise or a stop, evaluate. Returns `finished` or `stopped`."""
    with distributed.world(work.config.train) as here:
        session = _prepare(work, out, here, resume=resume, status=status, stop=stop)
        stopped = _steps(session)
        if session.saved_step != session.step:
            _save(session, validation_loss=None, best=False)
        if session.writer is not None:
            session.writer.wait()
        if not stopped:
            _evaluate(session)
        session.record(
            {
                "kind": "system",
                "step": session.step,
                "time": time.time(),
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
    share = train.global_batch_size // here.size
    size = work.settings.microbatch_size or max(d for d in configuration.divisors(share) if d <= MICROBATCH)
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
    optimizer = Optimizer(cast(GPT, _Trainable(trainable)), train)
    optimizer.prepare_state()
    wrapped = distributed.spread(cast(GPT, work.module), train, here)
    first = here.rank == 0
    session = Session(
        work, out, here, wrapped, optimizer, size, stop, status, Metrics(out / "metrics.jsonl") if first else None,
        Writer(checkpoints, config) if first else None, HostCopies(here.device),
    )  # fmt: skip
    facts = here.tell(_restore(work, optimizer, path) if path is not None else None)
    if facts is not None:
        _share(session)
        session.step = session.saved_step = facts["step"]
        session.tokens, session.rises = facts["tokens"], facts["rises"]
        session.best = tuple(facts["best"]) if facts["best"] else None
    _announce(session, resumed=facts is not None)
    session.tell(
        microbatch_size=size, steps=config.steps, step=session.step, checkpoint_step=session.saved_step
    )
    return session


@torch.no_grad()
def _restore(work: Work[Example], optimizer: Optimizer | None, path: Path) -> dict[str, Any]:
    """Fill what is trained from a checkpoint, and the optimizer too where one is given; the checkpoint's plain facts."""
    state = checkpoint.load_state(path)
    saved, extra = checkpoint.weights(path), state["adapters"]
    for name, parameter in work.trainable().items():
        parameter.copy_(padded(name, extra[name] if name in extra else saved[name], work.model))
    if optimizer is not None:
        for name, entries in optimizer.state().items():
            for key, tensor in entries.items():
                value = state["optimizer"][name][key]
                tensor.copy_(padded(name, value, work.model) if value.ndim else value)
    return {key: value for key, value in state.items() if key not in {"optimizer", "adapters"}}


def _share(session: Session[Example]) -> None:
    """Every rank gets rank 0's weights and optimizer state."""
    states = [tensor for entries in session.optimizer.state().values() for tensor in entries.values()]
    distributed.from_rank_0([p.data for p in session.work.trainable().values()] + states, session.here)


def _announce(session: Session[Example], *, resumed: bool) -> None:
    work, here = session.work, session.here
    trainable = sum(p.numel() for p in work.trainable().values())
    name = (
        torch.cuda.get_device_name(here.device)
        if here.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    session.record({
        "kind": "system", "step": session.step, "time": time.time(), "device": name,
        "gpus": here.size if here.device.type == "cuda" else 0, "torch": torch.__version__, "python": platform.python_version(),
        "world_size": here.size, "microbatch_size": session.microbatch_size, "parameters": flops.parameters(work.model),
        "flops_per_token": flops.flops_per_token(work.model), "compile": False, "trainable_parameters": trainable,
        "examples": len(work.train), "tokens_per_epoch": sum(work.length(item) for item in work.train), **work.announce,
    })  # fmt: skip
    if resumed:
        session.record({"kind": "resume", "step": session.step, "time": time.time(), "world_size": here.size,
                        "microbatch_size": session.microbatch_size})  # fmt: skip
    if here.rank == 0:
        log(
            f"{trainable:,} of {flops.parameters(work.model):,} parameters are trained, on {len(work.train)} examples"
        )
        log(
            f"{session.epoch_steps} steps an epoch, {work.settings.epochs} epochs at most; starting after step {session.step}"
        )


def _steps(session: Session[Example]) -> bool:
    """All epochs, until the validation loss rises. True: stopped on request."""
    config, here = session.work.config, session.here
    every, interval = config.checkpoint.every_steps, None
    if config.checkpoint.every:
        interval = configuration.parse_duration(config.checkpoint.every)
    if session.step == 0:
        _validate(session)  # what the base scores, to compare with
    while not session.over:
        due = interval is not None and here.rank == 0 and time.monotonic() - session.saved_at >= interval
        stop, due = here.agree(session.stopping, due).result()
        if stop:
            return True
        if due and session.saved_step != session.step:
            _save(session, validation_loss=None, best=False)
        session.tell(state="training")
        _one_step(session)
        if session.step % session.epoch_steps == 0:
            loss = _validate(session)
            improved = loss is not None and (session.best is None or loss < session.best[1])
            session.rises = 0 if improved else session.rises + 1
            _save(session, validation_loss=loss, best=improved)
        elif every and session.step % every == 0:
            _save(session, validation_loss=None, best=False)
    if here.rank == 0 and session.step < config.steps:
        log(
            f"the validation loss has not fallen for {session.rises} epochs: ending after step {session.step} of {config.steps}"
        )
    return False


def rows_of_step(step: int, count: int, global_batch_size: int, seed: int) -> list[int | None]:
    """Which examples step number `step` (from 1) trains on; None fills up the last batch of an epoch."""
    per_epoch = -(-count // global_batch_size)
    epoch, index = divmod(step - 1, per_epoch)
    rows: list[int | None] = [
        *examples.order(count, seed, epoch)[index * global_batch_size : (index + 1) * global_batch_size]
    ]
    return rows + [None] * (global_batch_size - len(rows))


def _one_step(session: Session[Example]) -> None:
    work, here, train = session.work, session.here, session.work.config.train
    step, begun = session.step + 1, Mark(here.device)
    if work.settings.drop_rate > 0:  # dropout, too, is a function of the step
        torch.manual_seed(hash((train.seed, step, here.rank)) & 0x7FFF_FFFF_FFFF)
    chosen = [
        None if row is None else work.train[row]
        for row in rows_of_step(step, len(work.train), train.global_batch_size, train.seed)
    ]
    real = [item for item in chosen if item is not None]
    weight = sum(work.weigh(item) for item in real)
    share = train.global_batch_size // here.size
    mine = chosen[here.rank * share : (here.rank + 1) * share]
    total = torch.zeros(len(work.columns), device=here.device)
    starts = range(0, share, session.microbatch_size)
    session.wrapped.train()
    for start in starts:
        batch = [
            tensor.to(here.device) for tensor in work.collate(mine[start : start + session.microbatch_size])
        ]
        with distributed.synchronised(session.wrapped, start == starts[-1]):
            part = session.wrapped(*batch, weight / here.size)
            part[0].backward()
        total += part.detach()
    factor = schedule.factor(step, work.config.steps, train)
    norm, skipped = session.optimizer.step(factor)
    means = here.mean(total).tolist()
    ended = Mark(here.device)
    ended.wait()
    tokens = sum(work.length(item) for item in real)
    session.step, session.tokens = step, session.tokens + tokens
    record = {
        "kind": "step", "step": step, "tokens": session.tokens, "time": time.time(), "loss": finite(means[0]),
        "learning_rate": train.learning_rate * factor, "grad_norm": finite(float(norm)),
        "step_seconds": begun.seconds_until(ended), "mfu": None, "memory_gib": peak_memory_gib(here.device),
        "epoch": (step - 1) // session.epoch_steps + 1, **_named(work.columns[1:], means[1:]),
    }  # fmt: skip
    record["tokens_per_second"] = tokens / max(record["step_seconds"], 1e-9)
    session.skipped_in_a_row = session.skipped_in_a_row + 1 if float(skipped) else 0
    if session.skipped_in_a_row:
        record["skipped"] = True
    session.record(record)
    if here.rank == 0 and (step % train.log_every == 0 or step == work.config.steps):
        log(step_line(record, work.config.steps))
    session.tell(step=step, last_step_time=time.time(), step_seconds=record["step_seconds"])
    if session.skipped_in_a_row >= SKIPPED_IN_A_ROW:
        raise NonFiniteError(f"{SKIPPED_IN_A_ROW} steps in a row, up to step {step}, had a loss or gradient that is not finite and "
                             "were skipped; resume with a lower learning rate")  # fmt: skip


def _named(names: Sequence[str], values: Sequence[float]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in zip(names, values, strict=True)}


def measure(session: Session[Example], items: Sequence[Example]) -> list[float]:
    """The means of all columns over `items`; every rank takes part and gets the same."""
    work, here, size = session.work, session.here, session.microbatch_size
    total = torch.zeros(len(work.columns), dtype=torch.float64, device=here.device)
    work.module.eval()
    for start in range(here.rank * size, len(items), here.size * size):
        rows: list[Example | None] = [*items[start : start + size]]
        batch = [tensor.to(here.device) for tensor in work.collate(rows)]
        with torch.no_grad():
            total += work.module(*batch, 1.0).double()
    return cast("list[float]", (here.sum(total) / sum(work.weigh(item) for item in items)).tolist())


def _validate(session: Session[Example]) -> float | None:
    """The validation loss, on record; None where it is not a number."""
    work, started = session.work, time.time()
    session.tell(state="validating")
    means = measure(session, work.validation)
    now, epoch = time.time(), session.step // session.epoch_steps
    session.record({
        "kind": "validation", "step": session.step, "tokens": session.tokens, "time": now, "validation_loss": finite(means[0]),
        "seconds": now - started, "validation_tokens": sum(work.length(item) for item in work.validation), "epoch": epoch,
        **{f"validation_{name}": value for name, value in _named(work.columns[1:], means[1:]).items()},
    })  # fmt: skip
    if session.here.rank == 0:
        more = "".join(
            f", {name} {value:.4f}" for name, value in zip(work.columns[1:], means[1:], strict=True)
        )
        log(f"epoch {epoch} | validation loss {means[0]:.4f}{more} on {len(work.validation)} examples")
    session.tell(state="training", last_step_time=now)
    return finite(means[0])


def _save(session: Session[Example], *, validation_loss: float | None, best: bool) -> None:
    """Begin to write a checkpoint of this step."""
    started = time.monotonic()
    if best and validation_loss is not None:
        session.best = (session.step, validation_loss)
    session.saved_step, session.saved_at = session.step, time.monotonic()
    if session.writer is None or session.metrics is None:
        return
    session.writer.wait()  # its buffers are about to be used again
    taken = _snapshot(session)
    seconds = time.monotonic() - started
    session.metrics.sync()
    tokens = session.tokens

    def saved(item: Saved) -> None:
        session.record({
            "kind": "checkpoint", "step": item.step, "tokens": tokens, "time": time.time(), "sha256": item.sha256,
            "bytes": item.bytes, "validation_loss": validation_loss, "best": item.best, "seconds": seconds,
        })  # fmt: skip
        session.tell(checkpoint_step=item.step)

    session.writer.start(taken, best=best, saved=saved)


def _snapshot(session: Session[Example]) -> Snapshot:
    """Weights with adapters merged, the adapters themselves, and the optimizer's state of whatever is trained."""
    work, copies = session.work, session.copies
    weights = {name: copies.take(name, tensor).contiguous() for name, tensor in work.weights()}
    adapters = {name: copies.take(name, p) for name, p in work.trainable().items() if name not in weights}
    states = {
        name: {key: unpadded(name, copies.take(f"{name}/{key}", tensor), work.model) if tensor.ndim else tensor.cpu().clone()
               for key, tensor in entries.items()}
        for name, entries in session.optimizer.state().items()
    }  # fmt: skip
    facts = {
        "world_size": session.here.size, "microbatch_size": session.microbatch_size, "rises": session.rises,
        "best": list(session.best) if session.best else None, "tokens": session.tokens, "adapters": adapters,
        "torch": str(torch.__version__),
    }  # fmt: skip
    if session.here.device.type == "cuda":
        torch.cuda.synchronize(session.here.device)
    return Snapshot(session.step, weights, states, facts)


def _evaluate(session: Session[Example]) -> None:
    """The test sets with the best epoch's weights; evaluations.json."""
    work, here = session.work, session.here
    step = session.best[0] if session.best else session.step
    if step != session.step:
        if here.rank == 0:
            _restore(work, None, session.out / "checkpoints" / f"step-{step:06d}")
        distributed.from_rank_0([p.data for p in work.trainable().values()], here)
    results = []
    for name, items in work.test.items():
        session.tell(state="evaluating")
        means = measure(session, items)
        results.append({
            "name": name, "loss": finite(means[0]), "examples": len(items), "tokens": sum(work.weigh(item) for item in items),
            "checkpoint_step": step, **_named(work.columns[1:], means[1:]),
        })  # fmt: skip
    if here.rank == 0:
        write_json(session.out / "evaluations.json", {"test_sets": results, "samples": []})
        for item in results:
            log(
                f"{item['name']}: loss {item['loss']} on {item['examples']} examples (checkpoint of step {step})"
            )
