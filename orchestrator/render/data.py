"""The `data` commands' documents: what was prepared, what is whole, what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.data import prepare as data
from orchestrator.figures import count, size
from orchestrator.progress import bar
from orchestrator.render import text as render
from orchestrator.render.text import Column
from runs.store import default_home


def recipe(tokenizer: str, shard_tokens: int, validation_fraction: float, column: str) -> data.Recipe:
    """How shards are made. Raises DataError for what cannot be."""
    made = data.Recipe(tokenizer, shard_tokens, validation_fraction, column)
    made.check()
    return made


def prepare(sources: Sequence[str], to: Path, how: data.Recipe) -> dict[str, Any]:
    """Tokenise, and say what came of it."""
    with bar() as progress:
        made = data.prepare(sources, to, how, cache=default_home() / "cache", progress=progress)
    return {
        "folder": str(made.folder), "tokenizer": made.tokenizer, "vocab_size": made.vocab_size, "documents": made.documents,
        "train_tokens": made.tokens("train"), "validation_tokens": made.tokens("validation"), "unchanged": made.unchanged,
        "shards": [asdict(item) for item in made.shards],
    }  # fmt: skip


def say_prepared(document: dict[str, Any]) -> None:
    """The folder, and what is in it."""
    what = "unchanged" if document["unchanged"] else "written"
    render.line(f"{document['folder']}: {what}; {document['documents']:,} documents, {count(document['train_tokens'])} tokens to train"
                f" on, {count(document['validation_tokens'])} held out, in {len(document['shards'])} shards")  # fmt: skip


def push(folder: Path, to: str) -> dict[str, Any]:
    """Upload what has changed."""
    from orchestrator.data import push as data_push
    from provisioning.objects import S3

    with bar() as progress:
        made = data_push.push(folder, to, S3(), progress)
    return {
        "to": made.to,
        "uploaded": made.uploaded,
        "unchanged": made.unchanged,
        "bytes": made.bytes,
        "globs": made.globs,
    }


def say_pushed(document: dict[str, Any]) -> None:
    """What went, and what to write in a spec."""
    render.line(f"{document['to']}: {len(document['uploaded'])} shards uploaded ({size(document['bytes'])}), "
                f"{len(document['unchanged'])} unchanged; in a spec: {', '.join(document['globs'])}")  # fmt: skip


def verify(folder: str) -> dict[str, Any]:
    """Read every byte."""
    with bar() as progress:
        if folder.startswith("s3://"):
            from orchestrator.data import push as data_push
            from provisioning.objects import S3

            problems = data_push.verify(folder, S3(), progress)
        else:
            problems = data.verify(Path(folder), progress)
    return {"folder": folder, "ok": not problems, "problems": problems}


def say_verified(document: dict[str, Any]) -> None:
    """What is wrong, or that nothing is."""
    for text in document["problems"] or [f"{document['folder']} is whole"]:
        render.line(text)


def listing(folder: Path) -> list[dict[str, Any]]:
    """The shards of a folder."""
    return [asdict(item) for item in data.listing(folder)]


def say_listing(document: list[dict[str, Any]]) -> None:
    """A table of shards."""
    columns = (
        Column("SHARD", lambda item: item["name"], right=False, keep=9),
        Column("PART", lambda item: item["part"], right=False, keep=7),
        Column("TOKENS", lambda item: f"{item['tokens']:,}", keep=9),
        Column("SIZE", lambda item: size(item["bytes"]), keep=8),
        Column("SHA256", lambda item: item["sha256"][:16] or "-", right=False, keep=3),
    )
    render.table(columns, document)
