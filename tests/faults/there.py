"""Faults of the node and of the provider."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from functools import partial

from tests.faults import disk
from tests.faults.harness import EVERY, SLOW, STEPS, Case
from tests.faults.kind import LAUNCH, LONG, SKIPPED, TERMINATE, End, kind

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
    object.__setattr__(self, "first_step_seconds", 60.0)


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


def no_space_there(case: Case) -> End:
    homes = case.cloud.directory / "state" / "homes"
    disk.mount(homes, 256)
    case.afterwards.append(partial(disk.unmount, homes))
    case.launch(node={"max_restarts": 1})
    case.at_step(most=EVERY)
    filler = disk.fill(homes)
    case.injected += 1
    while case.record().outcome is None and case.record().attempts[-1].trainer_end is None:
        case.later(1)
    filler.unlink()
    return End(case.carry_on())


if disk.mountable():
    kind("no space left on the node (ENOSPC): a file system of its own, filled to the last byte")(
        no_space_there
    )
else:
    SKIPPED["no space left (ENOSPC) on the node"] = (
        "needs root, to mount a file system of its own; files that cannot grow (RLIMIT_FSIZE) stand for it"
    )

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
    case.launch_and_follow({"loop": SLOW + NAN.format(step=step)})
    case.injected += 1
    return End(case.followed(), expected=100, exact=False)


SHOUT = """


import os


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
    step, blocks = case.random.randint(5, STEPS // 2), case.random.randint(10, 50)
    case.launch_and_follow({"loop": SLOW + SHOUT.format(step=step, blocks=blocks)})
    case.injected += 1
    code = case.followed()
    told = case.shown.read_bytes()
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
    code = case.carry_on()
    lines = [line for line in case.cli.metrics(case.run) if line["kind"] == "step"]
    spent = sum(line["step_seconds"] for line in lines)
    training = case.cli.show(case.run)["training_seconds"]
    return End(code if spent * 0.5 < training < spent * 2 + 5 else 1)


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
    case.refuse("/api/v1/", case.random.randint(3, 8))
    return End(case.carry_on())


# ---------------------------------------------------------------- several


@kind("three of these in one run, which a follower revives", times=3)
def several(case: Case) -> End:
    case.launch_and_follow()
    hurts: dict[str, Callable[[str], None]] = {
        "driver": lambda _: case.kill_driver(),
        "rank": lambda node: case.strike([case.random.choice(case.ranks(node))]),
        "torchrun": lambda node: case.strike([case.torchrun(node)]),
        "supervisor": lambda node: case.strike([case.file(node, "supervisor.json")["pid"]]),
        "link": case.strike_link,
        "provider": lambda _: case.refuse("/api/v1/", 5),
    }
    for name in case.random.sample(sorted(hurts), 3):
        node = case.at_step(most=EVERY)
        case.until(partial(case.trains, node))
        hurts[name](node)
        case.later(2)
    return End(case.followed())
