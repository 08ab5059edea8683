"""Files to a node and back: what moves, what does not, what a broken link costs, and where nothing may be written."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator.clock import SystemClock
from orchestrator.remote import kit as kits
from orchestrator.remote import lanes, openssh, pieces, questions, rsync, transfer
from orchestrator.remote.kit import Kit
from orchestrator.remote.mirror import Mirror
from orchestrator.remote.node import CommandFailed, ConnectionLost, NodeUnreachable, NoSuchFile, Remote
from orchestrator.site import collect
from runs.record import CheckpointRecord
from tests.nodes import Node, Proxy, any_node, local, node, processes, stop_master, until
from trainer import manifest

__all__ = ["any_node", "node"]
WAYS = ["rsync", "ssh", "fabric"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """rsync over OpenSSH; OpenSSH without rsync; neither."""
    hidden = {"rsync": set(), "ssh": {"rsync"}, "fabric": {"rsync", "ssh"}}[request.param]
    if request.param != "fabric" and not openssh.available():
        pytest.skip("no OpenSSH client")
    if request.param == "rsync" and rsync.installed() is None:
        pytest.skip("no rsync")
    hide(monkeypatch, hidden)
    return str(request.param)


def hide(monkeypatch: pytest.MonkeyPatch, programs: set[str]) -> None:
    """Let this side look as if it had none of the programs."""
    real = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, **rest: None if name in programs else real(name, **rest)
    )


def forest(folder: Path, count: int = 40) -> Path:
    """A tree with names that shells dislike, an empty file, and files of several kilobytes."""
    for index in range(count):
        place = folder / f"d {index % 4}" / f"f'{index} $x;\n.bin"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(os.urandom(index * 100))
    return folder


def same(left: Path, right: Path) -> bool:
    names = pieces.tree(str(left))
    return names == pieces.tree(str(right)) and all(
        filecmp.cmp(left / name, right / name, shallow=False) for name in names
    )


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a megabyte a large file, of many pieces."""
    monkeypatch.setattr(transfer, "LARGE", 1 << 20)
    monkeypatch.setattr(lanes, "PIECE", 1 << 18)


def test_a_checkpoint_that_retention_let_go_is_known_to_be_gone(node: Node, tmp_path: Path) -> None:
    """Where a newer one has taken its place; where nothing is found at all, nothing is given up. What is whole here, and the
    manifest of what came half, are not asked for again."""
    checkpoints = node.home / "llmctl" / "runs" / "r" / "checkpoints"
    items = {step: announced(checkpoints, step) for step in (10, 20)}
    gone: list[int] = []
    puller = collect.Puller(tmp_path, SystemClock(), lambda: None, lambda item: gone.append(item.step))
    shutil.rmtree(checkpoints / "step-000010")
    with node.remote() as remote:
        there = "~/llmctl/runs/r"
        with pytest.raises(NoSuchFile):
            puller.fetch(remote, there, [items[10]], weights_only=False)
        (checkpoints / "latest").symlink_to("step-000020")
        puller.fetch(remote, there, list(items.values()), weights_only=False)
        assert (gone, [item.step for item in puller.whole()]) == ([10], [20])
        (checkpoints / "step-000020" / manifest.NAME).unlink()
        puller.fetch(remote, there, [items[20]], weights_only=False)
        partial = tmp_path / "checkpoints" / ".step-000020.partial"
        (tmp_path / "checkpoints" / "step-000020").rename(partial)
        puller.fetch(remote, there, [items[20]], weights_only=False)
    assert manifest.verify(tmp_path / "checkpoints" / "step-000020") == []


