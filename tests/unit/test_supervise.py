"""What the supervisor judges by, on a virtual clock."""

import ast
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import clock, processes
from trainer.interruption import notice
from trainer.supervise import take_lock
from trainer.supervisor import Supervisor, fixed_offset
from trainer.utilisation import mean, parse
from trainer.watchdog import (
    Clock,
    Deadline,
    Job,
    JobError,
    Progress,
    describe,
    exit_code,
    read_json,
    write_json,
)


class World(Clock):
    """Two clocks that move only when told."""

    def __init__(self) -> None:
        self.walls, self.boots = 1_800_000_000.0, 5_000.0

    def wall(self):
        return self.walls

    def boot(self):
        return self.boots

    def sleep(self, seconds):
        self.walls += seconds
        self.boots += seconds


@pytest.fixture
def world():
    return World()


@pytest.fixture
def supervised(tmp_path, world):
    """A supervisor whose trainer is a process that ignores everything but SIGKILL; time is virtual."""
    stubborn = "import signal, time\nfor n in (10, 15): signal.signal(n, signal.SIG_IGN)\nopen('up', 'w').close()\ntime.sleep(3600)"

    def make(**changes):
        job = Job(**{"token": "t", "argv": [sys.executable, "-c", stubborn], "max_restarts": 1, **changes})
        lock = take_lock(tmp_path / "lock")
        assert lock is not None
        one = Supervisor(tmp_path, job, lock, world)
        one.tick()
        while not (tmp_path / "up").exists():
            world.sleep(0)
        return one

    yield make
    assert processes.end(tmp_path) == []


def ticks(one: Supervisor, seconds: float) -> None:
    """Let that much virtual time pass."""
    for _ in range(math.ceil(seconds)):
        one.clock.sleep(1)
        one.tick()


def test_the_times_of_a_node_never_jump(world, supervised):
    """The offset is fixed by the first supervisor of a boot, and kept by the next; a reboot fixes it anew."""
    one = supervised()
    before = one.record["heartbeat"]
    world.walls += 3600
    ticks(one, 10)
    assert one.record["heartbeat"] - before == pytest.approx(10, abs=2)
    kept = one.record["clock_offset_seconds"]
    assert fixed_offset(one.record, world) == kept
    rebooted = {**one.record, "boot_id": "another"}
    assert fixed_offset(rebooted, world) == pytest.approx(kept + 3600)


def test_a_deadline_counts_down_on_the_boot_clock(world):
    deadline = Deadline(world, world.walls + 100)
    world.sleep(30)
    assert deadline.remaining() == pytest.approx(70)
    world.walls += 3600
    assert (deadline.remaining(), deadline.jump()) == (pytest.approx(70), pytest.approx(3600))
    world.walls -= 7200
    assert deadline.remaining() == pytest.approx(70)
    world.sleep(71)
    assert deadline.remaining() == pytest.approx(-1)
    assert Deadline(world, None).remaining() == math.inf


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_clock_jump_neither_fires_nor_delays_the_deadline(supervised, world, tmp_path, jump):
    one = supervised(deadline=world.walls + 1000, grace_seconds=60)
    world.walls += jump
    ticks(one, 900)
    assert (one.record["state"], one.record["clock_jump_seconds"]) == ("running", jump)
    ticks(one, 50)
    assert (one.record["state"], (tmp_path / "stop").exists()) == ("stopping", True)


def test_a_rewritten_deadline_is_armed_by_the_clock_as_it_is_now(supervised, world, tmp_path):
    one = supervised(deadline=world.walls + 1000)
    world.walls += 500_000
    (tmp_path / "deadline").write_text(str(world.walls + 300))
    ticks(one, 230)
    assert one.record["state"] == "running"
    ticks(one, 15)
    assert one.record["state"] == "stopping"


def test_an_unreadable_deadline_leaves_the_old_one(supervised, world, tmp_path):
    one = supervised(deadline=world.walls + 1000)
    (tmp_path / "deadline").write_text("soon")
    ticks(one, 945)
    assert one.record["state"] == "stopping"


def test_who_does_not_stop_by_the_deadline_is_killed(supervised, world):
    one = supervised(deadline=world.walls + 100, grace_seconds=60)
    ticks(one, 41)
    assert one.record["state"] == "stopping"
    ticks(one, 60)
    assert one.record["state"] == "stopping"
    ticks(one, 13)
    assert (one.record["reason"], one.record["exit_code"]) == ("deadline", -signal.SIGKILL)
    assert "did not stop in time" in one.record["detail"]


def test_a_stop_has_its_own_patience_but_never_beyond_the_deadline(supervised, world, tmp_path):
    one = supervised(deadline=world.walls + 200, stop_grace_seconds=5000)
    write_json(tmp_path / "stop-request.json", {"checkpoint": True})
    ticks(one, 190)
    assert one.record["state"] == "stopping"
    ticks(one, 25)
    assert (one.record["state"], one.record["reason"]) == ("ended", "stopped")


