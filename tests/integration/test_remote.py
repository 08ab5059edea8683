"""Commands on a node, on the embedded server and on OpenSSH's, over good links and bad ones."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.remote import connection, openssh, session
from orchestrator.remote.node import (
    CommandFailed,
    CommandTimeout,
    ConnectionLost,
    HostKeyMismatch,
    LoginRefused,
    NodeUnreachable,
    NoSuchFile,
    Remote,
)
from provisioning import keys
from tests.nodes import Node, Proxy, any_node, node, processes, until

__all__ = ["any_node", "node"]
NASTY = "a b;$(id) `id` \\ \"x\" 'y'\n\n*?\t\u2028é"


def test_arguments_and_streams_arrive_as_they_are(any_node: Node) -> None:
    with any_node.remote() as remote:
        assert remote.run(["printf", "%s", NASTY]).stdout.decode() == NASTY
        result = remote.run("echo out; echo err >&2; exit 5", check=False)
        assert (result.stdout, result.stderr, result.exit_code) == (b"out\n", b"err\n", 5)
        data = os.urandom(2_000_000)
        assert remote.run(["cat"], stdin=data).stdout == data
        assert remote.connections == 1


def test_environment_is_quoted_and_unseen(any_node: Node) -> None:
    with any_node.remote() as remote:
        seen = remote.run('printf %s "$A"; cat', env={"A": NASTY, "B": "1"}, stdin=b"input\n")
        assert seen.stdout.decode() == NASTY + "input\n"
        listed = remote.run(
            "ps -eo args 2>/dev/null || cat /proc/[0-9]*/cmdline", env={"TOKEN": "s3cr3t-value"}
        ).text
        assert "s3cr3t-value" not in listed
        for bad in ({"A=B": "1"}, {"A": "\0"}, {"": "x"}, {"1A": "x"}):
            with pytest.raises(ValueError, match="environment variable"):
                remote.run(["true"], env=bad)


def test_failure_tells_command_and_reason(any_node: Node) -> None:
    with any_node.remote() as remote:
        with pytest.raises(CommandFailed, match="the reason") as caught:
            remote.run("echo the reason >&2; exit 3")
        assert caught.value.result.exit_code == 3
        assert caught.value.exit_code == 1
        assert remote.run("kill -9 $$", check=False).exit_code == session.SIGNALLED


def test_timeout_leaves_no_orphan(any_node: Node) -> None:
    mark = f"1{os.getpid()}"
    with any_node.remote() as remote:
        remote.run(["true"])  # the handshake takes its time on a busy machine, and is no part of this
        with pytest.raises(CommandTimeout) as caught:
            remote.run(f"echo begun; sleep {mark} & trap '' TERM; sleep {mark}", timeout=2)
        assert caught.value.result.stdout == b"begun\n"
        until(lambda: not remote.run(["pgrep", "-f", f"sleep {mark}$"], check=False).text)
        assert remote.run(["echo", "still here"]).text == "still here"
        assert remote.connections == 1


def test_output_is_bounded(node: Node) -> None:
    with node.remote() as remote:
        result = remote.run(["head", "-c", "5000000", "/dev/zero"], limit=1000)
    assert result.truncated
    assert len(result.stdout) == 1000


def test_files_are_written_whole_and_read_in_part(any_node: Node) -> None:
    with any_node.remote() as remote:
        remote.write("~/a b/c'd", b"0123456789", 0o640)
        path = any_node.home / "a b" / "c'd"
        assert path.read_bytes() == b"0123456789"
        assert path.stat().st_mode & 0o777 == 0o640
        assert remote.read("a b/c'd", 3, 4) == b"3456"
        assert remote.read("a b/c'd", 10) == b""
        remote.write(str(path), b"new")
        assert remote.read(str(path)) == b"new"
        assert [entry.name for entry in path.parent.iterdir()] == ["c'd"]
        with pytest.raises(NoSuchFile):
            remote.read("nothing")
        with pytest.raises(CommandFailed):
            remote.write("a b/c'd/under-a-file", b"x")
        for bad in ("", "a\0b"):
            with pytest.raises(ValueError, match="no path"):
                remote.read(bad)


def test_large_file_through_stdin(node: Node) -> None:
    data = os.urandom(9_000_000)
    with node.remote() as remote:
        remote.write("big", data)
        assert remote.read("big", limit=10_000_000) == data


def test_detached_job_outlives_connection(any_node: Node) -> None:
    with any_node.remote() as remote:
        remote.run(["mkdir", "work"])
        remote.detach(
            ["sh", "-c", "echo $SECRET; until [ -e go ]; do sleep 0.02; done; echo done"],
            cwd="work",
            log="job.log",
            env={"SECRET": "x y"},
        )
        until(lambda: remote.read("work/job.log") == b"x y\n")
        for argv, cwd in ((["true"], "nowhere"), (["no-such-program"], "work")):
            with pytest.raises(CommandFailed):
                remote.detach(argv, cwd=cwd, log="job.log")
    (any_node.home / "work" / "go").touch()
    until(lambda: (any_node.home / "work" / "job.log").read_bytes() == b"x y\ndone\n")


def test_detach_without_setsid(node: Node, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python3").symlink_to(Path(sys.executable).resolve())
    for name in ("sh", "sleep"):
        (tools / name).symlink_to(shutil.which(name) or "")
    with node.remote() as remote:
        remote.run(["true"])
        remote.detach(["sh", "-c", "sleep 0.1; echo done"], cwd=".", log="job.log", env={"PATH": str(tools)})
    until(lambda: (node.home / "job.log").read_bytes() == b"done\n")


def test_background_job_that_keeps_the_pipes_does_not_hold_us(any_node: Node) -> None:
    with any_node.remote() as remote:
        started = time.monotonic()
        assert remote.run("sleep 3 & echo started", timeout=20).text == "started"
        assert time.monotonic() - started < 15


def test_many_threads_on_one_connection(any_node: Node) -> None:
    answers: dict[int, str] = {}
    with any_node.remote() as remote:

        def ask(number: int) -> None:
            for _ in range(3):
                answers[number] = remote.run(["echo", str(number)]).text

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert remote.connections == 1
    assert answers == {number: str(number) for number in range(16)}


def test_another_host_key_is_an_error(any_node: Node, tmp_path: Path) -> None:
    wrong = keys.known_hosts(tmp_path, "wrong")
    keys.pin(wrong, keys.generate().public)
    address = dataclasses.replace(any_node.address, known_hosts=wrong)
    for tried in (address, dataclasses.replace(address, accept_new=True)):
        with pytest.raises(HostKeyMismatch) as caught:
            Remote(tried).run(["true"])
        assert caught.value.exit_code == 6
        assert str(wrong) in str(caught.value)
    assert keys.pinned(wrong) != keys.pinned(any_node.address.known_hosts)


def test_first_key_is_pinned_only_where_that_was_asked_for(any_node: Node, tmp_path: Path) -> None:
    fresh = keys.known_hosts(tmp_path, "fresh")
    address = dataclasses.replace(any_node.address, known_hosts=fresh)
    with pytest.raises(HostKeyMismatch, match="no key"):
        Remote(address).run(["true"])
    assert not fresh.exists()
    with Remote(dataclasses.replace(address, accept_new=True)) as remote:
        remote.run(["true"])
    assert keys.pinned(fresh) == keys.pinned(any_node.address.known_hosts)
    with Remote(address) as remote:
        remote.run(["true"])


@pytest.mark.skipif(not openssh.available(), reason="no OpenSSH client")
def test_a_pin_holds_for_every_node_that_the_machine_becomes(any_node: Node, tmp_path: Path) -> None:
    """The file of a machine of one's own is shared by its attempts, which have names of their own."""
    shared = keys.known_hosts(tmp_path, "ssh-host-22")
    first = dataclasses.replace(any_node.address, known_hosts=shared)
    with Remote(dataclasses.replace(first, accept_new=True)) as remote:
        remote.run(["true"])
    second = openssh.Carrier(dataclasses.replace(first, key="llmctl-test-ab12-a2-n0"))
    second.ensure()
    second.stop()


