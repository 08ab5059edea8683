"""What following a run looks like: its log on stdout, and one calm line about the run below it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from orchestrator.actions import follow
from orchestrator.figures import count, dollars, duration, gpu_figures, number, percent, sane
from orchestrator.render.text import width
from runs import rows

_TOLD = {
    "OfferChosen", "LaunchIntended", "LaunchAnswered", "LaunchRefused", "LaunchAmbiguous", "LaunchFound",
    "LaunchAbandoned", "NodeReady", "PreflightFailed", "LaneDone", "TrainerStarted", "TrainerRestarted", "TrainerEnded",
    "CheckpointVerified", "EvaluationRecorded", "JobFailed", "StopRequested", "TerminateIntended", "TerminateAnswered",
    "NodeGone", "NodeKept", "LeaseExtended", "LimitsRaised", "RunEnded", "ResumeRequested",
}  # fmt: skip


_RUNG = {"LaunchAnswered", "LaunchFound", "RunEnded"}
"""What rings the terminal's bell when it happens: money begins to flow, or all is over."""


class Screen:
    """Log lines to stdout, events and notes to stderr, and in a terminal a status line that stays at the bottom."""

    def __init__(self, *, log: bool = True, events: bool = True) -> None:
        self._log, self._events = log, events
        self._began = datetime.now(UTC)
        self._live = sys.stderr.isatty() and sys.stdout.isatty()
        self._line, self._rest = "", b""
        self._printed, self._why = 0.0, ""

    def play(self, heard: Iterable[follow.Heard]) -> None:
        """Show what is heard until it ends. Leaves the terminal as it was, whatever happens."""
        try:
            for item in heard:
                if isinstance(item, follow.Log):
                    self._bytes(item.data)
                elif isinstance(item, follow.Happened):
                    self._event(item.body)
                elif isinstance(item, follow.Note):
                    self._say(f"note: {item.text}")
                else:
                    self._status(item)
        finally:
            if self._rest and self._log:
                self._bytes(b"\n")
            self._erase()

    def _bytes(self, data: bytes) -> None:
        if not self._log:
            return
        whole, newline, self._rest = (self._rest + data).rpartition(b"\n")
        if newline:
            self._erase()
            sys.stdout.write(sane(whole.decode("utf-8", "replace")) + "\n")
            sys.stdout.flush()
            self._draw()

    def _event(self, body: dict[str, Any]) -> None:
        if self._events and body["kind"] in _TOLD:
            self._say(f"{body['at'][11:19]} {describe(body)}")
        if self._live and body["kind"] in _RUNG and datetime.fromisoformat(body["at"]) > self._began:
            sys.stderr.write("\a")

    def _say(self, text: str) -> None:
        self._erase()
        sys.stderr.write(sane(text) + "\n")
        sys.stderr.flush()
        self._draw()

    def _status(self, item: follow.Row) -> None:
        self._line = status_line(item.row, item.heartbeat)
        if self._live:
            self._erase()
            self._draw()
        elif item.row["state"] == "waiting" and (why := (item.heartbeat or {}).get("why") or "") != self._why:
            self._why = why
            self._say(why)
        elif not self._log and time.monotonic() - self._printed > 5:
            self._printed = time.monotonic()
            sys.stderr.write(self._line + "\n")

    def _draw(self) -> None:
        if self._live and self._line:
            sys.stderr.write(fit(self._line, width(sys.stderr) - 1))
            sys.stderr.flush()

    def _erase(self) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def fit(text: str, columns: int) -> str:
    """`text` cut to `columns`, at a separator where there is one."""
    if len(text) <= columns:
        return text
    cut = text[:columns].rfind(" | ")
    return text[:cut] if cut > 0 else text[: max(0, columns - 1)] + "…"


