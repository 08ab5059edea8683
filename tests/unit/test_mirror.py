"""Mirrors and their fold on a disk that fills up: nothing is lost, nothing is twice, once there is room again."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.remote import mirror
from orchestrator.remote.mirror import Mirror
from orchestrator.site.journal import Journal
from runs.record import RunRecord


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: as on a full disk, a write falls short, then fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_falls_short_leaves_no_gap(tmp_path: Path) -> None:
    """What was written counts; the rest is asked for again from there on."""
    log, theirs = (
        Mirror(tmp_path / "train.log", 1),
        b"".join(b"line %06d\n" % number for number in range(1000)),
    )
    assert log.append(theirs[:4000])
    with files_end_at(7000), pytest.raises(OSError, match="large"):
        log.append(theirs[4000:9000])
    assert log.offset == 7000
    assert log.append(theirs[log.offset :])
    assert (tmp_path / "train.log").read_bytes() == theirs


def test_a_nearly_full_disk_pauses_the_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that prints for ever stops being copied before this disk is full."""
    log = Mirror(tmp_path / "train.log", 1)
    monkeypatch.setattr(mirror, "MIN_FREE_BYTES", 1 << 62)
    assert not log.append(b"much")
    assert log.paused and log.offset == 0


def test_attempts_share_a_file_and_not_a_line(tmp_path: Path) -> None:
    """The second attempt begins on a line of its own, wherever the first was cut off."""
    Mirror(tmp_path / "train.log", 1).append(b"whole\ncut o")
    second = Mirror(tmp_path / "train.log", 2)
    assert second.offset == 0
    second.append(b"again\n")
    assert second.lines() == [b"whole", b"cut o", b"again"]
    assert Mirror(tmp_path / "train.log", 2).offset == 6


def test_metrics_that_could_not_be_written_are_written_later(tmp_path: Path) -> None:
    """A fold that failed in the middle begins anew: each step once, in order."""
    now = datetime.now(UTC)
    run = RunRecord(
        run="r-0000",
        name="r",
        provider="local",
        spec={},
        steps=200,
        created_at=now,
        wait_from=now,
    )
    raw = Mirror(tmp_path / "metrics.raw.jsonl", 1)
    journal = Journal(tmp_path / "metrics.raw.jsonl", tmp_path / "metrics.jsonl")

    def steps(first: int, last: int) -> bytes:
        lines = [
            {"kind": "step", "step": step, "time": 1000.0 + step, "loss": 1.0, "tokens": step}
            for step in range(first, last + 1)
        ]
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    raw.append(steps(1, 50))
    journal.read(run)
    raw.append(steps(51, 200))
    with files_end_at(6000), pytest.raises(OSError, match="large"):
        journal.read(run)
    journal.read(run)
    folded = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert folded == list(range(1, 201))
