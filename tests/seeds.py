"""Runs as a driver would have left them: events by hand, with log, metrics and checkpoints beside the store."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from runs import events as e
from runs import spec as specs
from runs.facts import Marker, Offer, Tariff
from runs.store import Store, run_dir
from trainer import manifest

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SPEC: dict[str, Any] = {
    "name": "demo",
    "hardware": {"provider": "local", "usd_per_hour": 36.0},
    "data": {
        "train": ["builtin:python-stdlib"],
        "validation": ["builtin:python-stdlib"],
        "tokenizer": "bytes",
    },
    "model": {"vocab_size": 256, "context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 2},
    "train": {
        "steps": 100,
        "global_batch_size": 8,
        "microbatch_size": 4,
        "device": "cpu",
        "precision": "fp32",
    },
}


def at(seconds: float) -> datetime:
    """A moment of the story."""
    return T0 + timedelta(seconds=seconds)


class Seed:
    """One run. Each method tells the next part of its story, and returns the seed."""

    def __init__(
        self, home: Path, run: str = "demo-0001", *, usd_per_hour: float = 36.0, **spec: Any
    ) -> None:
        self.store, self.home, self.run = Store(home), home, run
        self.key, self.directory = f"llmctl-{run}-a1-n0", run_dir(home, run)
        self.directory.mkdir(parents=True)
        values = specs.from_dict({**SPEC, "name": run.rpartition("-")[0], **spec}).to_dict()
        (self.directory / "spec.yaml").write_text(json.dumps(values))
        tariff = Tariff(micro_usd_per_hour=round(usd_per_hour * 1e6))
        self.offer = Offer(
            provider="local", instance_type="local", region="local", gpu=None, gpus=0, tariff=tariff
        )
        self.marker = Marker(run=run, attempt=1, index=0, lease_end=at(86400))
        self.tell(e.RunCreated(at=at(0), run=run, spec=values, steps=100, max_micro_usd=45_000_000))

    def tell(self, *events: Any) -> Seed:
        """Commit events of the run, or of its node."""
        node = {"LaunchIntended", "LaunchAnswered", "LaunchRefused", "LaunchAmbiguous", "NodeObserved", "NodeReady", "NodeKept",
                "TerminateIntended", "TerminateAnswered", "NodeGone"}  # fmt: skip
        streams = [
            e.node_stream(self.key) if event.kind in node else e.run_stream(self.run) for event in events
        ]
        self.store.commit(list(zip(streams, events, strict=True)))
        return self

    def driven(self) -> Seed:
        """A driver took it, and is no more."""
        return self.tell(e.DriverStarted(at=at(1), epoch=1, pid=2**22 + 1, start_time=1.0, boot_id="gone"))

    def rented(self, *, unguarded: bool = False) -> Seed:
        """A node is there since second 10, and ready at 20."""
        self.driven().tell(
            e.OfferChosen(at=at(2), attempt=1, offer=self.offer),
            e.AttemptStarted(at=at(2), attempt=1, keys=(self.key,), from_step=0, world_size=2),
            e.LaunchIntended(
                at=at(3),
                key=self.key,
                run=self.run,
                provider="local",
                marker=self.marker,
                offer=self.offer,
                unguarded=unguarded,
            ),
            e.LaunchAnswered(at=at(4), id=self.key),
        )
        return self.tell(
            e.NodeObserved(at=at(10), status="active", ip="127.0.0.1", port=2222, not_before=at(10)),
            e.NodeReady(at=at(20), host_key="ssh-ed25519 AAAA", boot_id="b"),
        )

    def trained(self, step: int = 100, **summary: Any) -> Seed:
        """Lanes, and steps from second 50 to 250."""
        told = {"step": step, "tokens": step * 256, "loss": 2.5, "train_loss": 2.6, "validation_loss": 2.7, "step_seconds": 2.0,
                "tokens_per_second": 128.0, "mfu": None, "memory_gib": 1.5, "parameters": 33_000, **summary}  # fmt: skip
        return self.tell(
            e.LaneDone(at=at(40), key=self.key, lane="data", hash="d", seconds=18.0, sent_bytes=7_000_000),
            e.LaneDone(at=at(40), key=self.key, lane="ready", hash="r", seconds=20.0),
            e.TrainerStarted(at=at(41), attempt=1, token=f"{self.run}-a1"),
            e.ProgressSeen(
                at=at(250), summary=told, intervals=(("training", at(50).timestamp(), at(250).timestamp()),)
            ),
        )

    def checkpoint(self, step: int, *, here: bool = True, loss: float = 2.7) -> Seed:
        """A whole checkpoint was announced, and is on this side."""
        folder = self.directory / "checkpoints" / manifest.directory_name(step)
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "training_state.pt", "config.json"):
            (folder / name).write_text(f"{name} of step {step}")
        size = manifest.write(folder, step).bytes
        digest = manifest.digest(folder)
        self.tell(e.CheckpointSeen(at=at(240), step=step, sha256=digest, bytes=size, validation_loss=loss))
        if here:
            self.tell(
                e.CheckpointVerified(at=at(245), step=step, path=str(folder), sha256=digest, bytes=size)
            )
        return self

    def released(self) -> Seed:
        """Terminated at second 262, confirmed at 264."""
        return self.tell(
            e.TrainerEnded(at=at(250), attempt=1, reason="finished", step=100),
            e.TerminateIntended(at=at(260), reason="succeeded"),
            e.TerminateAnswered(at=at(262), accepted=True),
            e.NodeGone(at=at(264), evidence="not found"),
            e.AttemptEnded(at=at(264), attempt=1, reason="succeeded"),
        )

    def ended(self, outcome: Any = "succeeded", reason: str = "finished") -> Seed:
        """The verdict."""
        return self.tell(e.RunEnded(at=at(265), outcome=outcome, reason=reason))

    def finished(self) -> Seed:
        """A whole run: 252 billed seconds, 200 of them training, $2.52."""
        return self.rented().trained().checkpoint(50, loss=2.9).checkpoint(100).released().ended()

    def logged(self, lines: int = 20) -> Seed:
        """train.log and metrics.jsonl."""
        (self.directory / "train.log").write_text("".join(f"line {index}\n" for index in range(lines)))
        steps = [{"kind": "step", "step": n, "tokens": n * 256, "time": at(50 + 2 * n).timestamp(), "loss": 5.0 - n / 40, "step_seconds": 2.0}
                 for n in range(1, 101)]  # fmt: skip
        (self.directory / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in steps))
        return self

    @property
    def record(self) -> Any:
        """The record as it is now."""
        return self.store.record(self.run)
