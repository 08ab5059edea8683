"""The kinds of fault: each launches the tiny run, injects its fault at a seeded moment, carries on, and says how that ended."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from runs.store import Store
from tests.faults.harness import EVERY, PATIENCE, STEPS, Case

LAUNCH, TERMINATE = "/instance-operations/launch", "/instance-operations/terminate"
LONG = 12.0
"""Seconds that a run takes here at least: random moments lie within."""


@dataclass(frozen=True)
class End:
    """How a case ended, and how it should have."""

    code: int
    expected: int = 0
    exact: bool = True
    """The run was completed, and must equal the undisturbed one."""


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    name: str
    words: str
    inject: Callable[[Case], End]
    times: int = 1
    """How many faults a case injects."""


KINDS: dict[str, Kind] = {}
SKIPPED = {
    "no space left (ENOSPC), there and here": "needs a file system of its own, hence root; files that cannot grow (RLIMIT_FSIZE) stand for it",
    "a new boot id": "needs a machine that reboots; the power cut keeps the boot id, and tests/faults/test_supervisor.py changes it",
    "CUDA that stops answering": "needs a GPU; stopped ranks stand for it",
}


def kind(words: str, times: int = 1) -> Callable[[Callable[[Case], End]], Callable[[Case], End]]:
    """Add a kind, named as its function."""

    def add(function: Callable[[Case], End]) -> Callable[[Case], End]:
        name = function.__name__.replace("_", "-")
        KINDS[name] = Kind(name, words, function, times)
        return function

    return add


# ---------------------------------------------------------------- this side


@kind("kill -9 of the following `launch`, and of the driver with it")
def follower_killed(case: Case) -> End:
    case.write()
    following = case.cli.start("launch", "run.yaml", "-y", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    case.until(case.only)
    case.run = case.only()
    case.until(lambda: case.record().epoch)
    case.later(LONG / 2)
    following.kill()
    following.wait()
    case.kill_driver()
    return End(case.carry_on())


@kind("kill -9 of the driver at random times, three times", times=3)
def driver_killed(case: Case) -> End:
    case.launch()
    case.until(lambda: case.record().epoch)
    for _ in range(3):
        case.later(LONG / 2)
        if case.record().outcome is not None:
            break
        epoch = case.record().epoch
        case.kill_driver()
        following = case.cli.start("resume", case.run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        case.until(lambda epoch=epoch: case.record().epoch > epoch)
        following.kill()
        following.wait()
    return End(case.carry_on())


def _killed_at(case: Case, match: str, when: Any, skip: int = 0) -> End:
    case.write()
    sprung = case.tap.at(match, when, case.kill_driver, skip)
    case.cli.run("launch", "run.yaml", "-y", "--detach", timeout=PATIENCE)
    case.run = case.only()
    case.until(sprung.is_set)
    return End(case.carry_on())


@kind("kill -9 of the driver as its launch arrives, before it has an effect")
def driver_killed_before_launch(case: Case) -> End:
    return _killed_at(case, LAUNCH, "before")


@kind("kill -9 of the driver after its launch had its effect, before the answer")
def driver_killed_after_launch(case: Case) -> End:
    return _killed_at(case, LAUNCH, "after")


@kind("kill -9 of the driver as its terminate arrives, before it has an effect")
def driver_killed_before_terminate(case: Case) -> End:
    return _killed_at(case, TERMINATE, "before")


@kind("kill -9 of the driver after its terminate had its effect, before the answer")
def driver_killed_after_terminate(case: Case) -> End:
    return _killed_at(case, TERMINATE, "after")


@kind("kill -9 of the driver as it reads the inventory")
def driver_killed_at_a_read(case: Case) -> End:
    return _killed_at(case, "GET /api/v1/instances", "after", case.random.randint(0, 6))


@kind("SIGSTOP of the driver, then `stop --now` from another terminal, then SIGCONT and `resume`")
def driver_frozen(case: Case) -> End:
    case.launch()
    case.at_step()
    frozen = case.driver()
    os.kill(frozen, signal.SIGSTOP)
    case.injected += 1
    stopped = case.cli.run("stop", case.run, "--now", code=None, timeout=PATIENCE).returncode
    try:
        os.kill(frozen, signal.SIGCONT)
    except ProcessLookupError:
        pass
    if stopped != 0 or case.cloud.billing():
        return End(stopped if stopped else 8)
    return End(case.carry_on())


@kind("two more drivers started at once, one of them by force")
def two_drivers(case: Case) -> End:
    case.launch()
    case.later(LONG / 2)
    more = [case.cli.start("internal-driver", case.run, *force) for force in ([], ["--force"], [])]
    case.injected += 1
    code = case.carry_on()
    for process in more:
        process.communicate(timeout=PATIENCE)
    return End(code)


@kind("`launch`, `stop`, `status --watch` and `tail` at once, then `resume`")
def commands_at_once(case: Case) -> End:
    case.launch()
    watching = [
        case.cli.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for words in (["status", "--watch"], ["tail", case.run], ["resume", case.run])
    ]
    case.later(LONG)
    stops = [case.cli.start("stop", case.run) for _ in range(2)]
    case.injected += 1
    codes = [process.wait(PATIENCE) for process in stops]
    watching[0].kill()
    for process in watching:
        process.wait(PATIENCE)
    if codes != [0, 0] or case.cloud.billing():
        return End(max(codes) or 8)
    return End(case.carry_on() if case.record().outcome != "succeeded" else 0)


@kind("no file of the driver can grow for some seconds (a full disk here)")
def full_disk_here(case: Case) -> End:
    case.launch()
    case.at_step()
    process, most = psutil.Process(case.driver()), resource.RLIM_INFINITY
    process.rlimit(psutil.RLIMIT_FSIZE, (0, most))
    case.injected += 1
    case.later(4)
    if process.is_running():
        process.rlimit(psutil.RLIMIT_FSIZE, (most, most))
    return End(case.carry_on())


# ---------------------------------------------------------------- the link


@kind("the link stalls without a reset, for up to 40 s, then goes on")
def link_stalled(case: Case) -> End:
    case.launch()
    case.until(lambda: case.record().epoch)
    link = case.link()
    case.later(LONG / 2)
    link.stall()
    case.injected += 1
    case.later(40)
    link.flow()
    return End(case.carry_on())


@kind("the link is reset in mid-transfer, three times", times=3)
def link_reset(case: Case) -> End:
    case.launch()
    link = case.link()
    for _ in range(3):
        carried = link.bytes + case.random.randint(1 << 16, 1 << 20)
        case.until(lambda carried=carried: link.bytes >= carried or case.record().outcome)
        link.cut()
        case.injected += 1
    return End(case.carry_on())


@kind("the node's SSH server dies and comes back, at the same address or at another")
def server_moved(case: Case) -> End:
    case.launch()
    node = case.at_step()
    case.end_server(node)
    case.injected += 1
    case.later(5)
    port = case.start_server(node)
    (case.links.route if case.random.random() < 0.5 else case.links.readdress)(node, port)
    return End(case.carry_on())


@kind("the node shows another host key in mid-run")
def host_key_changed(case: Case) -> End:
    case.launch()
    node = case.at_step()
    case.end_server(node)
    case.links.route(node, case.start_server(node, host_key=case.another_key()))
    case.injected += 1
    return End(case.follow(), expected=6, exact=False)


# ---------------------------------------------------------------- the node


@kind("kill -9 of a rank")
def rank_killed(case: Case) -> End:
    case.launch()
    node = case.at_step()
    case.strike([case.random.choice(case.ranks(node))])
    return End(case.carry_on())


@kind("kill -9 of torchrun")
def torchrun_killed(case: Case) -> End:
    case.launch()
    node = case.at_step()
    case.strike([case.torchrun(node)])
    return End(case.carry_on())


@kind("kill -9 of the supervisor")
def supervisor_killed(case: Case) -> End:
    case.launch()
    node = case.at_step(most=EVERY)
    case.strike([case.file(node, "supervisor.json")["pid"]])
    return End(case.carry_on())


@kind("a power cut on the node: everything on it dies, it comes back with its files")
def node_rebooted(case: Case) -> End:
    case.launch()
    node = case.at_step()
    case.end_server(node, everything=True)
    case.injected += 1
    case.later(3)
    case.links.route(node, case.start_server(node))
    return End(case.carry_on())


SHORT_STALL = """

_job = Job.__init__


def _impatient(self: Job, *words: object, **names: object) -> None:
    _job(self, *words, **names)
    object.__setattr__(self, "stall_floor_seconds", 4.0)


Job.__init__ = _impatient
"""


@kind("the ranks hang without a crash (SIGSTOP)")
def trainer_hangs(case: Case) -> End:
    case.launch({"watchdog": SHORT_STALL})
    node = case.at_step()
    case.strike(case.ranks(node), signal.SIGSTOP)
    return End(case.carry_on())


@kind("no file of the ranks can grow (a full disk on the node)")
def full_disk_there(case: Case) -> End:
    case.launch()
    node = case.at_step()
    for pid in case.ranks(node):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    case.injected += 1
    return End(case.carry_on())


NAN = """


def _one_step(run: Run, batches: Batches) -> None:
    time.sleep(0.025)
    _quick_step(run, batches)
    if run.step == {step}:
        with torch.no_grad():
            for parameter in run.module.parameters():
                parameter.fill_(float("nan"))
"""


@kind("the weights become NaN")
def not_a_number(case: Case) -> End:
    step = case.random.randint(EVERY + 5, STEPS - 30)
    from tests.faults.harness import SLOW

    case.launch({"loop": SLOW + NAN.format(step=step)})
    case.injected += 1
    return End(case.follow(), expected=100, exact=False)


SHOUT = """


