"""The SSH server inside a local node: one user, one key, commands and SFTP, as sshd would do them."""

from __future__ import annotations

import asyncio
import ctypes
import ctypes.util
import fcntl
import os
import signal
import struct
import sys
import termios
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from provisioning import local_node

TICK_SECONDS = 1.0
_BLOCK = 1 << 18
_SET_CHILD_SUBREAPER = 36  # prctl(2), linux/prctl.h


def run(directory: Path, introduction: Mapping[str, object]) -> str:
    """Serve until something ends the node; returns why. Raises OSError when the port cannot be had."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGHUP, lambda *_: None)  # SIG_IGN would be inherited by every process on the node
    _load_asyncssh()
    return asyncio.run(_serve(directory, introduction))


def _load_asyncssh() -> None:
    """asyncssh without a few ciphers that nobody needs on loopback: it searches their libraries with ldconfig, gcc and ld, a quarter
    of the time that it takes to load."""
    search = ctypes.util.find_library
    ctypes.util.find_library = lambda name: None  # noqa: ARG005 - the name is the signature's
    try:
        import asyncssh  # noqa: F401
    finally:
        ctypes.util.find_library = search


async def _serve(directory: Path, introduction: Mapping[str, object]) -> str:
    import asyncssh

    wanted = local_node.wanted(directory)
    if wanted is None:
        return "its directory was removed"
    os.chdir(wanted["home"])
    stop = asyncio.Event()
    children = _Children()
    loop = asyncio.get_running_loop()

    def terminate() -> None:
        stop.set()
        children.changed.set()

    loop.add_signal_handler(signal.SIGTERM, terminate)
    loop.add_signal_handler(signal.SIGCHLD, children.changed.set)
    user, authorized = wanted["user"], asyncssh.import_public_key(wanted["authorized_key"])

    class Gate(asyncssh.SSHServer):  # type: ignore[misc]  # asyncssh is not followed by mypy
        """Public-key login of the node's one user."""

        def begin_auth(self, _username: str) -> bool:
            return True

        def public_key_auth_supported(self) -> bool:
            return True

        def validate_public_key(self, username: str, key: object) -> bool:
            return username == user and bool(key == authorized)

    environment = _environment(directory, wanted)

    async def session(process: Any) -> None:
        with suppress(asyncssh.Error, OSError):
            await _session(process, environment, children)

    server = await asyncssh.create_server(
        Gate,
        wanted["host"],
        wanted["port"],
        server_host_keys=[asyncssh.import_private_key((directory / "host_key").read_text())],
        process_factory=session,
        sftp_factory=True,
        encoding=None,
        line_editor=False,
        agent_forwarding=False,
        keepalive_interval=15,
        keepalive_count_max=4,
    )
    local_node.announce(directory, introduction, server.sockets[0].getsockname()[1])
    reason = await _until_over(directory, stop, children)
    server.close()
    return reason


async def _until_over(directory: Path, stop: asyncio.Event, children: _Children) -> str:
    """Wait for SIGTERM, `end`, the end of the lease or the loss of the directory; says which it was."""
    while not stop.is_set():
        wanted = local_node.wanted(directory)
        if wanted is None:
            return "its directory was removed"
        if wanted["ending"]:
            break
        if wanted["lease_end"] is not None and time.time() >= wanted["lease_end"]:
            return "its lease ended"
        children.reap_adopted()
        children.changed.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(children.changed.wait(), TICK_SECONDS)
    return "it was terminated"


@dataclass
class _Children:
    """The processes that this server started itself; asyncio waits for them. Others were adopted."""

    own: set[int] = field(default_factory=set)
    starting: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def reap_adopted(self) -> None:
        """Collect adopted processes that ended."""
        while not self.starting:  # while one starts, its pid is not in `own` yet
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in self.own:
                return
            with suppress(ChildProcessError):
                os.waitpid(ended.si_pid, os.WNOHANG)


def _environment(directory: Path, wanted: Mapping[str, Any]) -> dict[str, str]:
    """What a process on the node sees. Its first python3 is the one that runs llmctl."""
    path = [
        str(Path(sys.executable).parent),
        *(part for part in wanted["path"].split(":") if part.startswith("/")),
    ]
    return {
        **os.environ,
        "HOME": wanted["home"],
        "USER": wanted["user"],
        "LOGNAME": wanted["user"],
        "SHELL": _shell(),
        "LANG": "C.UTF-8",
        "PATH": ":".join(dict.fromkeys(path)),
        **wanted["env"],
        "LLMCTL_NODE": wanted["name"],
        local_node.MARK: str(directory),
    }


