"""What there is to move files with: the programs on both sides, and the link between them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from subprocess import DEVNULL, PIPE

from orchestrator.remote import openssh, pieces, rsync
from orchestrator.remote.node import Remote
from orchestrator.remote.questions import ask

FAR_SECONDS = 0.015
"""A round trip from which one channel's window, not the processor, is the limit."""
FAR_LANES, NEAR_LANES = 8, 2
SAMPLED = 64 << 20
"""From so many bytes on it is worth finding out whether compression pays."""
COMPRESSIBLE, SLOW = 0.8, 80e6
"""Compress what shrinks below this, on a link of fewer bytes a second than that (measured: docs/performance.md)."""


@dataclass
class Kit:
    """What there is to move files with."""

    carrier: openssh.Carrier | None
    mine: tuple[int, int, int] | None
    theirs: tuple[int, int, int] | None
    round_trip: float

    @property
    def lanes(self) -> int:
        """How many channels to use at once."""
        return FAR_LANES if self.round_trip > FAR_SECONDS else NEAR_LANES

    def flags(self, *, pull: bool, immutable: bool = False, compress: bool = False) -> rsync.Flags | None:
        """How rsync is called, or None where it cannot be."""
        if self.carrier is None or self.mine is None or self.theirs is None:
            return None
        if pull and self.mine < rsync.SAFE_PULL:
            return None
        return rsync.Flags(self.mine, self.theirs, immutable, compress)


def look(remote: Remote) -> Kit:
    """What both sides have; looked at once."""
    known = remote.memory.get("kit")
    if isinstance(known, Kit):
        return known
    carrier = openssh.Carrier(remote.address) if openssh.available() else None
    theirs = rsync.version(remote.run("command -v rsync >/dev/null && rsync --version | head -n 1 || :").text)
    kit = Kit(carrier, rsync.installed(), theirs, remote.round_trip())
    remote.memory["kit"] = kit
    return kit


def compression_pays(remote: Remote, kit: Kit, sizes: Mapping[str, int], *, pull: bool) -> bool:
    """Whether compression wins: samples of the largest of `sizes` (path → bytes, here or on the node) shrink, and the link is slower than the processor."""
    if sum(sizes.values()) < SAMPLED:
        return False
    largest = max(sizes, key=lambda path: sizes[path])
    ratio = ask(remote, "compressibility", path=largest) if pull else pieces.compressibility(largest)
    return ratio < COMPRESSIBLE and _bytes_per_second(remote, kit) < SLOW


def _bytes_per_second(remote: Remote, kit: Kit) -> float:
    """What the link takes: four channels, a megabyte each, of noise; measured once."""
    known = remote.memory.get("bytes_per_second")
    if isinstance(known, float):
        return known
    assert kit.carrier is not None
    noise = os.urandom(1 << 20)
    argv = kit.carrier.argv(["sh", "-c", "echo; cat >/dev/null"])
    with ThreadPoolExecutor(4) as pool:
        channels = [subprocess.Popen(argv, stdin=PIPE, stdout=PIPE, stderr=DEVNULL) for _ in range(4)]
        for channel in channels:  # until a shell has started there: that is not the link's time
            assert channel.stdout is not None
            channel.stdout.readline()
        started = time.monotonic()
        list(pool.map(lambda channel: channel.communicate(noise), channels))
    seconds = max(1e-3, time.monotonic() - started - kit.round_trip)
    remote.memory["bytes_per_second"] = 4 * len(noise) / seconds
    return 4 * len(noise) / seconds
