"""Where token shards are: local paths and globs, built-in corpora, the Hugging Face Hub, and S3; and what they hold.

A published file is judged by its first bytes and its length alone; what was learnt of a pinned one is remembered.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import sys
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from orchestrator.data import corpora
from orchestrator.data.errors import DataError, Offline
from orchestrator.data.hashes import Progress, quiet
from orchestrator.data.hub import Hub, HubFile, HubName
from provisioning.objects import ObjectInfo
from trainer import shards

HEAD_BYTES = 64 * 1024
SAMPLES, SAMPLE_BYTES = 16, 16 * 1024
_CODES = {"uint16": "H", "uint32": "I"}
_MAGIC = frozenset("*?[")
Part = Literal["train", "validation"]


class ObjectStore(Protocol):
    """What is needed of S3 here. Keys are whole: `s3://bucket/key`."""

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """Every object whose key starts with `prefix`."""

    def presign_get(self, key: str) -> str:
        """A URL from which the object can be read for a while without credentials."""


@dataclass(frozen=True)
class Found:
    """One file of tokens. What is None is not known before it is read whole."""

    source: str
    """As the spec names it."""
    name: str
    """Its own name, without folders."""
    path: Path | None = None
    url: str | None = None
    """https://… or s3://bucket/key"""
    revision: str | None = None
    """The commit or ETag that the URL's content has."""
    sha256: str | None = None
    bytes: int | None = None
    tokens: int | None = None
    dtype: str = "uint16"
    offset: int = 0
    """First byte of the tokens."""
    max_id: int | None = None
    """The largest token id in a sample of them."""


@dataclass(frozen=True)
class Finder:
    """How sources become files. `pinned`: an hf:// source without a network is an error even where its name alone would do."""

    cache: Path
    tokenizer: str
    hub: Hub
    objects: ObjectStore | None = None
    pinned: bool = True
    progress: Progress = quiet
    warnings: list[str] = field(default_factory=list)
    corpora: dict[str, corpora.Corpus] = field(default_factory=dict)
    """Those that were made already: train, validation and test sets may name the same."""

    def find(self, source: str, part: Part) -> list[Found]:
        """The files of one source, in order. Raises DataError."""
        if source.startswith("builtin:"):
            name = source.removeprefix("builtin:")
            if (corpus := self.corpora.get(name)) is None:
                corpus = self.corpora[name] = corpora.prepare(name, self.tokenizer, self.cache, self.progress)
            return [local(source, path) for path in (corpus.train if part == "train" else corpus.validation)]
        if source.startswith("hf://"):
            return self._hub(source)
        if source.startswith("s3://"):
            return self._objects(source)
        return [local(source, path) for path in paths(source)]

    def _hub(self, source: str) -> list[Found]:
        name = HubName.parse(source)
        globbed = bool(_MAGIC & set(name.file))
        try:
            listing = self.hub.listing(name)
        except Offline as error:
            if globbed or (self.pinned and not name.pinned):
                hint = f"{error.hint}. Or pin what it shall be: hf://{name.repo}@COMMIT/{'FILE' if globbed else name.file}"
                raise Offline(f"{source}: {error}", hint) from error
            revision = name.revision or "main"
            self.warnings.append(f"{source} was not looked at ({error}): its size and its tokens are unknown")
            url = self.hub.url(name, revision, name.file)
            return [Found(source, Path(name.file).name, url=url, revision=revision)]
        files = sorted(fnmatch.filter(listing.files, name.file)) if globbed else [name.file]
        if not files or any(file not in listing.files for file in files):
            near = [file for file in sorted(listing.files) if Path(file).suffix in {".bin", ".safetensors"}]
            raise DataError(f"{source}: {name.repo} at {listing.commit[:12]} has no such file",
                            f"It has {', '.join(near[:5]) or 'no token shards'}")  # fmt: skip
        return [self._published(source, name, listing.commit, file, listing.files[file]) for file in files]

    def _published(self, source: str, name: HubName, commit: str, file: str, known: HubFile) -> Found:
        url = self.hub.url(name, commit, file)
        found = Found(
            source, Path(file).name, url=url, revision=commit, sha256=known.sha256, bytes=known.bytes
        )
        return self._inspect(found, url)

    def _objects(self, source: str) -> list[Found]:
        if self.objects is None:
            raise DataError(
                f"{source}: no S3 client is set up", "Install llmctl[aws] and configure AWS credentials"
            )
        fixed = source[: min((source.find(mark) for mark in _MAGIC if mark in source), default=len(source))]
        listed = {item.key: item for item in self.objects.list(fixed)}
        keys = (
            sorted(fnmatch.filter(listed, source))
            if fixed != source
            else [key for key in listed if key == source]
        )
        if not keys:
            raise DataError(f"{source}: no such object", "`llmctl data push` puts shards there")
        hashes = self._pushed_hashes(keys)
        made = [
            Found(
                source,
                Path(key).name,
                url=key,
                revision=listed[key].etag,
                sha256=hashes.get(key),
                bytes=listed[key].bytes,
            )
            for key in keys
        ]
        return [self._inspect(item, self.objects.presign_get(item.url or "")) for item in made]

    def _pushed_hashes(self, keys: Sequence[str]) -> dict[str, str]:
        """SHA-256 by key, where `data push` left its shards.json beside the shards."""
        assert self.objects is not None
        hashes: dict[str, str] = {}
        for folder in sorted({key.rpartition("/")[0] for key in keys}):
            for item in self.objects.list(f"{folder}/shards.json"):
                if item.key == f"{folder}/shards.json":
                    raw = json.loads(self.hub.read(self.objects.presign_get(item.key), 0, item.bytes))
                    hashes |= {
                        f"{folder}/{entry['name']}": str(entry["sha256"]) for entry in raw.get("shards", ())
                    }
        return hashes

    def _inspect(self, found: Found, readable: str) -> Found:
        """With what the first bytes of a published file tell. Raises DataError."""
        key = hashlib.sha256(f"{found.url} {found.revision}".encode()).hexdigest()[:32]
        place = self.cache / "published" / f"{key}.json"
        if place.exists():
            return replace(found, **json.loads(place.read_text(encoding="utf-8")))
        if found.bytes is None:
            self.warnings.append(f"{found.source}: its size is unknown, so all of it is used")
            return found
        head = self.hub.read(readable, 0, min(HEAD_BYTES, found.bytes))
        info = probe_head(head, found)
        learnt: dict[str, Any] = {
            "tokens": info.tokens,
            "dtype": info.dtype,
            "offset": info.offset,
            "max_id": _largest(head[info.offset :], info.dtype),
        }
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(learnt), encoding="utf-8")
        temporary.replace(place)
        return replace(found, **learnt)


