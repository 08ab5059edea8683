"""Real SSH nodes for tests, and a link between here and there that a test may slow down, stall or cut.

In a test module:  from tests.nodes import node, sshd  # noqa: F401

`node` is the product's own local node in a folder of its own; `sshd` is OpenSSH's server, skipped where there is none;
`any_node` is a test on both. `link(node)` puts a Proxy in front of either.
"""

from __future__ import annotations

import asyncio
import dataclasses
import getpass
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.remote import openssh
from orchestrator.remote.node import Address, Remote
from provisioning import keys, local_node

KEY = "llmctl-test-ab12-a1-n0"


def until(look: Callable[[], Any], seconds: float = 30) -> Any:
    """The first truthy answer of `look`, which has a third of the time at most: it takes that of those it waits for."""
    deadline = time.monotonic() + seconds
    while (began := time.monotonic()) < deadline:
        if found := look():
            return found
        time.sleep(max(0.01, 2 * (time.monotonic() - began)))
    raise TimeoutError("it did not happen")


@dataclass
class Node:
    """A machine that answers SSH."""

    address: Address
    home: Path
    """The home directory of its user, as this machine sees it."""
    directory: Path | None = None
    """The state of a local node."""

    def remote(self) -> Remote:
        return Remote(self.address)

    def at(self, port: int) -> Node:
        """The same machine through another port."""
        return dataclasses.replace(self, address=dataclasses.replace(self.address, port=port))


def accounts(folder: Path) -> tuple[Path, keys.KeyPair, Path]:
    """(client key, host key pair, known_hosts with that host key) below an LLMCTL_HOME `folder`."""
    client, host = keys.client_key(folder), keys.host_key(folder, KEY)
    keys.pin(keys.known_hosts(folder, KEY), host.public)
    return client, host, keys.known_hosts(folder, KEY)


@contextmanager
def local(folder: Path, **options: Any) -> Iterator[Node]:
    """A local node below `folder`; its end is checked to be one."""
    client, host, known = accounts(folder)
    directory, home = folder / "nodes" / KEY, folder / "node-home" / "0"
    wanted: dict[str, Any] = {"lease_end": time.time() + 600} | options
    local_node.spawn(
        directory,
        name=KEY,
        user="someone",
        authorized_key=keys.public_key(client),
        host_private_key=host.private,
        home=home,
        **wanted,
    )
    try:
        state = until(lambda: (found := local_node.read(directory)) and found.status == "active" and found)
        yield Node(Address("127.0.0.1", state.port, "someone", client, known, KEY), home, directory)
    finally:
        local_node.end(directory, grace_seconds=0.5)
        assert processes(directory) == []


def processes(directory: Path) -> list[str]:
    """The command lines of everything that carries the mark of the node in `directory`."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get(local_node.MARK) == str(directory.resolve())
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


@contextmanager
def real_sshd(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    prefix: Sequence[str] = (),
    client: Path | None = None,
) -> Iterator[Node]:
    """OpenSSH's sshd, its user's home moved below `folder`; on loopback and any port unless said otherwise. `prefix`: a
    command that runs it elsewhere; `client`: the key that may log in, instead of one of its own."""
    binary = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin:/opt/homebrew/sbin")
    if binary is None:
        pytest.skip("no sshd on this machine")
    own, host_pair, known = accounts(folder)
    client = client or own
    place, home = folder / "sshd", folder / "home"
    place.mkdir()
    home.mkdir()
    keys.write_private(place / "host_key", host_pair.private)
    (place / "authorized_keys").write_text(keys.public_key(client) + "\n")
    enter = place / "enter"
    enter.write_text(
        f'cd {home} && export HOME={home} PATH="{os.environ["PATH"]}" && exec sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    if not port:
        with socket.socket() as free:
            free.bind((host, 0))
            port = free.getsockname()[1]
    options = {
        "Port": port,
        "ListenAddress": host,
        "HostKey": place / "host_key",
        "AuthorizedKeysFile": place / "authorized_keys",
        "PidFile": place / "pid",
        "UsePAM": "no",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "yes",
        "ForceCommand": f"sh {enter}",
        "SetEnv": "SHLVL=1",  # else bash reads the .bashrc of whoever runs the tests, whatever that takes
    }
    (place / "conf").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (place / "log").open("wb") as log:
        server = subprocess.Popen([*prefix, binary, "-D", "-e", "-f", str(place / "conf")], stderr=log)
    try:
        address = Address(host, port, getpass.getuser(), client, known, KEY)
        try:
            until(lambda: server.poll() is None and answers(port, host), 10)
        except TimeoutError:
            pytest.skip(f"sshd does not start here: {(place / 'log').read_text().strip()}")
        yield Node(address, home)
    finally:
        server.terminate()
        server.wait()


def answers(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something listens."""
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


