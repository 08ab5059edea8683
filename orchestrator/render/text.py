"""Tables and lines for people. Everything that imports rich is here and in the modules named `render_…`."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
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

_ANSI = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "magenta": "35", "cyan": "36"}


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
    """Print a table on stdout, without the columns for which there is no room. Ten thousand rows are no matter."""
    room = space or width()
    cells = [[sane(column.cell(row)).replace("\n", " ") for column in columns] for row in rows]
    if room < NARROW:
        cells = [[_short(text, room * 2 // 5) for text in line] for line in cells]
    shown = fitting(columns, cells, room)
    widths = [max(len(columns[index].title), *(len(line[index]) for line in cells), 0) for index in shown]
    paint = coloured()
    made = []  # column by column: what is the same for all rows is looked up once
    for index, wide in zip(shown, widths, strict=True):
        column = columns[index]
        texts = [_padded(line[index], wide, column.right) for line in cells]
        if paint and column.style:
            texts = [_styled(text, column.style(row)) for row, text in zip(rows, texts, strict=True)]
        made.append([_styled(_padded(column.title, wide, column.right), "bold" if paint else ""), *texts])
    lines = ["  ".join(parts).rstrip() for parts in zip(*made, strict=True)]
    sys.stdout.write("\n".join(lines) + "\n")


def coloured() -> bool:
    """Whether stdout is a terminal that wants colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _padded(text: str, wide: int, right: bool) -> str:
    return text.rjust(wide) if right else text.ljust(wide)


def _styled(text: str, style: str) -> str:
    return f"\x1b[{_ANSI[style]}m{text}\x1b[0m" if style in _ANSI else text


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


def note(text: str, *, style: str = "", indent: int = 2) -> None:
    """A sentence on stdout: in a terminal wrapped between words, elsewhere one line."""
    line(wrapped(text, indent) if sys.stdout.isatty() else text, style=style)


def fact(name: str, text: str) -> None:
    """A name and what is to be said of it, wrapped like a note and indented behind the name."""
    note(f"{name:<12}{text}", indent=12)


def wrapped(text: str, indent: int) -> str:
    """`text` in lines that fit the terminal, all but the first indented; words that are longer than a line stay whole."""
    return "\n".join(
        textwrap.wrap(
            sane(text),
            max(20, width() - 1),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