def paths(source: str) -> list[Path]:
    """The files of a local path or glob, sorted. Raises DataError."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a folder", f"Write a glob: {path}/*.bin")
    if path.exists() or not _MAGIC & set(source):
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - the pattern may be absolute
    if not (files := [item for item in found if item.is_file()]):
        raise DataError(f"{source} matches no file", f"Look at {path.parent} for what is there")
    return files


def local(source: str, path: Path) -> Found:
    """What a local file holds. Raises DataError."""
    try:
        info = shards.probe(path)
        size = path.stat().st_size
    except shards.ShardError as error:
        hint = (
            "Check the path; relative ones start at the spec's folder"
            if not path.exists()
            else "Copy it again, or make it anew with `llmctl data prepare`"
        )
        raise DataError(str(error), hint) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    return Found(source, path.name, path=path.resolve(), bytes=size, tokens=info.tokens, dtype=info.dtype,
                 offset=info.offset, max_id=_sample(path, info))  # fmt: skip


def probe_head(head: bytes, found: Found) -> shards.ShardInfo:
    """What a file of `found.bytes` that starts with `head` holds: a sparse stand-in is probed. Raises DataError."""
    with tempfile.TemporaryDirectory(prefix="llmctl-") as folder:
        stand_in = Path(folder) / (found.name or "shard")
        stand_in.write_bytes(head)
        os.truncate(stand_in, found.bytes or 0)
        try:
            return shards.probe(stand_in)
        except shards.ShardError as error:
            raise DataError(
                str(error).replace(str(stand_in), found.url or found.name), "Is it a token shard?"
            ) from error


def _sample(path: Path, info: shards.ShardInfo) -> int:
    """The largest id in blocks spread over a local shard."""
    width = array(_CODES[info.dtype]).itemsize
    blocks = max(1, min(SAMPLES, info.tokens * width // SAMPLE_BYTES))
    largest = 0
    with path.open("rb") as file:
        for index in range(blocks):
            file.seek(info.offset + info.tokens * index // blocks * width)
            largest = max(largest, _largest(file.read(min(SAMPLE_BYTES, info.tokens * width)), info.dtype))
    return largest


def _largest(data: bytes, dtype: str) -> int:
    ids = array(_CODES[dtype])
    ids.frombytes(data[: len(data) // ids.itemsize * ids.itemsize])
    if sys.byteorder == "big":
        ids.byteswap()
    return max(ids, default=0)
