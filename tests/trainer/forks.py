"""The trainer in processes of its own that are forks of one that has loaded torch: what each of a node's processes needs two
seconds for is done once. `conftest.run_trainer` starts them as a node does, each a new Python, several under torchrun."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context, util
from pathlib import Path

import torch

PATIENCE = 120.0

_context = get_context("forkserver")
_context.set_forkserver_preload(["torch._dynamo", "trainer.loop", "tests.trainer.killed"])
util.get_temp_dir()  # made now, and removed by whom it belongs to: the session's own is gone before that


def run(
    module: str, arguments: Sequence[str], log: Path, *, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` in `ranks` processes that find each other as torchrun would let them. The code is that of the
    first rank that failed; stderr is the output of all, which goes through `log`."""
    log.touch()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
    started = []
    for rank in range(ranks):
        world = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        process = _context.Process(target=_main, args=(module, arguments, {**os.environ, **world}, log))
        process.start()
        started.append(process)
    end, codes = time.monotonic() + PATIENCE, []
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()
        codes.append(process.exitcode or 0)
    code = next(filter(None, codes), 0)
    return subprocess.CompletedProcess([module, *arguments], code, "", log.read_text(encoding="utf-8"))


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _main(module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """What a process does after its fork."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # OMP_NUM_THREADS was read when torch was loaded
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
