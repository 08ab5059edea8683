"""What a case must not have lost: instances, launches, checkpoints, lines, dollars, and the word of the exit code."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs.record import AttemptRecord, RunRecord
from runs.store import Store
from tests.faults.harness import STEPS, Case, Outcome
from trainer import manifest

COLUMNS = {
    "leaked": "instances leaked",
    "doubled": "launches doubled",
    "intents": "calls without an intent on disk",
    "checkpoints": "checkpoints lost",
    "lines": "lines lost or doubled",
    "dollars": "dollars wrong",
    "code": "wrong exit code",
    "other": "other",
}
PRICE = 1.29


@dataclass(frozen=True)
class Reference:
    """What the same run comes to when nothing happens to it."""

    losses: tuple[float, ...]
    weights: str
    """sha256 of the last checkpoint's weights."""


def reference(case: Case) -> Reference:
    """Of a case whose run has succeeded undisturbed."""
    return Reference(tuple(losses(case)), weights(case.record()))


def losses(case: Case) -> list[float]:
    """Of each step, in the file's order."""
    return [line["loss"] for line in case.cli.metrics(case.run) if line["kind"] == "step"]


def weights(record: RunRecord) -> str:
    """sha256 of the newest checkpoint's weights here, "" where there is none."""
    last = record.latest
    if last is None or last.path is None:
        return ""
    return next(
        item.sha256 for item in manifest.read(Path(last.path)).files if item.name == "model.safetensors"
    )


def audit(
    case: Case, outcome: Outcome, *, code: int, expected: int, known: Reference | None, exact: bool = True
) -> None:
    """Compare what happened with what may happen. `exact`: the run has been completed, so it must equal `known`."""
    record, document = case.record(), case.cli.show(case.run)
    if code != expected:
        outcome.complain("code", f"{code} instead of {expected} ({record.outcome}, {record.reason})")
    _launches(case, outcome)
    _checkpoints(case, record, outcome)
    _log(case, record, outcome)
    _dollars(case, document, outcome)
    if exact and record.outcome == "succeeded":
        _exact(case, record, outcome, known)
    elif exact:
        outcome.complain("other", f"the run was not completed: {record.outcome}, {record.reason}")


def _launches(case: Case, outcome: Outcome) -> None:
    names = Counter(row["name"] for row in case.cloud.machines())
    outcome.complain("doubled", *(f"{name}: {count} instances" for name, count in names.items() if count > 1))
    intents = {node.marker.name for node in case.record().nodes}
    outcome.complain("doubled", *(f"{name} was never intended" for name in names if name not in intents))


def _checkpoints(case: Case, record: RunRecord, outcome: Outcome) -> None:
    """All that the record calls fetched is whole; a run that ended with a checkpoint has its newest here."""
    for item in record.checkpoints.values():
        if item.fetched and not item.dropped:
            outcome.complain("checkpoints", *manifest.verify(Path(item.path or "")))
    died = any(
        row["status"] in {"vanished", "preempted", "unhealthy"} or not row["terminates"]
        for row in case.cloud.machines()
    )
    latest = record.latest
    if latest is not None and not latest.fetched and not died:
        outcome.complain("checkpoints", f"the newest one, of step {latest.step}, is not here")


def _log(case: Case, record: RunRecord, outcome: Outcome) -> None:
    """Each attempt's part of the mirrored files is the node's file; of a node that died under us, its beginning."""
    folder = case.home / "runs" / case.run
    for local, remote in (("train.log", "train.log"), ("metrics.raw.jsonl", "metrics.jsonl")):
        for attempt, part in _parts(folder / local, record):
            node = record.node(attempt.keys[0])
            if node is None or node.id is None:
                continue
            path = case.directory(node.id) / remote
            theirs = path.read_bytes() if path.exists() else b""
            ended = attempt.trainer_end is not None
            if not theirs.startswith(part) and not theirs.startswith(part.removesuffix(b"\n")):
                outcome.complain("lines", f"{local} of attempt {attempt.number} is not what the node wrote")
            elif ended and len(part) < len(theirs):
                outcome.complain(
                    "lines", f"{local} of attempt {attempt.number} lacks {len(theirs) - len(part)} bytes"
                )


def _parts(path: Path, record: RunRecord) -> list[tuple[AttemptRecord, bytes]]:
    """The local file cut into its attempts."""
    note = path.with_name(f".{path.name}.bases")
    if not note.exists():
        return []
    bases: dict[str, int] = json.loads(note.read_text())
    data, attempts = (
        path.read_bytes() if path.exists() else b"",
        sorted(record.attempts, key=lambda item: item.number),
    )
    begins = [(item, bases[str(item.number)]) for item in attempts if str(item.number) in bases]
    ends = [begin for _, begin in begins[1:]] + [len(data)]
    return [(item, data[begin:end]) for (item, begin), end in zip(begins, ends, strict=True)]


def _dollars(case: Case, document: dict[str, Any], outcome: Outcome) -> None:
    """The bill is the provider's to a billing minute a node, and its charges add up to it."""
    rows = case.cloud.state()["ledger"]
    theirs, ours = sum(row["usd"] for row in rows), document["cost_usd"]
    if abs(theirs - ours) > len(rows) * PRICE / 60 + 1e-6:
        outcome.complain("dollars", f"show says {ours:.4f}, the provider {theirs:.4f}")
    total = sum(charge["usd"] for charge in document["charges"])
    if abs(total - ours) > 1e-5:
        outcome.complain("dollars", f"charges add up to {total:.6f}, not {ours:.6f}")


def _exact(case: Case, record: RunRecord, outcome: Outcome, known: Reference | None) -> None:
    """Each step once, in order, and the same numbers and weights as without any fault."""
    made = [line["step"] for line in case.cli.metrics(case.run) if line["kind"] == "step"]
    if made != list(range(1, STEPS + 1)):
        outcome.complain("lines", f"metrics.jsonl has {len(made)} steps, {len(set(made))} different ones")
    if record.latest is None or record.latest.step != STEPS or not weights(record):
        outcome.complain("checkpoints", "the last step's checkpoint is not here")
    elif known is not None and weights(record) != known.weights:
        outcome.complain("checkpoints", "the resumed run ends with other weights than the undisturbed one")
    if known is not None and made == list(range(1, STEPS + 1)) and tuple(losses(case)) != known.losses:
        outcome.complain("lines", "the losses are not those of the undisturbed run")


def store_is_whole(case: Case) -> bool:
    """The rows of the database equal the fold of its events."""
    store = Store(case.home)
    try:
        before = store.record(case.run)
        store.rebuild()
        return before == store.record(case.run)
    finally:
        store.close()
