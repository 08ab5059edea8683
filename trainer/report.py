"""A run's metrics as a wandb run, written on the node (`wandb.from: node`): `python3 report.py --run DIR`, this file alone.

`report.json`, by the driver: the start's `token`, `mode` (offline or online), `project`, `run` (the wandb run's id), `config`, and
`over` where no supervisor is to be waited for. The process follows metrics.jsonl beside the trainer, at the lowest priority and in
a session of its own: nobody waits for it while steps run, and what goes wrong is a line in report.log. Where wandb is missing it is
installed into a folder of its own, which the trainer never sees. One reporter a run directory; it ends when the supervisor has and
everything is logged, and its last word is in `report-status.json`. What was finished stands in `report-state.json`, so that another
start continues the same wandb run; of a reporter that was killed wandb may have any part, so the next one logs anew from there on,
in place of its offline folder. wandb's own files are in `report/wandb`: a folder `wandb` in the run directory would be what a
trainer without that library imports by that name.

The driver, which writes the same wandb run for `from: driver`, takes the first half of this module. Standard library only, but for wandb.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

INIT_SECONDS = 15
"""Without a network `wandb.init` takes 103 s to fail by default; after this it goes offline and is synced behind."""
SYNC_SECONDS = 25
"""For sending behind what was logged offline, at a run's end."""
NOTHING_SENT = {"step": 0, "validation": -1}
"""Before the first line of each kind: what is tuned is validated before its first step."""
POLL_SECONDS = 1.0
ABANDONED_SECONDS = 600.0
"""A supervisor that has not written for so long is gone, and nobody has started another."""
CLOSE_SECONDS = 300
"""For the last lines, and for sending behind: then this process ends, whatever wandb still hopes for. Its files stay."""
INSTALL_SECONDS, INSTALL_PAUSE_SECONDS = 600.0, 60.0
PACKAGE = "wandb>=0.31"


# ---------------------------------------------------------------- from metrics to wandb, on either side


class Lines:
    """The whole lines of a metrics file, from a byte position on."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path, self.offset = path, offset

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines behind the last one read; a torn one is left for later, and skipped where a kill cut it off. A file
        that shrank was made anew: from its start."""
        try:
            if self._path.stat().st_size < self.offset:
                self.offset = 0
            with self._path.open("rb") as file:
                file.seek(self.offset)
                while (line := file.readline()).endswith(b"\n"):
                    self.offset += len(line)
                    with contextlib.suppress(ValueError):
                        value = json.loads(line)
                        if isinstance(value, dict):
                            yield value
        except FileNotFoundError:
            return


def logged(line: Mapping[str, Any], sent: dict[str, int]) -> dict[str, Any] | None:
    """What wandb is given of a line of metrics, under the same names; None where it takes nothing. Each step of each kind
    is given once, though a restart makes it again: `sent` holds the last ones."""
    kind, step = line.get("kind"), line.get("step")
    if kind not in sent or not isinstance(step, int) or step <= sent[kind]:
        return None
    sent[kind] = step
    return {key: value for key, value in line.items() if key not in {"kind", "step"}}


def last_sent(told: Any) -> dict[str, int]:
    """`sent`, as a file remembers it."""
    try:
        return {kind: int(told.get(kind, before)) for kind, before in NOTHING_SENT.items()}
    except (ValueError, TypeError, AttributeError):
        return dict(NOTHING_SENT)


def open_run(mode: str, options: Mapping[str, Any], say: Callable[[str], None]) -> tuple[Any, str | None]:
    """(the wandb run, the folder to be synced later). An online run that cannot be had within INIT_SECONDS is an offline
    one, with such a folder."""
    import wandb

    settings = wandb.Settings(init_timeout=INIT_SECONDS, console="off", silent=True, x_disable_stats=True)
    if mode == "online":
        try:
            return wandb.init(mode="online", resume="allow", settings=settings, **options), None
        except wandb.errors.Error as error:
            why = str(error).partition("\n")[0]
            say(f"wandb is not reachable ({why}); logging offline, to be synced at the end")
        wandb.teardown()  # its service still holds the run that failed, and would refuse its name
    opened = wandb.init(mode="offline", resume="allow", settings=settings, **options)
    return opened, str(Path(opened.dir).parent) if mode == "online" else None


