"""The machines behind the server's instances: real SSH servers of the provider `local`, and what cloud-init would do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from provisioning import local_node
from provisioning.cloudinit import GUARD_DIRECTORY, HEADER
from tests import images


def cloud_config(user_data: str | None) -> dict[str, Any]:
    """The cloud-config of user data; empty where there is none. Raises ValueError for what cloud-init would not read."""
    if not user_data:
        return {}
    if not user_data.startswith(HEADER):
        raise ValueError("user data without its first line")
    config: dict[str, Any] = json.loads(user_data.removeprefix(HEADER))
    return config


class Nodes:
    """Starts and ends nodes below `directory`; `directory/ports.json` maps instance ids to SSH ports (it is what
    LLMCTL_TEST_SSH_PORTS names)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.ports_file = directory / "ports.json"
        self._ports: dict[str, int] = {}
        self._closed: dict[str, socket.socket] = {}
        self._starting: set[str] = set()
        self._guards: dict[str, subprocess.Popen[bytes] | None] = {}
        self._guard_due: dict[str, float] = {}
        self._ending: list[threading.Thread] = []
        directory.mkdir(parents=True, exist_ok=True)
        self._publish()

    def poll(self) -> None:
        """Publish the SSH port of each node that listens by now."""
        for node_id in list(self._starting):
            state = local_node.read(self._directory / node_id)
            if state is not None and state.port is not None and state.status == "active":
                self._starting.discard(node_id)
                self._ports[node_id] = state.port
                self._publish()
                self._closed.pop(node_id).close()

    def refuse(self, node_id: str) -> None:
        """A port that does not answer yet, or ever: bound, so nobody else gets it, and never listened on."""
        if node_id not in self._closed:
            self._closed[node_id] = socket.socket()
            self._closed[node_id].bind(("127.0.0.1", 0))
            self._ports[node_id] = self._closed[node_id].getsockname()[1]
            self._publish()

    def start(
        self, node_id: str, authorized_key: str, user_data: str | None, env: dict[str, str], *, ignored: bool
    ) -> None:
        """Boot the node as its user data says, or as an image would that ignores it."""
        config = {} if ignored else cloud_config(user_data)
        images.known(self._directory / "homes" / node_id)
        local_node.spawn(
            self._directory / node_id,
            name=node_id,
            user="ubuntu",
            authorized_key=authorized_key,
            host_private_key=config.get("ssh_keys", {}).get("ed25519_private"),
            home=self._directory / "homes" / node_id,
            lease_end=None,
            env=env,
        )
        self._starting.add(node_id)
        files = {Path(file["path"]).name: file for file in config.get("write_files", ())}
        if "guard.py" in files:
            guard = self._guard_directory(node_id)
            guard.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name, file in files.items():
                if file["path"].startswith(GUARD_DIRECTORY):
                    (guard / name).write_text(file["content"], encoding="utf-8")
            self._guards[node_id] = None
            self._guard_due[node_id] = 0.0

    def run_guards(self, every: float) -> None:
        """What the timer of a self-terminating node does; `every` real seconds."""
        for node_id, process in list(self._guards.items()):
            if (process is None or process.poll() is not None) and time.monotonic() >= self._guard_due[
                node_id
            ]:
                self._guard_due[node_id] = time.monotonic() + every
                directory = self._guard_directory(node_id)
                env = os.environ | {"LLMCTL_GUARD_DIRECTORY": str(directory)}
                with (directory / "log").open("ab") as log:
                    argv = [sys.executable, str(directory / "guard.py")]
                    self._guards[node_id] = subprocess.Popen(argv, env=env, stdout=log, stderr=log)

    def end(self, node_id: str) -> None:
        """Power off; returns at once."""
        self._stop_guard(node_id)
        self._starting.discard(node_id)
        if closed := self._closed.pop(node_id, None):
            closed.close()
        thread = threading.Thread(
            target=local_node.end, args=(self._directory / node_id,), kwargs={"grace_seconds": 0.2}
        )
        thread.start()
        self._ending.append(thread)

    def end_all(self) -> None:
        """Power everything off and wait for it."""
        for path in self._directory.iterdir():
            if (path / "node.json").exists():
                self.end(path.name)
        for thread in self._ending:
            thread.join()

    def _stop_guard(self, node_id: str) -> None:
        process = self._guards.pop(node_id, None)
        if process is not None:
            process.kill()
            process.wait()

    def _guard_directory(self, node_id: str) -> Path:
        return self._directory / "guards" / node_id

    def _publish(self) -> None:
        temporary = self.ports_file.with_suffix(".new")
        temporary.write_text(json.dumps(self._ports), encoding="utf-8")
        temporary.replace(self.ports_file)
