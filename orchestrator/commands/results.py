"""What runs cost and what they reached: compare, report."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.common import (
    Form,
    Json,
    Output,
    Runs,
    add,
    answer,
    find_all,
    machine,
    open_store,
)

PANEL = "Results"


class Format(StrEnum):
    """What `compare` prints."""

    TABLE = "table"
    CSV = "csv"
    MD = "md"
    JSON = "json"
    HTML = "html"


class Axis(StrEnum):
    """What loss curves run over."""

    TOKENS = "tokens"
    STEPS = "steps"
    HOURS = "hours"
    DOLLARS = "dollars"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add(
        app,
        PANEL,
        "compare",
        compare,
        "llmctl compare --sort cost_usd",
        "llmctl compare A B --diff",
        "llmctl compare --plot",
    )
    add(app, PANEL, "report", report, "llmctl report --to report.html")


def compare(
    runs: Runs = None,
    *,
    sort: Annotated[
        str | None,
        typer.Option("--sort", metavar="KEY", help="A column, as cost_usd; -KEY: the other way round."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Also published runs, with their sources.")
    ] = False,
    group_by: Annotated[
        str | None,
        typer.Option("--group-by", metavar="KEY", help="One row a value of KEY: means, and spread."),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", metavar="NAME", help="The runs of a sweep, a row a variant: mean and spread."
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="KEY,KEY", help="These columns, in this order.")
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="What differs between two runs.")] = False,
    test_set: Annotated[
        str | None, typer.Option("--test-set", metavar="NAME", help="The set whose test losses are shown.")
    ] = None,
    sigma: Annotated[
        float | None, typer.Option("--sigma", min=0.0, help="Loss differences within 2 sigma are noise.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.TABLE,
    plot: Annotated[
        bool, typer.Option("--plot", help="Loss curves, and loss against dollars, in the terminal.")
    ] = False,
    over: Annotated[Axis, typer.Option("--over", help="What the curves run over.")] = Axis.TOKENS,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Put loss beside cost for every run. Losses on different sets are never ranked together."""
    from orchestrator.actions import comparing
    from orchestrator.render import compare as render_compare

    store = open_store()
    words = [*(runs or []), *([comparing.sweep(store, sweep)] if sweep is not None else [])]
    ask = comparing.Ask(
        find_all(store, words),
        sort,
        published,
        group_by or ("variant" if sweep is not None else None),
        columns.split(",") if columns else None,
        test_set,
        sigma,
    )
    quiet = machine(as_json, output) or form is Format.JSON
    if diff:
        document = comparing.difference(store, ask)
        answer(document, as_json=quiet, human=lambda: render_compare.difference(document))
        return
    table = comparing.table(store, ask, bare=quiet)
    render_compare.say(table, "json" if quiet else form.value)
    if plot and not quiet:
        from orchestrator.render import plot as render_plot

        render_plot.plot(store, table, over.value)


def report(
    runs: Runs = None,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="FILE.html", help="Where to write it.")] = Path(
        "report.html"
    ),
    published: Annotated[
        bool, typer.Option("--published/--no-published", help="Also published runs.")
    ] = True,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Write one self-contained HTML page: table, curves, loss against dollars, dollars by phase, each run in full."""
    from orchestrator.actions import comparing
    from orchestrator.render import compare as render_compare

    store = open_store()
    document = comparing.report(store, find_all(store, runs), to, published=published)
    answer(document, as_json=machine(as_json, output), human=lambda: render_compare.written(document))
