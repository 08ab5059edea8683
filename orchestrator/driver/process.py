"""The driver as a process: starting one, and whether there is one. Imports none of what a driver does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from runs.lock import driver_lock, held
from runs.store import run_dir


def spawn(home: Path, run: str, *, force: bool = False) -> None:
    """Start the detached driver process of `run`; it ends at once where another one drives."""
    directory = run_dir(home, run)
    directory.mkdir(parents=True, exist_ok=True)
    script = Path(sys.executable).parent / "llmctl"
    command = (
        [str(script)]
        if script.exists()
        else [sys.executable, "-P", "-c", "from orchestrator.cli import main; main()"]
    )
    command += [
        "internal-driver",
        *(["--force"] if force else []),
        "--",
        run,
    ]  # a name may begin with a hyphen
    with (directory / "driver.log").open("ab") as log:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=directory,
            env={**os.environ, "LLMCTL_HOME": str(home)},
        )


def driver_alive(home: Path, run: str) -> bool:
    """Whether some process drives the run now."""
    return held(driver_lock(run_dir(home, run)))
