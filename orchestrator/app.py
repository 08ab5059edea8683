"""The Typer application: every command in its panel. Built only when an argument parser is needed."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from orchestrator import exits
from orchestrator.commands import data, finish, models, results, start, watch

app = typer.Typer(
    name="llmctl",
    help="Pretrain GPT-style models on rented GPU nodes: one command, one honest bill.",
    epilog=exits.epilog(),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (start, watch, finish, results, models, data):
    module.register(app)


def _version(context: typer.Context, value: bool) -> None:
    if value and not context.resilient_parsing:  # as when a shell completes the line
        from importlib.metadata import version

        sys.stdout.write(f"llmctl {version('llmctl')}\n")
        raise typer.Exit


@app.callback()
def root(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where a command fails.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Pretrain GPT-style models on rented GPU nodes: one command, one honest bill."""
    del version
    if debug:
        os.environ["LLMCTL_DEBUG"] = "1"
