"""A node on this machine: an SSH server as a detached process, and everything that was started on it.

A node's directory holds

    node.json      what it shall be (by `spawn` and `extend`, replaced whole): name, user, home, lease_end …
    host_key       its private host key, 0600
    server.json    what it is (by the server alone): pid, start time, port, and in the end why it ended
    lock           an flock that the server holds as long as it lives: from `spawn` on, so it is never in doubt
    server.log     what the server had to complain about

The server admits one user with one key, runs commands and SFTP, and lives until its lease ends, until `end` is
called, or until its directory is gone. Whatever was started on it carries LLMCTL_NODE and LLMCTL_NODE_DIRECTORY in its
environment and, on Linux, becomes the server's child when orphaned: so nothing survives the node. Times are POSIX
seconds of the wall clock, because a lease goes on while a laptop sleeps.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import site
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from provisioning import keys
from trainer import processes

if TYPE_CHECKING:
    import psutil

MARK = "LLMCTL_NODE_DIRECTORY"
GRACE_SECONDS = 2.0
"""Between asking a node's processes to end and making them."""
END_SECONDS = 15.0
_START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from pathlib import Path; from provisioning.local_node import serve; serve(Path(sys.argv[1]))"
)
"""The server imports what this process can import, also where that comes from PYTHONPATH or the user's own packages."""
_INHERITED = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "TZ")
"""All that a node takes from its starter's environment besides PATH: what describes the machine, nothing secret."""


class NodeEndError(Exception):
    """Processes of a node withstood SIGKILL (an uninterruptible disk or driver call)."""

    exit_code = 8
    code = "node_still_runs"

    def __init__(self, directory: Path, pids: Sequence[int]) -> None:
        super().__init__(
            f"node {directory.name}: processes {', '.join(map(str, pids))} did not end when killed"
        )
        self.hint = "they wait for a device or a disk; try again in a minute, or restart this machine"


@dataclass(frozen=True)
class State:
    """One node as its directory tells it."""

    name: str
    user: str
    home: Path
    host: str
    status: Literal["booting", "active", "terminating", "terminated"]
    host_public_key: str
    lease_end: float | None
    spawned: float
    port: int | None = None
    pid: int | None = None
    started: str | None = None
    """Start time of the process `pid`, so that a reused number is not mistaken for it."""
    ended: float | None = None
    reason: str = ""


