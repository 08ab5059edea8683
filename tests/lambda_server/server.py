"""The HTTP face: authentication, rate limits, faults on demand, and validation of what comes in and goes out."""

from __future__ import annotations

import base64
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pydantic import ValidationError

from tests.lambda_server import schema
from tests.lambda_server.nodes import Nodes
from tests.lambda_server.switches import Fault, Switches
from tests.lambda_server.world import GONE, INVALID, RefusalError, World

PREFIX = "/api/v1"
SUGGESTION = "See the documentation."


class LambdaServer:
    """The server on a loopback port. `real_nodes` False: instances exist on paper only. `clock` is for tests that move
    time themselves; they call `world.advance()` too."""

    def __init__(
        self,
        directory: Path,
        switches: Switches | None = None,
        *,
        port: int = 0,
        real_nodes: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.key = f"secret_test_{secrets.token_hex(12)}"
        self.nodes = Nodes(directory) if real_nodes else None
        self.world = World(switches or Switches(), clock, self.nodes)
        self.requests: list[dict[str, Any]] = []
        self.violations: list[str] = []
        self.clock = clock
        self.last: dict[str, float] = {}
        self.fired: set[str] = set()
        self.armed: set[str] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._http.daemon_threads = True
        self._http.owner = self  # type: ignore[attr-defined]
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})]
        if real_nodes:
            self._threads.append(threading.Thread(target=self._tick))

    @property
    def address(self) -> str:
        """http://127.0.0.1:PORT"""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def url(self) -> str:
        """For LAMBDA_API_BASE_URL."""
        return self.address + PREFIX

    def start(self) -> LambdaServer:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """End the server and every node."""
        self._stopping.set()
        self._http.shutdown()
        self._http.server_close()
        for thread in self._threads:
            thread.join()
        if self.nodes is not None:
            self.nodes.end_all()

    def _tick(self) -> None:
        while not self._stopping.wait(0.05):
            with self.world.lock:
                self.world.advance()

    def fault(self, method: str, path: str) -> Fault | None:
        """The next fault that is meant for this request, with or without the prefix of its path; it is used up."""
        world = self.world
        for index, fault in enumerate(world.switches.faults):
            if fault.match in f"{method} {path} {method} {PREFIX}{path}":
                self.fired.add(f"{fault.kind} on {fault.match!r}")
                left = [*world.switches.faults]
                left[index] = fault.model_copy(update={"times": fault.times - 1})
                world.set({"faults": [item.model_dump() for item in left if item.times > 0]})
                return fault
        return None

    def too_fast(self, path: str) -> bool:
        """The documented limits; a refused request does not count."""
        switches, now = self.world.switches, self.clock()
        limits = {"any": switches.request_interval}
        if path.endswith("/launch"):
            limits["launch"] = switches.launch_interval
        if not switches.rate_limits:
            return False
        if any(
            now - self.last.get(name, 0.0) < self.world.real(limit) * 0.97 for name, limit in limits.items()
        ):
            return True
        self.last |= dict.fromkeys(limits, now)
        return False

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[str, dict[str, Any]]:
        """(path of the document, body of the 200). Raises RefusalError."""
        world = self.world
        identifier = path.removeprefix("/instances/")
        routes: dict[tuple[str, str], Callable[[], Any]] = {
            ("GET", "/instance-types"): world.types,
            ("GET", "/instances"): world.instances,
            ("GET", "/instances/{id}"): lambda: world.instance(identifier),
            ("POST", "/instances/{id}"): lambda: world.rename(identifier, body),
            ("POST", "/instance-operations/launch"): lambda: world.launch(body),
            ("POST", "/instance-operations/terminate"): lambda: world.terminate(body["instance_ids"]),
            ("GET", "/ssh-keys"): lambda: world.keys,
            ("POST", "/ssh-keys"): lambda: world.add_key(body),
            ("GET", "/file-systems"): world.filesystems,
            ("GET", "/audit-events"): lambda: world.audit_page(query.get("page_token")),
        }
        pattern = "/instances/{id}" if re.fullmatch(r"/instances/[^/]+", path) else path
        if (method, pattern) not in routes:
            raise RefusalError(404, "global/not-found", "The requested resource was not found.")
        if pattern == "/instances/{id}" and not re.fullmatch(r"[0-9a-f]{32}", identifier):
            raise RefusalError(400, INVALID, "The id is malformed.")
        if method == "POST":
            complaint = schema.complaint(PREFIX + pattern, method, "request", body)
            if complaint:
                self.violations.append(complaint)
                raise RefusalError(400, INVALID, complaint)
        data = routes[method, pattern]()
        page = {"page_token": data[1]} if pattern == "/audit-events" else {}
        return PREFIX + pattern, {"data": data[0] if page else data} | page

    def check(self, pattern: str, method: str, status: int, body: dict[str, Any]) -> None:
        """Keep what is wrong with an answer; a test that did not ask for it fails on that."""
        complaint = schema.complaint(pattern, method, str(status), body)
        if complaint:
            self.violations.append(complaint)

    def admin(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The test's own door: /admin/state, /admin/switches, /admin/fault, /admin/kill, /admin/foreign."""
        world = self.world
        if path == "/admin/switches" and body:
            world.set(body)
        elif path == "/admin/fault" and body:
            faults = [item.model_dump() for item in world.switches.faults]
            fault = Fault.model_validate(body)
            self.armed.add(f"{fault.kind} on {fault.match!r}")
            world.set({"faults": [*faults, fault.model_dump()]})
        elif path == "/admin/kill" and body:
            world.kill(body["id"], body["how"])
        elif path == "/admin/foreign" and body:
            self._foreign(body)
        world.advance()
        machines = [
            {"id": machine.id, "name": machine.name, "region": machine.request["region_name"]}
            | {
                "type": machine.request["instance_type_name"],
                "terminates": machine.terminates,
                "lies": machine.lies,
            }
            | {
                "status": machine.status(self.clock(), world.real(world.switches.terminating_seconds))
                or "vanished"
            }
            | {"user_data": "user_data" in machine.request, "keys": machine.request["ssh_key_names"]}
            for machine in world.machines.values()
        ]
        return {
            "machines": machines,
            "ledger": world.ledger(),
            "requests": self.requests,
            "violations": self.violations,
            "unfired": sorted(self.armed - self.fired),
            "switches": world.switches.model_dump(),
            "keys": world.keys,
        }

    def _foreign(self, body: dict[str, Any]) -> None:
        """Someone else's machine, on paper."""
        nodes, self.world._nodes = self.world._nodes, None
        if not any(key["name"] == "theirs" for key in self.world.keys):
            self.world.add_key({"name": "theirs", "public_key": "ssh-ed25519 AAAA them"})
        request = {
            "region_name": "us-west-1",
            "instance_type_name": "gpu_1x_a10",
            "ssh_key_names": ["theirs"],
        }
        machine = self.world.machines[self.world.launch(request | body)["instance_ids"][0]]
        machine.active = machine.boots_until = machine.launched
        machine.listening = True
        self.world._nodes = nodes


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Silence: requests are in /admin/state."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str) -> None:
        owner: LambdaServer = self.server.owner  # type: ignore[attr-defined]
        parts = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if parts.path.startswith("/admin/"):
            self._admin(owner, parts.path, raw)
            return
        path = parts.path.removeprefix(PREFIX)
        with owner.world.lock:
            owner.world.advance()
            outcome, effect = self._decide(owner, method, path, parts.query, raw)
            row = {
                "method": method,
                "path": path,
                "at": owner.clock(),
                "status": outcome[0],
                "effect": effect,
            }
            owner.requests.append(row)
        self._send(*outcome)

    def _decide(
        self, owner: LambdaServer, method: str, path: str, query: str, raw: bytes
    ) -> tuple[tuple[int | None, bytes, dict[str, str]], bool]:
        """((status or None for a lost connection, body, headers), whether the request had its effect)."""
        if not self._authorized(owner):
            return _refused(401, "global/invalid-api-key", "API key was invalid, expired, or deleted."), False
        fault = owner.fault(method, path)
        if fault is not None and fault.kind in ("refuse", "lose-request"):
            return _faulty(fault), False
        if owner.too_fast(path):
            return (429, b"Too Many Requests", {}), False
        account = owner.world.switches.account
        if account in ("inactive", "forbidden"):
            code = "global/account-inactive" if account == "inactive" else "global/forbidden"
            return _refused(403, code, "Your account may not do this."), False
        try:
            values = {name: value[0] for name, value in parse_qs(query).items()}
            pattern, body = owner.answer(method, path, values, json.loads(raw) if raw else None)
        except RefusalError as refusal:
            outcome = _refused(refusal.status, refusal.code, str(refusal))
            known = re.sub(r"/instances/[^/]+$", "/instances/{id}", path)
            deliberate = refusal.code == GONE and refusal.status == 400 and not path.endswith("/launch")
            if not deliberate:
                owner.check(PREFIX + known, method, refusal.status, json.loads(outcome[1]))
            return outcome, False
        if fault is not None:
            return _faulty(fault), True
        if not owner.world.switches.status_names:
            owner.check(pattern, method, 200, body)
        return (200, json.dumps(body).encode(), {"Content-Type": "application/json"}), True

    def _authorized(self, owner: LambdaServer) -> bool:
        """Bearer, or Basic with the key as the user."""
        basic = base64.b64encode(f"{owner.key}:".encode()).decode()
        return self.headers.get("Authorization") in (
            f"Bearer {owner.key}",
            f"Basic {basic}",
            f"Basic {owner.key}",
        )

    def _admin(self, owner: LambdaServer, path: str, raw: bytes) -> None:
        try:
            with owner.world.lock:
                answer = owner.admin(path, json.loads(raw) if raw else None)
        except (ValidationError, ValueError, KeyError) as error:
            self._send(400, str(error).encode(), {})
            return
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int | None, body: bytes, headers: dict[str, str]) -> None:
        self.close_connection = True
        if status is None:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        with suppress(OSError):
            self.end_headers()
            self.wfile.write(body)


def _refused(status: int, code: str, message: str) -> tuple[int, bytes, dict[str, str]]:
    error = {"code": code, "message": message, "suggestion": SUGGESTION}
    return status, json.dumps({"error": error}).encode(), {"Content-Type": "application/json"}


def _faulty(fault: Fault) -> tuple[int | None, bytes, dict[str, str]]:
    if fault.kind in ("lose-request", "lose-answer"):
        return None, b"", {}
    if fault.kind == "garbage":
        return 200, b"<html><body>One moment, please</body></html>", {"Content-Type": "text/html"}
    if fault.kind == "empty":
        return (
            200,
            b'{"data": {}}' if "types" in fault.match or "operations" in fault.match else b'{"data": []}',
            {},
        )
    headers = {"Retry-After": fault.retry_after} if fault.retry_after is not None else {}
    if fault.code is None:
        return fault.status, b"<html>upstream is unwell</html>", headers
    status, body, more = _refused(fault.status, fault.code, "On demand.")
    return status, body, headers | more
