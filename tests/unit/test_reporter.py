"""What logs to wandb on a node: what it takes of the metrics, its start and its end. The real library, offline, in a real process."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from orchestrator.site import reported
from tests.seeds import Seed
from tests.unit.test_wandb import told
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


def wait_for_folder(run: Path, reporter: subprocess.Popen[bytes]) -> Path:
    """The one offline folder, once it is there."""
    while not (found := list(run.glob("wandb/offline-run-*/run-*.wandb"))):
        assert reporter.poll() is None, "it has ended"
        time.sleep(0.05)
    (path,) = found
    return path.parent


@pytest.mark.slow
def test_a_reporter_that_is_killed_and_started_again_continues_the_same_run(tmp_path: Path) -> None:
    """Nothing is lost with it, and nothing is there twice. It ends with its own supervisor, not with the word of an earlier one."""
    pytest.importorskip("wandb")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(map(line, range(1, 51))))
    supervised(tmp_path, "t0", "ended")
    first = start(tmp_path)
    left = wait_for_folder(tmp_path, first)
    assert start(tmp_path).wait() == 0, "one reporter a run directory"
    first.kill()
    first.wait()
    supervised(tmp_path, "t1", "ended")
    assert start(tmp_path).wait() == 0
    assert not left.exists()
    with metrics.open("a") as file:  # the next attempt, resumed from step 40
        file.write("".join(map(line, range(41, 101))))
    supervised(tmp_path, "t2", "ended")
    assert start(tmp_path, "t2").wait() == 0
    assert json.loads((tmp_path / "report-status.json").read_text()) == {"state": "done", "detail": ""}
    ids, history, _, config = told(tmp_path)
    assert ids == {"demo-0001"} and config["seed"] == 1
    assert [item["_step"] for item in history] == list(range(1, 101)), "each step once, over all of them"


def test_a_start_that_comes_while_the_last_one_is_closed_is_followed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text('{"token": "t1"}')
    supervised(tmp_path, "t1", "ended")
    first = report.Reporter(tmp_path)
    monkeypatch.setattr(
        first, "_close", lambda: str((tmp_path / "report.json").write_text('{"token": "t2"}'))[:0]
    )
    assert first.work()
    supervised(tmp_path, "t2", "ended")
    assert not report.Reporter(tmp_path).work()


@pytest.mark.slow
def test_a_reporter_that_cannot_go_on_says_why(tmp_path: Path) -> None:
    """A break is a word in its status, and an exit code that nobody waits for."""
    (tmp_path / "metrics.jsonl").write_text(line(1))
    (tmp_path / "supervisor.json").write_text("{}")
    done = subprocess.run([sys.executable, SCRIPT, "--run", tmp_path], check=False, capture_output=True)
    assert done.returncode == 1 and b"KeyError" in done.stderr
    status = json.loads((tmp_path / "report-status.json").read_text())
    assert status["state"] == "failed" and "KeyError" in status["detail"]


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
