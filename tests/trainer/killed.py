"""Runs the trainer and kills it with SIGKILL at a named instant: `python -m tests.trainer.killed INSTANT COUNT ARGUMENTS…`.

The instant's COUNT-th occurrence is fatal. Under torchrun only the rank in $KILL_RANK dies.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from trainer import checkpoint, evaluate, loop, manifest
from trainer.__main__ import main


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(owner: Any, name: str, count: int, *, after: bool = False) -> None:
    """Die when `owner.name` is called for the `count`-th time, before or after it does its work."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and not after:
            die()
        result = original(*args, **kwargs)
        if calls[0] == count:
            die()
        return result

    setattr(owner, name, wrapped)


INSTANTS = {
    "step": (loop, "_one_step", False),
    "backward": (loop.distributed, "synchronised", False),
    "validation": (evaluate, "_batch", True),
    "weights-written": (checkpoint, "save_file", True),
    "manifest-written": (manifest, "write", True),
    "renamed": (checkpoint, "point", False),
    "linked": (checkpoint, "point", True),
    "retention": (checkpoint.shutil, "rmtree", False),
}

if __name__ == "__main__":
    instant, count = sys.argv[1], int(sys.argv[2])
    if os.environ.get("RANK", "0") == os.environ.get("KILL_RANK", "0"):
        owner, name, after = INSTANTS[instant]
        arm(owner, name, count, after=after)
    sys.exit(main(sys.argv[3:]))