def test_what_cannot_be_reached(any_node: Node, tmp_path: Path) -> None:
    with pytest.raises(NodeUnreachable, match="refused"):
        Remote(dataclasses.replace(any_node.address, port=1)).run(["true"])
    with pytest.raises(NodeUnreachable, match="cannot be reached"):
        Remote(dataclasses.replace(any_node.address, host="no-such-host.invalid")).run(["true"])
    with pytest.raises(LoginRefused):
        Remote(dataclasses.replace(any_node.address, identity_file=keys.client_key(tmp_path / "x"))).run(
            ["true"]
        )
    with pytest.raises(keys.KeyFileError):
        Remote(dataclasses.replace(any_node.address, identity_file=tmp_path / "none")).run(["true"])


def test_a_port_that_is_silent_or_not_ssh(node: Node) -> None:
    with Proxy(node.address.port) as proxy:
        proxy.stall()
        with pytest.raises(NodeUnreachable, match="handshake"):
            Remote(node.at(proxy.port).address, connect_timeout=0.5).run(["true"])


def test_cut_link_is_a_lost_connection_and_the_next_call_connects(node: Node) -> None:
    with Proxy(node.address.port) as proxy, node.at(proxy.port).remote() as remote:
        remote.run(["true"])
        threading.Timer(0.3, proxy.cut).start()
        with pytest.raises(ConnectionLost) as caught:
            remote.run(["sleep", "1006"], timeout=30)
        assert caught.value.exit_code == 6
        assert remote.run(["echo", "again"]).text == "again"
        assert remote.connections == 2


