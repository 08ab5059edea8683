"""A process beside the trainer on a run's first node: one file of the trainer's, with its plan, its log and its last word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trainer
from orchestrator.remote.connection import NoSuchFile
from orchestrator.remote.node import Remote
from orchestrator.site.start import directory
from runs.record import RunRecord


def start(
    remote: Remote,
    run: RunRecord,
    name: str,
    plan: Mapping[str, Any],
    *,
    python: str = "python3",
    env: Mapping[str, str] | None = None,
) -> None:
    """Write the plan, NAME.json, and see that trainer/NAME.py runs; harmless where it does. Raises RemoteError."""
    place = directory(run.run)
    remote.write(f"{place}/{name}.json", json.dumps(plan).encode(), 0o600)
    remote.write(f"~/llmctl/{name}.py", Path(trainer.__file__).with_name(f"{name}.py").read_bytes(), 0o644)
    remote.detach([python, f"../../{name}.py", "--run", "."], cwd=place, log=f"{name}.log", env=env)


def said(remote: Remote, run: RunRecord, name: str) -> dict[str, Any]:
    """What it said last, in NAME-status.json; {} before that. Raises RemoteError."""
    try:
        status = json.loads(remote.read(f"{directory(run.run)}/{name}-status.json"))
    except (NoSuchFile, ValueError):
        return {}
    return status if isinstance(status, dict) else {}
