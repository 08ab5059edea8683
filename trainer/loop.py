"""The training run, from the first step to the last line of its metrics. Its exit codes are those of `trainer.ending`."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer import (
    cache,
    checkpoint,
    clock,
    distributed,
    ending,
    flops,
    manifest,
    microbatch,
    reading,
    schedule,
)
from trainer.batches import Batches, await_shards
from trainer.checkpoint import Saved
from trainer.config import TrainerConfig, parse_duration
from trainer.ending import NonFiniteError
from trainer.evaluate import mean_loss, report, samples, slices
from trainer.progress import Status, finite, log, step_line
from trainer.session import Mark, Pending, Run, peak_memory_gib, prepare, restore_model
from trainer.shards import ShardError

SKIPPED_IN_A_ROW = 10
"""Non-finite steps in a row after which training ends."""


def run(config_path: Path, out: Path, *, resume: bool) -> int:
    """Train as `config_path` says, into `out`; the exit code. Every rank runs this."""

    def work(status: Status | None, stop: threading.Event) -> str:
        return _train(reading.load(config_path), out, resume=resume, status=status, stop=stop)

    return ending.carry(out, work, ShardError)


def _train(
    config: TrainerConfig, out: Path, *, resume: bool, status: Status | None, stop: threading.Event
) -> str:
    """The story of a run: prepare, step until the end or a stop, evaluate. Returns `finished` or `stopped`."""
    with distributed.world(config.train) as here:
        run = prepare(config, out, here, resume=resume, status=status, stop=stop)
        try:
            stopped = _steps(run)
            _flush(run)
            if run.saved_step != run.step:
                _save(run, best=False, validation_loss=None)
            if run.writer is not None:
                run.writer.wait()
        except torch.OutOfMemoryError as error:
            hint = microbatch.would_fit(config, here, run.microbatch_size)
            raise torch.OutOfMemoryError(f"out of memory in step {run.step + 1}: {hint}. {error}") from error
        finally:
            gc.unfreeze()
            gc.enable()
        if not stopped:
            stopped = not _evaluate(run)
        run.record(
            {
                "kind": "system",
                "step": run.step,
                "time": clock.now(),
                "peak_memory_gib": peak_memory_gib(here.device),
            }
        )
        here.tell(None)  # nobody leaves while rank 0 still works
        return "stopped" if stopped else "finished"


def _steps(run: Run) -> bool:
    """All steps that are left. True: stopped on request."""
    config, here = run.config, run.here
    train, last = config.train, config.steps
    if run.step >= last:
        return False
    batches = Batches(
        run.reader, global_batch_size=train.global_batch_size, microbatch_size=run.microbatch_size, rank=here.rank,
        world_size=here.size, first_step=run.step + 1, last_step=last, device=here.device,
    )  # fmt: skip
    interval = parse_duration(config.checkpoint.every) if config.checkpoint.every else None
    seen: set[int] = set()
    begun_at = run.step
    flags = here.agree(run.stopping, False)
    try:
        while run.step < last:
            stop, due = flags.result()
            if stop:
                return True
            if due and run.saved_step != run.step:
                _save(run, best=False, validation_loss=None)
            overdue = interval is not None and here.rank == 0 and time.monotonic() - run.saved_at >= interval
            flags = here.agree(run.stopping, overdue)
            needed = run.reader.order.shards_of_step(run.step + 1, train.global_batch_size) - seen
            if needed and not _await(run, needed):
                flags.result()
                return True
            seen |= needed
            run.tell(state="training")
            _one_step(run, batches)
            if run.step == begun_at + 1:
                here.shorten_timeouts()
                if here.rank == 0 and train.compile:
                    cache.save_compiled(cache.key(config, here.device, here.size))
            if run.step == begun_at + 3:  # everything that lives long lives now
                gc.collect()
                gc.freeze()
                gc.disable()
            if run.step % train.log_every == 0 or run.step == last:
                _flush(run)
            _validate_and_save(run, last=run.step == last)
        flags.result()
    finally:
        batches.close()
    return False


def _one_step(run: Run, batches: Batches) -> None:
    """One optimizer update from one global batch. The host waits for nothing but the step before."""
    config, train, device = run.config, run.config.train, run.here.device
    begun = Mark(device)
    step = run.step + 1
    if config.model.drop_rate > 0:  # dropout, too, is a function of the step: nothing to save
        torch.manual_seed(hash((train.seed, step, run.here.rank)) & 0x7FFF_FFFF_FFFF)
    accumulation = train.global_batch_size // run.here.size // run.microbatch_size
    tokens = train.global_batch_size // run.here.size * config.model.context_length
    total = torch.zeros((), device=device)
    for index in range(accumulation):
        inputs, targets = batches.next()
        with distributed.synchronised(run.module, index == accumulation - 1):
            part = run.module(inputs, targets, float(tokens))
            part.backward()
        total += part.detach()
    factor = schedule.factor(step, config.steps, train)
    norm, skipped = run.optimizer.step(factor)
    previous = run.pending[-1].ended if run.pending else None
    run.pending.append(Pending(step, train.learning_rate * factor, total, norm, skipped, begun, Mark(device)))
    if previous is not None:
        previous.wait()  # at most one step ahead of the GPU
    run.step = step
    run.tell(step=step if device.type == "cpu" else step - 1, last_step_time=clock.now())


def _flush(run: Run) -> None:
    """Fetch the numbers of all steps since the last time, and write them down. Every rank calls it at the same steps.

    Raises NonFiniteError after too many skipped steps in a row.
    """
    if not run.pending:
        return
    pending, run.pending = run.pending, []
    losses = run.here.mean(torch.stack([item.loss for item in pending])).tolist()
    norms = torch.stack([item.norm for item in pending]).tolist()
    skips = torch.stack([item.skipped for item in pending]).tolist()
    now, latest = clock.now(), pending[-1].ended
    memory = peak_memory_gib(run.here.device)
    tokens = run.config.tokens_per_step
    per_token = flops.flops_per_token(run.config.model)
    records = []
    for item, value, norm, skip in zip(pending, losses, norms, skips, strict=True):
        seconds = item.begun.seconds_until(item.ended)
        run.recent.append(seconds)
        ended = item.ended.time if run.here.device.type == "cpu" else now - item.ended.seconds_until(latest)
        speed = tokens / max(seconds, 1e-9)
        record = {
            "kind": "step", "step": item.step, "tokens": item.step * tokens, "time": ended, "loss": finite(value),
            "learning_rate": item.learning_rate, "grad_norm": finite(norm), "step_seconds": seconds,
            "tokens_per_second": speed, "mfu": speed * per_token / run.peak_flops if run.peak_flops else None,
            "memory_gib": memory,
        }  # fmt: skip
        if skip:
            record["skipped"] = True
        run.skipped_in_a_row = run.skipped_in_a_row + 1 if skip else 0
        records.append(record)
        if run.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            break
    run.record(*records)
    if run.here.rank == 0:
        log(step_line(records[-1], run.config.steps))
    run.tell(step=pending[-1].step, step_seconds=statistics.median(run.recent))
    if run.skipped_in_a_row >= SKIPPED_IN_A_ROW:
        raise NonFiniteError(
            f"{SKIPPED_IN_A_ROW} steps in a row, up to step {records[-1]['step']}, had a loss or gradient that is not finite and were "
            f"skipped; the last good checkpoint is of step {run.saved_step}; resume with a lower learning rate or more warm-up"
        )


def _await(run: Run, needed: set[int]) -> bool:
    """Wait until every rank has the shards. False: a stop was requested meanwhile."""

    def waiting(path: Path) -> None:
        run.tell(state="waiting_for_data", message=f"waiting for {path}")
        time.sleep(0.5)

    def exchange(missing: bool) -> Any:
        return run.here.agree(missing, run.stopping).result()

    there = await_shards(run.reader, needed, exchange, waiting)
    run.tell(message=None)
    return there


def _validate_and_save(run: Run, *, last: bool) -> None:
    """What is due after a step: a validation, a checkpoint, or nothing."""
    train, every = run.config.train, run.config.checkpoint.every_steps
    validation = None
    if run.config.data.validation and (
        last or (train.validate_every and run.step % train.validate_every == 0)
    ):
        validation = _validate(run)
    improved = validation is not None and (run.best is None or validation < run.best[1])
    if improved or last or (every and run.step % every == 0):
        _save(run, best=improved, validation_loss=validation)


def _validate(run: Run) -> float | None:
    """The loss on the validation shards; None: interrupted by a stop, or not a number."""
    _flush(run)
    run.tell(state="validating")
    started = clock.now()
    gc.collect()
    result = mean_loss(
        run.module, run.config.data.validation, tokens=run.config.train.validation_tokens, config=run.config.model,
        microbatch_size=run.microbatch_size, here=run.here, fewer=True, stopped=lambda: run.stopping, moved=lambda batch: run.tell(progress=batch),
    )  # fmt: skip
    if result is None:
        return None
    now = clock.now()
    run.record({
        "kind": "validation", "step": run.step, "tokens": run.step * run.config.tokens_per_step, "time": now,
        "validation_loss": finite(result.loss), "seconds": now - started, "validation_tokens": result.tokens,
    })  # fmt: skip
    if run.here.rank == 0:
        log(
            f"step {run.step}/{run.config.steps} | validation loss {result.loss:.4f} on {result.tokens:,} tokens"
        )
    run.tell(state="training", last_step_time=now, progress=None)
    return finite(result.loss)


def _save(run: Run, *, best: bool, validation_loss: float | None) -> None:
    """Begin to write a checkpoint of this step. Training stands still only while the state is copied."""
    _flush(run)
    started = time.monotonic()
    if best:
        assert validation_loss is not None
        run.best = (run.step, validation_loss)
    facts = {
        "world_size": run.here.size, "microbatch_size": run.microbatch_size, "best": list(run.best) if run.best else None,
        "skipped_in_a_row": run.skipped_in_a_row, "torch": str(torch.__version__),
    }  # fmt: skip
    if run.writer is not None:
        run.writer.wait()  # its buffers are about to be used again
    assert run.copies is not None
    taken = checkpoint.snapshot(
        run.model, run.optimizer, copies=run.copies, here=run.here, step=run.step, facts=facts
    )
    seconds = time.monotonic() - started
    run.saved_step, run.saved_at = run.step, time.monotonic()
    if run.writer is not None and taken is not None and run.metrics is not None:
        run.metrics.sync()  # a checkpoint never knows of more steps than the metrics do
        run.writer.start(taken, best=best, saved=_saved(run, validation_loss, seconds))


def _saved(run: Run, validation_loss: float | None, seconds: float) -> Callable[[Saved], None]:
    def saved(saved: Saved) -> None:
        run.record({
            "kind": "checkpoint", "step": saved.step, "tokens": saved.step * run.config.tokens_per_step, "time": clock.now(),
            "sha256": saved.sha256, "bytes": saved.bytes, "validation_loss": validation_loss, "best": saved.best, "seconds": seconds,
        })  # fmt: skip
        run.tell(checkpoint_step=saved.step)

    return saved


def _evaluate(run: Run) -> bool:
    """Test sets and samples on the best checkpoint, or the last; evaluations.json. False: interrupted by a stop."""
    config, here = run.config, run.here
    wanted = config.evaluate
    if not wanted.test_sets and not wanted.prompt_tokens:
        return True
    run.tell(state="evaluating")
    checkpoints = run.out / "checkpoints"
    step = run.best[0] if run.best else run.step
    path = checkpoints / manifest.directory_name(step)
    if step != run.step:
        restore_model(run, path)
    results = slices(
        run.module, wanted, config.model, microbatch_size=run.microbatch_size, here=here, step=step,
        stopped=lambda: run.stopping, moved=lambda batch: run.tell(progress=batch),
    )  # fmt: skip
    if results is None:
        return False
    run.tell(progress=None)  # what follows moves at a pace of its own
    if here.rank == 0:
        report(run.out, results, samples(path, wanted.prompt_tokens, here.device), step)
    return True
