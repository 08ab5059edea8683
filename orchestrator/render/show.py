"""`show` for people: what a run is, where its time and its dollars went, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from orchestrator.figures import NONE, count, dollars, duration, gpu_figures, number, percent, size
from orchestrator.render import text as render
from orchestrator.render.live import describe
from orchestrator.render.models import hellaswag
from orchestrator.render.text import Column
from provisioning import console_of
from runs import charges
from runs.rows import MICRO

if TYPE_CHECKING:
    from runs.record import RunRecord

EVENTS_SHOWN = 25
LABEL = 15
"""Columns of a phase's name in the timeline."""
_COLOURS = {
    "training": "green", "redone": "red", "evaluating": "cyan", "preparing": "yellow", "collecting": "blue",
    "booting": "magenta", "releasing": "bright_black", "idle": "red",
}  # fmt: skip


def show(document: dict[str, Any], run: RunRecord, now: datetime) -> None:
    """Print the whole record."""
    _head(run, now)
    _attempts(document["attempts"])
    timeline(run, now)
    _phases(run, now)
    _checkpoints(document["checkpoints"])
    _evaluations(run)
    _events(document["events"])


def _head(run: RunRecord, now: datetime) -> None:
    state = f"{run.state} ({run.reason})" if run.reason else run.state
    render.line(f"{run.run}  {state}", style=f"bold {render.STATE_STYLES.get(run.state, '')}".strip())
    told, model, train = run.summary, run.spec["model"], run.spec["train"]
    parts = [
        f"{count(told.get('parameters'))} parameters" if told.get("parameters") else "",
        f"{model['n_layers']} layers × {model['emb_dim']}",
        f"context {model['context_length']}",
        f"global batch {train['global_batch_size']}",
    ]
    render.line("  " + ", ".join(part for part in parts if part))
    render.line("  " + ", ".join(results(run)))
    render.line("  " + money(run, now))
    for node in run.nodes:
        if node.audited is not None:
            render.line(f"  the bill of {node.key}: {node.audited}")


def results(run: RunRecord) -> list[str]:
    """Step, losses and speed, as far as they are known; of a run that only measures, what it found."""
    told = run.summary
    if (run.spec.get("tune") or {}).get("method") == "evaluate":
        losses = [item for item in run.evaluations if item.get("loss") is not None]
        return [f"loss {number(item['loss'])} on {item['name']}" for item in losses] or ["nothing measured"]
    said = [f"step {told.get('step', 0)} of {run.steps}"]
    for key, name in (("train_loss", "train loss"), ("validation_loss", "validation loss")):
        if told.get(key) is not None:
            said.append(f"{name} {number(told[key])}")
    if told.get("tokens_per_second"):
        said.append(f"{count(told['tokens_per_second'])} tokens/s")
    if told.get("mfu"):
        said.append(f"MFU {percent(told['mfu'])}")
    return said + gpu_figures(told)


def money(run: RunRecord, now: datetime) -> str:
    """The bill in a line."""
    totals = charges.totals(run, now)
    cost = dollars(totals.micro_usd / MICRO)
    bound = "" if totals.final else " so far, an upper bound until the end of its nodes is confirmed"
    if bound and all(node.settled for node in run.owned):
        bound = ", an upper bound: a node ended by itself while nobody looked, and is counted until it was found gone"
    text = f"cost {cost}{bound}; billed {duration(totals.billed_seconds)}, training {duration(totals.training_seconds)}"
    return (
        f"{text}, overhead {percent(totals.overhead_fraction)}"
        if totals.overhead_fraction is not None
        else text
    )


