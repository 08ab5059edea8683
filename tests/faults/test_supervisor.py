"""The supervisor on real processes: kills, hangs, full disks, reboots and double starts."""

import http.server
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.faults import disk
from trainer import processes
from trainer.supervise import take_lock
from trainer.watchdog import read_json, write_json

REPOSITORY = Path(__file__).resolve().parents[2]

# A trainer in a few lines of plain Python: each start follows the next word of PLAN.
FAKE = """
import faulthandler, json, os, signal, subprocess, sys, time
faulthandler.register(signal.SIGUSR1, all_threads=True)
with open("starts.log", "a") as log:
    log.write(json.dumps({"argv": sys.argv[1:], "pid": os.getpid()}) + "\\n")
start = len(open("starts.log").readlines())
plan = os.environ["PLAN"].split()
todo = plan[min(start, len(plan)) - 1]
def status(**values):
    temporary = f"status.{os.getpid()}"
    with open(temporary, "w") as file:
        json.dump(values, file)
    os.replace(temporary, "status.json")
def a_place_to_hang():
    time.sleep(3600)
if todo.startswith("exit"):
    sys.exit(int(todo[4:]))
if todo == "finish":
    status(state="finished", step=7)
    sys.exit(0)
if todo == "fork":  # a worker in a session of its own, as torchrun starts them
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    a_place_to_hang()
if todo == "hang":
    status(state="running", step=3, last_step_time=time.time(), step_seconds=0.01)
    a_place_to_hang()
step = 0
while not os.path.exists("stop"):
    step += 1
    status(state="running", step=step, last_step_time=time.time(), step_seconds=0.01)
    time.sleep(0.01)
status(state="stopped", step=step)
"""


@pytest.fixture
def run(tmp_path):
    """A run directory with the shipped trainer; nothing of it is alive afterwards."""
    directory = tmp_path / "run"
    shutil.copytree(
        REPOSITORY / "trainer", directory / "trainer", ignore=shutil.ignore_patterns("__pycache__")
    )
    (directory / "fake.py").write_text(FAKE)
    yield directory
    call(directory, "kill")
    assert processes.marked(directory) == []


def job(run: Path, plan: str = "train", **changes: object) -> None:
    values = {"token": "t1", "argv": [sys.executable, "fake.py"], "env": {"PLAN": plan}, "secrets_file": None, "max_restarts": 2,
              "deadline": None, "restart_pause_seconds": 0, **changes}  # fmt: skip
    write_json(run / "job.json", values)


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def start(run: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "trainer.supervise"]
    with (run / "supervisor.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=run, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options
        )


