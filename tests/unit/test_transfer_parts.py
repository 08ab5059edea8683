"""The parts of a transfer that need no node: versions, flags, shares, pieces, names."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.remote import lanes, openssh, pieces, questions, rsync, transfer
from orchestrator.remote.connection import Address, ConnectionLost, HostKeyMismatch


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rsync  version 3.5.0  protocol version 32\n", (3, 5, 0)),
        ("rsync  version v3.2.7-1  protocol version 31", (3, 2, 7)),
        ("rsync  version 2.6.9  protocol version 29", (2, 6, 9)),
        ("openrsync: protocol version 29\nrsync version 2.6.9 compatible", (2, 6, 9)),
        ("", None),
        ("sh: rsync: not found", None),
    ],
)
def test_version(text: str, expected: tuple[int, int, int] | None) -> None:
    assert rsync.version(text) == expected


def test_old_rsync_gets_old_flags_only() -> None:
    known = {
        "-L",
        "-I",
        "-t",
        "--from0",
        "--files-from=-",
        "--timeout=60",
        "-W",
        "--inplace",
        "-z",
        "--compress-level=1",
    }
    for immutable in (False, True):
        flags = rsync.Flags((2, 6, 9), (3, 5, 0), immutable=immutable, compress=True).argv()
        assert set(flags) <= known | {f"--partial-dir={rsync.PARTIAL}"}
    assert "--compress-choice=zstd" in rsync.Flags((3, 5, 0), (3, 2, 7), compress=True).argv()
    assert "--compress-choice=zstd" not in rsync.Flags((3, 5, 0), (3, 1, 3), compress=True).argv()


@given(
    st.lists(st.tuples(st.uuids().map(str), st.integers(0, 10**9)), unique_by=lambda item: item[0]),
    st.integers(1, 9),
)
def test_shares_are_a_partition_and_even(sizes: list[tuple[str, int]], count: int) -> None:
    groups = rsync.shares(sizes, count)
    assert sorted(name for group in groups for name in group) == sorted(name for name, _ in sizes)
    assert len(groups) <= count
    weight = dict(sizes)
    heavy = [sum(weight[name] + 4096 for name in group) for group in groups]
    if len(groups) == count > 1:
        assert max(heavy) - min(heavy) <= max(weight.values()) + 4096


@given(st.integers(0, 3 * lanes.PIECE + 1), st.data())
def test_cut_covers_what_is_missing(size: int, data: st.DataObject) -> None:
    every = lanes.cut("here", "there", size, [])
    assert sum(length for *_, length in every) == size
    done = data.draw(st.lists(st.sampled_from(every), unique=True)) if every else []
    rest = lanes.cut("here", "there", size, [piece[2:] for piece in done])
    assert sorted(rest + done) == sorted(every)


def test_pieces_in_any_order_make_the_file(tmp_path: Path) -> None:
    source, goal = tmp_path / "source", tmp_path / "sub" / "goal"
    source.write_bytes(os.urandom(3_000_000))
    version = "3000000 5"
    assert pieces.begin(str(goal), version) == []
    for offset, length in ((2_000_000, 1_000_000), (0, 1_500_000)):
        buffer = io.BytesIO()
        pieces.read_piece(str(source), offset, length, buffer.write, lambda _: None)
        buffer.seek(0)
        pieces.write_piece(str(goal), offset, length, buffer.read, lambda _: None)
    assert pieces.begin(str(goal), version) == [[2_000_000, 1_000_000], [0, 1_500_000]]
    with pytest.raises(EOFError):
        pieces.write_piece(str(goal), 1_500_000, 500_000, io.BytesIO(b"short").read, lambda _: None)
    assert len(pieces.begin(str(goal), version)) == 2, "a torn piece does not count"
    pieces.write_piece(str(goal), 1_500_000, 500_000, source.open("rb").read, lambda _: None)
    with source.open("rb") as file:
        file.seek(1_500_000)
        pieces.write_piece(str(goal), 1_500_000, 500_000, file.read, lambda _: None)
    pieces.finish(str(goal), 3_000_000, 5)
    assert goal.read_bytes() == source.read_bytes()
    assert goal.stat().st_mtime_ns == 5
    assert [path.name for path in goal.parent.iterdir()] == ["goal"]


def test_another_version_starts_anew(tmp_path: Path) -> None:
    goal = str(tmp_path / "goal")
    pieces.begin(goal, "4 1")
    pieces.write_piece(goal, 0, 4, io.BytesIO(b"data").read, lambda _: None)
    assert pieces.begin(goal, "4 2") == []
    with pytest.raises(EOFError, match="0 of 4"):
        pieces.finish(goal, 4, 2)


def test_cut_line_of_the_record_is_no_piece(tmp_path: Path) -> None:
    goal = str(tmp_path / "goal")
    pieces.begin(goal, "9 1")
    Path(goal + pieces.DONE).write_text("9 1\n0 4\n4 ")
    assert pieces.begin(goal, "9 1") == [[0, 4]]


def test_node_side_runs_alone(tmp_path: Path) -> None:
    """As on the node: isolated, from its text only."""
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    (tmp_path / "file").write_bytes(b"abc")
    command = [sys.executable, *questions.node_side("serve")[1:]]
    asked = [
        {"operation": "tree", "root": "nowhere"},
        {"operation": "look", "paths": ["file", "none", "."], "hashed": True},
    ]
    lines = "".join(json.dumps(question) + "\n" for question in asked).encode()
    done = subprocess.run(command, cwd=tmp_path, input=lines, capture_output=True, check=True)
    refused, told = map(json.loads, done.stdout.splitlines())
    assert refused["error"].startswith("FileNotFoundError"), (
        "a question that fails leaves the next one answered"
    )
    answer = told["answer"]
    assert answer[0][0] == 3
    assert answer[0][2].startswith("ba7816bf")
    assert answer[1:] == [None, None]


@pytest.mark.parametrize("name", ["a", "a/b/c", "a b/ü", "..a", "a..b/c"])
def test_target_stays_inside(tmp_path: Path, name: str) -> None:
    assert transfer.target(tmp_path, name) == tmp_path / name


@given(st.text(max_size=30))
def test_no_name_leads_out(name: str) -> None:
    folder = Path("/nonexistent/folder")
    try:
        place = transfer.target(folder, name)
    except transfer.TransferError:
        return
    assert Path(os.path.normpath(place)).is_relative_to(folder)
    assert Path(os.path.normpath(place)) != folder


def address(tmp_path: Path) -> Address:
    return Address("h", 2222, "me", tmp_path / "a key%", tmp_path / "known", "llmctl-x-ab12-a1-n0")


def test_ssh_config_trusts_and_tries_nothing_else(tmp_path: Path) -> None:
    text = openssh.ssh_config(address(tmp_path), tmp_path / "sock")
    for line in (
        *(
            "StrictHostKeyChecking yes",
            "GlobalKnownHostsFile none",
            "IdentitiesOnly yes",
            "IdentityAgent none",
        ),
        *(
            "BatchMode yes",
            "ForwardAgent no",
            "HostKeyAlias llmctl-x-ab12-a1-n0",
            "Port 2222",
            "ServerAliveCountMax 3",
        ),
    ):
        assert f"  {line}\n" in text
    assert f'IdentityFile "{tmp_path}/a key%%"' in text


def test_socket_name_is_short_and_its_folder_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 120)))
    carrier = openssh.Carrier(address(tmp_path))
    assert len(str(carrier.config)) + len(".sock.") + 16 < 100
    assert carrier.config.parent.stat().st_mode & 0o077 == 0


def test_only_old_leftovers_are_tidied(tmp_path: Path) -> None:
    for name in ("old", "living", "new"):
        for kind in ("conf", "lock"):
            (tmp_path / f"{name}.{kind}").touch()
            os.utime(tmp_path / f"{name}.{kind}", None if name == "new" else (0, 0))
    (tmp_path / "living.sock").touch()
    openssh._tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.conf")) == ["living.conf", "new.conf"]


def test_ssh_failures_have_names(tmp_path: Path) -> None:
    carrier = openssh.Carrier(address(tmp_path))
    carrier.check(0, "")
    carrier.check(3, "the command's own status")
    with pytest.raises(ConnectionLost, match="Broken pipe"):
        carrier.check(255, "client_loop: send disconnect: Broken pipe")
    with pytest.raises(HostKeyMismatch):
        carrier.check(255, "Host key verification failed.")
