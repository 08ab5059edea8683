"""The work behind `llmctl data`: text to token shards with a manifest, and whether shards are what they were.

The shards, `train_*.bin` and `validation_*.bin` in llm.c's format, come into being in a hidden folder
beside their place and appear there by rename, with `shards.json`: how they were made, and each one's tokens and SHA-256. A
preparation that was interrupted goes on after its last whole shard; one whose sources and settings have not changed does nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.data import texts
from orchestrator.data.errors import DataError
from orchestrator.data.hashes import HashCache, Progress, quiet
from orchestrator.data.hub import Hub
from trainer import shards, tokenize

MANIFEST = "shards.json"


@dataclass(frozen=True)
class ShardEntry:
    """One line of a manifest."""

    name: str
    part: str
    """train | validation"""
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Prepared:
    """What a folder of shards holds, as its manifest says."""

    folder: Path
    tokenizer: str
    vocab_size: int
    documents: int
    shards: list[ShardEntry]
    unchanged: bool = False
    """Everything was there already."""

    def tokens(self, part: str) -> int:
        """Tokens of the train or the validation shards."""
        return sum(item.tokens for item in self.shards if item.part == part)


@dataclass(frozen=True)
class Recipe:
    """Everything that the shards depend on, besides the sources."""

    tokenizer: str = "gpt2"
    shard_tokens: int = tokenize.SHARD_TOKENS
    validation_fraction: float = 0.01
    column: str = "text"

    def check(self) -> None:
        """Raises DataError."""
        if not 0 <= self.validation_fraction < 1:
            raise DataError(
                f"validation fraction {self.validation_fraction} is not in [0, 1)",
                "Write 0.01 for one document in a hundred",
            )
        if not 1 <= self.shard_tokens < 1 << 31:
            raise DataError(
                f"{self.shard_tokens} tokens a shard: llm.c's header holds 1 to 2147483647", "Write 100000000"
            )
        if _tokenizer(self.tokenizer).vocab_size > 1 << 16:
            raise DataError(
                f"{self.tokenizer} has more than 65536 ids, and the shards hold 16-bit tokens",
                "Use a smaller vocabulary",
            )


def prepare(
    sources: Sequence[str], to: Path, recipe: Recipe, *, cache: Path, processes: int | None = None, hub: Hub | None = None,
    progress: Progress = quiet,
) -> Prepared:  # fmt: skip
    """Tokenise `sources` (text files, folders, globs, parquet files, hf:// names of either) into `to`. Raises DataError."""
    recipe.check()
    files = [path for source in sources for path in texts.files(source, cache, hub, progress)]
    if not files:
        raise DataError(
            "no source was given",
            "Name text files, folders, globs, parquet files or hf://owner/name/*.parquet",
        )
    hashes = HashCache(cache)
    inputs = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": hashes.sha256(path, progress)}
        for path in files
    ]
    settings = asdict(recipe)
    if recipe.tokenizer not in {"gpt2", "bytes"}:
        settings["tokenizer_sha256"] = hashes.sha256(Path(recipe.tokenizer))
    key = hashlib.sha256(
        json.dumps([settings, [item["sha256"] for item in inputs]], sort_keys=True).encode()
    ).hexdigest()
    if (there := _unchanged(to, key)) is not None:
        return there
    if to.exists() and not (to / MANIFEST).exists() and (not to.is_dir() or any(to.iterdir())):
        raise DataError(f"{to} exists and holds something else", "Name a new folder, or empty this one")
    partial = to.with_name(f".{to.name}.partial")
    facts = {"version": 1, "key": key, **settings, "vocab_size": _tokenizer(recipe.tokenizer).vocab_size,
             "separator": _tokenizer(recipe.tokenizer).separator, "sources": inputs}  # fmt: skip
    try:
        with _alone(to):
            writer = _Writer.open(partial, key, recipe.shard_tokens)
            _tokenise(files, recipe, writer, processes, progress)
            _finish(writer, to, facts)
    except OSError as error:
        raise DataError(f"{error.filename or partial}: {error.strerror or error}",
                        "Make room there, or name another folder; the next call goes on from here") from error  # fmt: skip
    return read(to)


