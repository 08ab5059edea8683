"""Checkpoints of a tuning run: whole models, adapters merged, that open like any other, and what a resume needs besides."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint, clock, distributed
from trainer.after.examples import Example
from trainer.after.work import Session, Work
from trainer.checkpoint import Saved, Snapshot
from trainer.model import padded, unpadded
from trainer.optim import Optimizer

ADAPTERS = "adapter.safetensors"
"""The adapters alone, in a checkpoint whose weights have them merged."""


@torch.no_grad()
def restore(work: Work[Example], optimizer: Optimizer | None, path: Path) -> dict[str, Any]:
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


def share(session: Session[Example]) -> None:
    """Every rank gets rank 0's weights and optimizer state."""
    states = [tensor for entries in session.optimizer.state().values() for tensor in entries.values()]
    distributed.from_rank_0([p.data for p in session.work.trainable().values()] + states, session.here)


def save(session: Session[Example], *, validation_loss: float | None, best: bool) -> None:
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
            "kind": "checkpoint", "step": item.step, "tokens": tokens, "time": clock.now(), "sha256": item.sha256,
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
    alone = {} if work.adapters is None else {
        name: copies.take(f"{ADAPTERS}/{name}", tensor).contiguous() for name, tensor in work.adapters.tensors().items()
    }  # fmt: skip
    if session.here.device.type == "cuda":
        torch.cuda.synchronize(session.here.device)
    return Snapshot(session.step, weights, states, facts, {ADAPTERS: alone} if alone else {})
