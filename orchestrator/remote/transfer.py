"""Files to a node and back: rsync over one OpenSSH ControlMaster, large files in pieces over the same master.

    TransferError      what happened, why, what to do now; exit_code 1
    └── DiskFull       there or here

besides RemoteError and its family where the link or the node is at fault. What is there already is not sent: files of the
same size and time (without rsync: of the same content). What broke goes on where it stopped. Nothing is ever deleted
on either side. Where rsync or OpenSSH is missing on either side, everything goes in pieces (method "pieces").

Paths on a node are those of `remote`. Names that come from a node never lead out of the folder that they are meant for.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from orchestrator.remote import lanes, openssh, pieces, rsync
from orchestrator.remote.connection import CommandFailed, NoSuchFile, Result
from orchestrator.remote.kit import Kit, compression_pays, look
from orchestrator.remote.node import Remote, node_path
from orchestrator.remote.questions import ask

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes to do."""
Method = Literal["unchanged", "rsync", "pieces", "rsync+pieces"]
LARGE = 1 << 20
"""From here on a file goes in pieces: one rsync fills one SSH channel only, and costs more of the processor."""
_TREE = "llmctl/.trees"


class TransferError(Exception):
    """Files could not be moved."""

    exit_code = 1
    code = "transfer"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or "the next try goes on where this one stopped"


class DiskFull(TransferError):
    """No space left where the files go."""

    code = "disk_full"


@dataclass(frozen=True)
class Transfer:
    """What a transfer did."""

    files_sent: int
    bytes_sent: int
    """Of the files' content; compression is not counted."""
    seconds: float
    method: Method
    compressed: bool = False


@dataclass(frozen=True)
class _File:
    """One file to be moved, and the version of it that is meant."""

    here: Path
    there: str
    size: int
    mtime_ns: int


@dataclass
class _Count:
    """Bytes done of bytes to do."""

    total: int
    progress: Progress | None
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, count: int) -> None:
        """From any thread."""
        with self.lock:
            self.done = min(self.done + count, self.total)
            if self.progress is not None:
                self.progress(self.done, self.total)


def push(
    remote: Remote, files: Mapping[str, Path], *, immutable: bool = False, progress: Progress | None = None
) -> Transfer:
    """Bring local files to their paths on the node. `immutable`: files that are never read half-written and never change
    (shards); they may be written in place. Raises TransferError, DiskFull, RemoteError."""
    started = time.monotonic()
    wanted = [_local(Path(here), node_path(there)) for there, here in files.items()]
    if not wanted:
        return Transfer(0, 0, 0.0, "unchanged")
    kit = look(remote)
    flags = kit.flags(pull=False, immutable=immutable)
    seen = ask(remote, "look", paths=[file.there for file in wanted], hashed=flags is None)
    missing = [file for file, there in zip(wanted, seen, strict=True) if not _same(file, there)]
    missing = _drop_equal(
        remote, missing, {file.there: there for file, there in zip(wanted, seen, strict=True)}
    )
    return _move(remote, kit, missing, flags=flags, pull_to=None, progress=progress, started=started)


def push_tree(
    remote: Remote, local_dir: Path, node_dir: str, *, progress: Progress | None = None
) -> Transfer:
    """Bring every file under `local_dir` (but `__pycache__`) to `node_dir`. An unchanged tree costs one exchange: its digest
    is compared with the one that the node remembers for this very folder."""
    started = time.monotonic()
    target = node_path(node_dir)
    names = [name for name in pieces.tree(str(local_dir)) if "__pycache__/" not in name]
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{pieces.sha256(f'{local_dir}/{name}')}\n".encode())
    note = f"{_TREE}/{hashlib.sha256(target.encode()).hexdigest()[:24]}"
    state = 'd=$(ls -di -- "$1" 2>/dev/null) && '
    known = remote.run(
        [
            "sh",
            "-c",
            state + '[ "$(cat "$2" 2>/dev/null)" = "$3 ${d%% *}" ] && echo same',
            "sh",
            target,
            note,
            digest.hexdigest(),
        ],
        check=False,
    )
    if known.text == "same":
        return Transfer(0, 0, time.monotonic() - started, "unchanged")
    remote.run(["sh", "-c", 'rm -f -- "$1" && mkdir -p -- "$(dirname -- "$1")" "$2"', "sh", note, target])
    moved = push(remote, {f"{target}/{name}": local_dir / name for name in names}, progress=progress)
    remote.run(["sh", "-c", state + 'printf %s "$3 ${d%% *}" >"$2"', "sh", target, note, digest.hexdigest()])
    return Transfer(
        moved.files_sent, moved.bytes_sent, time.monotonic() - started, moved.method, moved.compressed
    )