def test_stalled_link_is_noticed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy's kernel goes on acknowledging: only the question inside SSH can tell."""
    assert connection.PROBE_SECONDS + connection.SILENCE_SECONDS < 60
    monkeypatch.setattr(connection, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 1.0)
    with Proxy(node.address.port) as proxy, node.at(proxy.port).remote() as remote:
        remote.run(["true"])
        threading.Timer(0.2, proxy.stall).start()
        with pytest.raises(ConnectionLost, match="silent"):
            remote.run(["sleep", "1007"], timeout=60)
        proxy.flow()
        assert remote.run(["echo", "again"]).text == "again"


def test_probe_of_a_busy_link_disturbs_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PROBE_SECONDS", 0.01)
    with node.remote() as remote:
        for _ in range(10):
            assert len(remote.run(["head", "-c", "2000000", "/dev/zero"]).stdout) == 2_000_000
        assert remote.connections == 1


def test_login_takes_no_key_from_home(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good key in ~/.ssh and a host alias in its config must not help."""
    ssh = tmp_path / "user" / ".ssh"
    ssh.mkdir(parents=True)
    (ssh / "id_ed25519").write_bytes(node.address.identity_file.read_bytes())
    (ssh / "id_ed25519").chmod(0o600)
    (ssh / "config").write_text(f"Host 127.0.0.1\n  User {node.address.user}\n  Port {node.address.port}\n")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    stranger = dataclasses.replace(node.address, identity_file=keys.client_key(tmp_path / "y"))
    with pytest.raises(LoginRefused):
        Remote(stranger).run(["true"])
    with pytest.raises(NodeUnreachable):
        Remote(dataclasses.replace(node.address, port=1)).run(["true"])


def test_a_command_on_a_warm_connection_is_one_exchange(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """No handshake, and no channel to be opened first: the question goes there, and what it left comes back."""
    monkeypatch.setattr(connection, "FIRST_PROBES", 0)  # whose own exchanges would be counted too
    with Proxy(node.address.port, 0.1) as proxy, node.at(proxy.port).remote() as remote:
        remote.run(["true"])
        exchanges, carried = proxy.exchanges, proxy.bytes
        for _ in range(5):
            assert remote.run(["echo", "x"]).text == "x"
        assert proxy.exchanges - exchanges <= 5 + 1, "one each, and what was still under way"
        assert (proxy.bytes - carried) / 5 < 2000
        assert proxy.connections == 1


def test_a_link_that_was_not_heard_of_is_asked_before_a_command_is_sent(node: Node) -> None:
    """After the sleep of this machine no command is lost with the link."""
    with Proxy(node.address.port) as proxy, node.at(proxy.port).remote() as remote:
        remote.run(["true"])
        link = remote._link
        assert link is not None
        link._heard_at -= 3600
        opened: list[object] = []
        open_channel = link.open_channel
        link.open_channel = lambda *a: opened.append(a) or open_channel(*a)  # type: ignore[method-assign]
        assert remote.run(["echo", "x"]).text == "x"
        assert len(opened) == 1


def test_round_trip_is_the_links_and_no_commands(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(node.address.port, 0.03) as proxy, node.at(proxy.port).remote() as remote:
        monkeypatch.setattr(remote, "session", lambda *a, **k: pytest.fail("a command was run"))
        assert remote.round_trip() >= 0.06
        assert remote.connections == 1


def test_round_trip_of_a_link_that_does_not_answer(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    import paramiko

    monkeypatch.setattr(connection, "SILENCE_SECONDS", 0.2)
    over = threading.Event()
    monkeypatch.setattr(paramiko.Transport, "global_request", lambda *_, **__: over.wait())
    with node.remote() as remote, pytest.raises(ConnectionLost, match="does not answer"):
        remote.round_trip()
    over.set()


def test_what_a_channel_says_after_its_end_is_not_sent(any_node: Node) -> None:
    """The end of the input, held back until the node's end of the channel was answered: it would end the connection."""
    with any_node.remote() as remote:
        link = remote._connected()
        for _ in range(3):
            channel = link.open_channel(None, 10)
            channel.exec_command("cat")  # which does not end by itself
            with channel.lock:
                late = channel._send_eof()
            channel.close()
            channel.transport._send_user_message(late)
            assert remote.run(["echo", "still here"]).text == "still here"
        assert remote.connections == 1


def test_a_refused_session_is_asked_for_again_and_ends_no_connection(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sshd has not noticed yet that the commands before have ended; paramiko has two errors for that."""
    import paramiko

    with node.remote() as remote:
        link = remote._connected()
        really = link.transport.open_session
        refusals = [
            paramiko.SSHException("Unable to open channel."),
            paramiko.ChannelException(2, "Connect failed"),
        ]

        def open_session(**options: object) -> paramiko.Channel:
            if refusals:
                raise refusals.pop()
            return really(**options)

        monkeypatch.setattr(link.transport, "open_session", open_session)
        link.open_channel(None, 10).close()
        assert refusals == []
        monkeypatch.setattr(connection, "REFUSED_SECONDS", 0.1)
        refusals += [paramiko.ChannelException(2, "Connect failed") for _ in range(100)]
        with pytest.raises(connection.SessionRefused, match="refuses another session"):
            link.open_channel(None, 10)
        refusals.clear()
        assert remote.run(["echo", "still here"]).text == "still here"
        assert remote.connections == 1


def test_closing_ends_nothing_on_the_node(node: Node) -> None:
    assert node.directory is not None
    remote = node.remote()
    remote.detach(["sleep", "1008"], cwd=".", log="l")
    remote.close()
    until(lambda: "sleep 1008" in processes(node.directory))
    assert remote.run(["echo", "reopened"]).text == "reopened"
    remote.close()
