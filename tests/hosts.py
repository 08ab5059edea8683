"""Hosts with addresses of their own on this machine: network namespaces on one bridge, each with a real sshd.

What happens between them is real TCP over a network that a test may cut, slow down or take away. Needs root and iproute2 on
Linux; a test without them is skipped, and says so.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from provisioning import keys
from tests.nodes import Node, real_sshd

SSH_PORT = 22


@dataclass
class Host:
    """One of them."""

    name: str
    """Of its namespace."""
    address: str
    link: str
    """The bridge's end of its cable."""
    node: Node

    def ip(self, *words: str) -> str:
        """Run `ip` in its namespace."""
        return _run("ip", "-n", self.name, *words)

    def pids(self) -> list[int]:
        """Every process there."""
        return [int(word) for word in _run("ip", "netns", "pids", self.name).split()]

    def commands(self) -> list[str]:
        """Their command lines, but for the SSH server's."""
        lines = []
        for pid in self.pids():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if line and "sshd" not in line:
                lines.append(line)
        return lines

    def cut(self, other: Host) -> None:
        """Nothing that either sends reaches the other: the cable between the two is pulled, all others hold."""
        for one, two in ((self, other), (other, self)):
            one.ip(
                "neigh",
                "replace",
                two.address,
                "lladdr",
                "02:00:00:00:00:99",
                "nud",
                "permanent",
                "dev",
                "eth0",
            )

    def heal(self, other: Host) -> None:
        """Undo `cut`."""
        for one, two in ((self, other), (other, self)):
            one.ip("neigh", "del", two.address, "dev", "eth0")

    def slow_down(self, rate: str) -> None:
        """What it sends goes no faster than `rate` (tc's words: 20mbit)."""
        _run("tc", "-n", self.name, "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "64kb",
             "latency", "200ms")  # fmt: skip

    def die(self) -> None:
        """A power cut: it sends no word more, and nothing on it lives on."""
        _run("ip", "link", "set", self.link, "down")
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@contextmanager
def three_hosts(folder: Path) -> Iterator[list[Host]]:
    """Three of them, and the key in `folder/ssh` that logs in on each."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    client = keys.client_key(folder)
    number = os.getpid() % 250
    bridge = f"ltb{number}"
    with ExitStack() as stack:
        try:
            _run("ip", "link", "add", bridge, "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        stack.callback(_run, "ip", "link", "del", bridge)
        _run("ip", "addr", "add", f"10.231.{number}.1/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        hosts = []
        # The third one's address sorts before the others' as a text.
        for index, last in enumerate((9, 20, 10)):
            name, link, address = f"lt{number}n{index}", f"lt{number}v{index}", f"10.231.{number}.{last}"
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "del", name)
            _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", link, "master", bridge, "up")
            for words in (("link", "set", "lo", "up"), ("addr", "add", f"{address}/24", "dev", "eth0"),
                          ("link", "set", "eth0", "up")):  # fmt: skip
                _run("ip", "-n", name, *words)
            place = folder / f"host{index}"
            place.mkdir()
            prefix = ["ip", "netns", "exec", name]
            node = stack.enter_context(real_sshd(place, address, SSH_PORT, prefix, client))
            hosts.append(Host(name, address, link, node))
        yield hosts
        for host in hosts:
            for pid in host.pids():
                os.kill(pid, signal.SIGKILL)
