"""Figures and sentences as people read them: dollars, durations, counts, rates. Text only; `-` stands for what is not known."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

NONE = "-"
_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC: titles, links, clipboard
    r"|\x1b[PX^_][^\x1b\x9c]*(?:\x1b\\|\x9c)?"  # DCS, SOS, PM, APC: strings for the terminal
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor, modes
    r"|\x1b[ -/]*[0-~]?"  # all other escapes
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def red(text: str, stream: TextIO) -> str:
    """`text` in bold red where `stream` is a terminal that wants colours."""
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[1;31m{text}\x1b[0m"


def dollars(value: float | None, of: float | None = None) -> str:
    """`$1,234.56`; four decimals under ten cents, so that a local run's bill is not zero. A part of a sum, `of`, has as
    many as the sum. What is not zero is never shown as zero."""
    if value is None:
        return NONE
    digits = 4 if 0 < abs(value if of is None else of) < 0.1 else 2
    least = 10.0**-digits
    return f"<${least:.{digits}f}" if 0 < value < least / 2 else f"${value:,.{digits}f}"


def duration(seconds: float | None) -> str:
    """`45s`, `3m20s`, `2h05m`, `3d04h`."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 10:
        return f"{max(0.0, seconds):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def hours(value: float | None) -> str:
    """Hours with as many decimals as they need."""
    if value is None:
        return NONE
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def count(value: float | None) -> str:
    """`950`, `12.3K`, `163M`, `3.26B`."""
    if value is None:
        return NONE
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """Bytes in decimal units: `1.2 GB`."""
    if value is None:
        return NONE
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def number(value: float | None, digits: int = 4) -> str:
    """A loss, or any other plain number. What is not finite is shown as what it is."""
    return NONE if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """`43.2%`."""
    return NONE if value is None else f"{value:.1%}"


def gpu_figures(facts: Mapping[str, Any]) -> list[str]:
    """What the GPUs do, the most wanted first: `GPU 97%`, `61.2 GiB`, `71 °C`, `640 W`. Without nvidia-smi's word on the
    memory, the trainer's own peak. What is not known is left out."""
    said = [f"GPU {facts['gpu_utilisation']:.0%}"] if facts.get("gpu_utilisation") is not None else []
    memory = facts.get("gpu_memory_gib")
    memory = facts.get("memory_gib") if memory is None else memory
    said += [f"{memory:.1f} GiB"] if memory else []
    return said + [
        f"{facts[name]:.0f} {unit}"
        for name, unit in (("gpu_celsius", "°C"), ("gpu_watts", "W"))
        if facts.get(name) is not None
    ]


def sane(text: str) -> str:
    """`text` without anything that a terminal would obey, since what a node prints must not drive this one: escape sequences,
    control characters but tab and line feed, and marks that reorder text. A carriage return becomes a line feed, so that
    progress bars stay readable."""
    if text.isprintable():
        return text
    text = _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROLS.sub("", text)


def spark(values: list[float], width: int) -> str:
    """A curve in one line of block characters; the mean of the values that fall into a cell. What is not finite is a gap."""
    if not values or width < 1:
        return ""
    cells = []
    for index in range(min(width, len(values))):
        low = index * len(values) // min(width, len(values))
        high = max(low + 1, (index + 1) * len(values) // min(width, len(values)))
        part = [value for value in values[low:high] if math.isfinite(value)]
        cells.append(sum(part) / len(part) if part else math.nan)
    known = [value for value in cells if math.isfinite(value)]
    if not known:
        return ""
    low_value, span = min(known), max(known) - min(known)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(
        blocks[min(7, int((value - low_value) / span * 8)) if span else 0] if math.isfinite(value) else " "
        for value in cells
    )


def on_stderr(text: str) -> str:
    """`text` for stderr: in a terminal each line is wrapped between words, so that a command in it can be read and copied."""
    if not sys.stderr.isatty():
        return text
    import functools
    import shutil
    import textwrap

    room = max(20, shutil.get_terminal_size().columns - 1)
    fill = functools.partial(textwrap.fill, width=room, break_long_words=False, break_on_hyphens=False)
    return "\n".join(
        fill(line, subsequent_indent=" " * 7 if line.startswith("  try:") else "  ")
        for line in text.split("\n")
    )
