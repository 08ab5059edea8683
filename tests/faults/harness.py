"""One case: a tiny run through the real CLI against the Lambda-shaped server, whose nodes are real SSH machines, and one kind
of fault at a seeded moment. `kinds` says which; `audit` says what was lost.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from orchestrator.driver.process import driver_alive
from orchestrator.exits import USAGE, exit_code_of
from provisioning import keys, local_node
from runs.facts import ENDED
from runs.record import RunRecord
from runs.store import Store
from tests.cli import Cli, spec
from tests.faults.tap import Links, Proxy, Tap
from tests.lambda_fixtures import Cloud
from tests.plain_trainer import plain_trainer
from trainer import processes

STEPS, EVERY = 200, 25
PACE = 0.02
PATIENCE = 240.0
"""Seconds in which anything that is waited for must happen, on a busy machine too."""
STEP_SECONDS = 0.025
SLOW = f"""

_quick_step = _one_step


def _one_step(run: Run, batches: Batches) -> None:
    time.sleep({STEP_SECONDS})
    _quick_step(run, batches)
"""
"""Appended to the trainer's loop: steps of a few milliseconds leave no time for faults."""


@dataclass
class Outcome:
    """What a case showed. Each list holds sentences; all empty: nothing was lost."""

    kind: str
    seed: int
    injected: int = 0
    seconds: float = 0.0
    announced: int = 0
    found: dict[str, list[str]] = field(default_factory=dict)

    def complain(self, column: str, *sentences: str) -> None:
        """Note what is wrong."""
        self.found.setdefault(column, []).extend(sentences)


