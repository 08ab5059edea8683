"""Bytes, commands and log lines between here and a node, beside what plain OpenSSH does on the same link in the same run.

    python -m benchmarks.transfer [--server local|sshd] [--delay-ms 0 70] [--sets "1 file" "100 shards"] [--megabytes 500] [--rounds 2] [--json FILE]

Both ends are on this machine, the delay is made by a proxy in a process of its own: ratios mean something, absolute figures
are this machine's. "plain" is the best of 1, 2, 4 and 8 `rsync -aW --inplace` processes, each with a connection of its own
and AES-GCM; one file has one stream. Each figure is the best of the rounds, taken in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.remote import openssh, rsync, transfer
from orchestrator.remote.node import Remote
from orchestrator.remote.stream import follow
from tests.nodes import Node, local, real_sshd, stop_master

PROXY = (
    "import sys, time; from tests.nodes import Proxy; p = Proxy(int(sys.argv[1]), float(sys.argv[2])); "
    "print(p.port, flush=True); sys.stdin.read()"
)
STREAMS = (1, 2, 4, 8)


@contextmanager
def delayed(node: Node, delay_ms: float) -> Iterator[Node]:
    """The node behind a link with that round trip; without a delay the node itself."""
    if not delay_ms:
        yield node
        return
    argv = [sys.executable, "-c", PROXY, str(node.address.port), str(delay_ms / 2000)]
    proxy = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert proxy.stdin is not None
    assert proxy.stdout is not None
    try:
        yield node.at(int(proxy.stdout.readline()))
    finally:
        proxy.stdin.close()
        proxy.wait()


def seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def plain(node: Node, names: list[str], source: Path, target: Path, count: int, *, pull: bool) -> None:
    """`count` rsyncs at once, as someone would start them by hand."""
    carrier = openssh.Carrier(node.address)
    carrier.ensure()  # only its configuration is used here
    shell = f"ssh -F {carrier.config} -o ControlPath=none"
    here, there = (target, source) if pull else (source, target)
    far = f"{node.address.key}:{there}/"
    ends = [far, f"{here}/"] if pull else [f"{here}/", far]
    running = []
    for group in rsync.shares([(name, 1) for name in names], count):
        argv = ["rsync", "-aW", "--inplace", "--files-from=-", "-e", shell, *ends]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write("".join(f"{name}\n" for name in group).encode())
        process.stdin.close()
        running.append(process)
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise SystemExit("a plain rsync failed")


SETS = {"1 file": 1, "100 shards": 100}


def files(node: Node, folder: Path, sets: list[str], megabytes: int, rounds: int) -> list[dict[str, object]]:
    """The sets of files, both ways."""
    rows: list[dict[str, object]] = []
    for what in sets:
        wanted = [(f"s{index}", megabytes // SETS[what]) for index in range(SETS[what])]
        source = folder / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        for name, size in wanted:
            (source / name).write_bytes(os.urandom(size << 20))
        names = [name for name, _ in wanted]
        for pull in (False, True):
            best = race(node, names, folder, rounds, pull=pull)
            limit = min((spent, way) for way, spent in best.items() if way != "ours")
            total = sum(size for _, size in wanted)
            rows.append(
                {
                    "what": f"{what}, {'pull' if pull else 'push'}",
                    "ours_mb_s": round(total / best["ours"], 1),
                    "limit_mb_s": round(total / limit[0], 1),
                    "limit": limit[1],
                    "ratio": round(limit[0] / best["ours"], 2),
                }
            )
            show(rows[-1])
    return rows


def race(node: Node, names: list[str], folder: Path, rounds: int, *, pull: bool) -> dict[str, float]:
    """The best seconds of each way to move the files."""
    source, best = folder / "source", dict[str, float]()
    for _ in range(rounds):
        for count in STREAMS if len(names) > 1 else (1,):
            target, way = empty(folder), f"plain {count}"
            started = time.monotonic()
            plain(node, names, source, target, count, pull=pull)
            best[way] = min(best.get(way, 1e9), time.monotonic() - started)
        with node.remote() as remote:
            warm(remote)
            target = empty(folder)
            started = time.monotonic()
            ours(remote, names, source, target, pull=pull)
            best["ours"] = min(best.get("ours", 1e9), time.monotonic() - started)
    return best


def ours(remote: Remote, names: list[str], source: Path, target: Path, *, pull: bool) -> None:
    if pull:
        transfer.pull(remote, str(source), names, target)
    else:
        transfer.push(remote, {str(target / name): source / name for name in names}, immutable=True)


def warm(remote: Remote) -> None:
    """The connection and what is known about the node, as in the middle of a run."""
    with tempfile.NamedTemporaryFile() as small:
        small.write(b"1")
        small.flush()
        transfer.push(remote, {f"llmctl-bench-{os.getpid()}-{time.monotonic_ns()}": Path(small.name)})


def empty(folder: Path) -> Path:
    shutil.rmtree(folder / "target", ignore_errors=True)
    (folder / "target").mkdir()
    return folder / "target"


def resync(node: Node, folder: Path) -> list[dict[str, object]]:
    """An unchanged tree of 1,000 files, and a command on the warm connection."""
    tree = folder / "tree"
    for index in range(1000):
        place = tree / f"d{index % 20}" / f"f{index}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(os.urandom(2000))
    carrier = openssh.Carrier(node.address)
    far = f"{node.address.key}:bench-tree/"
    with node.remote() as remote:
        transfer.push_tree(remote, tree, "bench-tree")
        carrier.ensure()
        argv = ["rsync", "-a", "-e", carrier.shell, f"{tree}/", far]
        subprocess.run(argv, check=True)
        mine = min(seconds(lambda: transfer.push_tree(remote, tree, "bench-tree")) for _ in range(7))
        theirs = min(seconds(lambda: subprocess.run(argv, check=True)) for _ in range(7))
        rows = [row("unchanged re-sync of 1,000 files", mine, theirs, "rsync over a ControlMaster")]
        mine = statistics.median(seconds(lambda: remote.run(["true"])) for _ in range(20))
        argv = carrier.argv(["true"])
        theirs = statistics.median(seconds(lambda: subprocess.run(argv, check=True)) for _ in range(10))
        rows.append(row("command on a warm connection", mine, theirs, "ssh over a ControlMaster"))
    for item in rows:
        show(item)
    return rows


def row(what: str, mine: float, theirs: float, limit: str) -> dict[str, object]:
    return {
        "what": what,
        "ours_ms": round(mine * 1000, 1),
        "limit_ms": round(theirs * 1000, 1),
        "limit": limit,
        "ratio": round(theirs / mine, 2),
    }


def logs(node: Node, megabytes: int) -> list[dict[str, object]]:
    """From a line written there to bytes here, and catching up with a long log."""
    log = node.home / "bench.log"
    log.write_bytes(b"")
    delays: list[float] = []

    def write() -> None:
        with log.open("ab", buffering=0) as file:
            for _ in range(200):
                file.write(f"{time.time()}\n".encode())
                time.sleep(0.02)

    with node.remote() as remote:
        writer, text = threading.Thread(target=write), b""
        writer.start()
        for data in follow(remote, "bench.log"):
            now, text = time.time(), text + data
            *lines, text = text.split(b"\n")
            delays += [now - float(line) for line in lines]
            if len(delays) == 200:
                break
        writer.join()
        with log.open("wb") as file:
            for _ in range(megabytes):
                file.write((b"x" * 99 + b"\n") * 10486)
        size, seen = log.stat().st_size, 0

        def catch_up() -> None:
            nonlocal seen
            for data in follow(remote, "bench.log"):
                seen += len(data)
                if seen >= size:
                    return

        mine = seconds(catch_up)
    carrier = openssh.Carrier(node.address)
    carrier.ensure()
    theirs = seconds(
        lambda: subprocess.run(carrier.argv(["cat", "bench.log"]), stdout=subprocess.DEVNULL, check=True)
    )
    log.unlink()
    delays.sort()
    rows: list[dict[str, object]] = [
        {"what": "log line to here, 95th percentile", "ours_ms": round(delays[189] * 1000, 1)},
        {
            "what": f"catching up with {size >> 20} MiB of log",
            "ours_mb_s": round(size / mine / 1e6, 1),
            "limit_mb_s": round(size / theirs / 1e6, 1),
            "limit": "ssh cat",
            "ratio": round(theirs / mine, 2),
        },
    ]
    for item in rows:
        show(item)
    return rows


def show(item: dict[str, object]) -> None:
    print("  ".join(f"{key}={value}" for key, value in item.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", choices=["local", "sshd"], default="local")
    parser.add_argument("--delay-ms", type=float, nargs="*", default=[0, 70])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--sets", choices=list(SETS), nargs="*", default=list(SETS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if rsync.installed() is None or not openssh.available():
        raise SystemExit("this benchmark compares with rsync over OpenSSH; both must be installed")
    memory = Path("/dev/shm")  # memory, so that no disk is measured
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        made = local(folder / "node") if asked.server == "local" else real_sshd(folder / "node")
        (folder / "node").mkdir()
        with made as node:
            for delay in asked.delay_ms:
                with delayed(node, delay) as link:
                    show({"server": asked.server, "delay_ms": delay})
                    rows = resync(link, folder) + files(
                        link, folder, asked.sets, asked.megabytes, asked.rounds
                    )
                    rows += logs(link, 1000) if not delay else []
                    found += [{"server": asked.server, "delay_ms": delay, **item} for item in rows]
                    stop_master(link)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
