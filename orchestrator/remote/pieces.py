"""Files in pieces: what both sides of a transfer do. Standard library of Python 3.9 only: on the node this file runs as
`python3 -I -c SOURCE OPERATION`, with JSON or raw bytes on stdin and stdout; here it is imported.

A file on its way stands beside its place as NAME.llmctl-part, with NAME.llmctl-done: one line that names the version of the
source, then a line `OFFSET LENGTH` for each piece that has arrived. A transfer that broke goes on with what is missing; the
file gets its name, whole and with the source's time, by rename at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 1 << 20
PART, DONE = ".llmctl-part", ".llmctl-done"


def sha256(path: str) -> str:
    """Hex, of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123  # a Path for each of a thousand files takes its time
        while True:
            block = file.read(BLOCK)
            if not block:
                return digest.hexdigest()
            digest.update(block)


def look(path: str, *, hashed: bool = False) -> list[Any] | None:
    """[bytes, mtime in ns, sha256 or None] of a regular file; None where there is none."""
    try:
        found = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return [found.st_size, found.st_mtime_ns, sha256(path) if hashed else None]


def tree(root: str) -> list[str]:
    """The regular files under `root`, relative, sorted; links are left alone, and what a transfer left behind too."""
    names, folders = [], [""]
    while folders:
        folder = folders.pop()
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}{entry.name}/")
                elif entry.is_file(follow_symlinks=False) and not entry.name.endswith((PART, DONE)):
                    names.append(folder + entry.name)
    return sorted(names)


def begin(path: str, version: str) -> list[list[int]]:
    """Make room for version `version` of a file; returns the [offset, length] pieces of it that are there already."""
    part, done = Path(path + PART), Path(path + DONE)
    part.parent.mkdir(parents=True, exist_ok=True)
    lines = done.read_text().split("\n") if done.exists() else []
    if lines[:1] == [version] and part.exists():
        # The text after the last line break is empty, or a line that was cut.
        return [[int(word) for word in line.split()] for line in lines[1:-1]]
    part.write_bytes(b"")
    done.write_text(f"{version}\n")
    return []


def write_piece(
    path: str, offset: int, length: int, read: Callable[[int], bytes], tell: Callable[[int], None]
) -> None:
    """Take `length` bytes from `read` to their place. Raises EOFError when they end early."""
    left = length
    with Path(path + PART).open("r+b", buffering=0) as file:
        file.seek(offset)
        while left:
            block = read(min(BLOCK, left))
            if not block:
                raise EOFError(path)
            view = memoryview(block)
            while view:
                view = view[file.write(view) :]
            left -= len(block)
            tell(len(block))
    with Path(path + DONE).open("a") as log:
        log.write(f"{offset} {length}\n")


def read_piece(
    path: str, offset: int, length: int, write: Callable[[bytes], Any], tell: Callable[[int], None]
) -> None:
    """Give `length` bytes from `offset` to `write`. Raises EOFError when the file is shorter."""
    left = length
    with Path(path).open("rb", buffering=0) as file:
        file.seek(offset)
        while left:
            block = file.read(min(BLOCK, left))
            if not block:
                raise EOFError(path)
            write(block)
            left -= len(block)
            tell(len(block))


def finish(path: str, size: int, mtime_ns: int) -> None:
    """Give an arrived file its time and its name."""
    part = Path(path + PART)
    arrived = part.stat().st_size
    if arrived != size:
        raise EOFError(f"{path} has {arrived} of {size} bytes")
    os.utime(part, ns=(mtime_ns, mtime_ns))
    part.replace(path)
    Path(path + DONE).unlink()


def compressibility(path: str, samples: int = 4) -> float:
    """Compressed over plain size of samples across a file, at the quickest setting."""
    import zlib

    size, plain, packed = Path(path).stat().st_size, 0, 0
    with Path(path).open("rb") as file:
        for index in range(samples):
            file.seek(size * index // samples)
            block = file.read(BLOCK // 2)
            plain += len(block)
            packed += len(zlib.compress(block, 1))
    return packed / plain if plain else 1.0


def widen(*descriptors: int) -> None:
    """Let pipes hold a megabyte, where the system can: the processes at their ends then wait less for each other."""
    for descriptor in descriptors:
        with suppress(OSError):
            fcntl.fcntl(descriptor, getattr(fcntl, "F_SETPIPE_SZ", 1031), BLOCK)


def _none(_: int) -> None:
    return


def _answer(operation: str, asked: dict[str, Any]) -> Any:
    """One of the operations with a JSON answer."""
    if operation == "look":
        return [look(path, hashed=asked["hashed"]) for path in asked["paths"]]
    if operation == "tree":
        return tree(asked["root"])
    if operation == "begin":
        return [begin(path, version) for path, version in asked["files"]]
    if operation == "compressibility":
        return compressibility(asked["path"])
    for path, size, mtime_ns in asked["files"]:
        finish(path, size, mtime_ns)
    return None


def _told(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"answer": _answer(asked["operation"], asked)}
    except (OSError, EOFError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(operation: str, source: BinaryIO, sink: BinaryIO) -> None:
    """`serve` answers each line of questions with a line; `receive` takes a line that names pieces, and then their bytes;
    `send` answers such a line with their bytes."""
    if operation == "serve":
        for line in source:
            sink.write(json.dumps(_told(json.loads(line))).encode() + b"\n")
            sink.flush()
        return
    widen(source.fileno(), sink.fileno())
    pieces: list[tuple[str, int, int]] = json.loads(source.readline())["pieces"]
    for path, offset, length in pieces:
        if operation == "receive":
            write_piece(path, offset, length, source.read, _none)
        else:
            read_piece(path, offset, length, sink.write, _none)
    sink.flush()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.stdin.buffer, sys.stdout.buffer)
    except (OSError, EOFError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
