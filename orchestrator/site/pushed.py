"""Checkpoints in S3: the addresses by which the node uploads them (trainer/push.py), what is there, and bringing it home.

Under `checkpoint.push` a run has a few slots, `RUN/slot-0/` and on, each with an index and parts. Their addresses are signed here
for these objects alone and until the node's lease ends; nothing else that could open a bucket is ever on the node.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.clock import Clock
from orchestrator.life import terms
from orchestrator.remote.connection import RemoteError
from orchestrator.remote.node import Remote
from orchestrator.site import beside, collect
from orchestrator.site.watch import Watch
from provisioning.base import ProviderError, Refused
from provisioning.objects import S3
from runs.record import RunRecord
from trainer import config, manifest, reading
from trainer import pull as ranges
from trainer.flops import parameters

PART_BYTES = 256 * 2**20
SPARE_SECONDS = 3600
"""How long addresses outlive the lease: for clocks, and for the last upload."""
RENEW_SECONDS = 600.0
"""Addresses die with the session that signed them, so a living driver signs them anew this often: boto3 takes a new session ten minutes
before the old one ends."""
LOOK_SECONDS = 30.0
"""How often the uploader is asked how it does."""
STUCK_SECONDS = 60.0
SETTLE_SECONDS = 600.0
"""How long a finished run's node is kept for its last upload."""


@dataclass(frozen=True)
class Pushed:
    """A checkpoint that is whole in a slot."""

    step: int
    sha256: str
    """Of its manifest, as the trainer announced it."""
    slot: str
    """`s3://bucket/prefix/RUN/slot-0/`"""
    manifest: str
    parts: tuple[dict[str, Any], ...]

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(int(item["bytes"]) for item in self.parts)


def prefix(run: RunRecord) -> str | None:
    """Where a run pushes to; None where it does not."""
    place = run.spec["checkpoint"].get("push")
    return f"{str(place).rstrip('/')}/{run.run}/" if place else None


def slots(run: RunRecord) -> list[str]:
    """Its slots: as many as retention keeps, the best, and one in writing."""
    place = prefix(run)
    return (
        [f"{place}slot-{index}/" for index in range(int(run.spec["checkpoint"]["keep"]) + 2)] if place else []
    )


def part_count(run: RunRecord) -> int:
    """Parts of a slot: weights and two moments in float32, and a quarter more."""
    model: config.ModelConfig = reading.from_dict(config.ModelConfig, run.spec["model"], "model.")
    return math.ceil((12 * parameters(model) * 1.25 + 64 * 2**20) / PART_BYTES)


def part(slot: str, index: int) -> str:
    """The key of a part."""
    return f"{slot}part-{index:05d}"


def addresses(store: S3, run: RunRecord, until: datetime | None, now: datetime) -> dict[str, Any]:
    """`push.json`: every slot's addresses, good until `until`, and what the slots hold. Raises ProviderError."""
    left = (until - now).total_seconds() + SPARE_SECONDS if until else 86_400.0
    seconds = int(max(SPARE_SECONDS, left))
    held = {item.slot: item for item in found(store, run)}
    made = []
    for slot in slots(run):
        there = held.get(slot)
        made.append({
            "name": slot.rstrip("/").rpartition("/")[2],
            "index": store.presign_put(f"{slot}index.json", seconds),
            "parts": [store.presign_put(part(slot, index), seconds) for index in range(part_count(run))],
            "step": there.step if there else None,
            "sha256": there.sha256 if there else None,
        })  # fmt: skip
    return {"slots": made, "part_bytes": PART_BYTES, "keep": int(run.spec["checkpoint"]["keep"])}


def found(store: S3, run: RunRecord) -> list[Pushed]:
    """The checkpoints that are whole in the run's slots, by step. Raises ProviderError."""
    place = prefix(run)
    if place is None:
        return []
    present = {item.key: item.bytes for item in store.list(place)}
    result = []
    for slot in slots(run):
        if f"{slot}index.json" not in present:
            continue
        try:
            raw = json.loads(store.read(f"{slot}index.json"))
        except Refused:  # deleted between the list and now
            continue
        if raw.get("step") is None:
            continue
        item = Pushed(int(raw["step"]), str(raw["sha256"]), slot, str(raw["manifest"]), tuple(raw["parts"]))
        if all(present.get(part(slot, index)) == entry["bytes"] for index, entry in enumerate(item.parts)):
            result.append(item)
    return sorted(result, key=lambda item: item.step)


# ---------------------------------------------------------------- on the node


def start(remote: Remote, run: RunRecord, store: S3, until: datetime | None, now: datetime) -> None:
    """Write fresh addresses and see that the uploader runs; harmless where it does. Raises ProviderError, RemoteError."""
    beside.start(remote, run, "push", addresses(store, run, until, now))


def settle(remote: Remote, run: RunRecord, clock: Clock) -> bool:
    """Wait for the last upload of a run whose trainer has ended: while it moves for SETTLE_SECONDS, else for a minute. Whether
    everything is there. Raises RemoteError."""
    if prefix(run) is None:
        return True
    began, stuck, never = clock.monotonic(), clock.monotonic(), threading.Event()
    while clock.monotonic() - began < SETTLE_SECONDS and clock.monotonic() - stuck < STUCK_SECONDS:
        status = beside.said(remote, run, "push")
        if status.get("state") == "done":
            return True
        if status.get("state") == "uploading":
            stuck = clock.monotonic()
        clock.wait(never, 0.5)
    return False