class Proxy:
    """A TCP link to `port` on this machine, with a delay each way; `stall` keeps connections and moves nothing, as when a
    cable is pulled; `cut` resets them; `refuse` takes no new ones."""

    def __init__(self, port: int, delay_seconds: float = 0.0) -> None:
        self._target, self._delay = port, delay_seconds
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._carrying: set[asyncio.Future[None]] = set()
        self.connections = 0
        self.bytes = 0
        """Carried so far, both ways."""
        self.exchanges = 0
        """How often the far end had something to say after the near end had."""
        self._asked = False
        self.cut_at: int | None = None
        """Cut once, when so many bytes were carried."""
        ready = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut everything and listen no more."""
        if self._thread.is_alive():
            self.cut()
            self._call(self._over.set)
            self._thread.join()

    def stall(self) -> None:
        self._call(self._flowing.clear)

    def flow(self) -> None:
        self._call(self._flowing.set)

    def cut(self) -> None:
        self._call(self._reset)

    def _call(self, function: Callable[[], object]) -> None:
        done = threading.Event()

        def work() -> None:
            function()
            done.set()

        self._loop.call_soon_threadsafe(work)
        done.wait()

    def _reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def _work(self, ready: threading.Event) -> None:
        self._loop.run_until_complete(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        self._over = asyncio.Event()
        self._flowing.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._over.wait()
        server.close()
        self._reset()
        self._flowing.set()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    async def _accept(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far, forth = await asyncio.open_connection("127.0.0.1", self._target, limit=1 << 20)
        except OSError:
            back.transport.abort()
            return
        for writer in (back, forth):
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._writers |= {back, forth}
        tasks = {
            asyncio.ensure_future(self._carry(near, forth, asks=True)),
            asyncio.ensure_future(self._carry(far, back, asks=False)),
        }
        self._carrying |= tasks
        await asyncio.wait(tasks)
        self._carrying -= tasks
        self._writers -= {back, forth}

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asks: bool) -> None:
        try:
            while data := await reader.read(1 << 18):
                await self._flowing.wait()
                self.bytes += len(data)
                self.exchanges += self._asked and not asks
                self._asked = asks
                if self.cut_at is not None and self.bytes >= self.cut_at:
                    self.cut_at = None
                    self._reset()
                    break
                if self._delay:
                    self._loop.call_later(self._delay, self._write, writer, data)
                else:
                    writer.write(data)
                    await writer.drain()
            if self._delay:
                await asyncio.sleep(self._delay + 0.001)
            writer.close()
        except OSError:
            writer.transport.abort()

    @staticmethod
    def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
        if not writer.is_closing():
            writer.write(data)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with local(tmp_path) as made:
        yield made
        stop_master(made)


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Node]:
    with real_sshd(tmp_path) as made:
        yield made
        stop_master(made)


@pytest.fixture(params=[local, real_sshd], ids=["local", "sshd"])
def any_node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node]:
    with request.param(tmp_path) as made:
        yield made
        stop_master(made)


def stop_master(node: Node) -> None:
    """End the ControlMaster of a node that a test is done with."""
    if openssh.available():
        openssh.Carrier(node.address).stop()
