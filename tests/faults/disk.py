"""A small file system of its own, which can be filled to its last byte: a real ENOSPC, where there is root to mount it."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from pathlib import Path


def mountable() -> bool:
    """Whether this user may mount such a thing here."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount(Path(folder), 1)
        except (OSError, subprocess.CalledProcessError):
            return False
        unmount(Path(folder))
    return True


def mount(folder: Path, mib: int) -> None:
    """Put an empty file system of that size over `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "llmctl-fault", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def unmount(folder: Path) -> None:
    """Take it away, whatever still has files open there."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def fill(folder: Path) -> Path:
    """Write until nothing more can be written; the file that takes the space."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return filler
