"""A file that grows on a node, followed: each byte once, over reconnections, and nothing left behind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from orchestrator.remote import stream
from orchestrator.remote.node import CommandFailed, NodeUnreachable
from orchestrator.remote.stream import follow
from tests.nodes import Node, Proxy, any_node, node, processes, until

__all__ = ["any_node", "node"]


class Follower:
    """A thread that collects what `follow` yields."""

    def __init__(self, node: Node, path: str, offset: int = 0, **options: float) -> None:
        self.data, self.ticks, self.stop = bytearray(), 0, threading.Event()
        self.error: Exception | None = None
        self.remote = node.remote()
        self._thread = threading.Thread(target=self._work, args=(path, offset), kwargs=options)
        self._thread.start()

    def _work(self, path: str, offset: int, **options: float) -> None:
        try:
            for data in follow(self.remote, path, offset, stop=self.stop, **options):
                self.data += data
                self.ticks += not data
        except (CommandFailed, NodeUnreachable) as error:
            self.error = error

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join()
        self.remote.close()


def test_from_a_byte_on_and_then_live(any_node: Node) -> None:
    log = any_node.home / "my log"
    log.write_bytes(b"old\nfirst\n")
    with Follower(any_node, "~/my log", 4) as follower:
        until(lambda: follower.data == b"first\n")
        for index in range(50):
            with log.open("ab") as file:
                file.write(b"line %d\n" % index)
        until(lambda: follower.data.endswith(b"line 49\n"))
        until(lambda: follower.ticks)
    assert bytes(follower.data) == log.read_bytes()[4:]


def test_a_file_that_comes_later(node: Node) -> None:
    with Follower(node, "later") as follower:
        until(lambda: follower.ticks)
        (node.home / "later").write_bytes(b"here\n")
        until(lambda: follower.data == b"here\n")


def test_each_byte_once_over_cuts_and_stalls(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SILENT_SECONDS", 2.5)
    log = node.home / "log"
    written = threading.Event()

    def write() -> None:
        with log.open("wb", buffering=0) as file:
            for index in range(60_000):
                file.write(b"%d %s\n" % (index, b"x" * 200))
        written.set()

    log.touch()
    with Proxy(node.address.port) as proxy, Follower(node.at(proxy.port), "log") as follower:
        writer = threading.Thread(target=write)
        writer.start()
        for step in range(1, 4):
            until(lambda step=step: len(follower.data) > step * 1_000_000)
            proxy.cut()
        until(lambda: len(follower.data) > 4_000_000)
        proxy.stall()
        connections = proxy.connections
        written.wait()
        until(lambda: follower.remote.connections > 4 or proxy.connections > connections)
        proxy.flow()
        writer.join()
        until(lambda: len(follower.data) >= log.stat().st_size)
    assert bytes(follower.data) == log.read_bytes()


def test_nothing_is_left_on_the_node(node: Node) -> None:
    assert node.directory is not None
    (node.home / "log").write_bytes(b"x\n")
    with Follower(node, "log") as follower:
        until(lambda: follower.data)
        assert any("log" in line for line in processes(node.directory))
    until(lambda: not processes(node.directory))


def test_gives_up_after_patience(node: Node) -> None:
    with (
        Proxy(node.address.port) as proxy,
        Follower(node.at(proxy.port), "log", patience_seconds=0.5) as follower,
    ):
        until(lambda: follower.ticks)
        proxy.close()
        until(lambda: follower.error)
    assert isinstance(follower.error, NodeUnreachable)


def test_a_folder_cannot_be_followed(node: Node, tmp_path: Path) -> None:
    (node.home / "folder").mkdir()
    with Follower(node, "folder") as follower:
        until(lambda: follower.error)
    assert isinstance(follower.error, CommandFailed)


def test_a_reader_that_takes_nothing_is_sent_one_window(node: Node) -> None:
    """Catching up with a long log holds no more than that in memory, however slow the reader is."""
    with (node.home / "log").open("wb") as log:
        log.truncate(300 << 20)
    with Proxy(node.address.port) as proxy, node.at(proxy.port).remote() as remote:
        reader = follow(remote, "log")
        seen = len(next(reader))
        until(lambda: proxy.bytes > stream.WINDOW)
        for _ in range(3):  # whatever else could be sent would come before the answers
            remote.run(["true"])
        assert proxy.bytes < stream.WINDOW * 1.25
        while seen < 3 * stream.WINDOW:
            seen += len(next(reader))
        assert proxy.bytes < stream.WINDOW * 5
