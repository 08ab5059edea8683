"""One process of a run, from its first line to its exit code: signals, status.json, and what each way to end is called.

Exit codes: 0 finished or stopped on request, 3 refused (configuration, data, disk), 4 too many non-finite steps in a
row, 5 out of memory. Any other end is a crash, and worth a restart from the last checkpoint.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from trainer.config import ConfigError
from trainer.progress import FAILURE, STOP, Status, report_failure

EXIT_REFUSED, EXIT_NON_FINITE, EXIT_MEMORY = 3, 4, 5

Work = Callable[[Status | None, threading.Event], str]
"""What the process is there for: given status.json (on the first rank of each node) and the event of SIGTERM, `finished` or `stopped`."""


class NonFiniteError(Exception):
    """Too many steps in a row had a loss or gradient that is not finite."""


def carry(out: Path, work: Work, unusable: type[Exception]) -> int:
    """Do `work`, which writes into `out`; the exit code. Every rank runs this. `unusable`: what it raises of its data."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    out.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    status = None
    if (
        int(os.environ.get("LOCAL_RANK", "0")) == 0
    ):  # each node has a supervisor, which reads a status of its own
        (out / FAILURE).unlink(missing_ok=True)
        status = Status(out, world_size=int(os.environ.get("WORLD_SIZE", "1")), microbatch_size=None)
    try:
        state = work(status, stop)
    except BaseException as error:
        known = _known(error, out, unusable)
        if known is None:
            _crash(out, status, f"{type(error).__name__}: {error}")
            raise
        return _fail(out, status, *known)
    if status is not None:
        status.end(state)
        if state == "stopped":
            (out / STOP).unlink(missing_ok=True)
    return 0


def _known(error: BaseException, out: Path, unusable: type[Exception]) -> tuple[int, str, str] | None:
    """(exit code, reason, message) of a failure that another start would not mend; None: a crash."""
    message = str(error)
    if isinstance(error, ConfigError):
        return EXIT_REFUSED, "config", message
    if isinstance(error, unusable):
        return EXIT_REFUSED, "data", message
    if isinstance(error, NonFiniteError):
        return EXIT_NON_FINITE, "non_finite", message
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return EXIT_REFUSED, "disk_full", f"{error.filename or out}: {error.strerror}; make room and resume"
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in message
    if isinstance(error, torch.OutOfMemoryError) or on_cpu:
        return EXIT_MEMORY, "out_of_memory", message
    return None


def _fail(out: Path, status: Status | None, code: int, reason: str, message: str) -> int:
    if status is not None:
        status.end("failed", reason=reason, message=message)
    else:
        report_failure(out, reason, message)
    os.write(2, f"trainer: {message}\n".encode())
    return code


def _crash(out: Path, status: Status | None, message: str) -> None:
    """Note a crash, unless another rank has already told why it ended and took this one with it."""
    if status is None:
        return
    reason = "crash"
    if (out / FAILURE).exists():
        told = json.loads((out / FAILURE).read_text(encoding="utf-8"))
        reason, message = told["reason"], told["message"]
    status.end("failed", reason=reason, message=message)
