"""Faults on this side: of the driver, of those who follow, of this disk; and of the link."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from contextlib import suppress
from functools import partial
from typing import Any

import psutil

from tests.cli import Cli
from tests.faults.harness import PATIENCE, Case
from tests.faults.kind import LAUNCH, LONG, TERMINATE, End, kind

# ---------------------------------------------------------------- this side


@kind("kill -9 of the following `launch`, and of the driver with it", times=2)
def follower_killed(case: Case) -> End:
    case.launch_and_follow()
    case.until(lambda: case.record().epoch)
    case.later(LONG / 2)
    case.kill_follower()
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
        case.until(partial(case.taken_over, epoch))
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
    with suppress(ProcessLookupError):
        os.kill(frozen, signal.SIGCONT)
    if stopped != 0 or case.cloud.billing():
        return End(stopped or 8)
    return End(case.carry_on())


@kind("two more drivers started at once, one of them by force")
def two_drivers(case: Case) -> End:
    case.launch()
    case.later(LONG / 2)
    more = [case.cli.start("internal-driver", *force, "--", case.run) for force in ([], ["--force"], [])]
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


@kind("this machine sleeps for up to 45 s: driver, follower and SSH all stand still")
def asleep(case: Case) -> End:
    case.launch_and_follow()
    case.at_step()
    link, sleeping = case.link(), [case.driver(), case.follower()]
    for pid in sleeping:
        os.kill(pid, signal.SIGSTOP)
    link.stall()
    case.injected += 1
    case.later(45)
    link.flow()
    for pid in sleeping:
        os.kill(pid, signal.SIGCONT)
    return End(case.followed())


@kind("another user of the account looks, and reaps all that is theirs")
def other_user(case: Case) -> End:
    case.launch()
    case.at_step()
    other = Cli(case.root / "other", {**case.cli.env, "LLMCTL_HOME": str(case.root / "other")})
    case.injected += 1
    commands = [
        other.start(*words)
        for words in (["offers", "--json"], ["reap", "--yes", "--json"], ["status", "--refresh", "--json"])
    ]
    told = [process.communicate(timeout=PATIENCE)[0] for process in commands]
    spared = json.loads(told[1])["terminated"] == []
    return End(case.carry_on() if spared else 1)


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
        case.until(partial(link.carried, link.bytes + case.random.randint(1 << 16, 1 << 20)))
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
    case.launch_and_follow()
    node = case.at_step()
    case.end_server(node)
    case.links.route(node, case.start_server(node, host_key=case.another_key()))
    case.injected += 1
    return End(case.followed(), expected=6, exact=False)
