"""What the harness puts between llmctl and the outside: a tap on the provider's API, and a link to each node that can be cut.

The tap passes every request on to the Lambda-shaped server. Before one that rents or ends an instance it copies the database and
opens the copy: the intent must be in it. It may also do something exactly as a request arrives, or after the server has acted on it.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from runs.events import node_stream
from runs.facts import Marker
from tests.nodes import Proxy as Wire

When = Literal["before", "after"]
Row = tuple[str, str, dict[str, Any]]
"""(stream, kind, body) of an event."""


@dataclass
class Trap:
    """What happens at one request."""

    match: str
    when: When
    action: Callable[[], None]
    skip: int
    """So many matching requests pass first."""
    sprung: threading.Event


class Tap:
    """The API as llmctl sees it. `home`: the LLMCTL_HOME whose database must hold each intent."""

    def __init__(self, target: str, home: Path) -> None:
        parts = urlsplit(target)
        self.host, self.port, self.home = parts.hostname or "", parts.port, home
        self.calls: list[str] = []
        self.announced = 0
        """Launches and terminations whose intent was found in the copy."""
        self.unannounced: list[str] = []
        self._traps: list[Trap] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.tap = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}{parts.path}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def at(self, match: str, when: When, action: Callable[[], None], skip: int = 0) -> threading.Event:
        """Do `action` at the next request whose `METHOD /path` contains `match`; with `before` the server never sees that request,
        and with neither does anybody get an answer."""
        trap = Trap(match, when, action, skip, threading.Event())
        with self._lock:
            self._traps.append(trap)
        return trap.sprung

    def spring(self, call: str, when: When) -> bool:
        """Do what was asked for at this call, if anything was."""
        with self._lock:
            found = next((trap for trap in self._traps if trap.when == when and trap.match in call), None)
            if found is None:
                return False
            found.skip -= 1
            if found.skip >= 0:
                return False
            self._traps.remove(found)
        found.action()
        found.sprung.set()
        return True

    def check(self, call: str, body: bytes) -> None:
        """Before a call that changes the bill: is its intent on disk?"""
        self.calls.append(call)
        if not call.endswith(("/launch", "/terminate")):
            return
        document, rows = json.loads(body), copied(self.home)
        if call.endswith("/launch"):
            missing = [] if intended(rows, document["name"]) else [f"launch of {document['name']}"]
        else:
            missing = [f"end of {node}" for node in document["instance_ids"] if not ending(rows, node)]
        self.unannounced += missing
        self.announced += not missing


def copied(home: Path) -> list[Row]:
    """The events in a copy of the database's files as they are now. A copy during which they changed is made again."""
    names = ("llmctl.db-wal", "llmctl.db")
    for _ in range(50):
        with tempfile.TemporaryDirectory(prefix="llmctl-copy-") as folder:
            before = [_state(home / name) for name in names]
            for name in names:
                with suppress(FileNotFoundError):
                    shutil.copy2(home / name, Path(folder) / name)
            if [_state(home / name) for name in names] != before:
                continue
            with closing(sqlite3.connect(Path(folder) / "llmctl.db")) as database:
                found = database.execute("SELECT stream, kind, body FROM events ORDER BY seq").fetchall()
            return [(stream, kind, json.loads(body)) for stream, kind, body in found]
    raise AssertionError("the database never stood still")


def _state(path: Path) -> tuple[int, int] | None:
    try:
        info = path.stat()
    except FileNotFoundError:
        return None
    return info.st_size, info.st_mtime_ns


def intended(rows: list[Row], name: str) -> bool:
    """An open intent to launch the node of that name."""
    marker = Marker.parse(name)
    assert marker is not None, f"{name} is no name of ours"
    kinds = [kind for stream, kind, _ in rows if stream == node_stream(marker.key)]
    return kinds[-1:] == ["LaunchIntended"]


def ending(rows: list[Row], node: str) -> bool:
    """An open intent to end the node with that id."""
    streams = {
        stream
        for stream, kind, body in rows
        if kind in {"LaunchAnswered", "LaunchFound"} and body["id"] == node
    }
    kinds = [
        kind
        for stream, kind, _ in rows
        if stream in streams and kind in {"TerminateIntended", "TerminateAnswered"}
    ]
    return kinds[-1:] == ["TerminateIntended"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self._pass("GET")

    def do_POST(self) -> None:
        self._pass("POST")

    def _pass(self, method: str) -> None:
        tap: Tap = self.server.tap  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        call = f"{method} {urlsplit(self.path).path}"
        tap.check(call, body)
        answer = None if tap.spring(call, "before") else self._forward(tap, method, body)
        if answer is not None and tap.spring(call, "after"):
            answer = None
        self._answer(answer)

    def _forward(self, tap: Tap, method: str, body: bytes) -> tuple[int, bytes, dict[str, str]] | None:
        """The server's answer; None where it gives none."""
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in {"host", "connection"}
        }
        with closing(http.client.HTTPConnection(tap.host, tap.port, timeout=60)) as connection:
            try:
                connection.request(method, self.path, body or None, headers)
                response = connection.getresponse()
                kept = {
                    name: value
                    for name, value in response.getheaders()
                    if name in {"Content-Type", "Retry-After"}
                }
                return response.status, response.read(), kept
            except (OSError, http.client.HTTPException):
                return None

    def _answer(self, answer: tuple[int, bytes, dict[str, str]] | None) -> None:
        self.close_connection = True
        with suppress(OSError):
            if answer is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, body, headers = answer
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body)), "Connection": "close"}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)


class Proxy(Wire):
    """A link whose far end may move."""

    @property
    def target(self) -> int:
        """The port that connections are carried to."""
        return self._target

    @target.setter
    def target(self, port: int) -> None:
        self._target = port

    def carried(self, count: int) -> bool:
        """Whether so many bytes have passed."""
        return self.bytes >= count


class Links:
    """A Proxy in front of every node's SSH port. `source` is the server's file of ports, `file` the one that llmctl reads."""

    def __init__(self, source: Path, file: Path) -> None:
        self.source, self.file = source, file
        self._proxies: dict[str, Proxy] = {}
        self._ports: dict[str, int] = {}
        self._lock, self._over = threading.RLock(), threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def of(self, node: str) -> Proxy:
        """The link to a node."""
        with self._lock:
            return self._proxies[node]

    def route(self, node: str, port: int) -> None:
        """The node's server listens at another port; nobody here sees that."""
        self.of(node).target = port

    def readdress(self, node: str, port: int) -> None:
        """The node has a new address, at which its server listens on `port`; the old one is dead."""
        with self._lock:
            old, self._proxies[node] = self._proxies[node], Proxy(port)
            self._publish()
        old.close()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        for proxy in self._proxies.values():
            proxy.close()

    def _work(self) -> None:
        while not self._over.wait(0.02):
            with suppress(ValueError), self._lock:
                self._take(json.loads(self.source.read_text()))

    def _take(self, ports: dict[str, int]) -> None:
        for node, port in ports.items():
            if self._ports.get(node) == port:
                continue
            self._ports[node] = port
            if node in self._proxies:
                self._proxies[node].target = port
            else:
                self._proxies[node] = Proxy(port)
                self._publish()

    def _publish(self) -> None:
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps({node: proxy.port for node, proxy in self._proxies.items()}))
        temporary.replace(self.file)
