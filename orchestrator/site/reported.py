"""The wandb run that a node writes (`wandb.from: node`): its start beside the trainer, its key, and its files home.

The process is trainer/report.py. Whatever becomes of it, the run goes on: here a failure is words for the record.
"""

from __future__ import annotations

import json
import netrc
import os
import threading
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trainer
from orchestrator.clock import Clock
from orchestrator.remote import transfer
from orchestrator.remote.connection import CommandFailed, NoSuchFile, RemoteError
from orchestrator.remote.node import Remote
from orchestrator.site.start import directory
from runs.record import RunRecord

SETTLE_SECONDS = 45.0
"""How long the bill runs on for the last lines to reach wandb, which are in files that come home as well."""


def wanted(run: RunRecord) -> bool:
    """Whether a node writes the run's wandb run."""
    section = run.spec["wandb"]
    return bool(section["mode"] != "disabled" and section["from"] == "node")


def config(run: RunRecord) -> dict[str, Any]:
    """What wandb is told of a run: its spec, without the address in `notify`, which may hold a token; and its hardware."""
    attempt = run.attempts[-1]
    hardware = {"world_size": attempt.world_size, **attempt.offer.model_dump(mode="json")}
    spec = {key: value for key, value in run.spec.items() if key != "notify"}
    return {**spec, "hardware_used": hardware}


def credentials() -> dict[str, str]:
    """wandb's settings of the caller's environment; the key from ~/.netrc where it is not there."""
    names = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY")
    found = {name: value for name in names if (value := os.environ.get(name))}
    if "WANDB_API_KEY" not in found:
        host = urllib.parse.urlsplit(found.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        try:
            known = netrc.netrc().authenticators(host)
        except (OSError, netrc.NetrcParseError):
            known = None
        if known is not None and known[2]:
            found["WANDB_API_KEY"] = known[2]
    return found


def start(remote: Remote, run: RunRecord, token: str, environment: Mapping[str, Any]) -> str:
    """Start the reporter of the run's first node beside the trainer, where one is wanted; harmless where it runs. The key is in
    that process's environment alone, and only where it is needed. Why there is none, or ""."""
    if not wanted(run):
        return ""
    place, section = directory(run.run), run.spec["wandb"]
    plan = {
        "token": token,
        "mode": section["mode"],
        "project": section["project"],
        "run": run.run,
        "config": config(run),
    }
    secrets = credentials() if section["mode"] == "online" else {}
    argv = [environment["python"], "../../report.py", "--run", "."]
    env = {**environment.get("env", {}), **secrets}
    try:
        remote.write(f"{place}/report.json", json.dumps(plan).encode(), 0o600)
        remote.write("~/llmctl/report.py", Path(trainer.__file__).with_name("report.py").read_bytes(), 0o644)
        remote.detach(argv, cwd=place, log="report.log", env=env)
    except RemoteError as error:
        return f"nothing logs to wandb on the node: {error}"
    return ""


def bring(remote: Remote, run: RunRecord, to: Path, clock: Clock) -> str:
    """Wait for the reporter of a run whose trainer has ended, and bring what it wrote to the folder `to`. What is wrong
    with it, and what to do; "" where everything is there or nothing is wanted. Raises RemoteError where the link is at fault."""
    if not wanted(run):
        return ""
    began, never, status = clock.monotonic(), threading.Event(), _status(remote, run)
    while status.get("state") in {"following", "sending"} and clock.monotonic() - began < SETTLE_SECONDS:
        clock.wait(never, 0.5)
        status = _status(remote, run)
    try:
        transfer.pull_tree(remote, f"{directory(run.run)}/wandb", to)
    except (CommandFailed, transfer.TransferError, OSError) as error:
        return f"the node's wandb files could not be fetched: {status.get('detail') or error}"
    if status.get("state") == "done":
        return ""
    why = status.get("detail") or "the node did not send everything in time"
    return f"{why}; what it logged is here: wandb sync {to}/*run-*"


def _status(remote: Remote, run: RunRecord) -> dict[str, Any]:
    """What the reporter said last; {} before that. Raises RemoteError."""
    try:
        status = json.loads(remote.read(f"{directory(run.run)}/report-status.json"))
    except (NoSuchFile, ValueError):
        return {}
    return status if isinstance(status, dict) else {}
