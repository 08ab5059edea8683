"""The CLI as a person or a script runs it: a subprocess of its own, in an LLMCTL_HOME of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests import images

LLMCTL = Path(sys.executable).parent / "llmctl"


class Cli:
    """`llmctl` with one LLMCTL_HOME and one environment. `cache`: a folder of shards that several homes share, whose nodes have an
    image that is known already."""

    def __init__(
        self, home: Path, env: Mapping[str, str] | None = None, *, cache: Path | None = None
    ) -> None:
        self.home = home
        if cache is not None:
            (home / "cache").mkdir(parents=True)
            cache.mkdir(parents=True, exist_ok=True)
            (home / "cache" / "builtin").symlink_to(cache)
            for node in ("0", "1"):
                images.known(home / "node-home" / node)
        keep = {
            name: os.environ[name]
            for name in ("PATH", "LANG", "TMPDIR", "XDG_RUNTIME_DIR", "PYTHONPATH")
            if name in os.environ
        }
        # A HOME of its own: the user's keys, caches and settings are neither read nor touched.
        (home / "user").mkdir(parents=True, exist_ok=True)
        self.env = {
            **keep,
            "HOME": str(home / "user"),
            "LLMCTL_HOME": str(home),
            "NO_COLOR": "1",
            **(env or {}),
        }

    def start(self, *args: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command and do not wait."""
        return subprocess.Popen(
            [LLMCTL, *args],
            env=self.env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=options.get("stdout", subprocess.PIPE),
            stderr=options.get("stderr", subprocess.PIPE),
            cwd=self.home,
        )

    def run(self, *args: str, code: int | None = 0, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """Run a command; its exit code must be `code`, unless that is None."""
        try:
            done = subprocess.run(
                [LLMCTL, *args],
                env=self.env,
                text=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                cwd=self.home,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            told = (error.stderr or b"").decode()[-2000:]
            raise AssertionError(
                f"llmctl {' '.join(args)} took {timeout:g} s\n{told}\n{self.driver_log()}"
            ) from None
        if code is not None and done.returncode != code:
            raise AssertionError(
                f"llmctl {' '.join(args)} ended with {done.returncode}, not {code}\n--- stdout\n{done.stdout[-4000:]}"
                f"\n--- stderr\n{done.stderr[-4000:]}\n{self.driver_log()}"
            )
        return done

    def json(self, *args: str, code: int | None = 0) -> Any:
        """The JSON document that a command prints."""
        return json.loads(self.run(*args, "--json", code=code).stdout)

    def show(self, run: str) -> dict[str, Any]:
        """The record of a run."""
        document: dict[str, Any] = self.json("show", run)
        return document

    def only(self) -> str:
        """The id of the one run."""
        (row,) = [row for row in self.json("status") if row["run"]]
        return str(row["run"])

    def wait(self, what: Callable[[], Any], patience: float = 120) -> Any:
        """The first true value of `what`, asked for again and again for at most `patience` seconds; what is a command of its own
        is asked less often, for it takes the time of those it waits for."""
        end = time.monotonic() + patience
        while (began := time.monotonic()) < end:
            found = what()
            if found:
                return found
            time.sleep(max(0.1, 2 * (time.monotonic() - began)))
        raise AssertionError(f"that did not happen within {patience:g} s\n{self.driver_log()}")

    def row(self, run: str) -> dict[str, Any]:
        """A run's element of `status --json`."""
        return next(row for row in self.json("status") if row["run"] == run)

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """The lines of the mirrored metrics.jsonl."""
        path = self.home / "runs" / run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def driver_log(self) -> str:
        """What all drivers wrote, for a failing test's report."""
        logs = sorted(self.home.glob("runs/*/driver.log"))
        return "\n".join(f"--- {path}\n{path.read_text()[-4000:]}" for path in logs)

    def processes(self) -> list[psutil.Process]:
        """Every living process that belongs to this home: drivers, nodes and what runs on them."""
        mine = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and self._owns(process):
                    mine.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return mine

    def running(self, word: str) -> list[psutil.Process]:
        """The living processes of this home whose command line has the argument `word`. Not what one of them has forked and what will
        be another program in a moment: it still has its parent's."""
        found = {}
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if word in process.cmdline():
                    found[process] = process.ppid()
        pids = {process.pid for process in found}
        return [process for process, parent in found.items() if parent not in pids]

    def left(self, patience: float = 20) -> list[str]:
        """The command lines of what still lives after `patience` seconds; a driver that has just finished is given that."""
        end = time.monotonic() + patience
        while (alive := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        return [" ".join(process.cmdline())[:200] for process in alive]

    def _owns(self, process: psutil.Process) -> bool:
        home = str(self.home)
        return any(home in word for word in process.cmdline()) or home in process.environ().get("HOME", "")

    def driver_pid(self, run: str) -> int:
        """The pid in the newest heartbeat of a run's driver."""
        return int(json.loads((self.home / "runs" / run / "driver.json").read_text())["pid"])

    def end(self) -> None:
        """Kill whatever a failed test left behind."""
        for process in self.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue


def spec(**changes: Any) -> str:
    """A tiny run.yaml that trains in a few seconds on the CPU, as JSON (which is YAML). `a__b=c` changes a.b."""
    values: dict[str, Any] = {
        "name": "tiny",
        "hardware": {"provider": "local", "usd_per_hour": 3.6},
        "data": {
            "train": ["builtin:python-stdlib"],
            "validation": ["builtin:python-stdlib"],
            "tokenizer": "bytes",
        },
        "model": {"vocab_size": 256, "context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 2},
        "train": {
            "steps": 60,
            "global_batch_size": 8,
            "microbatch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 5,
            "precision": "fp32",
            "device": "cpu",
            "processes_per_node": 2,
            "compile": False,
            "log_every": 5,
            "validate_every": 20,
            "validation_tokens": 2048,
        },
        "checkpoint": {"every_steps": 20},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return json.dumps(values)