def train_tokenizer(sources: Sequence[str], to: Path, vocab_size: int, *, cache: Path, column: str = "text", hub: Hub | None = None,
                    progress: Progress = quiet) -> None:  # fmt: skip
    """Train a byte-level BPE on the sources and write it to `to` as tokenizer.json. Raises DataError."""
    files = [path for source in sources for path in texts.files(source, cache, hub, progress)]
    try:
        tokenize.train_bpe((text for text, _ in texts.documents(files, column)), vocab_size, to)
    except tokenize.TokenizerError as error:
        raise DataError(str(error)) from error


def read(folder: Path) -> Prepared:
    """What the manifest of a folder says. Raises DataError."""
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = [ShardEntry(**item) for item in raw["shards"]]
        made = Prepared(folder, raw["tokenizer"], raw["vocab_size"], raw["documents"], entries)
    except FileNotFoundError:
        raise DataError(f"{folder} has no {MANIFEST}", "`llmctl data prepare` writes one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error}", "Prepare the data again") from error
    for item in made.shards:
        if Path(item.name).name != item.name:
            raise DataError(
                f"{folder / MANIFEST} names {item.name!r}, which is no plain file name",
                "Prepare the data again",
            )
    return made


def verify(folder: Path, progress: Progress = quiet) -> list[str]:
    """What is wrong with the shards of a folder, a sentence each; every byte is read. Raises DataError without a manifest."""
    made = read(folder)
    total = sum(item.bytes for item in made.shards)
    done, problems = 0, []
    for item in made.shards:
        path = folder / item.name
        try:
            held = shards.probe(path).tokens
            if held != item.tokens:
                problems.append(f"{path} holds {held} tokens, its manifest says {item.tokens}")
            elif _sha256(path) != item.sha256:
                problems.append(f"{path} does not have the checksum of its manifest")
        except shards.ShardError as error:
            problems.append(str(error))
        done += item.bytes
        progress("verifying", done, total)
    return problems


def listing(folder: Path) -> list[ShardEntry]:
    """The shards of a folder, with or without a manifest (then without hashes). Raises DataError."""
    if (folder / MANIFEST).exists():
        return read(folder).shards
    found = []
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.safetensors")]):
        try:
            info = shards.probe(path)
        except shards.ShardError as error:
            raise DataError(str(error)) from error
        part = "validation" if "val" in path.name else "train"
        found.append(ShardEntry(path.name, part, info.tokens, path.stat().st_size, ""))
    if not found:
        raise DataError(
            f"{folder} holds no token shards", "`llmctl data prepare SOURCE --to FOLDER` makes some"
        )
    return found


@dataclass
class _Writer:
    """Shards in the making; after each whole one it could begin again from there."""

    folder: Path
    key: str
    shard_tokens: int
    documents: int = 0
    entries: list[ShardEntry] = field(default_factory=list)
    rest: dict[str, array[int]] = field(
        default_factory=lambda: {"train": array("H"), "validation": array("H")}
    )

    @classmethod
    def open(cls, folder: Path, key: str, shard_tokens: int) -> _Writer:
        """A new one, or one that was interrupted."""
        writer = cls(folder, key, shard_tokens)
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state["key"] == key:
                writer.documents = state["documents"]
                writer.entries = [ShardEntry(**item) for item in state["entries"]]
                for part, block in writer.rest.items():
                    block.frombytes((folder / f"{part}.{state['documents']}.rest").read_bytes())
                return writer
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return cls(folder, key, shard_tokens)

    def add(self, encoded: tokenize.Encoded) -> None:
        """Take in the next documents."""
        self.documents += encoded.documents
        before = len(self.entries)
        for part, block in (("train", encoded.train), ("validation", encoded.held_out)):
            self.rest[part].extend(block)
            while len(self.rest[part]) >= self.shard_tokens:
                self._write(part, self.rest[part][: self.shard_tokens])
                del self.rest[part][: self.shard_tokens]
        if len(self.entries) > before:
            self._save()

    def close(self) -> None:
        """Write what is left as last, shorter shards."""
        for part, block in self.rest.items():
            if block:
                self._write(part, block)
                self.rest[part] = array("H")

    def _write(self, part: str, block: array[int]) -> None:
        number = sum(item.part == part for item in self.entries)
        path = self.folder / f"{part}_{number:06d}.bin"
        if sys.byteorder == "big":
            block.byteswap()
        shards.write_bin(path, block.tobytes())
        self.entries.append(ShardEntry(path.name, part, len(block), path.stat().st_size, _sha256(path)))

    def _save(self) -> None:
        old = list(self.folder.glob("*.rest"))
        for part, block in self.rest.items():
            (self.folder / f"{part}.{self.documents}.rest").write_bytes(block.tobytes())
        state = {
            "key": self.key,
            "documents": self.documents,
            "entries": [asdict(item) for item in self.entries],
        }
        temporary = self.folder / "state.new"
        temporary.write_text(json.dumps(state), encoding="utf-8")
        temporary.replace(self.folder / "state.json")
        for path in old:
            path.unlink(missing_ok=True)


