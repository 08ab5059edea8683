"""This machine stays awake while a driver lives, where the system lets a program ask for that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def inhibit_sleep(why: str) -> Iterator[None]:
    """Hold off idle sleep for the duration of the block; does nothing where it cannot be asked for."""
    command = _command(why)
    helper = None
    if command is not None:
        try:
            helper = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except OSError:
            helper = None
    try:
        yield
    finally:
        if helper is not None:
            helper.terminate()
            helper.wait()


def _command(why: str) -> list[str] | None:
    """A helper that inhibits sleep for as long as it lives, and that ends by itself when this process does."""
    if sys.platform == "darwin" and shutil.which("caffeinate"):
        return ["caffeinate", "-i", "-w", str(os.getpid())]
    if shutil.which("systemd-inhibit") and os.path.isdir("/run/systemd/system"):  # noqa: PTH112
        watch = ["tail", f"--pid={os.getpid()}", "-f", "/dev/null"]
        return [
            "systemd-inhibit",
            "--what=idle:sleep",
            "--mode=block",
            "--who=llmctl",
            f"--why={why}",
            *watch,
        ]
    return None
