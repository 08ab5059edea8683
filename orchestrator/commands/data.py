"""`llmctl data`: text to token shards, and whether shards are whole."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Text, parquet and Hugging Face sets to token shards; checksums.", no_args_is_help=True)
    app.add_typer(group, name="data", rich_help_panel="Models")
