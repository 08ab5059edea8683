"""What logs to wandb on a node: what it takes of the metrics, its start and its end. The real library, offline, in a real process."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.clock import SystemClock
from orchestrator.remote.connection import CommandFailed, ConnectionLost, Result
from orchestrator.site import reported
from runs import events as e
from tests.seeds import Seed, at
from tests.wandb_files import told
from trainer import report

SCRIPT = Path(report.__file__)


def line(step: int, kind: str = "step") -> str:
    """A line of metrics."""
    return json.dumps({"kind": kind, "step": step, "time": 1.8e9 + step, "loss": 5.0 - step / 100}) + "\n"


def test_a_torn_line_waits_and_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = report.Lines(path)
    assert list(lines.read()) == [], "there is no file yet"
    path.write_text(line(1) + line(2)[:20])
    assert [item["step"] for item in lines.read()] == [1]
    with path.open("a") as file:
        file.write(line(2)[20:] + line(3)[:9] + "\n" + line(4))  # step 3 was cut off by a kill, and ended
    again = report.Lines(path, lines.offset)
    assert [item["step"] for item in again.read()] == [2, 4]
    assert list(again.read()) == [] and again.offset == path.stat().st_size
    path.write_text(line(1))
    assert [item["step"] for item in again.read()] == [1], "a file that shrank was made anew"


def test_each_step_of_each_kind_once() -> None:
    sent = report.last_sent({})
    lines = [json.loads(line(step, kind)) for step, kind in
             [(0, "system"), (0, "validation"), (1, "step"), (2, "step"), (2, "validation"), (1, "step"), (2, "step"), (3, "step")]]  # fmt: skip
    kept = [(item["kind"], item["step"]) for item in lines if report.logged(item, sent) is not None]
    assert kept == [("validation", 0), ("step", 1), ("step", 2), ("validation", 2), ("step", 3)]
    assert sent == {"step": 3, "validation": 2} == report.last_sent(sent)
    assert report.logged(json.loads(line(4)), sent) == {"time": 1.8e9 + 4, "loss": 4.96}, (
        "names as in the file"
    )


def start(run: Path, token: str = "t1") -> subprocess.Popen[bytes]:
    """A reporter as the driver starts it."""
    plan = {"token": token, "mode": "offline", "project": "p", "run": "demo-0001", "config": {"seed": 1}}
    (run / "report.json").write_text(json.dumps(plan))
    return subprocess.Popen([sys.executable, SCRIPT, "--run", run], stdin=subprocess.DEVNULL)


def supervised(run: Path, token: str, state: str) -> None:
    """What a supervisor says."""
    (run / "supervisor.json").write_text(json.dumps({"token": token, "state": state}))


def status(run: Path) -> Any:
    """The reporter's last word."""
    return json.loads((run / "report-status.json").read_text())


def wait_for_folder(run: Path, reporter: subprocess.Popen[bytes]) -> Path:
    """The one offline folder, once it is there."""
    while not (found := list(run.glob("report/wandb/offline-run-*/run-*.wandb"))):
        assert reporter.poll() is None, "it has ended"
        time.sleep(0.05)
    (path,) = found
    return path.parent


@pytest.mark.slow
def test_a_reporter_that_is_killed_and_started_again_continues_the_same_run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost with it, and nothing is there twice. It ends with its own supervisor, not with the word of an earlier one."""
    pytest.importorskip("wandb")
    elsewhere = tmp_path_factory.mktemp("tmp")
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(map(line, range(1, 51))))
    supervised(tmp_path, "t0", "ended")
    first = start(tmp_path)
    left = wait_for_folder(tmp_path, first)
    assert start(tmp_path).wait() == 0, "one reporter a run directory"
    (left / "of the first").touch()
    first.kill()
    first.wait()
    supervised(tmp_path, "t1", "ended")
    assert start(tmp_path).wait() == 0
    assert not (left / "of the first").exists(), "the next one may have the name, if it is of the same second"
    with metrics.open("a") as file:  # the next attempt, resumed from step 40
        file.write("".join(map(line, range(41, 101))))
    supervised(tmp_path, "t2", "ended")
    assert start(tmp_path, "t2").wait() == 0
    assert status(tmp_path) == {"token": "t2", "state": "done", "detail": ""}
    ids, history, _, config = told(tmp_path / "report")
    assert ids == {"demo-0001"} and config["seed"] == 1
    assert [item["_step"] for item in history] == list(range(1, 101)), "each step once, over all of them"
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["wandb"], (
        "its temporary files are gone"
    )
    assert list(elsewhere.iterdir()) == [], "also those of the one that was killed"


def test_a_start_that_comes_while_the_last_one_is_closed_is_followed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own process finds the lock held, and leaves; so whoever holds it looks again when it has let go."""
    tokens = iter(["t2", "t2"])

    def close(_: report.Reporter) -> str:
        assert report.main(["--run", str(tmp_path)]) == 0, "one reporter a run directory"
        token = next(tokens)
        supervised(tmp_path, token, "ended")
        (tmp_path / "report.json").write_text(json.dumps({"token": token}))
        return ""

    (tmp_path / "report.json").write_text('{"token": "t1"}')
    supervised(tmp_path, "t1", "ended")
    monkeypatch.setattr(report.Reporter, "_close", close)
    monkeypatch.setattr(report.os, "nice", lambda _: 0)
    monkeypatch.setattr(report.Path, "write_text", _but_not_to_proc(Path.write_text))
    assert report.main(["--run", str(tmp_path)]) == 0
    assert status(tmp_path)["token"] == "t2" and list(tokens) == []


