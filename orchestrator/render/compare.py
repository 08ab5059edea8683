"""`compare` for people and for spreadsheets: a table, CSV, Markdown, HTML, JSON."""

from __future__ import annotations

import csv
import io
import string
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
    "hellaswag": "HELLASWAG", "hellaswag_set": "HELLASWAG SET", "judge_score": "JUDGE", "judge_panel": "JUDGE PANEL",
    "tokens_per_second": "TOK/S", "mfu": "MFU", "training_hours": "TRAIN H", "billed_hours": "BILLED H",
    "training_usd": "TRAIN $", "cost_usd": "COST", "usd_per_billion_tokens": "$/B TOK", "overhead_fraction": "OVERHEAD",
    "started": "STARTED",
}  # fmt: skip
_KEEP = {
    "run": 9, "state": 5, "cost_usd": 9, "validation_loss": 8, "test_loss": 8, "train_loss": 4, "billed_hours": 7,
    "training_usd": 5, "overhead_fraction": 6, "tokens_per_second": 6, "mfu": 4, "gpu": 4, "gpus": 3, "tokens": 5,
    "global_batch_size": 4, "test_set": 6, "validation_set": 1, "hellaswag": 6, "judge_score": 7, "training_hours": 3, "usd_per_billion_tokens": 5,
}  # fmt: skip
_DEFAULT = (
    "run", "state", "gpu", "gpus", "tokens", "global_batch_size", "train_loss", "validation_loss", "validation_set",
    "test_loss", "test_set", "hellaswag", "hellaswag_set", "judge_score", "judge_panel", "tokens_per_second", "mfu", "training_hours", "billed_hours", "training_usd", "cost_usd",
    "usd_per_billion_tokens", "overhead_fraction",
)  # fmt: skip


_LEFT = {
    "run",
    "state",
    "gpu",
    "validation_set",
    "test_set",
    "hellaswag_set",
    "judge_panel",
    "name",
    "source",
    "started",
    "provider",
    "instance_type",
}
_NAMED_BELOW = set(compare.SETS.values())
"""In a terminal's table the sets are named in a line under it: they are long, and losses without them mislead."""


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
    if base == "judge_score":
        return number(value, 1)
    if base in {"mfu", "overhead_fraction", "hellaswag"}:
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
        render.note("No runs yet. `llmctl launch SPEC` makes one; `--published` shows what others paid.")
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
    letters = {} if table.grouped else _letters(table)
    columns = [
        Column(
            _SHORT.get(key, key.upper()),
            _marked(table, key, marks, letters),
            right=key not in _LEFT,
            keep=9 if table.columns or (table.grouped and index < 2) else _KEEP.get(key, 2),
            style=render.state_style if key == "state" else None,
        )
        for index, key in enumerate(_keys(table, short=True))
        if table.columns
        or _KEEP.get(key, 2) >= 9
        or not (_blank(table.rows, key) or (key in _NAMED_BELOW and not table.grouped))
    ]
    render.table(columns, table.rows)
    _notes(table, letters)


def _letters(table: Table) -> dict[Any, str]:
    """Set → the letter that stands behind its figures; none where each column has but one set."""
    sets: dict[Any, None] = {}
    mixed = False
    for loss, of in compare.SETS.items():
        mine = dict.fromkeys(row.get(of) for row in table.rows if row.get(loss) is not None)
        mixed = mixed or len(mine) > 1
        if loss != "train_loss" or len(mine) > 1:
            sets |= mine
    names = [
        *string.ascii_lowercase,
        *(one + two for one in string.ascii_lowercase for two in string.ascii_lowercase),
    ]
    return dict(zip(sets, names, strict=False)) if mixed else {}


def _marked(
    table: Table, key: str, marks: dict[int, int], letters: dict[Any, str]
) -> Callable[[dict[str, Any]], str]:
    known: dict[Any, str] = {}
    noted = (
        table.grouped
        or key in {"cost_usd", "billed_hours"}
        or key in table.best
        or (letters and key in compare.SETS)
    )
    room = any(key in table.noise and index in table.best.get(key, ()) for index in range(len(table.rows)))
    fronts = {"cost_usd": table.front, "billed_hours": table.fast}.get(key, frozenset())

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
        if spread := row.get(f"{key}_sd") if table.grouped else None:
            shown += f" ± {cell(key, spread)}"
        if letters and key in compare.SETS and value is not None:
            shown += f" {letters.get(row.get(compare.SETS[key]) or '', '')}"
        if room:
            shown += " ≈" if index in table.best[key] else "  "
        return shown + ((" *" if index in fronts else "  ") if fronts else "")

    return text


def _notes(table: Table, letters: dict[Any, str]) -> None:
    if table.grouped:
        return
    _legend(table, letters)
    totals = table.totals
    if totals.get("runs"):
        render.line()
        render.note(
            f"{totals['runs']} {'run' if totals['runs'] == 1 else 'runs'}: {dollars(totals['cost_usd'])}, of which training {dollars(totals['training_usd'])};"
            f" {hours(totals['billed_hours'])} node-hours billed, {count(totals['tokens'])} tokens"
        )
    for text in _marks(table):
        render.note(text, style="dim")
    for text in _sources(table):
        render.note(text, style="dim")


def _marks(table: Table) -> list[str]:
    """What the marks in the cells mean."""
    said = []
    if table.front or table.fast:
        said.append(
            "* no other run on the same set has both a lower loss and a lower cost (at BILLED H: fewer hours)"
        )
    if any(table.best.get(key) for key in table.noise):
        said.append("≈ within the noise of the best on its set (1.96 sigma of a difference)")
    return said + list(table.noise.values())


def _legend(table: Table, letters: dict[Any, str]) -> None:
    """What the losses and scores were measured on."""
    if letters:
        said = [
            f"not comparable on different sets: {', '.join(f'{mark} {name}' for name, mark in letters.items())}"
        ]
    else:
        named = ((loss, next((row.get(of) for row in table.rows if row.get(loss) is not None), None))
                 for loss, of in compare.SETS.items())  # fmt: skip
        said = [
            ", ".join(f"{_SHORT[loss]} on {name}" for loss, name in named if name and loss != "train_loss")
        ]
    render.line()
    for text in filter(None, said):
        render.note(text, style="dim")


def _sources(table: Table) -> list[str]:
    """Who published what, a line a source."""
    found: dict[str, list[str]] = {}
    for row in table.rows:
        if row.get("published_by"):
            found.setdefault(row["published_by"], []).append(row["name"])
    return [f"source: {source}: {'; '.join(names)}" for source, names in found.items()]


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
    marks = {id(row): index for index, row in enumerate(table.rows)}
    cells = [_marked(table, key, marks, {}) for key in keys]
    sides = (" --- " if key in _LEFT else " ---: " for key in keys)
    lines = ["| " + " | ".join(keys) + " |", "|" + "|".join(sides) + "|"]
    for row in table.rows:
        values = (sane(one(row)).strip().replace("|", "\\|").replace("*", "\\*") for one in cells)
        lines.append("| " + " | ".join(values) + " |")
    said = [*_marks(table), *_sources(table)]
    sys.stdout.write("\n".join([*lines, *(f"\n{text}".replace("*", "\\*") for text in said)]) + "\n")


def _html(table: Table) -> None:
    from html import escape

    keys = _keys(table, short=False)
    marks = {id(row): index for index, row in enumerate(table.rows)}
    cells = [_marked(table, key, marks, {}) for key in keys]
    head = "".join(f"<th>{escape(key)}</th>" for key in keys)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(sane(one(row)).strip())}</td>" for one in cells) + "</tr>"
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
