"""One driver a run: an flock whose descriptor no child inherits, and the means to tell and end the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    start_time: float
    boot_id: str

    @classmethod
    def mine(cls) -> ProcessId:
        """This process."""
        import psutil

        return cls(os.getpid(), psutil.Process().create_time(), boot_id())

    def alive(self) -> bool:
        """The very same process runs now."""
        import psutil

        if self.pid <= 0 or self.boot_id != boot_id():
            return False
        try:
            process = psutil.Process(self.pid)
            return (
                abs(process.create_time() - self.start_time) < 1.0
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False

    def end(self, patience: float = 10.0) -> bool:
        """Kill it if it lives; True once it is gone. Bounded by `patience` seconds."""
        import psutil

        if not self.alive():
            return True
        try:
            process = psutil.Process(self.pid)
            process.send_signal(signal.SIGKILL)
            process.wait(patience)
        except psutil.NoSuchProcess:
            return True
        except psutil.TimeoutExpired:
            return not self.alive()
        return True


def boot_id() -> str:
    """An id of this boot of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import psutil

        return f"boot-{int(psutil.boot_time())}"


class Lock:
    """An exclusive flock on a file. `with Lock(path) as held:` gives False where another process has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self, patience: float = 0.0) -> bool:
        """Take it within `patience` seconds; False where another process keeps it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in {errno.EAGAIN, errno.EACCES}:
                    os.close(fd)
                    raise
                if time.monotonic() >= end:
                    os.close(fd)
                    return False
                time.sleep(0.05)
            else:
                self._fd = fd
                return True

    @contextmanager
    def hold(self, patience: float = 24 * 3600.0) -> Iterator[None]:
        """Hold it for the block, after waiting for whoever has it. Raises TimeoutError."""
        if not self.acquire(patience):
            raise TimeoutError(f"another process keeps {self.path}")
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Give it back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def held(path: Path) -> bool:
    """Whether some process holds the lock now."""
    if not path.exists():
        return False
    lock = Lock(path)
    free = lock.acquire()
    lock.release()
    return not free


def driver_lock(run_directory: Path) -> Path:
    """Where a run's driver lock is."""
    return run_directory / "driver.lock"
