"""What people read: figures, columns that fit, bars, and nothing that a node could make a terminal do."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import figures, footer
from orchestrator.actions import show
from orchestrator.figures import dollars, duration, on_stderr, sane, spark
from orchestrator.render import live as render_live
from orchestrator.render import show as render_show
from orchestrator.render import watch as render_watch
from orchestrator.render.compare import cell
from orchestrator.render.text import Column, fitting
from tests.seeds import Seed, at


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "$0.00"),
        (0.0123, "$0.0123"),
        (1.5, "$1.50"),
        (12345.678, "$12,345.68"),
        (1e-7, "<$0.0001"),
    ],
)
def test_dollars(value: float | None, text: str) -> None:
    assert dollars(value) == text


def test_parts_of_a_sum_have_its_decimals_and_are_not_zero() -> None:
    assert [dollars(value, 10.11) for value in (9.5, 0.056, 0.001, 0.0)] == [
        "$9.50",
        "$0.06",
        "<$0.01",
        "$0.00",
    ]
    assert dollars(0.2, 0.05) == "$0.2000"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (3.21, "3.2s"),
        (59, "59s"),
        (200, "3m20s"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
        (math.inf, "-"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_counts_and_sizes() -> None:
    assert [figures.count(value) for value in (None, 950, 12_345, 163_009_536, 3.26e9)] == [
        "-",
        "950",
        "12.3K",
        "163M",
        "3.26B",
    ]
    assert figures.size(1_234_567_890) == "1.23 GB"


def test_what_a_node_prints_cannot_drive_the_terminal() -> None:
    evil = "\x1b[2J\x1b]0;title\x07loss\x1b[31m 2.5\x1b[0m\r\x08\x9b1m\x1b]8;;http://x\x1b\\go\x1b(B\ttab\n"
    clean = sane(evil)
    assert "\x1b" not in clean and "\r" not in clean and "\x9b" not in clean and "\x08" not in clean
    assert "loss 2.5" in clean and "go" in clean and "\ttab\n" in clean


def test_what_is_unknown_is_never_zero() -> None:
    assert [cell(key, None) for key in ("validation_loss", "cost_usd", "mfu", "tokens")] == ["-"] * 4
    assert cell("cost_usd", 0.0) == "$0.00"


def test_a_sparkline_falls_with_the_loss_and_survives_nan() -> None:
    line = spark([5.0, 4.0, 3.0, math.nan, 1.0], 5)
    assert line[0] == "█" and line[-1] == "▁" and line[3] == " "
    assert spark([], 10) == "" and spark([math.nan], 10) == "" and spark([2.0, 2.0], 2) == "▁▁"


def test_columns_that_do_not_fit_go_in_the_order_of_their_worth() -> None:
    columns = [Column("A", str, keep=9), Column("B", str, keep=2), Column("C", str, keep=5)]
    cells = [["aaaa", "bbbb", "cccc"]]
    assert fitting(columns, cells, 80) == [0, 1, 2]
    assert fitting(columns, cells, 12) == [0, 2]
    assert fitting(columns, cells, 5) == [0]


def test_columns_that_are_empty_everywhere_are_left_out() -> None:
    columns = [Column("A", str, keep=9), Column("B", str), Column("C", str)]
    assert fitting(columns, [["x", "-", "1"], ["y", "", "2"]], 80) == [0, 2]


def test_the_waterfall_shows_each_span_where_it_was() -> None:
    assert render_show.waterfall([(0, 50)], 0, 100, 10) == "█████     "
    assert render_show.waterfall([(50, 100)], 0, 100, 10) == "     █████"
    assert render_show.waterfall([(99.99, 100)], 0, 100, 10) == "         █"
    assert render_show.waterfall([(0, 0)], 0, 0, 4) == "█   "


def test_the_bars_of_a_run_add_up_to_its_bill_and_show_the_lanes(tmp_path: Path) -> None:
    rows = render_show.bars(Seed(tmp_path).finished().record, at(10_000))
    assert sum(row.micro_usd or 0 for row in rows) == 2_520_000
    labels = [row.label for row in rows]
    assert labels[:2] == ["booting", "preparing"] and "  data" in labels
    lane = next(row for row in rows if row.label == "  data")
    assert lane.seconds == pytest.approx(18)


GPU = {"gpu_utilisation": 0.972, "gpu_memory_gib": 61.24, "gpu_celsius": 71.0, "gpu_watts": 640.2}


@pytest.mark.parametrize("columns", [20, 60, 200])
def test_a_status_line_fits_and_keeps_what_matters(tmp_path: Path, columns: int) -> None:
    row = Seed(tmp_path).rented().trained(step=40, **GPU).store.summary("demo-0001")
    assert row is not None
    text = render_live.fit(render_live.status_line(row, None), columns)
    assert len(text) <= columns
    assert text.startswith("step 40/100")
    assert ("loss 2.5000 | $" in text) is (columns > 20)
    assert ("demo-0001" in text) is ("GPU 97% | 61.2 GiB | 71 °C | 640 W" in text) is (columns == 200)


@pytest.mark.parametrize("columns", [60, 200])
def test_a_watched_run_fits(tmp_path: Path, columns: int) -> None:
    seed = Seed(tmp_path).rented().trained(step=40, **GPU).logged()
    (row,) = show.status(seed.store)
    block = render_watch.block(seed.store, row, columns)
    assert max(len(line) for line in block.splitlines()) <= columns
    assert "40/100" in block and "loss █" in block
    assert ("GPU 97%  61.2 GiB  71 °C  640 W" in block) is (columns == 200)
    assert "GPU 97%" in render_show.results(seed.record) and "GPU" not in "".join(
        render_show.results(seed.trained(gpu_utilisation=None).record)
    )


def test_every_event_can_be_told(tmp_path: Path) -> None:
    for _, _, body in Seed(tmp_path).finished().store.history("demo-0001"):
        assert render_live.describe(body)


def test_what_is_to_be_done_is_never_cut_off(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alarms under a watched run, and under every command, are wrapped between words in a narrow terminal."""
    from rich.console import Console

    seed = Seed(tmp_path).rented().trained(step=40)
    console = Console(width=60, file=io.StringIO(), force_terminal=False)
    console.print(render_watch.panel(seed.store, show.status(seed.store)))
    assert "`llmctl resume demo-0001` starts one" in " ".join(console.file.getvalue().split())
    monkeypatch.setenv("LLMCTL_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    footer.show()
    told = capsys.readouterr().err
    assert max(map(len, told.splitlines())) < 60 and "`llmctl resume demo-0001` starts one" in " ".join(
        told.split()
    )
    error = on_stderr("error: " + "what happened and why " * 5 + "\n  try: " + "what to type next " * 5)
    assert (
        max(map(len, error.splitlines())) < 60
        and error.split("try: ")[1].split() == ["what", "to", "type", "next"] * 5
    )
