"""One driver a run: the lock, and which process is meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from runs.lock import Lock, ProcessId, boot_id, driver_lock, held

HOLDER = """
import subprocess, sys
from pathlib import Path
from runs.lock import Lock
lock = Lock(Path(sys.argv[1]))
print(lock.acquire(), flush=True)
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_a_second_process_waits_outside_and_children_inherit_nothing(tmp_path: Path) -> None:
    path = driver_lock(tmp_path)
    assert not held(path)
    holder = _holder(path)
    try:
        assert holder.stdout is not None
        assert int(holder.stdout.readline()) > 0
        assert held(path)
        assert not Lock(path).acquire()
    finally:
        holder.kill()
        holder.wait()
    lock = Lock(path)
    assert lock.acquire(patience=10.0)  # though the child of the dead holder may still live
    with Lock(path) as mine:
        assert not mine
    lock.release()
    with Lock(path) as mine:
        assert mine


def test_looking_does_not_take_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not held(path)
    assert not path.exists()
    with Lock(path) as mine:
        assert mine
        assert held(path)
    assert not held(path)


def test_a_process_is_told_by_its_start_and_boot() -> None:
    me = ProcessId.mine()
    assert me.pid == os.getpid()
    assert me.alive()
    assert not ProcessId(me.pid, me.start_time - 100.0, me.boot_id).alive()
    assert not ProcessId(me.pid, me.start_time, "another boot").alive()
    assert not ProcessId(0, 0.0, "").alive()
    assert boot_id() == me.boot_id


def test_ending_ends_the_process_that_is_meant_and_no_other() -> None:
    import psutil

    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        started = psutil.Process(process.pid).create_time()
        assert ProcessId(
            process.pid, started - 50.0, boot_id()
        ).end()  # a later process with the same pid: left alone
        assert process.poll() is None
        assert ProcessId(process.pid, started, boot_id()).end()
        assert not ProcessId(process.pid, started, boot_id()).alive()
        assert ProcessId(process.pid, started, boot_id()).end()
    finally:
        process.kill()
        process.wait()
