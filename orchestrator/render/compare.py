"""`compare` for people and for spreadsheets: a table, CSV, Markdown, HTML, JSON."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.figures import NONE, count, dollars, hours, number, percent, sane, size
from orchestrator.render import text as render
from orchestrator.render.text import Column
from runs import compare

if TYPE_CHECKING:
    from orchestrator.actions.comparing import Table

_USD = {"training_usd", "cost_usd", "usd_per_billion_tokens"}
_SHORT = {
    "run": "RUN", "name": "NAME", "source": "SOURCE", "state": "STATE", "provider": "AT", "instance_type": "TYPE", "gpu": "GPU",
    "gpus": "GPUS", "parameters": "PARAMS", "tokens": "TOKENS", "global_batch_size": "BATCH", "microbatch_size": "MICRO",
    "train_loss": "TRAIN", "validation_loss": "VAL", "validation_set": "VAL SET", "test_loss": "TEST", "test_set": "TEST SET",
    "tokens_per_second": "TOK/S", "mfu": "MFU", "training_hours": "TRAIN H", "billed_hours": "BILLED H",
    "training_usd": "TRAIN $", "cost_usd": "COST", "usd_per_billion_tokens": "$/B TOK", "overhead_fraction": "OVERHEAD",
    "started": "STARTED",
}  # fmt: skip
_KEEP = {
    "run": 9, "state": 5, "cost_usd": 9, "validation_loss": 8, "test_loss": 8, "train_loss": 4, "billed_hours": 7,
    "training_usd": 5, "overhead_fraction": 6, "tokens_per_second": 6, "mfu": 4, "gpu": 4, "gpus": 3, "tokens": 5,
    "global_batch_size": 4, "test_set": 6, "validation_set": 1, "training_hours": 3, "usd_per_billion_tokens": 5,
}  # fmt: skip
_DEFAULT = (
    "run", "state", "gpu", "gpus", "tokens", "global_batch_size", "train_loss", "validation_loss", "validation_set",
    "test_loss", "test_set", "tokens_per_second", "mfu", "training_hours", "billed_hours", "training_usd", "cost_usd",
    "usd_per_billion_tokens", "overhead_fraction",
)  # fmt: skip


def cell(key: str, value: Any) -> str:
    """A value as the table shows it; what is not known as `-`, never as zero."""
    base = key.removesuffix("_sd")
    if value is None:
        return NONE
    if isinstance(value, str):
        return value[:19].replace("T", " ") if key == "started" else value
    if base in _USD:
        return dollars(value)
    if base in compare.LOSSES:
        return number(value)
    if base in {"training_hours", "billed_hours"}:
        return hours(value)
    if base in {"mfu", "overhead_fraction"}:
        return percent(value)
    if base in {"parameters", "tokens", "tokens_per_second"}:
        return count(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def say(table: Table, form: str) -> None:
    """Print the table as `table`, `csv`, `md`, `html` or `json`."""
    if form == "json":
        from orchestrator.actions.show import print_json

        print_json(table.rows)
        return
    if not table.rows and form == "table":
        render.line("No runs yet. `llmctl launch SPEC` makes one; `--published` shows what others paid.")
        return
    {"csv": _csv, "md": _markdown, "html": _html, "table": _table}[form](table)


def _keys(table: Table, *, short: bool) -> list[str]:
    if table.columns:
        return table.columns
    if table.grouped:
        return [
            key for key in (table.rows[0] if table.rows else {}) if not short or not _blank(table.rows, key)
        ]
    return list(_DEFAULT if short else compare.COLUMNS)


def _blank(rows: Sequence[dict[str, Any]], key: str) -> bool:
    return all(row.get(key) is None for row in rows)


def _table(table: Table) -> None:
    marks = {id(row): index for index, row in enumerate(table.rows)}
    columns = [
        Column(
            _SHORT.get(key, key.upper()),
            _marked(table, key, marks),
            right=key
            not in {"run", "state", "gpu", "validation_set", "test_set", "name", "source", "started"},
            keep=9 if table.columns or (table.grouped and index < 2) else _KEEP.get(key, 2),
            style=render.state_style if key == "state" else None,
        )
        for index, key in enumerate(_keys(table, short=True))
        if table.columns or _KEEP.get(key, 2) >= 9 or not _blank(table.rows, key)
    ]
    render.table(columns, table.rows)
    _notes(table)


def _marked(table: Table, key: str, marks: dict[int, int]) -> Callable[[dict[str, Any]], str]:
    known: dict[Any, str] = {}
    noted = table.grouped or key == "cost_usd" or key in table.best

    def text(row: dict[str, Any]) -> str:
        value = row.get(key)
        if key == "run" and value is None:
            value = row.get("name")
        shown = known.get(value)
        if shown is None:
            shown = known[value] = cell(key, value)
        if not noted:
            return shown
        index = marks[id(row)]
        spread = row.get(f"{key}_sd") if table.grouped else None
        if spread is not None:
            shown += f" ± {cell(key, spread)}"
        if key in table.best and index in table.best[key]:
            shown += " ≈" if key in table.noise else ""
        return shown + (" *" if key == "cost_usd" and index in table.front else "")

    return text


def _notes(table: Table) -> None:
    if table.grouped:
        return
    totals = table.totals
    if totals.get("runs"):
        render.line()
        render.line(
            f"{totals['runs']} {'run' if totals['runs'] == 1 else 'runs'}: {dollars(totals['cost_usd'])}, of which training {dollars(totals['training_usd'])};"
            f" {hours(totals['billed_hours'])} node-hours billed, {count(totals['tokens'])} tokens"
        )
    if table.front:
        render.line("* no other run on the same set has both a lower loss and a lower cost", style="dim")
    for sentence in table.noise.values():
        render.line(f"≈ as good as the best; {sentence}", style="dim")


def _csv(table: Table) -> None:
    keys = _keys(table, short=False)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(keys)
    for row in table.rows:
        writer.writerow(["" if row.get(key) is None else row.get(key) for key in keys])
    sys.stdout.write(text.getvalue())


def _markdown(table: Table) -> None:
    keys = [
        key
        for key in _keys(table, short=True)
        if table.columns or key == "run" or not _blank(table.rows, key)
    ]
    lines = ["| " + " | ".join(keys) + " |", "|" + "|".join(" --- " for _ in keys) + "|"]
    for row in table.rows:
        values = [row.get(key) if key != "run" or row.get(key) else row.get("name") for key in keys]
        lines.append(
            "| "
            + " | ".join(
                sane(cell(key, value)).replace("|", "\\|") for key, value in zip(keys, values, strict=True)
            )
            + " |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def _html(table: Table) -> None:
    from html import escape

    keys = _keys(table, short=False)
    head = "".join(f"<th>{escape(key)}</th>" for key in keys)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(sane(cell(key, row.get(key))))}</td>" for key in keys) + "</tr>"
        for row in table.rows
    )
    sys.stdout.write(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n")


# ---------------------------------------------------------------- two runs


def difference(items: Sequence[dict[str, Any]]) -> None:
    """What differs between two runs."""
    if not items:
        render.line("The two runs do not differ in anything that is recorded.")
        return
    left, right = [key for key in items[0] if key not in {"part", "key", "note"}][:2]
    columns = (
        Column("IN", lambda item: item["part"], right=False, keep=8),
        Column("KEY", lambda item: item["key"], right=False, keep=9),
        Column(left, lambda item: cell(item["key"], _plain(item[left])), keep=9),
        Column(right, lambda item: cell(item["key"], _plain(item[right])), keep=9),
        Column("NOTE", lambda item: item["note"], right=False, keep=7),
    )
    render.table(columns, items)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def written(document: dict[str, Any]) -> None:
    """Where a report is."""
    render.line(f"{document['path']}: {document['runs']} runs, {size(document['bytes'])}; it opens offline")