def close_run(run: Any) -> None:
    """Everything is in its file or sent."""
    import wandb

    run.finish()
    wandb.teardown()  # `finish` comes back before the last lines are in the file; the end of its service does not


def sync(folders: Sequence[str]) -> str | None:
    """Send what was logged offline; why that did not work, by name."""
    command = [sys.executable, "-m", "wandb", "sync", *folders]
    # Its own log goes there too, and not into the system's temporary folder.
    env = {**os.environ, "WANDB_DIR": str(Path(folders[0]).parent.parent)}
    try:
        subprocess.run(
            command, timeout=SYNC_SECONDS, check=True, env=env, stdin=subprocess.DEVNULL, capture_output=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        return type(error).__name__
    return None


# ---------------------------------------------------------------- on the node


class Reporter:
    """The process of one run directory, until the end of one start."""

    def __init__(self, run: Path) -> None:
        self.run, self._folder = run, run / "report" / "wandb"
        self._folder.mkdir(parents=True, exist_ok=True)  # it is fetched, whatever comes into it
        self._scratch = run / "report" / "tmp"
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        os.environ["TMPDIR"] = str(self._scratch)  # wandb leaves folders there
        state = read_json(run / "report-state.json")
        for folder in self._folder.glob("offline-run-*"):
            if folder.name not in state.get("folders", ()):
                shutil.rmtree(folder, ignore_errors=True)
        self._sent = last_sent(state.get("sent"))
        self._lines = Lines(run / "metrics.jsonl", int(state.get("offset", 0)))
        self._wandb: Any = None
        self._behind: str | None = None
        self._said = ""
        self._token = read_json(run / "report.json").get("token")
        self._beat: tuple[int, float] = (0, time.monotonic())
        """The supervisor's last writing, and when it was seen."""

    def work(self) -> int:
        """Until the supervisor has ended and everything is logged. Returns the exit code."""
        self._say_status("following")
        over = False
        try:
            while not over:
                over = self._over()  # looked at first: no line comes after it
                self._follow()
                if not over:
                    time.sleep(POLL_SECONDS)
            complaint = self._close()
        except Exception as error:  # noqa: BLE001  it is nobody's but its own log's
            self._say_status("failed", f"{type(error).__name__}: {error}")
            return 1
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._say_status("failed" if complaint else "done", complaint)
        return 0

    def overtaken(self) -> bool:
        """Whether another start has come meanwhile."""
        return read_json(self.run / "report.json").get("token") not in {None, self._token}

    def _follow(self) -> None:
        """Log what the metrics have gained."""
        for line in self._lines.read():
            values = logged(line, self._sent)
            if values is None:
                continue
            if self._wandb is None:
                self._wandb, self._behind = self._open()
            self._wandb.log(values, step=line["step"])

    def _open(self) -> tuple[Any, str | None]:
        plan = read_json(self.run / "report.json")
        options = {
            "project": plan["project"],
            "id": plan["run"],
            "name": plan["run"],
            "dir": str(self._folder.parent),
            "config": plan["config"],
        }
        self._have_wandb()
        return open_run(plan["mode"], options, self._note)

    def _note(self, text: str) -> None:
        self._said = text
        say(text)

    def _have_wandb(self) -> None:
        """Make `import wandb` work: the interpreter's own, else one beside the environments. Tried again until the run is over."""
        folder = self.run.parent.parent / "environments" / "wandb-{}.{}".format(*sys.version_info[:2])
        spec = importlib.util.find_spec("wandb")
        if spec is not None and spec.origin is not None:
            return
        while not folder.is_dir() and (problem := install(folder)):
            say(f"wandb could not be installed: {problem}")
            again_at = time.monotonic() + INSTALL_PAUSE_SECONDS
            while time.monotonic() < again_at:
                if self._over():
                    raise OSError(f"wandb is not on the node and could not be installed: {problem}")
                time.sleep(POLL_SECONDS)
        sys.path.insert(0, str(folder))  # with all that it needs, at versions that fit
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)]))

    def _over(self) -> bool:
        """Whether the supervisor of the newest start has ended, or is gone for good."""
        path, plan = self.run / "supervisor.json", read_json(self.run / "report.json")
        self._token, supervisor = plan.get("token"), read_json(path)
        ended = supervisor.get("token") == self._token and supervisor.get("state") == "ended"
        if ended or plan.get("over") or not self.run.is_dir():
            return True
        written = path.stat().st_mtime_ns if path.exists() else 0
        if written != self._beat[0]:
            self._beat = written, time.monotonic()
        return time.monotonic() - self._beat[1] > ABANDONED_SECONDS

    def _close(self) -> str:
        """Finish the wandb run, and send what was to be online; what could not be sent."""
        if self._wandb is None:
            return ""
        self._say_status("sending")
        signal.signal(signal.SIGALRM, self._give_up)
        signal.alarm(CLOSE_SECONDS)
        close_run(self._wandb)
        folders = sorted(self._folder.glob("offline-run-*"))
        state = {"offset": self._lines.offset, "sent": self._sent, "folders": [path.name for path in folders]}
        _write(self.run / "report-state.json", state)
        # An earlier one is of a start without a network; what was sent already is passed over.
        problem = sync([str(path) for path in folders]) if self._behind is not None else None
        signal.alarm(0)
        return f"{self._said}, which failed ({problem})" if problem else ""

    def _give_up(self, *_: object) -> None:
        """Nothing waits for a network that is not there: neither a kept node, nor a machine of one's own."""
        self._say_status("failed", f"wandb did not take everything within {CLOSE_SECONDS} s")
        os._exit(1)

    def _say_status(self, state: str, detail: str = "") -> None:
        """report-status.json: what the driver asks for at the end."""
        if detail:
            say(detail)
        with contextlib.suppress(OSError):
            status = {"token": self._token, "state": state, "detail": detail}
            _write(self.run / "report-status.json", status)