def test_what_the_end_waits_for_comes_before_what_is_under_way(
    any_node: Node, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull in the background ends where it is when the run has ended; what it has brought is not brought again."""
    small_pieces(monkeypatch)
    checkpoints = any_node.home / "llmctl" / "runs" / "r" / "checkpoints"
    items = {step: announced(checkpoints, step, size=3_000_000) for step in (10, 20)}
    run = cast(Any, SimpleNamespace(
        spec={"checkpoint": {"fetch": "best"}}, latest=items[10], best=items[10], attempt=SimpleNamespace(number=1)
    ))  # fmt: skip
    puller = collect.Puller(tmp_path, SystemClock(), lambda: None, lambda item: None)
    under_way, real = threading.Event(), transfer.pull

    def pull(*given: Any, progress: transfer.Progress | None) -> transfer.Transfer:
        def held(done: int, total: int) -> None:
            under_way.set()
            assert puller._hurry.wait(30)
            assert progress is not None
            progress(done, total)

        return real(*given, progress=held if progress is not None else None)

    monkeypatch.setattr(transfer, "pull", pull)
    with any_node.remote() as remote:
        puller.background(remote, "~/llmctl/runs/r", run)
        assert under_way.wait(30)
        puller.fetch(remote, "~/llmctl/runs/r", [items[20]], weights_only=True)
        assert [(item.step, item.weights_only) for item in puller.whole()] == [(20, True)]
        assert not (tmp_path / "checkpoints" / "step-000010" / "training_state.pt").exists()
        puller.fetch(remote, "~/llmctl/runs/r", [items[10]], weights_only=False)
    assert manifest.verify(tmp_path / "checkpoints" / "step-000010") == []


def test_a_checkpoint_does_not_wait_for_the_log(node: Node, tmp_path: Path) -> None:
    """A log that is long, over a link that is slow, arrives after what is worth more."""
    folder, fetched = node.home / "llmctl" / "runs" / "r", []
    folder.mkdir(parents=True)
    (folder / "train.log").write_bytes(b"x" * 1000)
    mirrors = {name: Mirror(tmp_path / name, 1) for name in ("train.log", "metrics.jsonl")}
    clock = Hasty()
    with node.remote() as remote, pytest.raises(TimeoutError, match="did not arrive"):
        collect.bring(remote, "~/llmctl/runs/r", mirrors, clock, lambda: fetched.append(clock.monotonic()))
    assert fetched == [0.0]


class Hasty(SystemClock):
    """A clock on which nobody waits."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return self.passed

    def wait(self, event: threading.Event, seconds: float) -> None:
        self.passed += seconds


def announced(checkpoints: Path, step: int, size: int = 1000) -> CheckpointRecord:
    """A checkpoint on a node."""
    folder = checkpoints / manifest.directory_name(step)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(size))
    (folder / "training_state.pt").write_bytes(os.urandom(size))
    manifest.write(folder, step)
    sha256 = manifest.digest(folder)
    return CheckpointRecord(step=step, sha256=sha256, bytes=2 * size, seen_at=datetime.now(UTC), attempt=1)


