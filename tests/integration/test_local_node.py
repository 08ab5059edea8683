"""The detached SSH server of a local node: what it admits, what it outlives, and that nothing outlives it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from orchestrator.remote.node import CommandFailed, LoginRefused, Remote
from provisioning import keys, local_node
from tests.nodes import KEY, Node, accounts, local, node, processes, until

__all__ = ["node"]


def state(node: Node) -> local_node.State:
    assert node.directory is not None
    found = local_node.read(node.directory)
    assert found is not None
    return found


def test_environment_is_clean(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    with node.remote() as remote:
        seen = dict(line.split("=", 1) for line in remote.run(["env"]).text.splitlines())
        python = remote.run(["python3", "-c", "import sys; print(sys.prefix)"]).text
    assert seen["HOME"] == str(node.home)
    assert seen["USER"] == "someone"
    assert python == sys.prefix
    assert set(seen) <= {
        *(
            "HOME",
            "USER",
            "LOGNAME",
            "SHELL",
            "LANG",
            "LC_CTYPE",
            "PATH",
            "PWD",
            "SHLVL",
            "_",
            "OLDPWD",
            "TZ",
        ),
        *("LLMCTL_NODE", "LLMCTL_NODE_DIRECTORY", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"),
    }


def test_secrets_of_the_starter_stay_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_API_KEY", "do-not-tell")
    with local(tmp_path, env={"GIVEN": "yes"}) as node, node.remote() as remote:
        assert remote.run(["printenv", "GIVEN"]).text == "yes"
        assert "do-not-tell" not in remote.run(["env"]).text
        server = psutil.Process(state(node).pid)
        assert "LAMBDA_API_KEY" not in server.environ()


def test_admits_one_user_with_one_key(node: Node, tmp_path: Path) -> None:
    other = keys.client_key(tmp_path / "other")
    for address in (
        dataclasses.replace(node.address, identity_file=other),
        dataclasses.replace(node.address, user="root2"),
    ):
        with pytest.raises(LoginRefused):
            Remote(address).run(["true"])


def test_exit_codes_and_signals(node: Node) -> None:
    with node.remote() as remote:
        assert remote.run("exit 7", check=False).exit_code == 7
        assert remote.run("kill -9 $$", check=False).exit_code == 128
        result = remote.run("echo out; exec 1>&-; sleep 0.05; echo err >&2", check=False)
        assert (result.stdout, result.stderr) == (b"out\n", b"err\n"), (
            "the end of stdout is not the end of stderr"
        )


@pytest.mark.parametrize("size", [0, 1, 65_536, 1_000_000, 3_000_000])
def test_no_byte_of_input_is_lost(node: Node, size: int) -> None:
    data = os.urandom(size)
    with node.remote() as remote:
        for _ in range(4):
            assert remote.run(["cat"], stdin=data).stdout == data


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no OpenSSH client")
def test_openssh_client_and_terminal(node: Node) -> None:
    from orchestrator.remote import openssh

    carrier = openssh.Carrier(node.address)
    carrier.ensure()
    data = os.urandom(5_000_000)
    answer = subprocess.run(carrier.argv(["cat"]), input=data, capture_output=True, check=True)
    assert answer.stdout == data
    command = [
        "ssh",
        "-tt",
        "-F",
        str(carrier.config),
        KEY,
        "tty; stty -echo; read line; echo got $line; exit 4",
    ]
    answer = subprocess.run(command, input=b"hello\n", capture_output=True, check=False)
    assert answer.returncode == 4
    assert b"/dev/" in answer.stdout
    assert b"got hello" in answer.stdout


def test_outlives_who_started_it(tmp_path: Path) -> None:
    client, _, _ = accounts(tmp_path)
    code = (
        "import sys; from pathlib import Path; from provisioning import local_node, keys\n"
        "d = Path(sys.argv[1]); local_node.spawn(d / 'n', name='n', user='u', authorized_key=keys.public_key(Path(sys.argv[2])),"
        " host_private_key=None, home=d / 'h', lease_end=None)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(client)], check=True, start_new_session=True
    )
    try:
        until(lambda: (found := local_node.read(tmp_path / "n")) and found.status == "active")
    finally:
        local_node.end(tmp_path / "n")
    assert local_node.read(tmp_path / "n").status == "terminated"


def test_jobs_survive_the_connection_and_end_with_the_node(node: Node) -> None:
    assert node.directory is not None
    with node.remote() as remote:
        remote.detach(["sleep", "1000"], cwd=".", log="a.log")
        remote.run("(sleep 1001 >/dev/null 2>&1 </dev/null &) ; exit 0")
        remote.detach(["sh", "-c", "trap '' TERM HUP; while :; do sleep 0.2; done"], cwd=".", log="b.log")
        remote.detach(["env", "-i", "/bin/sleep", "1002"], cwd=".", log="c.log")
    server = psutil.Process(state(node).pid)

    def commands() -> set[str]:
        found = set()
        for child in server.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # ended, or a zombie, since it was listed
                found.add(" ".join(child.cmdline()))
        return found

    expected = {"sleep 1000", "sleep 1001", "/bin/sleep 1002"}
    until(lambda: expected <= commands())
    everything = server.children(recursive=True)
    local_node.end(node.directory, grace_seconds=0.3)
    assert not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in everything
    )
    assert not local_node.lives(node.directory)


def test_end_after_the_server_was_killed(node: Node) -> None:
    assert node.directory is not None
    with node.remote() as remote:
        remote.detach(["sleep", "1003"], cwd=".", log="a.log")
    os.kill(state(node).pid, signal.SIGKILL)
    until(lambda: state(node).status == "terminated")
    assert state(node).reason == "its server was killed"
    until(lambda: processes(node.directory) == ["sleep 1003"])
    local_node.end(node.directory, grace_seconds=0.3)
    assert processes(node.directory) == []


def test_lease_ends_the_node_and_extend_moves_it(node: Node) -> None:
    assert node.directory is not None
    with node.remote() as remote:
        remote.detach(["sleep", "1004"], cwd=".", log="a.log")
    local_node.extend(node.directory, time.time() + 3600)
    assert state(node).lease_end > time.time() + 3000
    local_node.extend(node.directory, time.time() - 1)
    until(lambda: state(node).status == "terminated")
    assert state(node).reason == "its lease ended"
    assert state(node).ended is not None
    assert processes(node.directory) == []


def test_removed_directory_ends_the_node(node: Node) -> None:
    assert node.directory is not None
    pid = state(node).pid
    shutil.rmtree(node.directory)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    node.directory.mkdir()


def test_second_spawn_changes_nothing(node: Node, tmp_path: Path) -> None:
    assert node.directory is not None
    before = state(node)
    local_node.spawn(
        node.directory,
        name="other",
        user="other",
        authorized_key="",
        host_private_key=None,
        home=tmp_path / "other",
        lease_end=None,
    )
    assert state(node) == before


def test_taken_port_is_an_end_with_a_reason(node: Node, tmp_path: Path) -> None:
    directory = tmp_path / "second"
    local_node.spawn(
        directory,
        name="second",
        user="u",
        authorized_key=keys.public_key(node.address.identity_file),
        host_private_key=None,
        home=tmp_path / "h2",
        lease_end=None,
        port=node.address.port,
    )
    until(lambda: local_node.read(directory).status == "terminated")
    assert "could not start" in local_node.read(directory).reason


def test_commands_are_hung_up_on_disconnect(node: Node) -> None:
    assert node.directory is not None
    remote = node.remote()
    with remote.session(["sleep", "1005"]) as session:
        until(lambda: "sleep 1005" in processes(node.directory))
        session.receive(0.01)
    until(lambda: "sleep 1005" not in processes(node.directory))
    remote.close()


def test_a_program_that_is_not_there(node: Node) -> None:
    with node.remote() as remote, pytest.raises(CommandFailed) as caught:
        remote.run(["no-such-program"])
    assert caught.value.result.exit_code == 127