def test_a_deadline_that_has_passed_starts_nothing(tmp_path, world):
    one = Supervisor(tmp_path, Job("t", ["/bin/false"], deadline=world.walls - 5), 0, world)
    one.tick()
    assert (one.record["state"], one.record["reason"], one.record["starts"]) == ("ended", "deadline", 0)


def test_a_stall_is_measured_in_medians_and_not_moved_by_the_wall_clock(supervised, world, tmp_path):
    one = supervised(stall_factor=20, stall_floor_seconds=300, first_step_seconds=1800)
    world.walls += 1e6
    ticks(one, 1700)
    assert one.record["state"] == "running"
    write_json(
        tmp_path / "status.json",
        {"state": "running", "step": 1, "last_step_time": world.walls, "step_seconds": 30.0},
    )
    ticks(one, 600)
    assert one.record["state"] == "running"
    world.walls -= 5e5
    ticks(one, 2)
    assert (one.record["state"], one.record["crashes"]) == ("restarting", 1)
    assert "no progress for 601 s (limit 600 s)" in one.record["detail"]
    ticks(one, 3)
    assert (one.record["state"], one.record["restarts"]) == ("running", 1)


def test_progress_limits():
    job = Job("t", ["x"], stall_factor=20, stall_floor_seconds=300, first_step_seconds=1800)
    progress = Progress(0, {"state": "running", "step": 500, "last_step_time": 7.0})
    assert progress.limit(job) == 1800
    progress.observe(5, {"state": "running", "step": 400, "last_step_time": None})
    assert (progress.since, progress.limit(job)) == (5, 1800)
    for step in range(401, 411):
        progress.observe(
            step, {"state": "running", "step": step, "last_step_time": float(step), "step_seconds": 25.0}
        )
    assert (progress.since, progress.limit(job)) == (410, 500)
    progress.observe(420, {"state": "running", "step": 410, "last_step_time": 410.0, "step_seconds": 25.0})
    assert progress.since == 410
    progress.observe(430, {"state": "evaluating", "step": 410, "last_step_time": 410.0})
    assert progress.limit(job) == 1800
    for batch in range(3):
        progress.observe(440 + batch, {"state": "evaluating", "step": 410, "progress": batch})
        assert (progress.since, progress.limit(job)) == (440 + batch, 500)


REPORT = b"""failed (exitcode: 1) local_rank: 0 (pid: 5) of binary: python
  exitcode  : -15 (pid: 6)  (SIGTERM)
Root Cause (first observed failure):
  exitcode  : %d (pid: 5)
"""


@pytest.mark.parametrize(("report", "status", "expected"), [
    (REPORT.replace(b"exitcode: 1", b"exitcode: 3") % 3, {}, 3),
    (REPORT.replace(b"exitcode: 1", b"exitcode: -9") % -9, {}, -9),
    (REPORT % 5, {}, 5),
    (b"Killed\n", {}, 1),
    (b"", {"state": "failed", "reason": "non_finite"}, 4),
    (b"", {"state": "failed", "reason": "crash"}, 1),
])  # fmt: skip
def test_the_trainers_own_exit_code_is_found_behind_torchruns(tmp_path, report, status, expected):
    log = tmp_path / "train.log"
    log.write_bytes(b"exitcode  : 3 (pid: 1) of an earlier start\n" + report)
    assert exit_code(1, log, log.stat().st_size - len(report), status) == expected


def test_an_exit_code_without_a_log(tmp_path):
    assert exit_code(1, tmp_path / "none", 0, {}) == 1
    assert exit_code(0, tmp_path / "none", 0, {"state": "failed", "reason": "config"}) == 0


def test_describe():
    assert describe(-9) == "killed by SIGKILL"
    assert describe(-99) == "killed by signal 99"
    assert describe(5) == "exit code 5 (out_of_memory)"


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"token": "", "argv": ["x"]}', '{"token": "t", "argv": "x"}', '{"token": "t", "argv": ["x"], "deadline": "soon"}',
    '{"token": "t", "argv": ["x"], "deadline": NaN}', '{"token": "t", "argv": ["x"], "max_restarts": -1}',
    '{"token": "t", "argv": ["x"], "env": {"A": 1}}', '{"token": "t", "argv": ["x"], "stall_floor_seconds": -1}',
])  # fmt: skip
def test_unusable_jobs(tmp_path, text):
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(JobError):
        Job.load(tmp_path / "job.json")


def test_a_job_tolerates_keys_of_a_newer_driver(tmp_path):
    write_json(tmp_path / "job.json", {"token": "t", "argv": ["x"], "colour": "blue", "deadline": 5})
    assert Job.load(tmp_path / "job.json").deadline == 5