def pull(
    remote: Remote, node_dir: str, names: Sequence[str], to: Path, *, progress: Progress | None = None
) -> Transfer:
    """Bring the files `names` of `node_dir` to the same names under `to`. Raises NoSuchFile, TransferError, DiskFull,
    RemoteError."""
    started = time.monotonic()
    source = node_path(node_dir)
    targets = {name: target(to, name) for name in names}
    if not targets:
        return Transfer(0, 0, 0.0, "unchanged")
    kit = look(remote)
    flags = kit.flags(pull=True)
    paths = [f"{source}/{name}" for name in targets]
    missing = []
    for (name, here), there, seen in zip(
        targets.items(), paths, ask(remote, "look", paths=paths, hashed=flags is None), strict=True
    ):
        if seen is None:
            raise NoSuchFile(f"pull {source}/{name}", Result(b"", b"no such file", 1))
        file = _File(here, there, seen[0], seen[1])
        mine = (
            None
            if here.is_symlink()
            else pieces.look(str(here), hashed=flags is None and _size(here) == seen[0])
        )
        if (
            mine is None
            or mine[0] != seen[0]
            or (mine[2] != seen[2] if flags is None else not _same(file, mine))
        ):
            missing.append(file)
    return _move(remote, kit, missing, flags=flags, pull_to=to, progress=progress, started=started)


def pull_tree(remote: Remote, node_dir: str, to: Path, *, progress: Progress | None = None) -> Transfer:
    """Bring every regular file under `node_dir` (links are left out) to `to`."""
    names = ask(remote, "tree", root=node_path(node_dir))
    return pull(remote, node_dir, names, to, progress=progress)


def close(remote: Remote) -> None:
    """End the node's ControlMaster; without this it ends itself two minutes after its last use."""
    if openssh.available():
        openssh.Carrier(remote.address).stop()