def _attempts(attempts: Sequence[dict[str, Any]]) -> None:
    if not attempts:
        return
    render.line()
    columns = (
        Column("ATTEMPT", lambda item: str(attempts.index(item) + 1), keep=9),
        Column("TYPE", lambda item: item["instance_type"], right=False, keep=9),
        Column("REGION", lambda item: item["region"], right=False, keep=3),
        Column("$/H", lambda item: dollars(item["usd_per_hour"]), keep=7),
        Column("NODES", lambda item: str(len(item["nodes"])), keep=4),
        Column("PROCESSES", lambda item: str(item["world_size"]), keep=4),
        Column("MICROBATCH", lambda item: str(item["microbatch_size"] or NONE), keep=2),
        Column("FROM STEP", lambda item: str(item["from_step"]), keep=5),
        Column("STARTED", lambda item: item["started"][:19].replace("T", " "), right=False, keep=6),
        Column("ENDED", lambda item: (item["ended"] or NONE)[:19].replace("T", " "), right=False, keep=3),
    )
    render.table(columns, attempts)


# ---------------------------------------------------------------- the timeline


@dataclass(frozen=True)
class Bar:
    """One row of the waterfall: when something went on, and what it cost."""

    label: str
    spans: tuple[tuple[float, float], ...]
    """POSIX seconds."""
    micro_usd: int | None = None
    colour: str = ""

    @property
    def seconds(self) -> float:
        """Time in all spans."""
        return sum(end - start for start, end in self.spans)


def bars(run: RunRecord, now: datetime) -> list[Bar]:
    """The rows of the waterfall: each node's phases in the order in which they began, and the lanes under `preparing`."""
    rows: list[Bar] = []
    items = charges.charges(run, now)
    for node in run.nodes:
        mine = [item for item in items if item.node == node.key]
        for phase in dict.fromkeys(item.phase for item in mine):
            part = [item for item in mine if item.phase == phase]
            spans = tuple((item.start.timestamp(), item.end.timestamp()) for item in part)
            rows.append(Bar(phase, spans, sum(item.micro_usd for item in part), _COLOURS[phase]))
            if phase == "preparing":
                rows += _lanes(run, node.key)
    return rows


def _lanes(run: RunRecord, key: str) -> list[Bar]:
    rows = []
    for attempt in run.attempts:
        for name, lane in attempt.lanes.items():
            node, _, title = name.rpartition("/")
            if node == key and lane.seconds > 0:
                end = lane.ended_at.timestamp()
                rows.append(Bar(f"  {title}", ((end - lane.seconds, end),), None, "yellow"))
    return rows


def timeline(run: RunRecord, now: datetime) -> None:
    """Print the waterfall: where the billed time went, side by side."""
    from rich.text import Text

    rows = bars(run, now)
    if not rows:
        return
    room = render.width()
    first = min(start for row in rows for start, _ in row.spans)
    last = max(end for row in rows for _, end in row.spans)
    cells = max(10, min(100, room - LABEL - 9 - 11))
    out = render.console()
    out.print()
    out.print(Text(f"{'TIMELINE':<{LABEL}}{axis(last - first, cells)}{'TIME':>9}{'COST':>11}", style="bold"))
    for row in rows:
        text = Text(f"{row.label:<{LABEL}}"[:LABEL])
        text.append(waterfall(row.spans, first, last, cells), style=row.colour)
        cost = dollars(row.micro_usd / MICRO) if row.micro_usd is not None else ""
        text.append(f"{duration(row.seconds):>9}{cost:>11}")
        out.print(text, no_wrap=True, overflow="crop")


def axis(seconds: float, cells: int) -> str:
    """The time axis of the waterfall: its start and its end."""
    end = duration(seconds)
    return f"0{end:>{cells - 1}}"


def waterfall(spans: Iterable[tuple[float, float]], first: float, last: float, cells: int) -> str:
    """`spans` as a bar of `cells` characters over [first, last]; even the shortest is seen."""
    marks = [" "] * cells
    scale = cells / (last - first) if last > first else 0.0
    for start, end in spans:
        low = min(cells - 1, int((start - first) * scale))
        high = min(cells, max(low + 1, round((end - first) * scale)))
        marks[low:high] = "█" * (high - low)
    return "".join(marks)