class Case:
    """The stage of one case: server, tap, links, CLI, and hands that reach into each of them."""

    def __init__(self, kind: str, seed: int, root: Path, cache: Path, *, plain: bool = False) -> None:
        """`plain`: with the trainer that has no tensors, for kinds of fault that do not reach into it."""
        self.random = random.Random(f"{kind} {seed}")
        self.kind, self.seed, self.root, self._plain = kind, seed, root, plain
        self.home = root / "home"
        self.home.mkdir(parents=True)
        self.cloud = Cloud(root / "cloud", pace=PACE, boot_seconds=10)
        self.tap = Tap(self.cloud.url, self.home)
        environment = self.cloud.environment(self.home)
        self.links = Links(Path(environment["LLMCTL_TEST_SSH_PORTS"]), root / "ports.json")
        environment |= {"LAMBDA_API_BASE_URL": self.tap.url, "LLMCTL_TEST_SSH_PORTS": str(self.links.file)}
        self.cli = Cli(self.home, environment, cache=cache)
        self.injected = 0
        self.run = ""
        self.shown = root / "shown"
        self.afterwards: list[Callable[[], None]] = []
        """What takes the stage down again, when nothing of the case lives any more."""
        self._following: subprocess.Popen[str] | None = None

    # ------------------------------------------------------------ the run

    def trainer(self, **patches: str) -> Path:
        """A trainer package of the user's own: ours, slowed down, with `patches` (file → text to append)."""
        import trainer

        own = self.root / "own" / "trainer"
        if self._plain:
            own = Path(plain_trainer(self.root, step_seconds=STEP_SECONDS))
        else:
            shutil.copytree(Path(trainer.__file__).parent, own, ignore=shutil.ignore_patterns("__pycache__"))
            patches = {"loop": SLOW, **patches}
        for name, text in patches.items():
            with (own / f"{name}.py").open("a") as file:
                file.write(text)
        return own

    def write(self, patches: dict[str, str] | None = None, **changes: Any) -> None:
        """run.yaml."""
        usual: dict[str, Any] = {
            "hardware": {"provider": "lambda", "gpu": "A10:1"},
            "budget": {"max_usd": 5, "max_hours": 1},
            "train__steps": STEPS,
            "train__validate_every": 2 * EVERY,
            "checkpoint": {"every_steps": EVERY, "fetch": "latest"},
            "trainer": {"path": str(self.trainer(**(patches or {})))},
        }
        (self.home / "run.yaml").write_text(spec(**usual | changes))

    def launch(self, patches: dict[str, str] | None = None, **changes: Any) -> None:
        """Start the run, without following it."""
        self.write(patches, **changes)
        self.cli.run("launch", "run.yaml", "-y", "--detach", timeout=PATIENCE)
        self.run = self.only()

    def launch_and_follow(self, patches: dict[str, str] | None = None) -> None:
        """Start the run with a `launch` that follows it; what that shows goes to the file `shown`."""
        self.write(patches)
        with self.shown.open("wb") as file:
            self._following = self.cli.start("launch", "run.yaml", "-y", stdout=file, stderr=file)
        self.run = self.until(self.only)

    def only(self) -> str:
        """The id of the one run, "" while there is none."""
        if not (self.home / "llmctl.db").exists():
            return ""
        store = Store(self.home, read_only=True)
        try:
            found = store.runs()
        finally:
            store.close()
        return found[0][0] if found else ""

    def record(self) -> RunRecord:
        """The record as it is now."""
        run = self.run or self.only()
        store = Store(self.home, read_only=True)
        try:
            record = store.record(run)
        finally:
            store.close()
        assert record is not None
        return record

    def carry_on(self) -> int:
        """What a user does after any accident; the exit code. A run that is over already tells what it came to."""
        if self.record().outcome in (None, "failed", "stopped", "lost"):
            code = self.cli.run("resume", self.run, code=None, timeout=PATIENCE).returncode
            if code != USAGE:  # it has succeeded meanwhile: there is nothing to carry on
                return code
        return exit_code_of(self.record())

    def followed(self) -> int:
        """The exit code of that `launch`, once it has ended."""
        assert self._following is not None
        return self._following.wait(PATIENCE)

    def rest(self) -> None:
        """Return once nobody drives the run: a driver lives on for some seconds after the end, to ask the provider's log."""
        end = time.monotonic() + PATIENCE
        while driver_alive(self.home, self.run) and time.monotonic() < end:
            time.sleep(0.1)

    # ------------------------------------------------------------ moments

    def until(self, what: Callable[[], Any]) -> Any:
        """The first true answer. Raises AssertionError when the run ends before, or after PATIENCE."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if found := what():
                return found
            if self.run and self.record().outcome is not None:
                raise AssertionError(
                    f"the run ended before the moment came: {self.record().reason}\n{self.cli.driver_log()}"
                )
            time.sleep(0.05)
        raise AssertionError(f"that did not happen within {PATIENCE:g} s\n{self.cli.driver_log()}")

    def at_step(self, least: int = 5, most: int = STEPS // 2) -> str:
        """Wait for a seeded step of the newest node; its id."""
        step = self.random.randint(least, most)
        self.until(lambda: self.node() and (self.status().get("step") or 0) >= step)
        return self.node()

    def whole(self, number: int = 1) -> None:
        """Wait until so many checkpoints are here."""
        self.until(lambda: sum(item.fetched for item in self.record().checkpoints.values()) >= number)

    def later(self, most: float) -> None:
        """A seeded pause."""
        time.sleep(self.random.uniform(0, most))

    def taken_over(self, epoch: int) -> bool:
        """Whether a driver of a later epoch has the run."""
        return self.record().epoch > epoch

    def trains(self, node: str) -> bool:
        """Whether both ranks are at work on a node."""
        return len(self.ranks(node)) == 2 and self.file(node, "status.json").get("state") == "training"

    # ------------------------------------------------------------ hands

    def driver(self) -> int:
        """The pid of the driver that has the run now."""
        return self.record().driver_pid or 0

    def kill_driver(self) -> None:
        """kill -9, and certainty that it is gone."""
        pid = self.driver()
        os.kill(pid, signal.SIGKILL)
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        self.injected += 1

    def follower(self) -> int:
        """The pid of the `launch` that follows."""
        assert self._following is not None
        return self._following.pid

    def kill_follower(self) -> None:
        """kill -9 of the `launch` that follows."""
        assert self._following is not None
        self._following.kill()
        self._following.wait()
        self.injected += 1

    def node(self) -> str:
        """The id of the newest instance, "" while there is none."""
        living = [row["id"] for row in self.cloud.machines() if row["status"] not in ENDED]
        return living[-1] if living else ""

    def place(self, node: str) -> Path:
        """The state of a node: node.json, host_key."""
        return self.cloud.directory / "state" / node

    def directory(self, node: str) -> Path:
        """The run's directory on a node."""
        return self.cloud.directory / "state" / "homes" / node / "llmctl" / "runs" / self.run

    def file(self, node: str, name: str) -> dict[str, Any]:
        """A JSON file of the run's directory on a node; empty where it is absent."""
        try:
            found: dict[str, Any] = json.loads((self.directory(node) / name).read_text())
        except (OSError, ValueError):
            return {}
        return found

    def status(self) -> dict[str, Any]:
        """What the newest node's trainer says."""
        return self.file(self.node(), "status.json")

    def link(self) -> Proxy:
        """The link to the newest node."""
        node = self.until(lambda: self.node() in json.loads(self.links.file.read_text()) and self.node())
        return self.links.of(node)

    def ranks(self, node: str) -> list[int]:
        """The processes that train."""
        marked = processes.marked(self.directory(node))
        return [
            pid
            for pid in marked
            if "torch.distributed.run" not in " ".join(_words(pid)) and "train" in _words(pid)
        ]

    def torchrun(self, node: str) -> int:
        """The process that started them."""
        (agent,) = [
            pid
            for pid in processes.marked(self.directory(node))
            if any("torch.distributed.run" in word for word in _words(pid))
        ]
        return agent

    def strike(self, pids: list[int], number: int = signal.SIGKILL) -> None:
        """A signal to processes of a node."""
        assert pids, "there is nothing to strike"
        for pid in pids:
            os.kill(pid, number)
        self.injected += 1

    def strike_link(self, node: str) -> None:
        """A reset of all connections to a node."""
        self.links.of(node).cut()
        self.injected += 1

    def refuse(self, match: str, times: int) -> None:
        """So many requests are answered with a 503 that is not JSON."""
        self.cloud.fault(match, "refuse", times=times, status=503, code=None)
        self.injected += 1

    def end_server(self, node: str, *, everything: bool = False) -> None:
        """kill -9 of a node's SSH server; with `everything`, of all that runs there, as a power cut would."""
        state = local_node.read(self.place(node))
        assert state is not None and state.pid is not None
        mark, pids = str(self.place(node).resolve()), [state.pid]
        for process in psutil.process_iter() if everything else ():
            try:
                if process.environ().get(local_node.MARK) == mark:
                    pids.append(process.pid)
            except (psutil.Error, OSError):
                continue
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        while local_node.lives(self.place(node)):
            time.sleep(0.02)

    def start_server(self, node: str, *, host_key: str | None = None) -> int:
        """The node's SSH server again, on another port of this machine; the port."""
        place = self.place(node)
        wanted = json.loads((place / "node.json").read_text())
        local_node.spawn(
            place,
            name=wanted["name"],
            user=wanted["user"],
            authorized_key=wanted["authorized_key"],
            host_private_key=host_key or (place / "host_key").read_text(),
            home=Path(wanted["home"]),
            lease_end=wanted["lease_end"],
            env=wanted["env"],
        )

        def listening() -> int | None:
            state = local_node.read(place)
            return state.port if state is not None and state.status == "active" else None

        return int(self.until(listening))

    def another_key(self) -> str:
        """A host key that nobody pinned."""
        return keys.generate("other").private

    # ------------------------------------------------------------ the end

    def close(self, outcome: Outcome) -> None:
        """End the stage; what still runs or bills has leaked."""
        leaked = [f"{row['name']} bills" for row in self.cloud.billing()]
        try:
            self.cloud.close()
        except AssertionError as error:
            if not leaked:
                outcome.complain("other", f"the server complains: {error}")
        finally:
            self.links.close()
            self.tap.close()
        left = self._left()
        for process in left:
            subprocess.run(["kill", "-9", str(process.pid)], check=False, capture_output=True)
        for undo in self.afterwards:
            undo()
        outcome.complain(
            "leaked", *leaked, *(f"still runs: {' '.join(_words(process.pid))[:150]}" for process in left)
        )

    def _left(self) -> list[psutil.Process]:
        """Processes of this stage that outlive it; an SSH master ends itself two minutes after its last use and is none."""
        found, end = [], time.monotonic() + 5
        while time.monotonic() < end:
            found = [process for process in psutil.process_iter() if self._mine(process)]
            if not found:
                return []
            time.sleep(0.2)
        return found

    def _mine(self, process: psutil.Process) -> bool:
        root = str(self.root)
        try:
            if (
                process.pid == os.getpid()
                or process.status() == psutil.STATUS_ZOMBIE
                or process.name() == "ssh"
            ):
                return False
            return any(root in word for word in process.cmdline()) or root in process.environ().get(
                "HOME", ""
            )
        except (psutil.Error, OSError):
            return False


def _words(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []
