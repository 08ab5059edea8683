"""Which part of a file of tokens a run needs, and how that part becomes a file of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.errors import DataError
from orchestrator.data.find import Found
from orchestrator.data.hashes import HashCache, Progress
from trainer import shards, tokenize
from trainer.config import TestSet

PIECE_TOKENS = 100_000_000
SMALL_BYTES = 32 << 20
"""A file of this size is not worth cutting."""
ENOUGH = 0.8
"""Nor one of which this share is used."""
_WIDTH = {"uint16": 2, "uint32": 4}


@dataclass(frozen=True)
class Shard:
    """One file as the node will have it: here already (`path`), or to be fetched by the node (`url`)."""

    source: str
    """As the spec names it."""
    kind: str
    """local | url"""
    path: Path | None
    url: str | None
    """https://… or s3://bucket/key, which is signed when it is used."""
    revision: str | None
    sha256: str | None
    """None where only the node will know."""
    bytes: int | None
    tokens: int | None
    node_name: str
    """Its name under ~/llmctl/data: the same content has the same name."""
    span: tuple[int, int] | None = None
    """Bytes of the URL that are taken; None: all of it."""
    dtype: str = "uint16"


def slice_name(name: str, digests: Iterable[str], offset: int, tokens: int) -> str:
    """The name under which a loss is kept: `NAME-HASH@OFFSET+TOKENS`, HASH over the SHA-256 of the files in their order."""
    content = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests))
    return f"{name}-{content.hexdigest()[:12]}@{offset}+{tokens}"


