"""What a checkpoint consists of: `manifest.json`, written last, with the size and SHA-256 of every other file.

A directory whose manifest is absent or does not match is no checkpoint. Standard library only: the supervisor and the
program on the laptop check the same files with the same code.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

NAME = "manifest.json"
FETCHED = ".fetched"
"""In the folder of the checkpoints: the identities (`digest`) of those that are safe elsewhere, one a line."""
_STEP = re.compile(r"step-(\d{6,})")


class ManifestError(Exception):
    """A manifest that is missing or cannot be read; the message names the file."""


@dataclass(frozen=True)
class Entry:
    """One file of a checkpoint."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The step of a checkpoint and its files."""

    step: int
    files: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """Size of all files, the manifest excepted."""
        return sum(entry.bytes for entry in self.files)


def directory_name(step: int) -> str:
    """`step-000500`."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step that a checkpoint directory's name states, or None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(directory: Path, step: int) -> Manifest:
    """Describe every file in `directory` and write its manifest. Raises OSError."""
    paths = sorted(path for path in directory.iterdir() if path.is_file() and path.name != NAME)
    files = tuple(Entry(path.name, sha256(path), path.stat().st_size) for path in paths)
    document = {
        "step": step,
        "files": [{"name": entry.name, "sha256": entry.sha256, "bytes": entry.bytes} for entry in files],
    }
    (directory / NAME).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return Manifest(step, files)


def read(directory: Path) -> Manifest:
    """The manifest of `directory`. Raises ManifestError."""
    path = directory / NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(
            Entry(str(item["name"]), str(item["sha256"]), int(item["bytes"])) for item in raw["files"]
        )
        manifest = Manifest(int(raw["step"]), files)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path} is not a manifest: {error}") from error
    for entry in manifest.files:
        if entry.name in {"", ".."} or Path(entry.name).name != entry.name:
            raise ManifestError(f"{path} names {entry.name!r}, which is not a plain file name")
    return manifest


def verify(directory: Path) -> list[str]:
    """What is wrong with the checkpoint in `directory`, a sentence each; empty: it is whole."""
    try:
        manifest = read(directory)
    except ManifestError as error:
        return [str(error)]
    problems = []
    for entry in manifest.files:
        path = directory / entry.name
        try:
            size = path.stat().st_size
            if size != entry.bytes:
                problems.append(f"{path} has {size} bytes, its manifest says {entry.bytes}")
            elif sha256(path) != entry.sha256:
                problems.append(f"{path} does not have the checksum of its manifest")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return problems


def digest(directory: Path) -> str:
    """SHA-256 of the manifest's bytes: the identity of the checkpoint. Raises ManifestError."""
    try:
        return sha256(directory / NAME)
    except OSError as error:
        raise ManifestError(f"{directory / NAME}: {error.strerror}") from error