def _shell() -> str:
    return "/bin/bash" if Path("/bin/bash").exists() else "/bin/sh"


async def _session(process: Any, environment: Mapping[str, str], children: _Children) -> None:
    """Run one command (or a login shell) as sshd does: in a session of its own, hung up when the client is gone."""
    terminal = process.term_type is not None
    command = [_shell(), "-c", process.command] if process.command is not None else [_shell(), "-l"]
    ours, theirs = _terminal(process.term_size) if terminal else _pipes()
    children.starting += 1
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=theirs[0],
            stdout=theirs[1],
            stderr=theirs[2],
            env={**environment, "TERM": process.term_type} if terminal else environment,
            start_new_session=True,
            preexec_fn=_take_terminal if terminal else None,  # one ioctl, safe between fork and exec
        )
    except OSError:
        for descriptor in {*ours, *theirs}:
            os.close(descriptor)
        process.exit(127)
        return
    else:
        children.own.add(child.pid)
    finally:
        children.starting -= 1
    for descriptor in set(theirs):
        os.close(descriptor)
    feeding = asyncio.ensure_future(_feed(process, ours[0], child.pid))
    # send_eof: the end of one of the two would end both at the client.
    await process.redirect_stdout(ours[1], bufsize=_BLOCK, send_eof=False)
    if not terminal:
        await process.redirect_stderr(ours[2], bufsize=_BLOCK, send_eof=False)
    ended, gone = asyncio.ensure_future(child.wait()), asyncio.ensure_future(process.channel.wait_closed())
    await asyncio.wait((ended, gone), return_when=asyncio.FIRST_COMPLETED)
    if gone.done():
        _send(child.pid, signal.SIGHUP)
    status = await ended
    children.own.discard(child.pid)
    feeding.cancel()
    if not gone.done():
        await process.stdout.drain()
        await process.stderr.drain()
        _report(process, status)
    await gone


async def _feed(process: Any, descriptor: int, pid: int) -> None:
    """Carry the client's input to the child. asyncssh's own redirection into a pipe loses the tail when the input ends
    while the pipe is full (asyncio closes a pipe that was refilled from `resume_writing`; seen with CPython 3.11)."""
    import asyncssh

    os.set_blocking(descriptor, False)
    try:
        while True:
            try:
                data = await process.stdin.read(_BLOCK)
            except asyncssh.TerminalSizeChanged as size:
                with suppress(OSError):
                    _resize(descriptor, (size.width, size.height, size.pixwidth, size.pixheight))
                continue
            except (asyncssh.SignalReceived, asyncssh.BreakReceived) as asked:
                _send(pid, getattr(signal, f"SIG{getattr(asked, 'signal', 'INT')}", signal.SIGTERM))
                continue
            if not data:
                return
            with suppress(BrokenPipeError):
                await _write_all(descriptor, memoryview(data))
    finally:
        os.close(descriptor)


async def _write_all(descriptor: int, data: memoryview) -> None:
    loop = asyncio.get_running_loop()
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(descriptor, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(descriptor)


def _send(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _report(process: Any, status: int) -> None:
    if status >= 0:
        process.exit(status)
    else:
        process.exit_with_signal(signal.Signals(-status).name.removeprefix("SIG"))


def _pipes() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(our ends, the child's ends) of stdin, stdout, stderr."""
    (their_in, our_in), (our_out, their_out), (our_error, their_error) = os.pipe(), os.pipe(), os.pipe()
    return (our_in, our_out, our_error), (their_in, their_out, their_error)


def _terminal(size: tuple[int, int, int, int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    master, slave = os.openpty()
    _resize(slave, size)
    return (master, os.dup(master), master), (slave, slave, slave)


def _resize(descriptor: int, size: tuple[int, int, int, int]) -> None:
    columns, rows, width, height = size
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, width, height))


def _take_terminal() -> None:
    """In the child: make its standard input the terminal that Ctrl-C and hang-ups come from."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