@contextmanager
def _alone(to: Path) -> Iterator[None]:
    """Holds the lock beside `to`. Raises DataError while another process does, OSError."""
    to.parent.mkdir(parents=True, exist_ok=True)
    path = to.with_name(f".{to.name}.lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another llmctl is preparing {to}", "Wait for it, or name another folder"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _tokenise(
    files: Sequence[Path], recipe: Recipe, writer: _Writer, processes: int | None, progress: Progress
) -> None:
    total = sum(path.stat().st_size for path in files)
    read_bytes = 0.0

    def documents() -> Iterator[str]:
        nonlocal read_bytes
        for number, (text, weight) in enumerate(texts.documents(files, recipe.column)):
            read_bytes += weight
            if number >= done_before:
                yield text

    done_before = writer.documents
    try:
        for encoded in tokenize.encode_documents(
            recipe.tokenizer, documents(), processes=processes, held_out=recipe.validation_fraction
        ):
            writer.add(encoded)
            progress("tokenising", min(int(read_bytes), total), total)
    except tokenize.TokenizerError as error:
        raise DataError(str(error)) from error


def _finish(writer: _Writer, to: Path, facts: dict[str, Any]) -> None:
    """The last shards, the manifest, and the rename. Raises DataError, OSError."""
    writer.close()
    parts = {item.part for item in writer.entries}
    if "train" not in parts or (facts["validation_fraction"] > 0 and "validation" not in parts):
        shutil.rmtree(writer.folder, ignore_errors=True)
        missing = "validation" if "train" in parts else "training"
        raise DataError(
            f"of {writer.documents} documents none is left for {missing}",
            "Give more text, or another --validation-fraction",
        )
    document = {**facts, "documents": writer.documents, "shards": [asdict(item) for item in writer.entries]}
    (writer.folder / MANIFEST).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for path in [writer.folder / "state.json", *writer.folder.glob("*.rest")]:
        path.unlink(missing_ok=True)
    old = to.with_name(f".{to.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if to.exists():
        to.rename(old)
    writer.folder.rename(to)
    shutil.rmtree(old, ignore_errors=True)


def _unchanged(to: Path, key: str) -> Prepared | None:
    try:
        if json.loads((to / MANIFEST).read_text(encoding="utf-8")).get("key") != key:
            return None
        made = read(to)
        whole = all(shards.probe(to / item.name).tokens == item.tokens for item in made.shards)
    except (OSError, ValueError, AttributeError, DataError, shards.ShardError):
        return None
    return (
        Prepared(to, made.tokenizer, made.vocab_size, made.documents, made.shards, unchanged=True)
        if whole
        else None
    )


def _tokenizer(name: str) -> tokenize.Tokenizer:
    try:
        return tokenize.load(name)
    except tokenize.TokenizerError as error:
        raise DataError(str(error)) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
