"""`status` for people: a table of runs, the nodes behind them, and how old the last inventory is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.figures import NONE, count, dollars, duration, number
from orchestrator.render import text as render
from orchestrator.render.text import Column


def _reason(row: dict[str, Any]) -> str:
    if row["run"] is None:
        return "no run of this LLMCTL_HOME has it: `llmctl reap`"
    return str(row["reason"] or "")[:80]


RUNS = (
    Column("RUN", lambda row: row["run"] or "(none)", right=False, keep=9),
    Column("STATE", lambda row: row["state"] or "unowned", right=False, keep=9, style=render.state_style),
    Column("STEP", lambda row: f"{row['step'] or 0}/{row['steps']}" if row["steps"] else NONE, keep=8),
    Column("LOSS", lambda row: number(row["loss"]), keep=7),
    Column("VAL", lambda row: number(row["validation_loss"]), keep=5),
    Column("TOK/S", lambda row: count(row["tokens_per_second"]), keep=4),
    Column("COST", lambda row: dollars(row["cost_usd"]), keep=9),
    Column("$/H", lambda row: dollars(row["usd_per_hour"]) if row["usd_per_hour"] else NONE, keep=6),
    Column("ETA", lambda row: duration(row["eta_seconds"]), keep=6),
    Column("ON", lambda row: row["instance_type"] or row["provider"] or NONE, right=False, keep=3),
    Column("REASON", _reason, right=False, keep=2),
)
NODES = (
    Column("NODE", lambda node: node["name"], right=False, keep=9),
    Column("ID", lambda node: node["id"] or NONE, right=False, keep=3),
    Column("IP", lambda node: node["ip"] or NONE, right=False, keep=4),
    Column("STATUS", lambda node: node["status"], right=False, keep=9),
    Column("$/H", lambda node: dollars(node["usd_per_hour"]), keep=8),
    Column("RUN", lambda node: node["run"] or "(no run)", right=False, keep=5),
)


def status(rows: Sequence[dict[str, Any]], *, age_seconds: float | None) -> None:
    """Print `rows` as `show.status` gives them."""
    if not rows:
        render.note("No runs yet. `llmctl init` writes a spec, `llmctl launch` runs it.")
        return
    render.table(RUNS, rows)
    nodes = [{**node, "run": row["run"]} for row in rows for node in row["nodes"] if node["billing"]]
    if nodes:
        render.line()
        render.table(NODES, nodes)
    if age_seconds is not None:
        render.line(
            f"\nProviders last asked {duration(age_seconds)} ago; `--refresh` asks again.", style="dim"
        )


def plain(row: dict[str, Any]) -> str:
    """One run in one line, for `--watch` without a terminal."""
    parts = [row["run"] or "(no run)", row["state"] or "unowned"]
    if row["steps"]:
        parts.append(f"step {row['step'] or 0}/{row['steps']}")
    if row["loss"] is not None:
        parts.append(f"loss {number(row['loss'])}")
    if row["tokens_per_second"]:
        parts.append(f"{count(row['tokens_per_second'])} tok/s")
    parts.append(dollars(row["cost_usd"]))
    if row["eta_seconds"] is not None:
        parts.append(f"ETA {duration(row['eta_seconds'])}")
    return "  ".join(parts)
