"""Corpora that llmctl makes itself: `builtin:NAME`.

`python-stdlib` is the source text of the running Python's standard library, tests included: tens of megabytes of real
text that are on every machine. A document is a file; one in twenty, by the SHA-256 of its path, is held out. The others are cut at
line ends into passages of about half a kilobyte, which come in the order of a hash: a step of a small model reads a few
kilobytes, and from whole files in a row it would see one subject at a time. The order is the same everywhere. Tokens are
bytes, a zero byte before each passage.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.errors import DataError
from orchestrator.data.hashes import Progress, quiet
from trainer import shards

SHARD_TOKENS = 1 << 21
HELD_OUT = 20
"""One document in so many is held out."""
PASSAGE_BYTES = 512
_SKIPPED = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """The shards of a built-in corpus."""

    train: list[Path]
    validation: list[Path]


def prepare(name: str, tokenizer: str, cache: Path, progress: Progress = quiet) -> Corpus:
    """The corpus as llm.c shards under `cache`, made now unless the same text was tokenised before. Raises DataError."""
    if name != "python-stdlib":
        raise DataError(f"there is no built-in corpus {name!r}", "Write builtin:python-stdlib")
    if tokenizer != "bytes":
        raise DataError(f"builtin:{name} is tokens of bytes, and data.tokenizer is {tokenizer}",
                        "Write tokenizer: bytes and model.vocab_size: 256; for other tokenizers, `llmctl data prepare` text of your own")  # fmt: skip
    documents, digest = library()
    if not documents:
        raise DataError(
            "this Python has no standard library source", "Give text of your own to `llmctl data prepare`"
        )
    folder = cache / "builtin" / f"{name}-{PASSAGE_BYTES}-{digest[:16]}"
    if not _whole(folder):
        with _alone(folder):
            if not _whole(folder):  # who held the lock before may have made it
                _write(folder, documents, progress)
    return Corpus(sorted(folder.glob("train_*.bin")), sorted(folder.glob("validation_*.bin")))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One llmctl at a time makes `folder`: a second one would take away under the first one's hands what that has just begun to
    use. Raises DataError where the place cannot be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock").open("w", encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder}: {error.strerror or error}", "Free some space, or set LLMCTL_HOME elsewhere")


@functools.cache
def library() -> tuple[list[tuple[str, Path]], str]:
    """This Python's library, and the SHA-256 of all of it: read once a process, which asks for it twice to plan and to launch."""
    documents = stdlib(Path(sysconfig.get_paths()["stdlib"]))
    digest = hashlib.sha256()
    for key, path in documents:
        digest.update(key.encode() + hashlib.sha256(path.read_bytes()).digest())
    return documents, digest.hexdigest()


def stdlib(root: Path) -> list[tuple[str, Path]]:
    """(hash of the relative path, path) of every Python file under `root`, packages of others excepted, by hash."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        parts = Path(folder).relative_to(root).parts
        for name in files:
            path = Path(folder, name)
            if name.endswith(".py") and path.is_file():
                found.append((hashlib.sha256("/".join((*parts, name)).encode()).hexdigest(), path))
    return sorted(found)


def held_out(key: str) -> bool:
    """Whether the document with this hash is kept for validation."""
    return int(key, 16) % HELD_OUT == 0


def _write(folder: Path, documents: list[tuple[str, Path]], progress: Progress) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        counts = {}
        for part, wanted in (("validation", True), ("train", False)):
            chosen = [(key, path) for key, path in documents if held_out(key) is wanted]
            for index, block in enumerate(_blocks(chosen, part, progress)):
                info = shards.write_bin(temporary / f"{part}_{index:06d}.bin", widen(block))
                counts[info.path.name] = info.tokens
        (temporary / "shards.json").write_text(json.dumps(counts), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _blocks(documents: list[tuple[str, Path]], part: str, progress: Progress) -> Iterator[bytes]:
    """The shards' bytes."""
    texts = [(key, path.read_bytes()) for key, path in documents]
    order = sorted((hashlib.sha256(f"{key} {start}".encode()).digest(), index, start, end)
                   for index, (key, text) in enumerate(texts) for start, end in passages(text))  # fmt: skip
    block = bytearray()
    for done, (_, index, start, end) in enumerate(order):
        block += b"\0" + texts[index][1][start:end]
        while len(block) >= SHARD_TOKENS:
            yield bytes(block[:SHARD_TOKENS])
            del block[:SHARD_TOKENS]
            progress(f"tokenising {part}", done + 1, len(order))
    if block:
        yield bytes(block)


def passages(text: bytes) -> Iterator[tuple[int, int]]:
    """[start, end) of each passage: at least PASSAGE_BYTES, to the end of a line."""
    start = 0
    while start < len(text):
        end = text.find(b"\n", start + PASSAGE_BYTES) + 1 or len(text)
        yield start, end
        start = end


def widen(block: bytes) -> bytes:
    """Bytes as the little-endian uint16 tokens that a shard holds."""
    wide = bytearray(2 * len(block))
    wide[::2] = block
    return bytes(wide)


def _whole(folder: Path) -> bool:
    try:
        counts = json.loads((folder / "shards.json").read_text(encoding="utf-8"))
        return bool(counts) and all(
            shards.probe(folder / name).tokens == count for name, count in counts.items()
        )
    except (OSError, ValueError, shards.ShardError):
        return False
