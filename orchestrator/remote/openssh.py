"""The OpenSSH client as the carrier of bytes: one ControlMaster a node, its own configuration, nothing of ~/.ssh.

    RUNTIME/ID.conf     a generated ssh_config: `ssh -F RUNTIME/ID.conf NODE` works by hand too
    RUNTIME/ID.sock…    the master's socket; the master ends itself two minutes after its last use

RUNTIME is a short private folder, because a socket's path has room for about 100 characters.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from orchestrator.remote.connection import Address, ConnectionLost, HostKeyMismatch, RemoteError, lost

CIPHERS = "aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com,aes256-ctr,aes128-ctr"
LEFTOVER_SECONDS = 86_400.0
LOST = 255
"""The exit status that is ssh's own."""


def available() -> bool:
    """Whether this machine has the client."""
    return shutil.which("ssh") is not None


def runtime_directory() -> Path:
    """A private folder with a short name: in XDG_RUNTIME_DIR, else /tmp/llmctl-UID. Raises RemoteError if it is not ours."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = len(base) < 50 and re.fullmatch(r"/[\w./-]+", base) and Path(base).is_dir()
    path = Path(base) / "llmctl" if usable else Path(f"/tmp/llmctl-{os.getuid()}")  # noqa: S108  # checked below
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RemoteError(
            f"{path} is not a private folder of this user", hint="remove it, or set XDG_RUNTIME_DIR"
        )
    return path


def ssh_config(address: Address, socket: Path) -> str:
    """The ssh_config text that reaches the node and no other machine."""
    options = {
        "HostName": address.host,
        "Port": str(address.port),
        "User": address.user,
        "IdentityFile": _quoted(address.identity_file),
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "PreferredAuthentications": "publickey",
        "BatchMode": "yes",
        "UserKnownHostsFile": _quoted(address.known_hosts),
        "GlobalKnownHostsFile": "none",
        "HostKeyAlias": address.key,
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "Ciphers": CIPHERS,
        "Compression": "no",
        "ConnectTimeout": "15",
        "ServerAliveInterval": "10",
        "ServerAliveCountMax": "3",
        "ControlMaster": "no",
        "ControlPath": _quoted(socket),
        "ControlPersist": "120",
        "LogLevel": "ERROR",
    }
    return "\n".join([f"Host {address.key}", *(f"  {name} {value}" for name, value in options.items()), ""])


class Carrier:
    """Commands to one node over its ControlMaster."""

    def __init__(self, address: Address) -> None:
        self.address = address
        runtime = runtime_directory()
        text = "\n".join(map(str, (address, address.identity_file, address.known_hosts, address.key)))
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._socket, self.config = runtime / f"{name}.sock", runtime / f"{name}.conf"
        self._lock = runtime / f"{name}.lock"

    def ensure(self) -> None:
        """Have a master that answers. Raises ConnectionLost, HostKeyMismatch."""
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._socket.exists() and self._control("check"):
                return
            self._socket.unlink(missing_ok=True)
            _tidy(self.config.parent)
            with tempfile.NamedTemporaryFile("w", dir=self.config.parent, delete=False) as file:
                file.write(ssh_config(self.address, self._socket))
            Path(file.name).replace(self.config)
            # The master inherits no pipe of ours: who reads one would wait for it for ever.
            with tempfile.TemporaryFile() as complaints:
                started = subprocess.run(
                    ["ssh", "-F", str(self.config), "-f", "-N", "-M", self.address.key],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=complaints,
                    start_new_session=True,
                    check=False,
                )
                complaints.seek(0)
                self.check(started.returncode, complaints.read().decode(errors="replace"))

    def argv(self, command: Sequence[str]) -> list[str]:
        """The local argument list that runs `command` on the node."""
        return ["ssh", "-F", str(self.config), self.address.key, shlex.join(command)]

    @property
    def shell(self) -> str:
        """For rsync's -e."""
        return f"ssh -F {self.config}"

    def check(self, status: int, said: str) -> None:
        """Raise what ssh's own failure means."""
        if status != LOST:
            return
        if (
            "host key verification failed" in said.lower()
            or "host identification has changed" in said.lower()
        ):
            raise HostKeyMismatch(
                f"the host key of {self.address} is not the one in {self.address.known_hosts}"
            )
        raise lost(self.address, said.strip()[-300:] or "ssh ended")

    def stop(self) -> None:
        """End the master; it would also end itself."""
        if self._socket.exists():
            self._control("exit")
        for path in (self._socket, self.config, self._lock):
            path.unlink(missing_ok=True)

    def _control(self, word: str) -> bool:
        try:
            asked = subprocess.run(
                ["ssh", "-F", str(self.config), "-O", word, self.address.key],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=10,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return asked.returncode == 0


def _tidy(runtime: Path) -> None:
    """Remove what masters that ended by themselves left behind more than a day ago."""
    for config in runtime.glob("*.conf"):
        with suppress(FileNotFoundError):
            old = time.time() - config.stat().st_mtime > LEFTOVER_SECONDS
            if old and not config.with_suffix(".sock").exists():
                config.unlink()
                config.with_suffix(".lock").unlink()


def _quoted(path: Path) -> str:
    """A path as ssh_config takes it."""
    return '"{}"'.format(str(path).replace("%", "%%"))


__all__ = ["CIPHERS", "LOST", "Carrier", "ConnectionLost", "available", "runtime_directory", "ssh_config"]