def complaint(status: Mapping[str, Any]) -> str:
    """Why checkpoints do not reach S3 at the moment; "" where they do."""
    return (
        str(status.get("detail") or status["state"]) if status.get("state") in {"failing", "expired"} else ""
    )


class Renewer:
    """Keeps the uploader of a run's first node alive and its addresses fresh, beside everything else; a failure is tried again, and
    told once."""

    def __init__(self, store: S3 | None, clock: Clock, tell: Callable[[str], None]) -> None:
        self._store, self._clock, self._tell = store, clock, tell
        self._due: dict[str, float] = {}
        """Token → when its addresses are signed anew."""
        self._look_at = 0.0
        self._told = ""
        self._thread: threading.Thread | None = None

    def renew(self, run: RunRecord, watch: Watch | None) -> None:
        """Begin to renew where it is due; returns at once."""
        attempt, store, now = run.attempt, self._store, self._clock.monotonic()
        if (
            store is None
            or watch is None
            or attempt is None
            or attempt.token is None
            or attempt.trainer_end is not None
        ):
            return
        if prefix(run) is None or (self._thread and self._thread.is_alive()):
            return
        if attempt.token in self._due and now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        until, token, remote = terms.deadline(run), attempt.token, watch.remote

        def work() -> None:
            try:
                status = beside.said(remote, run, "push")
                if now >= self._due.setdefault(token, 0.0) or status.get("state") == "expired":
                    start(remote, run, store, until, self._clock.now())
                    self._due[token] = now + RENEW_SECONDS
                problem = complaint(status)
            except RemoteError:
                return  # the link is at fault, and others tell of that
            except (ProviderError, OSError) as error:
                problem = str(error)
            if problem and problem != self._told:
                self._tell(f"checkpoints do not reach S3: {problem}")
            self._told = problem

        self._thread = threading.Thread(target=work, name="push addresses", daemon=True)
        self._thread.start()


# ---------------------------------------------------------------- home


def fetch(store: S3, item: Pushed, to: Path, *, weights_only: bool = False) -> collect.Whole:
    """Bring one checkpoint from its slot to the folder `to`, verified, and published by rename; what is here moves no bytes.
    A transfer that broke goes on where it was. Raises collect.VerificationError, ProviderError, OSError."""
    final = to / manifest.directory_name(item.step)
    known = collect.here(final)
    if known is not None and known.sha256 == item.sha256 and (weights_only or not known.weights_only):
        return known
    partial = to / f".{final.name}.s3"
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "manifest.json").write_text(item.manifest, encoding="utf-8")
    if manifest.digest(partial) != item.sha256:
        raise collect.VerificationError(
            f"the manifest of step {item.step} in {item.slot} is not the one that was announced"
        )
    listed = manifest.read(partial)
    _download(store, item, partial)
    _unpack(partial, listed, [partial / f"part-{index:05d}" for index in range(len(item.parts))])
    staging = to / f".{final.name}.new"
    for path in (staging, final):
        shutil.rmtree(path, ignore_errors=True)
    staging.mkdir()
    for name in [*(entry.name for entry in listed.files), "manifest.json"]:
        (partial / name).rename(staging / name)
    staging.rename(final)
    shutil.rmtree(partial, ignore_errors=True)
    whole = collect.here(final)
    assert whole is not None
    return whole


def _download(store: S3, item: Pushed, partial: Path) -> None:
    """The parts, many ranges at once, each checked by its SHA-256."""
    told: list[str] = []

    def tell(**values: Any) -> None:
        told.extend([str(values["error"])] if "error" in values else [])

    items = [
        ranges.Item(
            store.presign_get(part(item.slot, index)),
            partial / f"part-{index:05d}",
            entry["bytes"],
            entry["sha256"],
        )
        for index, entry in enumerate(item.parts)
    ]
    if ranges.Pull(items, ranges.WORKERS, ranges.CHUNK_BYTES, 30.0, tell).run() != 0:
        raise collect.VerificationError(f"step {item.step} could not be fetched from {item.slot}: {'; '.join(told)}",
                                        "try again: what has arrived is kept, and addresses are signed anew")  # fmt: skip


def _unpack(folder: Path, listed: manifest.Manifest, parts: Sequence[Path]) -> None:
    """Cut the concatenation of the parts into files. Raises VerificationError."""
    blocks = _blocks(parts)
    rest = b""
    for entry in listed.files:
        left = entry.bytes
        with (folder / entry.name).open("wb") as file:
            while left:
                block = rest or next(blocks, b"")
                if not block:
                    break
                file.write(block[:left])
                rest, left = block[left:], left - len(block[:left])
        if left or manifest.sha256(folder / entry.name) != entry.sha256:
            raise collect.VerificationError(f"{entry.name} is not what its manifest says (sha256 differs)")


def _blocks(parts: Sequence[Path]) -> Iterator[bytes]:
    for path in parts:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                yield block
