"""The rows of `compare` as csv, markdown and JSON; in a terminal they are drawn by the orchestrator."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from runs.compare import COLUMNS, LOSSES, Row

SHORT = ("name", "gpu", "gpus", "tokens", "global_batch_size", "validation_loss", "test_loss", "test_set",
         "tokens_per_second", "mfu", "billed_hours", "cost_usd", "usd_per_billion_tokens", "overhead_fraction")  # fmt: skip
"""The columns of a table that is to be read by a person."""
_DOLLARS = {"training_usd", "cost_usd", "usd_per_billion_tokens"}
_SHARES = {"mfu", "overhead_fraction"}
_HOURS = {"training_hours", "billed_hours"}
_COUNTS = {"parameters", "tokens", "tokens_per_second"}


def cell(column: str, value: Any) -> str:
    """A value for people: `$47.35`, `3.6740`, `3.26B`, `9.8%`; empty where nothing is known."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    base = column.removesuffix("_sd")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if base in _DOLLARS:
        return f"${value:,.2f}" if value >= 0.1 or value == 0 else f"${value:.4f}"
    if base in LOSSES:
        return f"{value:.4f}"
    if base in _SHARES:
        return f"{value:.1%}"
    if base in _HOURS:
        return f"{value:.2f}" if value >= 0.1 else f"{value * 60:.1f} min"
    if base in _COUNTS:
        return count(value)
    return f"{value:g}"


def count(value: float) -> str:
    """`3.26B`, `163M`, `254k`, `812`: three digits."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def to_json(rows: Sequence[Row]) -> str:
    """A JSON list with exactly the public keys."""
    return json.dumps([{key: row.get(key) for key in COLUMNS} for row in rows], indent=2, allow_nan=False)


def to_csv(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """RFC 4180, plain numbers, a header; what is unknown is empty."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    writer.writerows(["" if row.get(key) is None else row[key] for key in columns] for row in rows)
    return out.getvalue()


def to_markdown(rows: Sequence[Row], columns: Sequence[str] = SHORT) -> str:
    """A GitHub table, numbers to the right."""
    body = [
        [cell(key, row.get(key)).replace("|", "\\|").replace("\n", " ") for key in columns] for row in rows
    ]
    numeric = [any(isinstance(row.get(key), (int, float)) for row in rows) for key in columns]
    rule = ["---:" if right else "---" for right in numeric]
    return "".join(f"| {' | '.join(line)} |\n" for line in [list(columns), rule, *body])