def call(run: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trainer.supervise", *arguments]
    return subprocess.run(
        command, cwd=run, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


def until(predicate, what: str, seconds: float = 30):
    limit = time.monotonic() + seconds
    while not (value := predicate()):
        assert time.monotonic() < limit, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return value


def record(run: Path) -> dict:
    return read_json(run / "supervisor.json")


def starts(run: Path) -> list[dict]:
    path = run / "starts.log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def training(run: Path) -> bool:
    return record(run).get("state") == "running" and (read_json(run / "status.json").get("step") or 0) >= 2


def test_a_finished_run_says_so_and_does_not_start_again(run):
    job(run, "finish")
    assert start(run).wait(30) == 0
    ended = record(run)
    assert (ended["state"], ended["reason"], ended["exit_code"], ended["step"], ended["restarts"]) == (
        "ended",
        "finished",
        0,
        7,
        0,
    )
    assert ended["ended_at"] >= ended["started_at"]
    assert start(run).wait(30) == 0
    assert [entry["argv"] for entry in starts(run)] == [[]]


def test_a_crash_is_restarted_with_resume_until_restarts_are_spent(run):
    job(run, "exit1 exit1 exit7", max_restarts=2)
    assert start(run).wait(30) == 1
    ended = record(run)
    assert (ended["reason"], ended["restarts"], ended["exit_code"]) == ("failed", 2, 7)
    assert "all 2 restarts are spent" in ended["detail"]
    assert [entry["argv"] for entry in starts(run)] == [[], ["--resume"], ["--resume"]]
    assert (run / "train.log").read_text().count("[supervisor] exit code 1; restart") == 2


@pytest.mark.parametrize(("code", "word"), [(3, "refused"), (4, "non_finite"), (5, "out_of_memory")])
def test_a_refusal_is_not_tried_again(run, code, word):
    job(run, f"exit{code}")
    assert start(run).wait(30) == 1
    assert len(starts(run)) == 1
    assert record(run)["exit_code"] == code
    assert word in record(run)["detail"]


def test_exit_zero_without_the_last_step_is_a_crash(run):
    job(run, "exit0 finish")
    assert start(run).wait(30) == 0
    assert record(run)["restarts"] == 1


def test_an_existing_checkpoint_is_resumed_on_the_first_start(run):
    (run / "checkpoints" / "step-000005").mkdir(parents=True)
    (run / "checkpoints" / "latest").symlink_to("step-000005")
    job(run, "finish")
    assert start(run).wait(30) == 0
    assert starts(run)[0]["argv"] == ["--resume"]
    document = json.loads(call(run, "status").stdout)
    assert document["checkpoints"] == {"steps": ["step-000005"], "latest": "step-000005", "best": None}


def test_an_interpreter_that_is_not_there_fails_at_once(run):
    job(run, argv=["/no/such/python", "-m", "trainer"])
    assert start(run).wait(30) == 1
    assert record(run)["exit_code"] == 127
    assert "/no/such/python" in record(run)["detail"]


def test_the_same_token_starts_once_and_another_is_refused(run):
    job(run)
    first = start(run)
    until(lambda: training(run), "training")
    again = call(run)
    assert (again.returncode, "supervised already" in again.stderr) == (0, True)
    job(run, token="t2")
    other = call(run)
    assert (other.returncode, "token t1" in other.stderr) == (9, True)
    assert len(starts(run)) == 1
    assert first.poll() is None


def test_two_starts_at_once_make_one_trainer(run):
    job(run)
    both = [start(run) for _ in range(4)]
    until(lambda: training(run), "training")
    until(lambda: sum(one.poll() is None for one in both) == 1, "the others to leave")
    assert {one.returncode for one in both} == {None, 0}
    assert len(starts(run)) == 1


def test_status_shows_heartbeat_progress_sizes_and_disk(run):
    job(run)
    start(run)
    until(lambda: training(run), "training")
    document = json.loads(call(run, "status").stdout)
    assert document["alive"] is True
    assert document["boot_id"] == document["supervisor"]["boot_id"]
    assert document["status"]["step"] >= 1
    assert set(document["sizes"]) == {"train.log", "metrics.jsonl", "supervisor.log"}
    assert document["disk_free_bytes"] > 0
    first = record(run)["heartbeat"]
    until(lambda: record(run)["heartbeat"] > first, "the next heartbeat")


def test_stop_checkpoints_first(run):
    job(run)
    supervisor = start(run)
    until(lambda: training(run), "training")
    assert call(run, "stop").returncode == 0
    assert supervisor.wait(30) == 0
    assert (record(run)["reason"], record(run)["exit_code"]) == ("stopped", 0)
    assert read_json(run / "status.json")["state"] == "stopped"


def test_stop_now_overrides_a_stop_that_hangs(run):
    job(run, "hang")
    supervisor = start(run)
    until(lambda: record(run).get("step") == 3, "the hang")
    call(run, "stop")
    until(lambda: record(run)["state"] == "stopping", "stopping")
    call(run, "stop", "--now")
    assert supervisor.wait(30) == 0
    assert (record(run)["reason"], record(run)["exit_code"]) == ("stopped", -9)


def test_kill_ends_everything(run):
    job(run, "fork")
    supervisor = start(run)
    until(lambda: len(processes.marked(run)) == 2, "the worker")
    assert call(run, "kill").returncode == 0
    assert supervisor.wait(30) == -9
    assert processes.marked(run) == []
    assert (record(run)["state"], record(run)["reason"]) == ("ended", "stopped")


def test_the_deadline_stops_gracefully(run):
    job(run, deadline=time.time() + 9000)
    supervisor = start(run)
    until(lambda: training(run), "training")
    (run / "deadline").write_text(str(time.time() + 30))  # inside the grace
    assert supervisor.wait(30) == 0
    assert (record(run)["reason"], read_json(run / "status.json")["state"]) == ("deadline", "stopped")


def test_a_later_deadline_in_the_file_counts(run):
    job(run, deadline=time.time() + 61)
    (run / "deadline").write_text(str(time.time() + 9000))
    write_json(
        run / "supervisor.json", {"token": "t1", "state": "running"}
    )  # the same start, so the file is meant for it
    supervisor = start(run)
    until(lambda: training(run), "training")
    assert json.loads(call(run, "status").stdout)["supervisor"]["deadline"] > time.time() + 8000
    (run / "deadline").write_text(str(time.time()))
    assert supervisor.wait(30) == 0
    assert record(run)["reason"] == "deadline"


def test_a_dead_supervisor_leaves_a_locked_orphan_that_the_next_start_ends(run):
    job(run, "fork train")
    supervisor = start(run)
    until(lambda: len(processes.marked(run)) == 2, "the worker")
    orphans = processes.marked(run)
    supervisor.kill()
    supervisor.wait()
    assert processes.marked(run) == orphans
    assert take_lock(run / "lock") is None  # torchrun inherited it
    assert json.loads(call(run, "status").stdout)["alive"] is False
    start(run)
    until(lambda: training(run), "the resumed trainer")
    assert not set(orphans) & set(processes.marked(run))
    assert starts(run)[1]["argv"] == ["--resume"]
    assert (record(run)["restarts"], record(run)["crashes"]) == (1, 0)


def test_a_dead_torchrun_takes_its_workers_along(run):
    job(run, "fork train")
    start(run)
    until(lambda: len(processes.marked(run)) == 2, "the worker")
    agent = starts(run)[0]["pid"]
    (worker,) = set(processes.marked(run)) - {agent}
    os.kill(agent, signal.SIGKILL)
    until(lambda: len(starts(run)) == 2, "the restart")
    assert processes.start_time(worker) is None
    assert "SIGKILL" in record(run)["detail"]


def test_sigterm_ends_the_processes_but_not_the_run(run):
    job(run, "train finish")
    supervisor = start(run)
    until(lambda: training(run), "training")
    supervisor.terminate()
    assert supervisor.wait(30) == 0
    assert record(run)["state"] == "running"
    assert processes.marked(run) == []
    assert start(run).wait(30) == 0
    assert (record(run)["reason"], starts(run)[1]["argv"]) == ("finished", ["--resume"])


def test_after_a_reboot_the_same_token_resumes(run):
    job(run, "train finish")
    supervisor = start(run)
    until(lambda: training(run), "training")
    supervisor.kill()
    supervisor.wait()
    processes.end(run)
    write_json(run / "supervisor.json", {**record(run), "boot_id": "an-earlier-boot", "pid": os.getpid(),
                                         "start_time": processes.start_time(os.getpid())})  # fmt: skip
    assert json.loads(call(run, "status").stdout)["alive"] is False
    assert start(run).wait(30) == 0
    assert (record(run)["reason"], record(run)["restarts"]) == ("finished", 1)
    assert record(run)["boot_id"] == processes.boot_id()


def test_a_stop_that_was_asked_before_a_reboot_still_holds(run):
    job(run)
    write_json(run / "supervisor.json", {"token": "t1", "state": "stopping", "starts": 1})
    call(run, "stop")
    assert start(run).wait(30) == 0
    assert (record(run)["reason"], starts(run)) == ("stopped", [])


def test_requests_to_an_earlier_start_do_not_end_a_new_one(run):
    job(run, "train")
    supervisor = start(run)
    until(lambda: training(run), "training")
    call(run, "stop")
    supervisor.wait(30)
    job(run, "finish", token="t2")
    assert start(run).wait(30) == 0
    assert (record(run)["token"], record(run)["reason"]) == ("t2", "finished")


def test_a_stall_dumps_stacks_and_restarts(run):
    job(run, "hang finish", stall_factor=1, stall_floor_seconds=1)
    assert start(run).wait(60) == 0
    ended = record(run)
    assert (ended["reason"], ended["restarts"], ended["stacks"]) == ("finished", 1, "stacks.txt")
    assert "a_place_to_hang" in (run / "stacks.txt").read_text()
    assert "no progress for" in (run / "train.log").read_text()


def test_a_full_disk_does_not_kill_the_supervisor(run):
    job(run)
    supervisor = start(run)
    until(lambda: training(run), "training")
    resource.prlimit(
        supervisor.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)
    )  # its writes fail from now on
    until(lambda: time.time() - record(run)["heartbeat"] > 2, "heartbeats to fail")
    assert supervisor.poll() is None
    assert json.loads(call(run, "status").stdout)["alive"] is True
    resource.prlimit(supervisor.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    old = record(run)["heartbeat"]
    until(lambda: record(run)["heartbeat"] > old, "heartbeats again")
    assert len(starts(run)) == 1


@pytest.mark.skipif(not disk.mountable(), reason="needs root, to mount a small file system")
def test_the_last_word_is_written_on_a_full_disk(run):
    """A real ENOSPC that nobody clears: restarts are spent, and what the supervisor set aside has room for saying so."""
    disk.mount(run, 32)
    try:
        shutil.copytree(REPOSITORY / "trainer", run / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
        (run / "fake.py").write_text(FAKE)
        job(run, max_restarts=1)
        supervisor = start(run)
        until(lambda: training(run), "training")
        disk.fill(run)
        assert supervisor.wait(60) == 1
        assert (record(run)["state"], record(run)["reason"]) == ("ended", "failed")
        assert "the disk is full" in record(run)["detail"]
    finally:
        disk.unmount(run)


def test_it_outlives_the_shell_that_started_it(run):
    job(run)
    with (run / "supervisor.log").open("ab") as log:
        shell = subprocess.Popen(["bash", "-c", 'setsid -f "$0" -m trainer.supervise </dev/null; exec sleep 3600', sys.executable],
                                 cwd=run, env=environment(), stdout=log, stderr=log, start_new_session=True)  # fmt: skip
    until(lambda: training(run), "training")
    os.killpg(shell.pid, signal.SIGHUP)
    shell.wait()
    old = record(run)["heartbeat"]
    until(lambda: record(run)["heartbeat"] > old, "the next heartbeat")
    assert os.getsid(record(run)["pid"]) not in (shell.pid, os.getsid(0))


def test_secrets_reach_the_trainer_and_nothing_else(run):
    (run / "secrets").write_text("HF_TOKEN=hf_s3cret=x\n")
    (run / "secrets").chmod(0o600)
    job(run, secrets_file="secrets")
    supervisor = start(run)
    until(lambda: training(run), "training")
    trainer = starts(run)[0]["pid"]
    assert b"HF_TOKEN=hf_s3cret=x" in Path(f"/proc/{trainer}/environ").read_bytes()
    assert b"hf_s3cret" not in Path(f"/proc/{supervisor.pid}/environ").read_bytes()
    held = [path.name for path in run.iterdir() if path.is_file() and b"hf_s3cret" in path.read_bytes()]
    assert held == [], "they are taken from the disk before the trainer lives"
    os.kill(trainer, signal.SIGKILL)
    until(lambda: len(starts(run)) == 2 and training(run), "another start")
    assert b"HF_TOKEN=hf_s3cret=x" in Path(f"/proc/{starts(run)[1]['pid']}/environ").read_bytes()
    call(run, "stop")
    supervisor.wait(30)


def test_a_spot_notice_stops_gracefully(run):
    class Metadata(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self):
            until(lambda: training(run), "training")
            self.answer(b"a-token")

        def do_GET(self):
            fine = self.headers["X-aws-ec2-metadata-token"] == "a-token"
            self.answer(
                b'{"action": "terminate", "time": "2026-01-01T00:02:00Z"}' if fine else b"",
                200 if fine else 404,
            )

        def answer(self, body, code=200):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        job(run, watch_interruption=True)
        os.environ["LLMCTL_IMDS"] = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            assert start(run).wait(30) == 0
        finally:
            del os.environ["LLMCTL_IMDS"]
            server.shutdown()
    assert (record(run)["reason"], record(run)["detail"]) == (
        "interrupted",
        "terminate at 2026-01-01T00:02:00Z",
    )


def test_unusable_jobs_are_refused(run):
    (run / "job.json").write_text('{"token": "t1", "argv": []}')
    refused = call(run)
    assert (refused.returncode, "unusable argv" in refused.stderr) == (3, True)
    assert call(run, "--run", "/no/such/folder").returncode == 2


def test_a_killed_rank_under_torchrun_is_restarted(run):
    pytest.importorskip("torch")
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        sys.executable,
        "fake.py",
    ]
    job(run, "train train exit3", argv=argv)  # both ranks count as starts: the second pair sees `exit3`
    start(run)
    until(lambda: training(run) and len(starts(run)) == 2, "both ranks")
    os.kill(starts(run)[1]["pid"], signal.SIGKILL)
    until(lambda: record(run)["state"] == "ended", "the end")
    assert (record(run)["restarts"], record(run)["exit_code"], record(run)["reason"]) == (1, 3, "failed")
    assert "killed by SIGKILL; restart 1 of 2" in (run / "train.log").read_text()