def test_missing_secrets_end_the_run_with_the_reason(tmp_path, world):
    one = Supervisor(tmp_path, Job("t", ["/bin/true"], secrets_file="gone"), 0, world)
    one.tick()
    assert (one.record["reason"], "gone" in one.record["detail"]) == ("failed", True)


def test_write_json_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    with pytest.raises(OSError, match="No such file"):
        write_json(tmp_path / "no" / "b.json", {})
    path.write_text('{"a": ')
    assert read_json(path) == {}


def test_marks_and_handlers_of_processes(tmp_path):
    code = "import signal, sys\nsignal.signal(signal.SIGUSR1, lambda *_: None)\nprint('up', flush=True)\nsys.stdin.read()"
    environment = {**os.environ, processes.MARK: str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=-1, stdout=-1, start_new_session=True
    ) as child:
        child.stdout.readline()
        assert processes.marked(tmp_path) == [child.pid]
        assert processes.marked(tmp_path / "other") == []
        assert processes.catches(child.pid, signal.SIGUSR1)
        assert not processes.catches(child.pid, signal.SIGUSR2)
        started = processes.start_time(child.pid)
        assert processes.same(child.pid, started)
        assert not processes.same(child.pid, "0")
        assert not processes.same(None, started)
        assert processes.end(tmp_path) == []
        assert processes.start_time(child.pid) is None  # a zombie: nobody has waited for it yet
        processes.send([child.pid], signal.SIGTERM)
    processes.send([child.pid], signal.SIGTERM)


def test_processes_where_only_ps_knows():
    listing = "  12 python -m x HOME=/h LLMCTL_RUN_DIR=/r/a LANG=C\n  13 sh LLMCTL_RUN_DIR=/r/ab\n 14 vi\n"
    assert processes.parse_ps(listing, "LLMCTL_RUN_DIR=/r/a") == [12]


def test_no_metadata_service_means_no_notice():
    assert notice("http://127.0.0.1:1") is None


def test_the_node_side_is_standard_library_only_and_python_3_10():
    root = Path(__file__).resolve().parents[2]
    code = ("import sys; import trainer.supervise, trainer.pull; "
            "print(*sorted({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names))")  # fmt: skip
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert set(loaded.stdout.split()) <= {"__main__", "trainer"}
    for name in ("supervise", "supervisor", "watchdog", "processes", "interruption", "utilisation", "pull"):
        ast.parse((root / "trainer" / f"{name}.py").read_text(), feature_version=(3, 10))


def test_what_nvidia_smi_tells_is_the_mean_of_the_gpus_that_tell_it():
    assert parse("98, 61440, 70, 650.5\n100, 63488, 72, 649.5\n") == {
        "utilisation": 0.99, "memory_gib": 61.0, "celsius": 71.0, "watts": 650.0}  # fmt: skip
    assert parse("[N/A], 1024, 40, [Not Supported]\n80, 1024, 42, [N/A]\n") == {
        "utilisation": 0.8, "memory_gib": 1.0, "celsius": 41.0}  # fmt: skip
    assert parse("NVIDIA-SMI has failed because it couldn't communicate with the driver\n") == parse("") == {}
    assert mean([{"utilisation": 1.0, "watts": 600.04}, {}, {"utilisation": 0.5}]) == {
        "utilisation": 0.75,
        "watts": 600.0,
    }
    assert mean([]) == {}


def test_a_real_supervisor_tells_what_its_gpus_do(tmp_path):
    """The trainer here waits for the figures in supervisor.json; a GPU that is not the trainer's is not asked for."""
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "$*" > "$0.asked"\necho "96, 61440, 71, 640.25"\n')
    tool.chmod(0o755)
    wait = """
import json, time
while not json.load(open("supervisor.json"))["gpu"]:
    time.sleep(0.02)
json.dump({"state": "finished", "step": 1}, open("status.json", "w"))
"""
    job = {"token": "t", "argv": [sys.executable, "-c", wait], "env": {"CUDA_VISIBLE_DEVICES": "1"}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "trainer", "supervise", "start"]
    done = subprocess.run(command, cwd=tmp_path, env=env, timeout=60, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    told = read_json(tmp_path / "supervisor.json")
    assert (told["state"], told["reason"]) == ("ended", "finished")
    assert told["gpu"] == {"utilisation": 0.96, "memory_gib": 60.0, "celsius": 71.0, "watts": 640.2}
    assert tool.with_name("nvidia-smi.asked").read_text().split()[-1] == "--id=1"


def test_the_trainer_goes_by_the_supervisors_clock():
    told = subprocess.run(
        [sys.executable, "-c", "from trainer import clock; print(clock.now() - clock.boot())"],
        env={**os.environ, clock.OFFSET: "1000.5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(told.stdout) == pytest.approx(1000.5)
