"""rsync processes over one ControlMaster: which flags, how many at once, and what their answers mean.

Only flags that rsync 2.6.9 and openrsync know are used, more where both sides are newer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from orchestrator.remote.connection import CommandFailed, Result, lost
from orchestrator.remote.openssh import LOST, Carrier

PARTIAL = ".llmctl-partial"
SAFE_PULL = (3, 2, 5)
"""The first rsync that refuses names it did not ask for (CVE-2022-29154); an older one here does not pull."""
_ZSTD = (3, 2, 0)
_LINK_BROKE = {10, 12, 30, 35}  # rsync(1): socket I/O, protocol stream, time-outs


@dataclass(frozen=True)
class Flags:
    """What a call may use."""

    mine: tuple[int, int, int]
    theirs: tuple[int, int, int]
    immutable: bool = False
    """Write in place: quicker, and torn if cut, which size and time then show."""
    compress: bool = False

    def argv(self) -> list[str]:
        """Times but no owners, links' contents instead of links, names from stdin; each named file moves (`-I`): that it
        differs is known, and rsync's own look, at size and whole seconds, would miss an edit within a second."""
        flags = ["-L", "-t", "-I", "--from0", "--files-from=-", "--timeout=60"]
        flags += ["-W", "--inplace"] if self.immutable else [f"--partial-dir={PARTIAL}"]
        if self.compress:
            zstd = min(self.mine, self.theirs) >= _ZSTD
            flags += ["-z", *(["--compress-choice=zstd"] if zstd else []), "--compress-level=1"]
        if self.mine >= (3, 0, 0):
            flags.append("--out-format=%l %n")
        return flags


def version(text: str) -> tuple[int, int, int] | None:
    """From the output of `rsync --version`; openrsync counts as the 2.6.9 that it says to be compatible with."""
    if "openrsync" in text:
        return (2, 6, 9)
    found = re.search(r"rsync\s+version\s+v?(\d+)\.(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def installed() -> tuple[int, int, int] | None:
    """The rsync of this machine, or None."""
    if shutil.which("rsync") is None:
        return None
    answer = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=False)
    return version(answer.stdout + answer.stderr)


def shares(sizes: Sequence[tuple[str, int]], lanes: int) -> list[list[str]]:
    """Names in `lanes` groups of about the same bytes, the largest first."""
    groups: list[tuple[list[str], int]] = [([], 0) for _ in range(lanes)]
    for name, size in sorted(sizes, key=lambda item: -item[1]):
        lightest = min(range(lanes), key=lambda index: groups[index][1])
        names, weight = groups[lightest]
        groups[lightest] = ([*names, name], weight + size + 4096)
    return [names for names, _ in groups if names]


def run(
    carrier: Carrier,
    flags: Flags,
    ends: tuple[str, str],
    groups: Sequence[Sequence[str]],
    tell: Callable[[int], None],
) -> None:
    """One rsync a group, at once, `ends` being where from and where to. Raises ConnectionLost, CommandFailed; the first error ends the others."""
    argv = ["rsync", *flags.argv(), "-e", carrier.shell, *ends]
    running: list[subprocess.Popen[bytes]] = []
    lock, stopped = threading.Lock(), threading.Event()

    def one(names: Sequence[str]) -> None:
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as listed:
            listed.write(b"".join(name.encode() + b"\0" for name in names))
            listed.seek(0)
            with lock:
                if stopped.is_set():
                    return
                process = subprocess.Popen(argv, stdin=listed, stdout=subprocess.PIPE, stderr=said)
                running.append(process)
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    size, _, name = line.partition(b" ")
                    if size.isdigit() and not name.endswith(b"/\n"):
                        tell(int(size))
            status = process.wait()
            said.seek(0)
            _check(carrier, status, said.read())

    def stop() -> None:
        with lock:
            stopped.set()
            for process in running:
                if process.poll() is None:
                    process.terminate()

    with ThreadPoolExecutor(max_workers=max(1, len(groups)), thread_name_prefix="rsync") as pool:
        try:
            for future in [pool.submit(one, names) for names in groups]:
                future.result()
        except BaseException:
            stop()
            raise


def _check(carrier: Carrier, status: int, said: bytes) -> None:
    text = said.decode(errors="replace")
    carrier.check(status if status == LOST else 0, text)
    if status in _LINK_BROKE and "No space left" not in text:
        raise lost(carrier.address, f"rsync ended with {status}: {text.strip()[-200:]}")
    if status != 0:
        raise CommandFailed("rsync", Result(b"", said, status))


def write_links(stage: Path, files: Sequence[tuple[str, Path]]) -> None:
    """A folder of links that gives local files the names that they shall have on the node."""
    for name, local in files:
        link = stage / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(local.resolve())