def target(folder: Path, name: str) -> Path:
    """Where the file `name` from a node goes under `folder`. Raises TransferError for a name that leads elsewhere, be it
    by `..`, by an absolute path or by a link that stands here."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\0" in name or not pure.parts:
        raise TransferError(
            f"the node offers a file called {name!r}", hint="a name must stay within its folder"
        )
    place = folder
    for part in pure.parts[:-1]:
        place /= part
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise TransferError(
                f"{place} is not a folder of its own", hint="remove it, or choose another target"
            )
    return folder / pure


def _move(
    remote: Remote,
    kit: Kit,
    files: Sequence[_File],
    *,
    flags: rsync.Flags | None,
    pull_to: Path | None,
    progress: Progress | None,
    started: float,
) -> Transfer:
    """Move what is missing: small files by rsync, large ones (without rsync: all) in pieces."""
    total = sum(file.size for file in files)
    if not files:
        return Transfer(0, 0, time.monotonic() - started, "unchanged")
    count = _Count(total, progress)
    sizes = {file.there if pull_to is not None else str(file.here): file.size for file in files}
    with _explained(here=pull_to is not None):
        if kit.carrier is not None:
            kit.carrier.ensure()
        if flags is not None and compression_pays(remote, kit, sizes, pull=pull_to is not None):
            flags = rsync.Flags(flags.mine, flags.theirs, flags.immutable, compress=True)
        compress = flags is not None and flags.compress
        small = [file for file in files if flags is not None and (file.size < LARGE or compress)]
        large = [file for file in files if file not in small] if small else list(files)
        if small and flags is not None:
            _by_rsync(kit, flags, small, pull_to, count)
        if large:
            _by_pieces(remote, kit, large, pull=pull_to is not None, count=count)
    method: Method = "rsync+pieces" if small and large else "rsync" if small else "pieces"
    return Transfer(len(files), total, time.monotonic() - started, method, compress)


def _by_rsync(kit: Kit, flags: rsync.Flags, files: Sequence[_File], to: Path | None, count: _Count) -> None:
    """Through a folder of our own on this side: of links for a push, of new files for a pull."""
    carrier = kit.carrier
    assert carrier is not None
    wanted = max(1, min(kit.lanes, sum(file.size for file in files) >> 22, len(files)))
    for root in ("/", ""):
        some = [(file.there.lstrip("/"), file) for file in files if file.there.startswith("/") == bool(root)]
        if not some:
            continue
        node_end = f"{carrier.address.key}:{root or './'}"
        groups = rsync.shares([(name, file.size) for name, file in some], wanted)
        with _stage(to) as stage:
            if to is None:
                rsync.write_links(stage, [(name, file.here) for name, file in some])
                rsync.run(carrier, flags, (f"{stage}/", node_end), groups, count.tell)
            else:
                rsync.run(carrier, flags, (node_end, f"{stage}/"), groups, count.tell)
                _publish(stage, some)


@contextmanager
def _stage(to: Path | None) -> Iterator[Path]:
    """A folder for links, gone afterwards; or one under `to` that a broken pull leaves behind for the next."""
    if to is None:
        with tempfile.TemporaryDirectory(dir=openssh.runtime_directory()) as name:
            yield Path(name)
        return
    stage = to / ".llmctl-pull"
    stage.mkdir(parents=True, exist_ok=True)
    yield stage
    for folder, _, _ in os.walk(stage, topdown=False):
        with suppress(OSError):
            Path(folder).rmdir()


def _publish(stage: Path, files: Sequence[tuple[str, _File]]) -> None:
    """Give pulled files their names: only those asked for, only regular ones, only whole."""
    for name, file in files:
        arrived = stage / PurePosixPath(name)
        if arrived.is_symlink() or not arrived.is_file() or arrived.stat().st_size != file.size:
            raise TransferError(f"{file.there} changed on the node while it was copied")
        file.here.parent.mkdir(parents=True, exist_ok=True)
        arrived.replace(file.here)


def _by_pieces(remote: Remote, kit: Kit, files: Sequence[_File], *, pull: bool, count: _Count) -> None:
    carrier = kit.carrier

    def open_channel(operation: str) -> lanes.Channel:
        return (
            lanes.FabricChannel(remote, operation)
            if carrier is None
            else lanes.SshChannel(carrier, operation)
        )

    versions = [f"{file.size} {file.mtime_ns}" for file in files]
    if pull:
        done = [pieces.begin(str(file.here), version) for file, version in zip(files, versions, strict=True)]
    else:
        begun = [(file.there, version) for file, version in zip(files, versions, strict=True)]
        done = ask(remote, "begin", files=begun)
    work = []
    for file, have in zip(files, done, strict=True):
        work += lanes.cut(str(file.here), file.there, file.size, have)
        if have:
            count.tell(sum(length for _, length in have))
    # Without OpenSSH the lanes share the connection with everyone else: half of its sessions are enough.
    lanes.move(
        remote.address, open_channel, work, pull=pull, lanes=kit.lanes if carrier else 3, tell=count.tell
    )
    if pull:
        seen = ask(remote, "look", paths=[file.there for file in files], hashed=False)
        for file, after in zip(files, seen, strict=True):
            if after is None or (after[0], after[1]) != (file.size, file.mtime_ns):
                raise TransferError(f"{file.there} changed on the node while it was copied")
            pieces.finish(str(file.here), file.size, file.mtime_ns)
    else:
        for file in files:
            if _local(file.here, file.there) != file:
                raise TransferError(f"{file.here} changed while it was copied")
        ask(remote, "finish", files=[(file.there, file.size, file.mtime_ns) for file in files])


def _local(here: Path, there: str) -> _File:
    seen = pieces.look(str(here))
    if seen is None:
        raise TransferError(f"{here} is not a file", hint="check the path; folders go through push_tree")
    return _File(here, there, seen[0], seen[1])


def _same(file: _File, seen: Sequence[object] | None) -> bool:
    """Same size and time; old rsyncs carry whole seconds only. With a hash: same content."""
    if seen is None or seen[0] != file.size:
        return False
    if seen[2] is not None:
        return seen[2] == pieces.sha256(str(file.here))
    there = seen[1]
    assert isinstance(there, int)
    return there == file.mtime_ns or (there % 10**9 == 0 and there // 10**9 == file.mtime_ns // 10**9)


def _drop_equal(
    remote: Remote, files: list[_File], seen: Mapping[str, Sequence[object] | None]
) -> list[_File]:
    """Without those large files that differ in their time only: reading both sides is cheaper than sending one."""
    alike = [
        file for file in files if file.size >= LARGE and (there := seen[file.there]) and there[0] == file.size
    ]
    if not alike:
        return files
    hashes = ask(remote, "look", paths=[file.there for file in alike], hashed=True)
    equal = {file for file, there in zip(alike, hashes, strict=True) if there and _same(file, there)}
    return [file for file in files if file not in equal]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


@contextmanager
def _explained(*, here: bool) -> Iterator[None]:
    """Turn what a full disk or a failing file says into a TransferError."""
    try:
        yield
    except CommandFailed as error:
        said = str(error)
        if "No space left" in said or "Disk quota" in said:
            raise _full("on this machine" if here and "rsync" in said else "on the node") from error
        raise TransferError(f"the transfer failed: {said}") from error
    except EOFError as error:
        raise TransferError(f"{error} became shorter while it was copied") from error
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise _full("on this machine") from error
        raise TransferError(f"the transfer failed: {error}") from error


def _full(where: str) -> DiskFull:
    return DiskFull(f"no space left {where}", hint="make room; the next try goes on where this one stopped")
