"""`llmctl data`: text to token shards, and whether shards are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.common import Form, Json, Output, answer, examples, machine

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder of shards.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="Text, parquet and Hugging Face sets to token shards; checksums.", no_args_is_help=True
    )
    group.command("prepare", epilog=examples("llmctl data prepare books/*.txt --to ./shards"))(prepare)
    group.command("verify", epilog=examples("llmctl data verify ./shards"))(verify)
    group.command("push", epilog=examples("llmctl data push ./shards --to s3://bucket/fineweb"))(push)
    group.command("list", epilog=examples("llmctl data list ./shards"))(listing)
    app.add_typer(group, name="data", rich_help_panel="Models")


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Text files, folders, globs, parquet files, hf:// names.",
            show_default=False,
        ),
    ],
    *,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the shards go.")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="gpt2, bytes, or a tokenizer.json.")] = "gpt2",
    shard_tokens: Annotated[
        int, typer.Option("--shard-tokens", min=1024, help="Tokens a shard.")
    ] = 100_000_000,
    validation: Annotated[
        float,
        typer.Option("--validation-fraction", min=0.0, max=0.99, help="Share of the documents held out."),
    ] = 0.01,
    column: Annotated[str, typer.Option("--column", help="Text column of parquet files.")] = "text",
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Tokenise text into shards with checksums. A second call on the same sources does nothing."""
    from orchestrator.render import data as shelves

    recipe = shelves.recipe(tokenizer, shard_tokens, validation, column)
    document = shelves.prepare(sources, to, recipe)
    answer(document, as_json=machine(as_json, output), human=lambda: shelves.say_prepared(document))


def verify(
    folder: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A folder of shards, or s3://BUCKET/FOLDER.", show_default=False),
    ],
    *,
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> int:
    """Read every shard of a folder and compare it with its manifest. Exit code 7 where one is not whole."""
    from orchestrator.render import data as shelves

    document = shelves.verify(folder)
    answer(document, as_json=machine(as_json, output), human=lambda: shelves.say_verified(document))
    return 0 if document["ok"] else 7


def push(
    folder: Folder,
    *,
    to: Annotated[str, typer.Option("--to", metavar="S3", help="s3://BUCKET/FOLDER.")],
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Upload a folder of shards to S3, only what has changed. A push that broke goes on where it was."""
    from orchestrator.render import data as shelves

    document = shelves.push(folder, to)
    answer(document, as_json=machine(as_json, output), human=lambda: shelves.say_pushed(document))


def listing(folder: Folder, *, as_json: Json = False, output: Output = Form.TEXT) -> None:
    """List the shards of a folder: tokens, bytes, checksum."""
    from orchestrator.render import data as shelves

    document = shelves.listing(folder)
    answer(document, as_json=machine(as_json, output), human=lambda: shelves.say_listing(document))
