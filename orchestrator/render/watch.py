"""`status --watch`: a calm display that redraws what changed; without a terminal, a plain line for each change."""

from __future__ import annotations

import math
import sys
import threading
from typing import TYPE_CHECKING, Any

from orchestrator import footer
from orchestrator.actions import show
from orchestrator.clock import Clock, SystemClock
from orchestrator.figures import count, dollars, duration, gpu_figures, number, percent, spark
from orchestrator.render import status as render_status
from orchestrator.render import text as render
from runs.rows import LIVE
from runs.store import Store, run_dir

if TYPE_CHECKING:
    from rich.console import RenderableType

EVERY_SECONDS = 1.0
SHOWN = 20


def watch(store: Store, run: str | None, clock: Clock | None = None) -> None:
    """Show all runs, or one, until Ctrl-C; one run also until it is over."""
    clock = clock or SystemClock()
    try:
        if sys.stdout.isatty():
            _live(store, run, clock)
        else:
            _plain(store, run, clock)
    except KeyboardInterrupt:
        return


def _rows(store: Store, run: str | None) -> list[dict[str, Any]]:
    rows = show.status(store, run)
    live = [
        row
        for row in rows
        if row["run"] is None or row["state"] in LIVE or any(node["billing"] for node in row["nodes"])
    ]
    return rows if run is not None else (live or rows)[:SHOWN]


def _over(rows: list[dict[str, Any]], run: str | None) -> bool:
    return run is not None and all(row["state"] not in LIVE for row in rows)


def _plain(store: Store, run: str | None, clock: Clock) -> None:
    never, last = threading.Event(), dict[str, str]()
    while True:
        rows = _rows(store, run)
        for row in rows:
            # The dollars move all the time; a line is due when something else did.
            key = str(row["run"] or row["nodes"][0]["id"])
            now = "  ".join(str(row[name]) for name in ("state", "step", "loss", "validation_loss"))
            if last.get(key) != now:
                last[key] = now
                sys.stdout.write(render_status.plain(row) + "\n")
        sys.stdout.flush()
        if _over(rows, run):
            return
        clock.wait(never, EVERY_SECONDS)


def _live(store: Store, run: str | None, clock: Clock) -> None:
    from rich.live import Live

    never = threading.Event()
    with Live(console=render.console(), auto_refresh=False, screen=False) as live:
        while True:
            rows = _rows(store, run)
            live.update(panel(store, rows), refresh=True)
            if _over(rows, run):
                return
            clock.wait(never, EVERY_SECONDS)


def panel(store: Store, rows: list[dict[str, Any]]) -> RenderableType:
    """Each run in a block of two or three lines, and the footer."""
    from rich.console import Group
    from rich.text import Text

    room = render.width()
    blocks = [block(store, row, room) for row in rows] or ["No runs yet."]
    said = footer.lines(store.home, store.concerning())
    shown = [Text(text, no_wrap=True, overflow="ellipsis") for text in blocks]
    return Group(*shown, *(Text(text) for text in said))  # what is to be done is never cut off


def block(store: Store, row: dict[str, Any], room: int) -> str:
    """One run in lines of at most `room` characters: what it is, where it stands, and its loss as a curve."""
    if row["run"] is None:
        node = row["nodes"][0]
        return f"(no run)  {node['name']}  {node['status']}  {dollars(row['usd_per_hour'])}/h"
    head = f"{row['run']}  {row['state']}" + (f"  {row['reason']}" if row["reason"] else "")
    facts = store.summary(row["run"]) or {}
    steps = row["steps"] or 0
    done = (row["step"] or 0) / steps if steps else 0.0
    cells = max(8, min(30, room // 6))
    bar = "━" * round(done * cells) + "─" * (cells - round(done * cells))
    left = [f"{bar} {row['step'] or 0}/{steps}"]
    if row["loss"] is not None:
        left.append(f"loss {number(row['loss'])}")
    if row["validation_loss"] is not None:
        left.append(f"val {number(row['validation_loss'])}")
    if row["tokens_per_second"]:
        left.append(f"{count(row['tokens_per_second'])} tok/s")
    if facts.get("mfu"):
        left.append(f"MFU {percent(facts['mfu'])}")
    left += gpu_figures(facts)
    money = [dollars(row["cost_usd"])]
    if row["eta_seconds"] is not None:
        end = row["cost_usd"] + row["usd_per_hour"] * row["eta_seconds"] / 3600
        money.append(f"of about {dollars(end)}  ETA {duration(row['eta_seconds'])}")
    money += _shares(facts)
    lines = [head, _fitted([*left], room), _fitted(money, room)]
    curve = sparkline(store, row["run"], max(10, min(60, room - 6)))
    return "\n".join([*lines, *([f"loss {curve}"] if curve else []), ""])


def _shares(facts: dict[str, Any]) -> list[str]:
    """What the dollars so far went into, the largest part first."""
    spent = facts.get("phases") or {}
    total = sum(spent.values())
    parts = sorted(((value, phase) for phase, value in spent.items() if value > 0), reverse=True)
    return (
        [f"{phase} {value / total:.0%}" for value, phase in parts if value >= 0.01 * total] if total else []
    )


def _fitted(parts: list[str], room: int) -> str:
    """As many parts as there is room for, the first ones first."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + 2 + len(part) > room:
            break
        text += f"  {part}"
    return text


def sparkline(store: Store, run: str, cells: int) -> str:
    """The run's loss in one line; empty without one."""
    from runs.series import series

    values = series(run_dir(store.home, run) / "metrics.jsonl", points=cells * 2).values
    return spark(_without_the_fall(values), cells)


def _without_the_fall(values: list[float]) -> list[float]:
    """Cut at what all but the first fifth of a run stays under: the fall at the start would flatten all that follows."""
    later = [value for value in values[len(values) // 5 :] if math.isfinite(value)]
    ceiling = max(later, default=math.inf)
    return [min(value, ceiling) if math.isfinite(value) else value for value in values]