def spawn(
    directory: Path,
    *,
    name: str,
    user: str,
    authorized_key: str,
    host_private_key: str | None,
    home: Path,
    lease_end: float | None,
    env: Mapping[str, str] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    hold: Sequence[int] = (),
) -> None:
    """Start the node's server, detached from this process, and return at once; `read` tells when it is active.

    A node that lives already is left alone. `host_private_key` None: the node makes its own. `env` is added to every
    process on the node; `port` 0 takes a free one. The descriptors in `hold` stay open as long as the server lives:
    an flock on one of them is the node's.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(directory) as lock:
        if lock is None:
            return
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (directory / "server.json").unlink(missing_ok=True)
        (directory / "host_key").unlink(missing_ok=True)
        keys.write_private(directory / "host_key", host_private_key or keys.generate(name).private)
        wanted: dict[str, Any] = {
            "name": name,
            "user": user,
            "authorized_key": authorized_key,
            "home": str(home.resolve()),
            "lease_end": lease_end,
            "env": dict(env or {}),
            "host": host,
            "port": port,
            "spawned": time.time(),
            "ending": False,
            "path": os.environ.get("PATH", os.defpath),
        }
        _write(directory / "node.json", wanted)
        kept = {key: os.environ[key] for key in _INHERITED if key in os.environ}
        if site.ENABLE_USER_SITE:  # torch installed with `pip --user`: the node has another HOME
            kept["PYTHONUSERBASE"] = site.getuserbase()
        with (directory / "server.log").open("ab") as log:
            subprocess.run(
                [sys.executable, "-P", "-c", _START, str(directory.resolve()), *filter(None, sys.path)],
                env={"PATH": wanted["path"], "HOME": wanted["home"], "LANG": "C.UTF-8", **kept},
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(lock, *hold),
                check=True,
            )


def read(directory: Path) -> State | None:
    """The node in `directory`, or None where none was ever spawned."""
    wanted, alive, is_ = (
        _json(directory / "node.json"),
        lives(directory),
        _json(directory / "server.json") or {},
    )
    if wanted is None:
        return None
    port = is_.get("port")
    living: Literal["booting", "active", "terminating"] = "booting" if port is None else "active"
    try:
        host_public_key = keys.public_key(directory / "host_key")
    except keys.KeyFileError:
        host_public_key = ""
    return State(
        name=wanted["name"],
        user=wanted["user"],
        home=Path(wanted["home"]),
        host=wanted["host"],
        status=("terminating" if wanted["ending"] else living) if alive else "terminated",
        host_public_key=host_public_key,
        lease_end=wanted["lease_end"],
        spawned=wanted["spawned"],
        port=port,
        pid=is_.get("pid"),
        started=is_.get("started"),
        ended=is_.get("ended"),
        reason="" if alive else is_.get("reason", "its server was killed"),
    )


def lives(directory: Path) -> bool:
    """Whether the node's server lives: it holds the lock."""
    try:
        descriptor = os.open(directory / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def extend(directory: Path, lease_end: float | None) -> None:
    """Move the end of the lease; the server looks once a second."""
    _change(directory, lease_end=lease_end)


def end(directory: Path, *, grace_seconds: float = GRACE_SECONDS) -> None:
    """End the server and every process started on the node; returns when none is left. A second call is harmless.

    Processes get SIGTERM, after `grace_seconds` SIGKILL. Raises NodeEndError if even that is not enough.
    """
    if not (directory / "node.json").exists():
        return
    _change(directory, ending=True)
    deadline = time.monotonic() + grace_seconds + END_SECONDS
    asked = False
    while lives(directory):
        server = _server(directory)
        if server is not None and time.monotonic() > deadline:
            _signal([server, *_children(server)], signal.SIGKILL)
        elif server is not None and not asked:
            _signal([server], signal.SIGTERM)
            asked = True
        if time.monotonic() > deadline + END_SECONDS:
            raise NodeEndError(directory, [server.pid] if server else [])
        time.sleep(0.02)
    sweep(directory, grace_seconds)


def sweep(directory: Path, grace_seconds: float, parent: psutil.Process | None = None) -> None:
    """End every process that carries the node's mark or descends from `parent`, and wait until none is left."""
    hard = time.monotonic() + grace_seconds
    asked: set[int] = set()
    while left := _left(directory, parent):
        now = time.monotonic()
        if now > hard + END_SECONDS:
            raise NodeEndError(directory, [process.pid for process in left])
        fresh = [process for process in left if process.pid not in asked]
        _signal(left if now > hard else fresh, signal.SIGKILL if now > hard else signal.SIGTERM)
        asked.update(process.pid for process in fresh)
        time.sleep(0.02)


def _left(directory: Path, parent: psutil.Process | None) -> list[psutil.Process]:
    import psutil

    mark, found = str(directory.resolve()), {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.pid != os.getpid():
                found[process.pid] = process
    if parent is not None:
        found |= {process.pid: process for process in _children(parent)}
    alive = []
    for process in found.values():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
            elif process.ppid() == os.getpid():
                _reap(process.pid)
    return alive


def _children(parent: psutil.Process) -> list[psutil.Process]:
    import psutil

    try:
        return parent.children(recursive=True)
    except psutil.Error:
        return []


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def _server(directory: Path) -> psutil.Process | None:
    """The node's server process, if it has introduced itself and still is the one it was."""
    import psutil

    is_ = _json(directory / "server.json") or {}
    with suppress(psutil.Error):
        if processes.same(is_.get("pid"), is_.get("started")):
            return psutil.Process(is_["pid"])
    return None


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def serve(directory: Path) -> None:
    """Be the server of the node in `directory`, in a process that belongs to nobody. For `spawn`; returns in the caller
    as soon as the server is on its way."""
    if os.fork():
        return
    import psutil

    from provisioning import local_server

    me = psutil.Process()
    introduction: dict[str, object] = {"pid": me.pid, "started": processes.start_time(me.pid)}
    _write(directory / "server.json", introduction)
    try:
        reason = local_server.run(directory, introduction)
        sweep(directory, GRACE_SECONDS, me)
    except OSError as error:
        reason = f"it could not start: {error}"
    if directory.exists():
        _write(directory / "server.json", introduction | {"ended": time.time(), "reason": reason})
    os._exit(0)


def wanted(directory: Path) -> dict[str, Any] | None:
    """node.json, for the server; None when it is gone."""
    return _json(directory / "node.json")


def announce(directory: Path, introduction: Mapping[str, object], port: int) -> None:
    """The server listens."""
    _write(directory / "server.json", {**introduction, "port": port})


@contextmanager
def _locked(directory: Path) -> Iterator[int | None]:
    """The node's lock, or None where its server has it. A reader holds it for an instant only, hence the short wait."""
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for _ in range(50):
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield descriptor
                return
            if _json(directory / "server.json") is not None:
                break
            time.sleep(0.01)
        yield None
    finally:
        os.close(descriptor)


def _change(directory: Path, **fields: object) -> None:
    with (directory / "change.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = _json(directory / "node.json")
        if wanted is not None:
            _write(directory / "node.json", wanted | fields)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return loaded


def _write(path: Path, value: Mapping[str, object]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    keys.write_private(temporary, json.dumps(value, indent=1))
    temporary.replace(path)