def status_line(row: dict[str, Any], heartbeat: dict[str, Any] | None) -> str:
    """A run in one line, the most wanted first, so that a narrow terminal loses the least. Whoever follows a run knows its
    name: that comes last."""
    shown = rows.status_document(row, driver_alive=True)
    parts = [shown["state"]] if shown["state"] != "training" or not shown["step"] else []
    if shown["step"]:
        parts.append(f"step {shown['step']}/{shown['steps']}")
    if shown["loss"] is not None:
        parts.append(f"loss {number(shown['loss'])}")
    parts.append(dollars(shown["cost_usd"]))
    if shown["tokens_per_second"]:
        parts.append(f"{count(shown['tokens_per_second'])} tok/s")
    if row["mfu"]:
        parts.append(f"MFU {percent(row['mfu'])}")
    if shown["eta_seconds"] is not None:
        parts.append(f"ETA {duration(shown['eta_seconds'])}")
    if heartbeat and heartbeat.get("complaint"):
        parts.append(str(heartbeat["complaint"]))
    elif heartbeat and heartbeat.get("why") and shown["state"] != "training":
        parts.append(str(heartbeat["why"]))
    parts += gpu_figures(row)
    parts.append(row["run"])
    return " | ".join(sane(str(part)).replace("\n", " ") for part in parts)


_HOW = {"rsync": " by rsync", "pieces": " over SSH", "rsync+pieces": " by rsync and over SSH"}
"""What carried the bytes: large files go in pieces over several SSH channels, and all do where rsync is missing."""


def describe(body: dict[str, Any]) -> str:
    """An event as a sentence."""
    kind = body["kind"]
    if kind == "OfferChosen":
        offer = body["offer"]
        rate = offer["tariff"]["micro_usd_per_hour"] / rows.MICRO
        return (
            f"attempt {body['attempt']}: {offer['instance_type']} in {offer['region']} at {dollars(rate)}/h"
        )
    if kind == "LaneDone":
        if body["lane"] == "ready":
            return f"ready to train after {duration(body['seconds'])}"
        sent = f", {count(body['sent_bytes'])}B sent" if body.get("sent_bytes") else ""
        how = _HOW.get((body.get("detail") or {}).get("method") or "", "") if sent else ""
        return f"{body['lane']} ready after {duration(body['seconds'])}{sent}{how}"
    if kind == "CheckpointVerified":
        return f"checkpoint of step {body['step']} is here and verified: {body['path']}"
    if kind == "RunEnded":
        return f"{body['outcome']}: {body['reason']}"
    if kind == "TrainerEnded":
        return (
            f"the trainer ended at step {body['step']}: {body['reason']} {body.get('detail') or ''}".rstrip()
        )
    if kind == "TerminateAnswered":
        return "termination accepted" if body["accepted"] else f"termination refused: {body['message']}"
    words: dict[str, Callable[[], str]] = {
        "LaunchIntended": lambda: f"asking for {body['key']}",
        "LaunchAnswered": lambda: f"the provider answers: node {body['id']}",
        "LaunchFound": lambda: f"found node {body['id']}",
        "LaunchRefused": lambda: f"refused: {body['code']}: {body['message']}",
        "LaunchAmbiguous": lambda: f"no clear answer: {body['message']}",
        "NodeReady": lambda: "the node answers and has shown the right host key",
        "TrainerStarted": lambda: "the trainer is started",
        "TrainerRestarted": lambda: (
            f"torchrun had come to step {body['step']} and is started again: {body['reason']}"
        ),
        "JobFailed": lambda: f"{body['job']} failed: {body['reason']}",
        "StopRequested": lambda: f"stopping ({body['reason']})",
        "TerminateIntended": lambda: f"asking the provider to end the node ({body['reason']})",
        "NodeGone": lambda: f"the node is gone ({body['evidence']})",
        "NodeKept": lambda: "the node is kept, and bills on",
        "PreflightFailed": lambda: f"not the node that was rented: {body['reason']}",
        "EvaluationRecorded": lambda: f"evaluated: {body['name']}",
        "RunCreated": lambda: f"created: {body['steps']} steps",
        "DriverStarted": lambda: f"driver {body['epoch']} took the run",
        "AttemptStarted": lambda: f"attempt {body['attempt']} begins, from step {body['from_step']}",
        "AttemptEnded": lambda: f"attempt {body['attempt']} ended ({body['reason']})",
        "CheckpointSeen": lambda: f"the node has a checkpoint of step {body['step']}",
        "CheckpointGone": lambda: (
            f"the node let the checkpoint of step {body['step']} go before it was here, as checkpoint.keep says"
        ),
        "CheckpointDropped": lambda: f"the checkpoint of step {body['step']} made room for newer ones",
    }
    return words[kind]() if kind in words else kind
