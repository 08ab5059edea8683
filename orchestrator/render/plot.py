"""Curves in the terminal: loss over tokens, steps, hours or dollars, and each run's loss against what it cost."""

from __future__ import annotations

import os
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.render import text as render
from runs.curves import curve

if TYPE_CHECKING:
    from orchestrator.actions.comparing import Table
    from runs.store import Store

WIDEST = 160
LETTERS = string.ascii_lowercase + string.ascii_uppercase
"""One curve, one letter: told apart without colours too."""


@dataclass(frozen=True)
class Drawn:
    """One curve, or one point."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    line: bool


def plot(store: Store, table: Table, over: str) -> None:
    """Print the curves of the table's runs, and their losses against dollars, one chart for each set."""
    shown = [row["run"] for row in table.rows if row.get("run")]
    # Each point the mean of its neighbours: a column of the terminal shows no more.
    cells = max(30, min(render.width(), WIDEST) // 2)
    curves = [Drawn(run, *curve(store, run, over, points=cells), line=True) for run in shown]
    curves = [item for item in curves if len(item.xs) > 1]
    if curves:
        chart(curves, f"training loss over {over}")
    against = dollars(table)
    for name, points in against.items():
        chart(points, f"loss on {name} against dollars")
    if not curves and not against:
        render.line("There is no loss to plot yet.")


def dollars(table: Table) -> dict[str, list[Drawn]]:
    """Set → a point for each run that has a loss on it and a cost; sets with one point are left out."""
    found: dict[str, list[Drawn]] = {}
    for row in table.rows:
        for loss, of in (("validation_loss", "validation_set"), ("test_loss", "test_set")):
            if row.get("cost_usd") is not None and row.get(loss) is not None:
                point = Drawn(row["run"] or row["name"], [row["cost_usd"]], [row[loss]], line=False)
                found.setdefault(str(row[of]), []).append(point)
    return {name: points for name, points in found.items() if len(points) > 1}


def chart(items: Sequence[Drawn], title: str) -> None:
    """Print one chart on stdout: coloured in a terminal, plain elsewhere and under NO_COLOR."""
    import plotext

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    figure = plotext.figure
    figure.clear()
    figure.theme("simple" if colour else "colorless")
    figure.plot_size(min(render.width(), WIDEST), 20)
    figure.title(title)
    figure.legend(False)
    for index, item in enumerate(items):
        signal = figure.signal(list(item.xs), list(item.ys), marker=LETTERS[index % len(LETTERS)])
        if item.line:
            signal.lines(True)
        figure.draw(signal)
    text = str(figure.build())
    sys.stdout.write((text if colour else plotext.uncolorize(text)).rstrip("\n") + "\n")
    for index, item in enumerate(items[: len(LETTERS)]):
        sys.stdout.write(f"  {LETTERS[index]} {item.name}\n")
    if len(items) > len(LETTERS):
        sys.stdout.write(f"  and {len(items) - len(LETTERS)} more, whose letters begin again\n")