def install(folder: Path) -> str:
    """wandb and what it needs, in `folder`, by pip or uv. Why not, or "": then it is there as a whole."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    uv = shutil.which("uv") or str(folder.with_name("tools") / "bin" / "uv")
    ways = (
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(temporary), PACKAGE],
        [uv, "pip", "install", "--quiet", "--python", sys.executable, "--target", str(temporary), PACKAGE],
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    problems = []
    for argv in ways:
        try:
            done = subprocess.run(
                argv, env=env, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            problems.append(f"{Path(argv[0]).name}: {type(error).__name__}")
            continue
        if done.returncode == 0:
            with contextlib.suppress(OSError):  # another run of this node was faster
                temporary.rename(folder)
            break
        problems.append(f"{Path(argv[0]).name}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    shutil.rmtree(temporary, ignore_errors=True)
    return "" if folder.is_dir() else "; ".join(problems)


def say(text: str) -> None:
    """A line with the time in report.log."""
    with contextlib.suppress(OSError):
        os.write(2, f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n".encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def take_lock(run: Path) -> int | None:
    """The lock of a run directory; None where another reporter is at work."""
    descriptor = os.open(run / "report.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def main(argv: list[str]) -> int:
    """The command line; returns the exit code. 0 also where another reporter is at work: it reads report.json anew."""
    parser = argparse.ArgumentParser(prog="report", description="Log a run's metrics to wandb.")
    parser.add_argument("--run", type=Path, required=True, help="the run directory")
    run = parser.parse_args(argv).run.resolve()
    os.nice(19)
    with contextlib.suppress(OSError):  # when memory runs out, this goes before the trainer
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    while (lock := take_lock(run)) is not None:
        reporter = Reporter(run)
        code = reporter.work()
        os.close(lock)
        if not reporter.overtaken():  # asked without the lock: who starts from here on finds it free
            return code
    return 0


if __name__ == "__main__":
    del sys.path[0]  # this file's folder, in which no other file may stand in for a module that wandb needs
    raise SystemExit(main(sys.argv[1:]))