def _one_step(run: Run, batches: Batches) -> None:
    time.sleep(0.025)
    _quick_step(run, batches)
    if run.step == {step} and run.here.rank == 0:
        os.write(1, b"\\x1b]0;owned\\x07\\x1b[2J\\x1b]52;c;b3duZWQ=\\x07\\x9b31m\\x1bc")
        for number in range({blocks}):
            os.write(1, (b"%012d" % number + b"x" * 51 + b"\\n") * (1 << 14))
"""


@kind("the node prints escape sequences and up to 50 MB of log")
def log_flood(case: Case) -> End:
    from tests.faults.harness import SLOW

    step, blocks = case.random.randint(5, STEPS // 2), case.random.randint(10, 50)
    case.write({"loop": SLOW + SHOUT.format(step=step, blocks=blocks)})
    shown = case.root / "shown"
    with shown.open("wb") as file:
        following = case.cli.start("launch", "run.yaml", "-y", stdout=file, stderr=file)
        case.injected += 1
        code = following.wait(PATIENCE)
    case.run = case.only()
    told = shown.read_bytes()
    harmful = [byte for byte in (b"\x1b", b"\x9b", b"\x07") if byte in told.replace("\u203a".encode(), b"")]
    return End(code if not harmful else 1)


JUMP = """

import os as _os
import time as _time

_real = _time.time


def _moved() -> float:
    return _real() + ({seconds} if _os.path.exists(_os.environ.get("HOME", "") + "/jumped") else 0)


_time.time = _moved
"""


@kind("the node's clock jumps, forward or back")
def clock_jumps(case: Case) -> End:
    seconds = case.random.choice([-7200, 1800, 7200])
    case.launch({"__init__": JUMP.format(seconds=seconds)})
    node = case.at_step()
    (case.cloud.directory / "state" / "homes" / node / "jumped").touch()
    case.injected += 1
    return End(case.carry_on())


# ---------------------------------------------------------------- the provider


@kind("the answer to the launch is lost, or is none")
def launch_answer_lost(case: Case) -> End:
    case.cloud.fault(f"POST {LAUNCH}", case.random.choice(["lose-answer", "lose-request", "garbage"]))
    case.launch()
    case.injected += 1
    return End(case.carry_on())


@kind("terminate fails, its answer is lost, or it lies")
def terminate_fails(case: Case) -> End:
    how = case.random.choice(["refuse", "lose-answer", "lose-request", "lies"])
    if how == "lies":
        case.cloud.set(terminate_lies=case.random.randint(1, 3))
    else:
        case.cloud.fault(f"POST {TERMINATE}", how, times=case.random.randint(1, 4))
    case.launch()
    case.injected += 1
    return End(case.carry_on())


@kind("capacity that the list shows is refused")
def capacity_refused(case: Case) -> End:
    code = "instance-operations/launch/insufficient-capacity"
    case.cloud.fault(f"POST {LAUNCH}", "refuse", times=case.random.randint(1, 2), status=400, code=code)
    case.launch(hardware={"provider": "lambda", "gpu": "A10:1"})
    case.injected += 1
    return End(case.carry_on())


def _dies(case: Case, how: str) -> End:
    case.launch()
    node = case.until(case.node)
    if case.random.random() < 0.75:
        case.at_step()
    case.cloud.kill(node, how)
    case.injected += 1
    return End(case.carry_on())


@kind("the instance is terminated, preempted or ill in mid-run")
def instance_dies(case: Case) -> End:
    return _dies(case, case.random.choice(["terminated", "preempted", "unhealthy"]))


@kind("the instance vanishes from the provider's list in mid-run")
def instance_vanishes(case: Case) -> End:
    return _dies(case, "vanished")


@kind("the API answers 503 to everything for a while")
def api_storm(case: Case) -> End:
    case.launch()
    case.later(LONG)
    case.cloud.fault("/api/v1/", "refuse", times=case.random.randint(3, 8), status=503, code=None)
    case.injected += 1
    return End(case.carry_on())


def store_is_whole(case: Case) -> bool:
    """The rows of the database equal the fold of its events."""
    store = Store(case.home)
    try:
        before = store.record(case.run)
        store.rebuild()
        return before == store.record(case.run)
    finally:
        store.close()