def _but_not_to_proc(write: Any) -> Any:
    return lambda path, *args, **options: 0 if path.parts[1] == "proc" else write(path, *args, **options)


def test_it_waits_for_no_supervisor_that_will_not_come(tmp_path: Path) -> None:
    """The driver, which knows that the trainer is over, has said so."""
    (tmp_path / "report.json").write_text('{"token": "t1", "over": true}')
    assert subprocess.run([sys.executable, SCRIPT, "--run", tmp_path], check=False).returncode == 0
    assert status(tmp_path)["state"] == "done"


def test_where_wandb_never_comes_to_an_end_the_reporter_does(tmp_path: Path) -> None:
    """A network that went away while steps ran: on a machine that is not terminated nothing may be left."""
    (tmp_path / "metrics.jsonl").write_text(line(1))
    plan = {"token": "t1", "over": True, "mode": "online", "project": "p", "run": "demo-0001", "config": {}}
    (tmp_path / "report.json").write_text(json.dumps(plan))
    code = f"""if True:
        import sys, threading, types
        sys.path.insert(0, {str(SCRIPT.parent)!r})
        import report
        report.CLOSE_SECONDS = 1
        report.open_run = lambda *_: (types.SimpleNamespace(log=lambda *_, **__: None), None)
        report.close_run = lambda _: threading.Event().wait()
        report.Reporter._have_wandb = lambda _: None
        report.main(["--run", {str(tmp_path)!r}])"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1
    assert status(tmp_path) == {
        "token": "t1",
        "state": "failed",
        "detail": "wandb did not take everything within 1 s",
    }


@pytest.mark.slow
def test_a_reporter_that_cannot_go_on_says_why(tmp_path: Path) -> None:
    """A break is a word in its status, and an exit code that nobody waits for."""
    (tmp_path / "metrics.jsonl").write_text(line(1))
    (tmp_path / "report.json").write_text('{"token": "t1", "over": true}')
    done = subprocess.run([sys.executable, SCRIPT, "--run", tmp_path], check=False, capture_output=True)
    assert done.returncode == 1 and b"KeyError" in done.stderr
    assert status(tmp_path)["state"] == "failed" and "KeyError" in status(tmp_path)["detail"]


def test_what_is_missing_is_installed_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels, folder = tmp_path / "wheels", tmp_path / "environments" / "wandb-3"
    wheels.mkdir()
    for name in ("PIP_NO_INDEX", "UV_NO_INDEX", "UV_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "pip: " not in (problem := report.install(folder)) and "No matching distribution" in problem
    assert not folder.exists() and not list(folder.parent.glob(".*"))
    info = "wandb-9.0.dist-info"
    with zipfile.ZipFile(wheels / "wandb-9.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("wandb/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: wandb\nVersion: 9.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    assert report.install(folder) == ""
    assert (folder / "wandb" / "__init__.py").is_file() and not list(folder.parent.glob(".*"))


def test_the_key_comes_from_the_environment_or_from_netrc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reported.credentials() == {}
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password from-netrc\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert reported.credentials() == {"WANDB_API_KEY": "from-netrc"}
    monkeypatch.setenv("WANDB_API_KEY", "from-environment")
    assert reported.credentials() == {"WANDB_API_KEY": "from-environment"}


class Failing:
    """A node to which each write fails as it is told to; `started` counts what was detached."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.started = list(failures), 0

    def write(self, *_: object) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def detach(self, *_: object, **__: object) -> None:
        self.started += 1

    def read(self, _: str) -> bytes:
        return json.dumps({"token": "demo-0001-a1", "state": "sending", "detail": ""}).encode()


