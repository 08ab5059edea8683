"""The machines behind the instances: embedded SSH nodes with a metadata service and a lease guard each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from provisioning.ec2_guard import DIRECTORY
from tests.lambda_server.nodes import Nodes, cloud_config


class Metadata:
    """The metadata service of one instance: its tags, and a spot interruption where one is announced."""

    def __init__(self, tags: Callable[[], dict[str, str]]) -> None:
        metadata = self
        self.interruption: dict[str, str] | None = None
        self.off = False

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self._answer(b"token")

            def do_GET(self) -> None:
                name = self.path.removeprefix("/latest/meta-data/")
                if self.headers.get("X-aws-ec2-metadata-token") != "token" or metadata.off:
                    self.send_error(401)
                elif name.startswith("tags/instance/") and name.removeprefix("tags/instance/") in tags():
                    self._answer(tags()[name.removeprefix("tags/instance/")].encode())
                elif name == "spot/instance-action" and metadata.interruption:
                    self._answer(json.dumps(metadata.interruption).encode())
                else:
                    self.send_error(404)

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class AwsNodes(Nodes):
    """Nodes whose guard is EC2's: it reads the lease from the metadata service and powers the machine off."""

    def start(
        self, node_id: str, authorized_key: str, user_data: str | None, env: dict[str, str], *, ignored: bool
    ) -> None:
        super().start(node_id, authorized_key, user_data, env, ignored=ignored)
        self._guards.pop(node_id, None)
        if ignored:
            return
        directory = self._guard_directory(node_id)
        directory.mkdir(parents=True, exist_ok=True)
        for file in cloud_config(user_data).get("write_files", ()):
            if file["path"].startswith(DIRECTORY):
                (directory / Path(file["path"]).name).write_text(file["content"], encoding="utf-8")
        self._guards[node_id] = None
        self._guard_due[node_id] = 0.0
        (directory / "imds").write_text(env["LLMCTL_IMDS"])

    def run_guards(self, every: float) -> None:
        for node_id, process in list(self._guards.items()):
            if (process is None or process.poll() is not None) and time.monotonic() >= self._guard_due[
                node_id
            ]:
                self._guard_due[node_id] = time.monotonic() + every
                directory = self._guard_directory(node_id)
                env = {"PATH": os.environ["PATH"], "LLMCTL_GUARD_DIRECTORY": str(directory),
                       "LLMCTL_IMDS": (directory / "imds").read_text(), "LLMCTL_POWEROFF": f"touch {directory}/poweroff"}  # fmt: skip
                with (directory / "log").open("ab") as log:
                    self._guards[node_id] = subprocess.Popen(
                        [sys.executable, "-S", str(directory / "guard.py")], env=env, stdout=log, stderr=log
                    )

    def powered_off(self) -> list[str]:
        """Nodes that ended themselves."""
        return [
            node_id
            for node_id in list(self._guards)
            if (self._guard_directory(node_id) / "poweroff").exists()
        ]
