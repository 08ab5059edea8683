"""`data push`: a folder of shards to S3, and whether what is there is whole.

A shard is skipped where the object has its size, and its SHA-256 by the bucket's shards.json or its ETag. The manifest goes last, so
a push that broke is simply made again; large shards go on with the parts that are missing. Every part is checked by S3 against its MD5.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data import prepare as data
from orchestrator.data.errors import DataError
from orchestrator.data.hashes import Progress, quiet
from orchestrator.data.hub import read_range
from provisioning.base import Refused
from provisioning.objects import S3, etag_of

BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class PushedData:
    """What a push did."""

    to: str
    uploaded: tuple[str, ...]
    unchanged: tuple[str, ...]
    bytes: int
    """Uploaded."""

    @property
    def globs(self) -> list[str]:
        """What to write under `data.train` and `data.validation`."""
        return [f"{self.to}/train_*.bin", f"{self.to}/validation_*.bin"]


def push(folder: Path, to: str, store: S3, progress: Progress = quiet) -> PushedData:
    """Upload the shards of `folder`, and last its manifest, to `to` (`s3://bucket/prefix`). Raises DataError, ProviderError."""
    made, to = data.read(folder), to.rstrip("/")
    problems = [
        item.name
        for item in made.shards
        if not (folder / item.name).is_file() or (folder / item.name).stat().st_size != item.bytes
    ]
    if problems:
        raise DataError(
            f"{folder}: {', '.join(problems)} are not what the manifest says",
            f"`llmctl data verify {folder}` tells more",
        )
    there = {item.key: item for item in store.list(f"{to}/")}
    known = _hashes(store, to) if f"{to}/{data.MANIFEST}" in there else {}

    def whole(item: data.ShardEntry) -> bool:
        found = there.get(f"{to}/{item.name}")
        if found is None or found.bytes != item.bytes:
            return False
        return known.get(item.name) == item.sha256 or found.etag == etag_of(folder / item.name)

    missing = [item for item in made.shards if not whole(item)]
    total, done = sum(item.bytes for item in missing), 0
    if missing and known:
        # Objects are about to change: a manifest of the old ones would lie until the new one is there.
        store.delete(f"{to}/{data.MANIFEST}")
    for item in missing:
        before = done

        def count(sent: int) -> None:
            nonlocal done
            done += sent
            progress("pushing", done, total)

        store.put(folder / item.name, f"{to}/{item.name}", count)
        done = before + item.bytes
    if missing or known != {item.name: item.sha256 for item in made.shards}:
        store.write(f"{to}/{data.MANIFEST}", (folder / data.MANIFEST).read_bytes())
    names = {item.name for item in missing}
    return PushedData(
        to,
        tuple(item.name for item in missing),
        tuple(item.name for item in made.shards if item.name not in names),
        total,
    )


def verify(place: str, store: S3, progress: Progress = quiet) -> list[str]:
    """What is wrong with pushed shards, a sentence each; every byte is fetched. Raises DataError, ProviderError."""
    place = place.rstrip("/")
    entries = _manifest(store, place)["shards"]
    there = {item.key: item.bytes for item in store.list(f"{place}/")}
    total, done, problems = sum(int(item["bytes"]) for item in entries), 0, []
    for item in entries:
        key, size = f"{place}/{item['name']}", int(item["bytes"])
        if there.get(key) != size:
            held = f"has {there[key]} bytes, its manifest says {size}" if key in there else "is not there"
            problems.append(f"{key} {held}")
            continue
        digest = hashlib.sha256()
        for start in range(0, size, BLOCK_BYTES):
            block = read_range(store.presign_get(key), start, min(BLOCK_BYTES, size - start))
            digest.update(block)
            done += len(block)
            progress("verifying", done, total)
        if digest.hexdigest() != item["sha256"]:
            problems.append(f"{key} does not have the checksum of its manifest")
    return problems


def _hashes(store: S3, place: str) -> dict[str, str]:
    return {str(item["name"]): str(item["sha256"]) for item in _manifest(store, place)["shards"]}


def _manifest(store: S3, place: str) -> dict[str, Any]:
    try:
        raw = json.loads(store.read(f"{place}/{data.MANIFEST}"))
    except Refused as error:
        if error.code != "NoSuchKey":
            raise
        raise DataError(
            f"{place} has no {data.MANIFEST}", "`llmctl data push FOLDER --to s3://…` puts one there"
        ) from None
    except ValueError as error:
        raise DataError(f"{place}/{data.MANIFEST} cannot be read: {error}", "push the data again") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("shards"), list):
        raise DataError(f"{place}/{data.MANIFEST} is no manifest", "push the data again")
    return raw