def looked(reporting: reported.Reporting, record: Any, remote: Failing) -> None:
    """One look, and the end of what it began."""
    reporting.look(record, SimpleNamespace(remote=remote))  # type: ignore[arg-type]
    if reporting._thread is not None:
        reporting._thread.join()


def started(tmp_path: Path, **wandb: str) -> Any:
    """The record of a run whose trainer was started."""
    seed = Seed(tmp_path, wandb=wandb or {"mode": "offline", "from": "node"}).rented()
    lane = e.LaneDone(
        at=at(30), key=seed.key, lane="environment", hash="e", seconds=1.0, detail={"python": "python3"}
    )
    return seed.tell(lane).trained()


def test_each_driver_starts_the_reporter_and_each_start_of_the_trainer_does(tmp_path: Path) -> None:
    """One that died after it had started the trainer may have left none; a reboot ends both."""
    seed, remote = started(tmp_path), Failing()
    told_of: list[str] = []
    for _driver in range(2):
        reporting = reported.Reporting(SystemClock(), told_of.append)
        for _ in range(3):
            looked(reporting, seed.record, remote)
    assert remote.started == 2
    seed.tell(e.TrainerStarted(at=at(60), attempt=1, token=f"{seed.run}-a1"))
    looked(reporting, seed.record, remote)
    assert remote.started == 3
    seed.tell(e.TrainerEnded(at=at(250), attempt=1, reason="finished", step=100))
    looked(reported.Reporting(SystemClock(), told_of.append), seed.record, remote)
    assert remote.started == 3 and told_of == []


def test_a_link_that_fails_is_tried_again_and_a_node_that_refuses_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, told_of = started(tmp_path), list[str]()
    monkeypatch.setattr(reported, "RETRY_SECONDS", 0.0)
    remote = Failing(ConnectionLost("cut"), CommandFailed("write", Result(b"", b"disk full", 1)))
    reporting = reported.Reporting(SystemClock(), told_of.append)
    for _ in range(4):
        looked(reporting, seed.record, remote)
    assert remote.failures == [] and remote.started == 0
    (words,) = told_of
    assert words.startswith("nothing logs to wandb on the node: ") and "disk full" in words


def test_one_that_never_ends_or_cannot_be_started_holds_no_run_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for for a while, its files come home as they are, and the record says why."""
    record, told_of, pulled = started(tmp_path).record, list[str](), list[str]()
    monkeypatch.setattr(reported, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(reported.transfer, "pull_tree", lambda _, there, to: pulled.append(there))
    reporting = reported.Reporting(SystemClock(), told_of.append)
    remote: Any = Failing()
    reporting.bring(remote, record, tmp_path / "wandb")
    assert remote.started == 1 and pulled == ["~/llmctl/runs/demo-0001/report/wandb"]
    assert told_of.pop().startswith("the node did not send everything in time; what it logged is here: ")
    remote = Failing(CommandFailed("write", Result(b"", b"disk full", 1)))
    reporting.bring(remote, record, tmp_path / "wandb")
    assert "could not be fetched" in told_of[0] and "disk full" in told_of[0]


@pytest.mark.parametrize("wandb", [{"mode": "disabled", "from": "node"}, {"mode": "offline"}])
def test_nothing_is_started_where_nothing_is_wanted(tmp_path: Path, wandb: dict[str, str]) -> None:
    seed, remote = started(tmp_path, **wandb), Failing()
    looked(reported.Reporting(SystemClock(), pytest.fail), seed.record, remote)
    assert remote.started == 0


def test_wandb_is_not_told_where_notices_go(tmp_path: Path) -> None:
    """The address of a webhook may hold a token."""
    record = Seed(tmp_path, notify="https://hooks.example/s3cr3t").rented().record
    config = reported.config(record)
    assert "s3cr3t" not in json.dumps(config) and config["train"]["steps"] == 100
    assert config["hardware_used"]["world_size"] == 2


def test_the_reporter_is_one_file_of_the_standard_library_and_python_3_10() -> None:
    code = (f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import report; "
            "print(*sorted({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names))")  # fmt: skip
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert set(loaded.stdout.split()) <= {"__main__", "report"}
    ast.parse(SCRIPT.read_text(), feature_version=(3, 10))