@dataclass(frozen=True)
class TestSetPlan:
    """A test set and the files that hold it; `test_set.offset` counts in those files."""

    __test__ = False

    test_set: TestSet
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Cutter:
    """Turns files into shards of what is needed of them."""

    cache: Path
    hashes: HashCache
    context: int
    vocab_size: int | None
    progress: Progress

    def share(
        self, files: Sequence[Found], sequences: int, what: str
    ) -> tuple[tuple[Shard, ...], int | None]:
        """The shards of the first `sequences` sequences, and how many tokens all whole sequences have. Raises DataError."""
        for file in files:
            self._check_vocabulary(file)
        counts = [None if file.tokens is None else max(0, file.tokens - 1) // self.context for file in files]
        known = [count for count in counts if count is not None]
        if files and len(known) == len(files) and not sum(known):
            longest = max(file.tokens or 0 for file in files)
            raise DataError(f"{what}: no shard holds a sequence of {self.context} tokens and one more; the longest has {longest}",
                            "Lower model.context_length, or give longer shards")  # fmt: skip
        made: list[Shard] = []
        left = sequences
        for file, count in zip(files, counts, strict=True):
            if left <= 0:
                break
            if count is None:
                made.append(self._whole(file))
                continue
            use = min(count, left)
            left -= use
            if use:
                made += self._take(file, 0, use * self.context + 1)[0]
        return tuple(made), sum(known) * self.context if len(known) == len(files) else None

    def slice(self, test_set: TestSet, files: Sequence[Found], tokenizer: str) -> TestSetPlan:
        """The shards of a test set. Raises DataError."""
        needed = (
            -(-test_set.tokens // self.context) * self.context + 1
        )  # whole sequences, as trainer/evaluate.py reads them
        held = None if any(file.tokens is None for file in files) else sum(file.tokens or 0 for file in files)
        if held is not None and held < test_set.offset + needed:
            raise DataError(f"evaluate.test_sets: {test_set.name} takes {needed} tokens from token {test_set.offset} on, its data has {held}",
                            "Lower its offset or its tokens")  # fmt: skip
        for file in files:
            self._check_vocabulary(file)
        size = test_set.bytes if test_set.bytes is not None else _text_bytes(test_set, files, tokenizer)
        if len(files) == 1 and held is not None:
            made, offset = self._take(files[0], test_set.offset, needed)
        else:
            made, offset, left = [], test_set.offset, test_set.offset + needed
            for file in files:
                if left > 0:
                    made.append(self._whole(file))
                    left -= file.tokens or 0
        names = [file.source for file in files]
        return TestSetPlan(dataclasses.replace(test_set, data=names, offset=offset, bytes=size), tuple(made))

    def named(self, test_set: TestSet, files: Sequence[Found]) -> str:
        """The name of a test set that is not a built-in one. Raises DataError."""
        digests = [self._digest(file) for file in files]
        return slice_name(test_set.name, digests, test_set.offset, test_set.tokens)

    def _digest(self, file: Found) -> str:
        if file.path is not None:
            return self.hashes.sha256(file.path, self.progress)
        return file.sha256 or hashlib.sha256(f"{file.url} {file.revision}".encode()).hexdigest()

    def _take(self, file: Found, first: int, count: int) -> tuple[list[Shard], int]:
        """Shards of tokens [first, first + count) of a file, or the whole file where that is as good; and where in them the
        first token is."""
        assert file.tokens is not None
        whole = count >= ENOUGH * file.tokens or (file.bytes or 0) <= SMALL_BYTES
        if whole and (file.path is not None or file.tokens <= 1.5 * PIECE_TOKENS):
            return [self._whole(file)], first
        step = max(1, PIECE_TOKENS // self.context) * self.context
        starts = range(first, first + count - 1, step)
        return [self._piece(file, start, min(step + 1, first + count - start)) for start in starts], 0

    def _whole(self, file: Found) -> Shard:
        digest = file.sha256 if file.path is None else self.hashes.sha256(file.path, self.progress)
        kind = "url" if file.path is None else "local"
        return Shard(file.source, kind, file.path, file.url, file.revision, digest, file.bytes, file.tokens,
                     _node_name(file, None, digest), None, file.dtype)  # fmt: skip

    def _piece(self, file: Found, first: int, count: int) -> Shard:
        width = _WIDTH[file.dtype]
        span = (file.offset + first * width, file.offset + (first + count) * width)
        size = shards.HEADER_BYTES + count * width
        if file.path is None:
            name = _node_name(file, span, None)
            return Shard(
                file.source, "url", None, file.url, file.revision, None, size, count, name, span, file.dtype
            )
        path = _cut(file.path, span, header(count, file.dtype), self.cache / "cut")
        digest = self.hashes.sha256(path, self.progress)
        name = _node_name(file, span, digest)
        return Shard(file.source, "local", path, None, None, digest, size, count, name, None, file.dtype)

    def _check_vocabulary(self, file: Found) -> None:
        if self.vocab_size is not None and file.max_id is not None and file.max_id >= self.vocab_size:
            usual = next((size for size in (256, 50257, 1 << 16) if file.max_id < size), file.max_id + 1)
            raise DataError(f"{file.path or file.url} holds token {file.max_id}, and model.vocab_size is {self.vocab_size}",
                            f"Write model.vocab_size: {usual}, or give data of another tokenizer")  # fmt: skip


def header(tokens: int, dtype: str) -> bytes:
    """The llm.c header of a shard with so many tokens."""
    magic = shards.MAGIC_UINT16 if dtype == "uint16" else shards.MAGIC_UINT32
    return struct.pack("<iii", *magic, tokens).ljust(shards.HEADER_BYTES, b"\0")


def _node_name(file: Found, span: tuple[int, int] | None, digest: str | None) -> str:
    digest = digest or hashlib.sha256(f"{file.url} {file.revision} {span}".encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]", "_", file.name)
    return f"{digest[:16]}-{name if span is None else f'{Path(name).stem}.{span[0]}.bin'}"


def _cut(source: Path, span: tuple[int, int], head: bytes, folder: Path) -> Path:
    """A part of a local file, as a file in the cache. Raises DataError."""
    try:
        info = source.stat()
        key = hashlib.sha256(
            f"{source} {info.st_size} {info.st_mtime_ns} {info.st_ino}".encode()
        ).hexdigest()[:16]
        path = folder / f"{key}-{span[0]}-{span[1]}.bin"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            with source.open("rb") as file, temporary.open("wb") as target:
                target.write(head)
                file.seek(span[0])
                left = span[1] - span[0]
                while left and (block := file.read(min(left, 4 << 20))):
                    target.write(block)
                    left -= len(block)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{source}: {error.strerror or error}", "Free some space, or set LLMCTL_HOME elsewhere"
        ) from error
    return path


def _text_bytes(test_set: TestSet, files: Sequence[Found], tokenizer: str) -> int | None:
    """UTF-8 bytes of what a test set predicts; None where its files or its tokenizer are not here."""
    if any(file.path is None for file in files):
        return None
    try:
        return tokenize.text_bytes(tokenizer, _tokens(files, test_set.offset + 1, test_set.tokens))
    except tokenize.TokenizerError:
        return None


def _tokens(files: Sequence[Found], first: int, count: int) -> Iterator[int]:
    """Tokens [first, first + count) of local files laid end to end."""
    for file in files:
        held, width = file.tokens or 0, _WIDTH[file.dtype]
        use = max(0, min(count, held - first))
        count -= use
        if use and file.path is not None:
            with file.path.open("rb") as source:
                source.seek(file.offset + first * width)
                while use:
                    block = source.read(min(use, 1 << 16) * width)
                    use -= len(block) // width
                    yield from memoryview(block).cast("H" if width == 2 else "I")
        first = max(0, first - held)
