"""The mirrored metrics: attempts follow each other in one file, each with its node's clock, and announcements are found again."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestrator.remote.mirror import Mirror, bases
from orchestrator.site.journal import Journal


def line(kind: str, step: int, time: float, **more: Any) -> bytes:
    """A line of metrics.jsonl."""
    return json.dumps({"kind": kind, "step": step, "tokens": step * 8, "time": time, **more}).encode() + b"\n"


def record(offsets: dict[int, float], known: dict[int, Any] | None = None) -> Any:
    """As much of a run record as the journal looks at."""
    nodes = {f"n{number}": SimpleNamespace(clock_offset_seconds=offset) for number, offset in offsets.items()}
    attempts = [SimpleNamespace(number=number, keys=(f"n{number}",)) for number in offsets]
    return SimpleNamespace(
        attempts=attempts,
        attempt=attempts[-1],
        node=nodes.get,
        checkpoints=known or {},
        intervals=(),
        summary={},
    )


def test_a_torn_line_of_a_dead_node_does_not_join_the_next_attempt(tmp_path: Path) -> None:
    """The second attempt begins on a line of its own; its cursor counts its own bytes alone."""
    path = tmp_path / "train.log"
    first = Mirror(path, 1)
    first.append(b"one\ntor")
    second = Mirror(path, 2)
    assert (first.offset >= 7, second.offset) == (True, 0)
    second.append(b"two\n")
    assert path.read_bytes() == b"one\ntor\ntwo\n"
    assert bases(path) == {1: 0, 2: 8}
    assert Mirror(path, 2).offset == 4, "a new driver goes on where the last one stopped"


def test_each_attempt_is_read_by_its_own_nodes_clock(tmp_path: Path) -> None:
    """The first node's clock is an hour behind; the intervals are this machine's time all the same."""
    raw = tmp_path / "metrics.raw.jsonl"
    steps = [line("step", n, 1000.0 + n, loss=1.0, step_seconds=1.0) for n in range(1, 5)]
    Mirror(raw, 1).append(b"".join(steps))
    later = [
        line("resume", 4, 9000.0),
        *(line("step", n, 9000.0 + n, loss=1.0, step_seconds=1.0) for n in range(5, 9)),
    ]
    Mirror(raw, 2).append(b"".join(later))
    journal, run = Journal(raw, tmp_path / "metrics.jsonl"), record({1: 3600.0, 2: 0.0})
    journal.read(run)
    progress = journal.progress(run, datetime.now(UTC))
    assert progress is not None
    trained = [(start, end) for phase, start, end in progress.intervals if phase == "training"]
    assert trained[0][0] >= 4600.0 and trained[-1][1] == 9008.0
    assert [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_bytes().splitlines()
            if json.loads(text)["kind"] == "step"] == list(range(1, 9))  # fmt: skip


def test_the_same_checkpoint_made_again_is_announced_again(tmp_path: Path) -> None:
    """Exact resume makes the same bytes: the new node has them although the record knows their hash from a lost one."""
    raw = tmp_path / "metrics.raw.jsonl"
    announcement = {"sha256": "aa", "bytes": 5, "validation_loss": None, "best": False}
    Mirror(raw, 1).append(line("checkpoint", 4, 10.0, **announcement))
    journal = Journal(raw, tmp_path / "metrics.jsonl")
    journal.read(record({1: 0.0}))
    lost = {4: SimpleNamespace(announced="aa", attempt=1, fetched=False)}
    assert list(journal.checkpoints(record({1: 0.0}, lost))) == []
    Mirror(raw, 2).append(line("resume", 0, 20.0) + line("checkpoint", 4, 30.0, **announcement))
    run = record({1: 0.0, 2: 0.0}, lost)
    journal.read(run)
    assert [item["step"] for item in journal.checkpoints(run)] == [4]
    here = {4: SimpleNamespace(announced="aa", attempt=1, fetched=True)}
    assert list(journal.checkpoints(record({1: 0.0, 2: 0.0}, here))) == [], (
        "what is here already is not pulled again"
    )


def test_the_gpus_figures_of_the_supervisor_become_progress_once(tmp_path: Path) -> None:
    """New figures are news, the same ones are not; beside a trainer on the CPU they are another's."""
    for gpus, told in ((2, {"gpu_utilisation": 0.97, "gpu_watts": 640.0}), (0, {})):
        raw = tmp_path / f"{gpus}.jsonl"
        Mirror(raw, 1).append(
            line("system", 0, 10.0, gpus=gpus, world_size=2) + line("step", 1, 11.0, loss=1.0)
        )
        journal, run = Journal(raw, tmp_path / f"{gpus}.folded.jsonl"), record({1: 0.0})
        journal.read(run)
        gpu = {"utilisation": 0.97, "watts": 640.0}
        progress = journal.progress(run, datetime.now(UTC), gpu)
        assert progress is not None
        assert {k: v for k, v in progress.summary.items() if k in {"gpu_utilisation", "gpu_watts"}} == told
        run.summary, run.intervals = progress.summary, progress.intervals
        assert journal.progress(run, datetime.now(UTC), gpu) is None
        hung = journal.progress(run, datetime.now(UTC), {})
        assert (hung.summary if hung else {}) == dict.fromkeys(told)