def test_there_and_back_and_nothing_twice(
    any_node: Node, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    source = forest(tmp_path / "source")
    (source / "large").write_bytes(os.urandom(3_000_001))
    (source / "__pycache__").mkdir()
    (source / "__pycache__" / "x.pyc").write_bytes(b"")
    with any_node.remote() as remote:
        first = transfer.push_tree(remote, source, "~/the tree")
        assert first.files_sent == 41
        assert first.method == {"rsync": "rsync+pieces"}.get(way, "pieces")
        shutil.rmtree(source / "__pycache__")
        assert same(source, any_node.home / "the tree")
        again = transfer.push_tree(remote, source, "~/the tree")
        assert (again.files_sent, again.bytes_sent, again.method) == (0, 0, "unchanged")
        back = transfer.pull_tree(remote, "the tree", tmp_path / "back")
        assert (back.files_sent, back.bytes_sent) == (first.files_sent, first.bytes_sent)
        assert same(source, tmp_path / "back")
        assert transfer.pull_tree(remote, "the tree", tmp_path / "back").files_sent == 0
        assert remote.connections == 1
    assert list(tmp_path.rglob("*.llmctl-*")) == []
    assert list(any_node.home.rglob("*.llmctl-*")) == []


def test_unchanged_tree_costs_one_command(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One exchange over the warm connection; no process is started here."""
    source = forest(tmp_path / "source", 200)
    with node.remote() as remote:
        transfer.push_tree(remote, source, "tree")
        commands: list[Any] = []
        run = remote.run
        monkeypatch.setattr(remote, "run", lambda *a, **k: commands.append(a) or run(*a, **k))
        monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
        assert transfer.push_tree(remote, source, "tree").files_sent == 0
        assert len(commands) == 1
        assert remote.connections == 1


def test_only_what_changed_moves(node: Node, way: str, tmp_path: Path) -> None:
    source = forest(tmp_path / "source")
    changed = next(path for path in source.rglob("*") if path.is_file() and path.stat().st_size)
    with node.remote() as remote:
        transfer.push_tree(remote, source, "tree")
        content = changed.read_bytes()
        changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        (source / "added").write_bytes(b"1")
        moved = transfer.push_tree(remote, source, "tree")
        assert moved.files_sent == 2
        assert same(source, node.home / "tree")
        shutil.rmtree(node.home / "tree")
        assert transfer.push_tree(remote, source, "tree").files_sent == 41, (
            "the digest belongs to that very folder"
        )
        (source / "added").unlink()
        transfer.push_tree(remote, source, "tree")
        assert (node.home / "tree" / "added").exists(), "nothing is deleted"


def test_touched_file_with_equal_content(
    node: Node, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(2 << 20))
    with node.remote() as remote:
        assert transfer.push(remote, {"large": large}).bytes_sent == 2 << 20
        os.utime(large, ns=(1, 1))
        assert transfer.push(remote, {"large": large}).bytes_sent == 0


def test_names_and_places_of_a_push(node: Node, way: str, tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"22")
    absolute = node.home.parent / "elsewhere" / "x y"
    wanted = {"~/data/renamed": tmp_path / "one", str(absolute): tmp_path / "two", "-odd": tmp_path / "one"}
    with node.remote() as remote:
        done = transfer.push(remote, wanted, immutable=True)
    assert (done.files_sent, done.bytes_sent) == (3, 4)
    assert (node.home / "data" / "renamed").read_bytes() == b"1"
    assert absolute.read_bytes() == b"22"
    assert (node.home / "-odd").read_bytes() == b"1"


def test_progress_adds_up(node: Node, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    source = forest(tmp_path / "source")
    (source / "large").write_bytes(os.urandom(2_000_000))
    seen: list[tuple[int, int]] = []
    with node.remote() as remote:
        done = transfer.push_tree(remote, source, "tree", progress=lambda *both: seen.append(both))
        assert seen[-1] == (done.bytes_sent, done.bytes_sent)
        assert seen == sorted(seen)
        seen.clear()
        transfer.pull_tree(remote, "tree", tmp_path / "back", progress=lambda *both: seen.append(both))
        assert seen[-1] == (done.bytes_sent, done.bytes_sent)


def test_missing_files(node: Node, way: str, tmp_path: Path) -> None:
    with node.remote() as remote:
        with pytest.raises(transfer.TransferError, match="is not a file"):
            transfer.push(remote, {"x": tmp_path / "nothing"})
        with pytest.raises(NoSuchFile, match="nothing"):
            transfer.pull(remote, ".", ["nothing"], tmp_path / "to")
        assert transfer.push(remote, {}).method == "unchanged"
        assert transfer.pull(remote, ".", [], tmp_path / "to").method == "unchanged"


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "a/../../escape", "", "a\0b", ".", ".."])
def test_names_that_lead_elsewhere(
    node: Node, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "to"
    ask = questions.ask
    monkeypatch.setattr(
        transfer, "ask", lambda remote, op, **k: [name] if op == "tree" else ask(remote, op, **k)
    )
    with node.remote() as remote, pytest.raises(transfer.TransferError, match="offers a file"):
        transfer.pull_tree(remote, ".", to)
    assert not to.exists()


def test_links_lead_nowhere(node: Node, way: str, tmp_path: Path) -> None:
    """A link on the node is not followed out of the tree; a link that stands here is not written through."""
    outside, to = tmp_path / "outside", tmp_path / "to"
    outside.mkdir()
    to.mkdir()
    (outside / "secret").write_bytes(b"secret")
    tree = node.home / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_bytes(b"data")
    (tree / "link").symlink_to(outside / "secret")
    (tree / "folder").symlink_to(outside)
    with node.remote() as remote:
        assert transfer.pull_tree(remote, "tree", to).files_sent == 1
        assert [path.name for path in to.iterdir()] == ["sub"]
        shutil.rmtree(to / "sub")
        (to / "sub").symlink_to(outside)
        with pytest.raises(transfer.TransferError, match="not a folder of its own"):
            transfer.pull_tree(remote, "tree", to)
        (to / "sub").unlink()
        (to / "sub").mkdir()
        (to / "sub" / "file").symlink_to(outside / "secret")
        transfer.pull_tree(remote, "tree", to)
        assert (outside / "secret").read_bytes() == b"secret"
        assert (to / "sub" / "file").read_bytes() == b"data"
        assert not (to / "sub" / "file").is_symlink()


@pytest.mark.parametrize("pull", [False, True], ids=["push", "pull"])
def test_broken_transfer_goes_on_where_it_stopped(
    node: Node, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pull: bool
) -> None:
    small_pieces(monkeypatch)
    size = 24 << 20
    here, there = tmp_path / "here", node.home / "there"
    data = os.urandom(size)
    (there if pull else here).write_bytes(data)
    with Proxy(node.address.port) as proxy:
        far = node.at(proxy.port)
        proxy.cut_at = (
            size * 3 // 4
        )  # what either end says is ahead or behind by all that windows and buffers hold

        def move(remote: Remote) -> transfer.Transfer:
            if pull:
                return transfer.pull(remote, ".", ["there"], tmp_path / "to")
            return transfer.push(remote, {"there": here})

        with far.remote() as remote:
            with pytest.raises((ConnectionLost, NodeUnreachable)):
                move(remote)
            assert proxy.cut_at is None
            assert not (tmp_path / "to" / "there" if pull else there).exists(), "no half file under its name"
            before = proxy.bytes
            move(remote)
            assert proxy.bytes - before < size * 0.95
        arrived = tmp_path / "to" / "there" if pull else there
        assert arrived.read_bytes() == data
        stop_master(far)


def test_source_that_changes_underway(
    node: Node, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    large = node.home / "large"
    large.write_bytes(os.urandom(4 << 20))
    changed = threading.Event()

    def change(_done: int, _total: int) -> None:
        if not changed.is_set():
            changed.set()
            large.write_bytes(b"quite another")

    with node.remote() as remote:
        with pytest.raises(transfer.TransferError):
            transfer.pull(remote, ".", ["large"], tmp_path / "to", progress=change)
        assert not (tmp_path / "to" / "large").exists()
        transfer.pull(remote, ".", ["large"], tmp_path / "to")
        assert (tmp_path / "to" / "large").read_bytes() == b"quite another"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_has_a_name(node: Node, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    (node.home / "large").write_bytes(os.urandom(2 << 20))
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "large.llmctl-part").symlink_to("/dev/full")
    version = node.home.joinpath("large").stat()
    (tmp_path / "to" / "large.llmctl-done").write_text(f"{version.st_size} {version.st_mtime_ns}\n")
    with node.remote() as remote, pytest.raises(transfer.DiskFull, match="on this machine") as caught:
        transfer.pull(remote, ".", ["large"], tmp_path / "to")
    assert caught.value.hint


def test_node_without_rsync(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "true", "cat", "head", "tail", "ls", "mkdir", "rm", "dirname"):
        (tools / name).symlink_to(shutil.which(name) or "")
    source = forest(tmp_path / "source")
    with local(tmp_path / "n") as node, node.remote() as remote:
        (tools / "python3").symlink_to(sys.executable)
        run = remote.run
        bare = {"PATH": str(tools)}
        remote.run = lambda command, **k: run(command, **{**k, "env": bare})  # type: ignore[method-assign]
        done = transfer.push_tree(remote, source, "tree")
        assert done.method == "pieces"
        assert same(source, node.home / "tree")
        stop_master(node)


def test_node_without_python_says_so(node: Node, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sh").symlink_to(shutil.which("sh") or "")
    with node.remote() as remote:
        session = remote.session
        bare = {"PATH": str(tools)}
        remote.session = lambda command, **k: session(command, **{**k, "env": bare})  # type: ignore[method-assign]
        with pytest.raises(CommandFailed, match="python3") as caught:
            questions.ask(remote, "look", paths=["x"] * 100_000, hashed=False)
    assert caught.value.result.exit_code == 127


def test_questions_start_one_process(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another question at the same time has a process of its own, which does not stay."""
    started: list[Any] = []
    with node.remote() as remote:
        session = remote.session
        monkeypatch.setattr(remote, "session", lambda *a, **k: started.append(a) or session(*a, **k))
        for _ in range(5):
            assert questions.ask(remote, "look", paths=["none"], hashed=False) == [None]
        assert len(started) == 1
        with pytest.raises(CommandFailed, match="No such file"):
            questions.ask(remote, "tree", root="none")
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(questions.ask, remote, "tree", root=".") for _ in range(20)]
            assert [found.result() for found in asked] == [[]] * 20
        until(lambda: len(serving(node)) == 1)
        before = len(started)
        assert questions.ask(remote, "tree", root=".") == []
        assert len(started) == before
        assert remote.connections == 1


def serving(node: Node) -> list[str]:
    """The processes on the node that wait for questions."""
    assert node.directory is not None
    return [line for line in processes(node.directory) if line.endswith(" serve")]


@pytest.mark.parametrize("fault", ["killed", "cut"])
def test_questions_go_on_after(node: Node, fault: str) -> None:
    """What answered is gone, and nobody was asking: the next question is answered all the same."""
    with Proxy(node.address.port) as proxy, node.at(proxy.port).remote() as remote:
        assert questions.ask(remote, "tree", root=".") == []
        if fault == "killed":
            [kept] = cast("list[Any]", remote.memory["answerers"])
            remote.run(["kill", "-KILL", str(kept.session.pid)])
        else:
            proxy.cut()
        assert questions.ask(remote, "tree", root=".") == []
        assert remote.connections == (1 if fault == "killed" else 2)


def test_old_rsync_does_not_pull(node: Node, tmp_path: Path) -> None:
    (node.home / "file").write_bytes(b"x")
    with node.remote() as remote:
        found = kits.look(remote)
        remote.memory["kit"] = Kit(found.carrier, (3, 1, 3), found.theirs, found.round_trip)
        assert transfer.pull(remote, ".", ["file"], tmp_path / "to").method == "pieces"


@pytest.mark.skipif(
    rsync.installed() is None or not openssh.available(), reason="no rsync or no OpenSSH client"
)
def test_flags_that_old_rsyncs_know_do_the_work(node: Node, tmp_path: Path) -> None:
    source = forest(tmp_path / "source")
    with node.remote() as remote:
        found = kits.look(remote)
        remote.memory["kit"] = Kit(found.carrier, (2, 6, 9), found.theirs, found.round_trip)
        assert transfer.push_tree(remote, source, "tree").method == "rsync"
    assert same(source, node.home / "tree")


@pytest.mark.skipif(
    rsync.installed() is None or not openssh.available(), reason="no rsync or no OpenSSH client"
)
def test_compression_only_where_it_wins(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kits, "SAMPLED", 1 << 20)
    text, noise = tmp_path / "text", tmp_path / "noise"
    text.write_bytes(b"the same words again and again\n" * 70_000)
    noise.write_bytes(os.urandom(2 << 20))
    with node.remote() as remote:
        for speed, file, expected in ((1e6, text, True), (1e6, noise, False), (1e9, text, False)):
            remote.memory["bytes_per_second"] = speed
            done = transfer.push(remote, {f"{file.name}-{speed}": file})
            assert done.compressed is expected
        assert (node.home / "text-1000000.0").read_bytes() == text.read_bytes()


@pytest.mark.skipif(not openssh.available(), reason="no OpenSSH client")
def test_one_connection_for_everything(node: Node, tmp_path: Path) -> None:
    with Proxy(node.address.port) as proxy:
        far = node.at(proxy.port)
        with far.remote() as remote:
            for round_ in range(3):
                source = forest(tmp_path / f"source{round_}", 20)
                transfer.push_tree(remote, source, f"tree{round_}")
                transfer.pull_tree(remote, f"tree{round_}", tmp_path / f"back{round_}")
            assert proxy.connections == 2, "one of Fabric's, one of the ControlMaster"
        stop_master(far)
