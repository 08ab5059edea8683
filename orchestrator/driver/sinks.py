"""Who else is told: wandb, and the spec's `notify`. Neither can hold up or end a run.

Both are called with the record by the driver, work in a thread of their own, and read what they send from the mirrored
metrics. What was sent is remembered in `runs/RUN/`, so that a driver that takes over continues the same wandb run.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.remote.mirror import publish
from orchestrator.site import reported
from runs.record import RunRecord
from trainer import report


class Sink:
    """A thread that takes jobs one by one; `call` never blocks, `close` waits a little for what is left."""

    def __init__(self, name: str, log: Callable[[str], None]) -> None:
        self._log = log
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def call(self, job: Callable[[], None]) -> None:
        """Do `job` when its turn comes."""
        self._jobs.put(job)

    def close(self, patience: float) -> None:
        """Finish what was asked for, for at most `patience` seconds."""
        self._jobs.put(None)
        self._thread.join(patience)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001  nobody who is told may harm the run
                self._log(f"{self._thread.name}: {type(error).__name__}: {error}")


# ---------------------------------------------------------------- notify


class Notify:
    """A shell command or a webhook URL, told once of each thing that a person wants to know."""

    def __init__(self, target: str | None, directory: Path, log: Callable[[str], None]) -> None:
        self._target, self._path = target, directory / "notified.json"
        self._sink = Sink("notify", log) if target else None
        self._told: set[str] = set(json.loads(self._path.read_text())) if self._path.exists() else set()

    def __call__(self, run: RunRecord) -> None:
        """Tell what is new in the record."""
        if self._sink is None:
            return
        for what, text in _news(run):
            if what not in self._told:
                self._told.add(what)
                publish(self._path, json.dumps(sorted(self._told)).encode())
                self._sink.call(lambda text=text: self._tell(run, text))  # type: ignore[misc]

    def _tell(self, run: RunRecord, text: str) -> None:
        assert self._target is not None
        if self._target.startswith(("http://", "https://")):
            import httpx2

            # `text` is what Slack and Telegram's sendMessage read; a chat_id stands in the URL's query.
            body = {"text": text, "run": run.run, "state": run.state}
            answer = httpx2.post(self._target, json=body, timeout=20)
            if answer.is_error:  # in words of our own: the address may hold a token
                raise OSError(f"the webhook answers {answer.status_code}")
            return
        values = {"LLMCTL_RUN": run.run, "LLMCTL_STATE": run.state, "LLMCTL_MESSAGE": text}
        # The user's own shell command, from the user's own spec.
        command = ["/bin/sh", "-c", self._target]
        subprocess.run(
            command, timeout=60, check=True, env={**os.environ, **values}, stdin=subprocess.DEVNULL
        )

    def close(self) -> None:
        """Let the last message out."""
        if self._sink is not None:
            self._sink.close(30)


def _news(run: RunRecord) -> list[tuple[str, str]]:
    """(what, sentence) of everything worth telling so far; `what` makes each told once."""
    news = []
    for node in run.nodes:
        if node.active_at is not None:
            place = f"{node.offer.instance_type} in {node.offer.region} at ${node.offer.usd_per_hour:.2f}/h"
            news.append((f"{node.key} rented", f"{run.run}: got {place}"))
        if node.terminate_tries >= 5 and not node.settled:
            news.append(
                (
                    f"{node.key} unconfirmed",
                    f"{run.run}: node {node.id} may still be billing; its end is not confirmed",
                )
            )
    if run.outcome is not None:
        news.append((f"ended {run.resumes}", f"{run.run} {run.outcome}: {run.reason}"))
    return news


# ---------------------------------------------------------------- wandb


class Wandb:
    """The mirrored metrics as a wandb run whose id is the run's; `disabled` imports nothing. Where the node writes them, its
    end alone, with the dollars and the row, which no node knows."""

    def __init__(self, run: RunRecord, directory: Path, log: Callable[[str], None]) -> None:
        section = run.spec["wandb"]
        self._mode, self._project = section["mode"], section["project"]
        self._directory, self._log = directory, log
        self._sink = Sink("wandb", log) if self._mode != "disabled" else None
        self._elsewhere = reported.wanted(run)
        self._run: Any = None
        self._behind: str | None = None
        """The folder of a run that was to be online and is not, to be synced at the end."""
        self._lines, self._busy = report.Lines(directory / "metrics.jsonl"), threading.Event()
        self._sent = report.last_sent(report.read_json(directory / "wandb.json"))
        """The last step that was sent, by kind."""

    def __call__(self, run: RunRecord) -> None:
        """Send what the metrics have gained, unless the last sending is still at work."""
        if self._sink is None or self._elsewhere or not run.summary or self._busy.is_set():
            return
        self._busy.set()
        self._sink.call(lambda: self._send(run))

    def _send(self, run: RunRecord) -> None:
        try:
            if self._run is None:
                self._open(run)
            for line in self._lines.read():
                values = report.logged(line, self._sent)
                if values is not None:
                    self._run.log({**values, "cost_usd": _cost(run, line["time"])}, step=line["step"])
            publish(self._directory / "wandb.json", json.dumps(self._sent).encode())
        finally:
            self._busy.clear()

    def _open(self, run: RunRecord) -> None:
        options = {
            "project": self._project,
            "id": run.run,
            "name": run.run,
            "dir": str(self._directory),
            "config": reported.config(run),
        }
        self._run, self._behind = report.open_run(self._mode, options, self._log)

    def finish(self, run: RunRecord) -> None:
        """The last metrics and the table row as summary; then close, for at most half a minute. Again where something was
        measured after the run's end."""
        if self._sink is None:
            return
        self._busy.clear()
        self(run)
        self._sink.call(lambda: self._close(run))
        self._sink.close(30)

    def _close(self, run: RunRecord) -> None:
        if self._run is None and self._elsewhere and run.summary:
            self._open(run)
        if self._run is None:
            return
        from runs import compare
        from runs.summary import summarise

        row = summarise(run)
        (final,) = compare.rows([compare.entry(row, run.spec)])
        known = {key: final[key] for key in compare.COLUMNS if final[key] is not None}
        # wandb's summary follows the history: the dollars over time end at the bill.
        # Of a run that goes on online, wandb takes no step before its own next one.
        step = max(run.summary["step"], self._run.step) if self._elsewhere else self._sent["step"]
        self._run.log({"cost_usd": final["cost_usd"]}, step=step)
        self._run.summary.update({**known, "phases_usd": row["phases"]})
        report.close_run(self._run)
        if self._behind is not None and (problem := report.sync([self._behind])):
            self._log(f"wandb is still not reachable ({problem}): `wandb sync {self._behind}` later")


def _cost(run: RunRecord, time: float) -> float:
    """Dollars at that moment."""
    from runs import charges

    return charges.total(run, datetime.fromtimestamp(time, UTC)) / 1e6
