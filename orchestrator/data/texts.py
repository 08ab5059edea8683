"""Text for `llmctl data prepare`: which files a source means, and the documents in them.

A document is a row of a parquet file's text column, or a text file; a text file that holds <|endoftext|> is divided there, and a
large one without it at blank lines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from orchestrator.data.errors import DataError
from orchestrator.data.find import paths
from orchestrator.data.hashes import Progress
from orchestrator.data.hub import HttpHub, Hub, HubName
from trainer import pull, tokenize

LARGE_TEXT = 1 << 20
"""Characters above which a text file is divided at blank lines …"""
BLOCK_TEXT = 1 << 16
"""… into documents of about so many."""
TEXT_SUFFIXES = frozenset({".txt", ".md", ".text", ".rst", ".py", ""})


def files(source: str, cache: Path, hub: Hub | None, progress: Progress) -> list[Path]:
    """The files of one source: a path, a folder, a glob, or hf://owner/name/file, which is fetched. Raises DataError."""
    if source.startswith("hf://"):
        return _download(source, cache / "downloads", hub or HttpHub(cache / "hub"), progress)
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(
            item for item in path.rglob("*") if item.suffix in {*TEXT_SUFFIXES, ".parquet"} and item.is_file()
        )
        if not found:
            raise DataError(f"{path} holds no text and no parquet files", "Name the files with a glob")
        return found
    named = paths(source)
    if missing := [item for item in named if not item.exists()]:
        raise DataError(f"{missing[0]}: no such file", "Check the path")
    return named


def _download(source: str, folder: Path, hub: Hub, progress: Progress) -> list[Path]:
    """Files of the Hub, kept in the cache by commit. Raises DataError."""
    name = HubName.parse(source)
    at = hub.listing(name)
    wanted = [file for file in sorted(at.files) if file == name.file or fnmatch(file, name.file)]
    if not wanted:
        raise DataError(
            f"{source}: {name.repo} has no such file", f"It has {', '.join(sorted(at.files)[:5])}"
        )
    items = []
    for file in wanted:
        known = at.files[file]
        place = folder / name.repo.replace("/", "--") / at.commit[:12] / file.replace("/", "--")
        items.append(pull.Item(hub.url(name, at.commit, file), place, known.bytes, known.sha256))
        if token := os.environ.get("HF_TOKEN"):
            items[-1].headers["Authorization"] = f"Bearer {token}"
    problems: list[str] = []

    def told(**line: Any) -> None:
        if "error" in line:
            problems.append(line["error"])
        elif line["kind"] == "progress":
            progress("downloading", line["fetched_bytes"], line["total_bytes"] or 0)

    if pull.Pull(items, pull.WORKERS, pull.CHUNK_BYTES, 30, told).run() != 0:
        raise DataError(problems[0], "Call it again: what has arrived is kept")
    return [item.path for item in items]


def documents(named: Sequence[Path], column: str) -> Iterator[tuple[str, float]]:
    """(text, bytes of the source that it stands for) of every document. Raises DataError."""
    for path in named:
        if path.suffix == ".parquet":
            yield from _rows(path, column)
        else:
            text = path.read_text(encoding="utf-8", errors="replace")
            yield from ((document, len(document)) for document in divide(text))


def divide(text: str) -> Iterator[str]:
    """The documents of a text file."""
    if tokenize.END_OF_TEXT in text:
        yield from (part.strip("\n") for part in text.split(tokenize.END_OF_TEXT) if part.strip())
    elif len(text) <= LARGE_TEXT:
        if text.strip():
            yield text
    else:
        start = 0
        while start < len(text):
            cut = text.find("\n\n", start + BLOCK_TEXT)
            end = len(text) if cut < 0 else cut + 2
            yield text[start:end]
            start = end


def _rows(path: Path, column: str) -> Iterator[tuple[str, float]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow", "pip install 'llmctl[data]'") from error
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            raise DataError(
                f"{path} has no column {column!r}", f"It has {', '.join(names)}; name one with --column"
            )
        weight = path.stat().st_size / max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            yield from ((str(text), weight) for text in batch.column(0).to_pylist() if text)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is no parquet file: {error}", "Copy it again") from error
