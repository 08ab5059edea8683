"""Tables and lines for people. Everything that imports rich is here and in the modules named `render_…`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.figures import sane

if TYPE_CHECKING:
    from rich.console import Console

PIPED_COLUMNS = 200
"""Width of tables that go into a file or a pipe, unless COLUMNS says otherwise."""
NARROW = 100
"""Under so many columns long cells are cut, so that more of them fit."""
STATE_STYLES = {
    "succeeded": "green", "failed": "red", "lost": "red", "stopped": "yellow", "training": "cyan",
    "waiting": "magenta", "planned": "magenta",
}  # fmt: skip


def width(stream: TextIO | None = None) -> int:
    """Columns of the terminal; a wide page where there is none."""
    stream = stream or sys.stdout
    return shutil.get_terminal_size((80 if stream.isatty() else PIPED_COLUMNS, 24)).columns


def console(*, err: bool = False) -> Console:
    """A rich console on stdout or stderr; it honours NO_COLOR and leaves pipes plain."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    return Console(file=stream, width=width(stream), highlight=False, markup=False, emoji=False)


@dataclass(frozen=True)
class Column:
    """One column of a table: how a row becomes its cell, and how early it is left out where the space is short."""

    title: str
    cell: Callable[[Any], str]
    right: bool = True
    keep: int = 5
    """Columns with the lowest go first."""
    style: Callable[[Any], str] | None = None


def table(columns: Sequence[Column], rows: Sequence[Any], *, space: int | None = None) -> None:
    """Print a table on stdout, without the columns for which there is no room."""
    from rich.table import Table
    from rich.text import Text

    room = space or width()
    cells = [[sane(column.cell(row)).replace("\n", " ") for column in columns] for row in rows]
    if room < NARROW:
        cells = [[_short(text, room * 2 // 5) for text in line] for line in cells]
    shown = fitting(columns, cells, room)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for index in shown:
        column = columns[index]
        grid.add_column(
            column.title, justify="right" if column.right else "left", no_wrap=True, overflow="ellipsis",
            header_style="bold",
        )  # fmt: skip
    for row, line in zip(rows, cells, strict=True):
        grid.add_row(
            *(
                Text(line[index], style=style(row) if (style := columns[index].style) else "")
                for index in shown
            )
        )
    console().print(grid)


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def fitting(columns: Sequence[Column], cells: Sequence[Sequence[str]], room: int) -> list[int]:
    """Which columns are shown in `room` characters: those that are empty in every row never, the least wanted go first."""
    widths = [
        max(len(column.title), *(len(line[index]) for line in cells)) if cells else len(column.title)
        for index, column in enumerate(columns)
    ]
    shown = [
        index for index, column in enumerate(columns)
        if column.keep >= 9 or not cells or any(line[index] not in {"", "-"} for line in cells)
    ]  # fmt: skip
    while len(shown) > 1 and sum(widths[index] + 2 for index in shown) - 2 > room:
        # Of equals the rightmost goes.
        least = min(shown, key=lambda index: (columns[index].keep, -index))
        if columns[least].keep >= 9:
            break
        shown.remove(least)
    return shown


def state_style(row: dict[str, Any]) -> str:
    """The colour of a row's state."""
    return STATE_STYLES.get(row.get("state") or "", "")


def heading(text: str) -> None:
    """A section's title on stdout."""
    console().print(text, style="bold")


def line(text: str = "", *, style: str = "") -> None:
    """A line on stdout; longer ones are wrapped by the terminal alone."""
    console().print(sane(text), style=style, soft_wrap=True)
