"""The steps of a tuning run: epochs over the examples, a validation after each, an end when it does not improve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import torch

from trainer import clock, distributed, manifest, schedule
from trainer import config as configuration
from trainer.after import examples, saving
from trainer.after.examples import Example
from trainer.after.work import Session
from trainer.ending import NonFiniteError
from trainer.evaluate import report, samples, slices
from trainer.loop import SKIPPED_IN_A_ROW
from trainer.progress import finite, log, step_line
from trainer.session import Mark, peak_memory_gib


def train(session: Session[Example]) -> bool:
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
            saving.save(session, validation_loss=None, best=False)
        session.tell(state="training")
        _one_step(session)
        if session.step % session.epoch_steps == 0:
            loss = _validate(session)
            improved = loss is not None and (session.best is None or loss < session.best[1])
            session.rises = 0 if improved else session.rises + 1
            saving.save(session, validation_loss=loss, best=improved)
        elif every and session.step % every == 0:
            saving.save(session, validation_loss=None, best=False)
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
    """One optimizer update from one global batch; the loss is the mean over what counts in all of it."""
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
    seconds, tokens = begun.seconds_until(ended), sum(work.length(item) for item in real)
    session.step, session.tokens = step, session.tokens + tokens
    session.skipped_in_a_row = session.skipped_in_a_row + 1 if float(skipped) else 0
    _report(session, {
        "kind": "step", "step": step, "tokens": session.tokens, "time": clock.now(), "loss": finite(means[0]),
        "learning_rate": train.learning_rate * factor, "grad_norm": finite(float(norm)), "step_seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9), "mfu": None, "memory_gib": peak_memory_gib(here.device),
        "epoch": (step - 1) // session.epoch_steps + 1, **_named(work.columns[1:], means[1:]),
        **({"skipped": True} if session.skipped_in_a_row else {}),
    })  # fmt: skip


def _report(session: Session[Example], record: dict[str, Any]) -> None:
    """Write a step down. Raises NonFiniteError after too many skipped ones in a row."""
    step, steps = record["step"], session.work.config.steps
    session.record(record)
    if session.here.rank == 0 and (step % session.work.settings.log_every == 0 or step == steps):
        log(step_line(record, steps))
    session.tell(step=step, last_step_time=record["time"], step_seconds=record["step_seconds"])
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
    work, started = session.work, clock.now()
    session.tell(state="validating")
    means = measure(session, work.validation)
    now, epoch = clock.now(), session.step // session.epoch_steps
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


def evaluate(session: Session[Example]) -> bool:
    """The test sets with the best epoch's weights, and how it continues the prompts; evaluations.json. False: interrupted by
    a stop."""
    work, here, wanted = session.work, session.here, session.work.config.evaluate
    step = session.best[0] if session.best else session.step
    path = session.out / "checkpoints" / manifest.directory_name(step)
    if step != session.step:
        if here.rank == 0:
            saving.restore(work, None, path)
        distributed.from_rank_0([p.data for p in work.trainable().values()], here)
    results = []
    for name, items in work.test.items():
        session.tell(state="evaluating")
        means = measure(session, items)
        results.append({
            "name": name, "loss": finite(means[0]), "examples": len(items), "tokens": sum(work.weigh(item) for item in items),
            "checkpoint_step": step, **_named(work.columns[1:], means[1:]),
        })  # fmt: skip
    if wanted.test_sets:
        session.tell(state="evaluating")
        more = slices(
            work.language_model(), wanted, work.model, microbatch_size=session.microbatch_size, here=here, step=step,
            stopped=lambda: session.stopping,
        )  # fmt: skip
        if more is None:
            return False
        results += more
    if here.rank == 0:
        report(session.out, results, samples(path, wanted.prompt_tokens, here.device), step)
    return True