def _phases(run: RunRecord, now: datetime) -> None:
    totals = charges.totals(run, now)
    if not totals.by_phase:
        return
    rows = sorted(totals.by_phase.items(), key=lambda item: -item[1])
    render.line()
    columns = (
        Column("PHASE", lambda item: item[0], right=False, keep=9),
        Column("TIME", lambda item: duration(totals.seconds_by_phase.get(item[0])), keep=9),
        Column("COST", lambda item: dollars(item[1] / MICRO), keep=9),
        Column(
            "SHARE", lambda item: percent(item[1] / totals.micro_usd) if totals.micro_usd else NONE, keep=8
        ),
    )
    render.table(columns, rows)


# ---------------------------------------------------------------- results


def _checkpoints(items: Sequence[dict[str, Any]]) -> None:
    if not items:
        return
    render.line()
    columns = (
        Column("CHECKPOINT", lambda item: str(item["step"]) + (" best" if item["best"] else ""), keep=9),
        Column("SIZE", lambda item: size(item["bytes"]), keep=6),
        Column("SHA256", lambda item: item["sha256"][:12], right=False, keep=3),
        Column(
            "HERE", lambda item: "yes" if item["fetched"] else "weights" if item["path"] else "no", keep=8
        ),
        Column("PATH", lambda item: item["path"] or "", right=False, keep=2),
    )
    render.table(columns, items)


def _evaluations(run: RunRecord) -> None:
    for item in run.evaluations:
        result = {key: value for key, value in item.items() if key not in {"name", "step"}}
        if result.get("loss") is not None:
            render.line(f"test loss on {item['name']}: {number(result['loss'])} at step {item['step']}")
        elif result.get("kind") == "hellaswag":
            render.line(f"{item['name']}: {hellaswag(item)}, at step {item['step']}")
        elif result.get("kind") == "judge":
            beside = (
                ", ".join(model for model in item["judged_with"] if model != item["model"]) or "nothing else"
            )
            render.line(
                f"{item['name']}: {number(item['score'], 1)} ({number(item['low'], 1)} to {number(item['high'], 1)}),"
                f" judged beside {beside}, at step {item['step']}"
            )
        elif result.get("text") is not None or result.get("samples") is not None:
            text = str(result.get("prompt") or "") + str(result.get("text") or result.get("samples"))
            render.line(f"{item['name']}:")
            for one in text.splitlines():
                render.line(f"  │ {one}")


def _events(items: Sequence[dict[str, Any]]) -> None:
    if not items:
        return
    told = [item for item in items if item["kind"] not in {"ProgressSeen", "NodeObserved"}]
    render.line()
    render.heading(
        "EVENTS" + (f" (the last {EVENTS_SHOWN} of {len(told)})" if len(told) > EVENTS_SHOWN else "")
    )
    for item in told[-EVENTS_SHOWN:]:
        render.note(f"{item['at'][:19].replace('T', ' ')}  {describe(item)}", indent=21)


# ---------------------------------------------------------------- the end


def ending(run: RunRecord, now: datetime) -> None:
    """What came of a run, in a few lines, for those who followed it."""
    state = f"{run.state}: {run.reason}" if run.reason else run.state
    render.line(f"{run.run} {state}", style=render.STATE_STYLES.get(run.state, ""))
    render.line("  " + ", ".join(results(run)))
    render.line("  " + money(run, now))
    here = [item for _, item in sorted(run.checkpoints.items()) if item.path]
    for item in here:
        mark = " (best)" if run.best is not None and run.best.step == item.step else ""
        render.line(f"  checkpoint of step {item.step}{mark}: {item.path}")
    if run.outcome in {"failed", "lost", "stopped"}:
        render.line(f"  carry on: llmctl resume {run.run} · look: llmctl show {run.run}")


def alarm(run: RunRecord) -> str:
    """Which nodes nobody has confirmed to be gone."""
    names = [
        f"{node.marker.name} ({node.id or 'no id'})"
        for node in run.owned
        if not node.settled and not run.keeps(node)
    ]
    return (
        f"WARNING: MAY STILL BE BILLING: {', '.join(names)}. The provider does not confirm that it is gone; the driver goes on"
        f" trying. Look with `llmctl status --refresh`, end it with `llmctl reap`, or at {console_of(run.provider)}"
    )
