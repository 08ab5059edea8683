"""Each planted bug turns each of its tests red, and the copy without one is green."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .bugs import BUGS, Bug

harness = pytest.mark.harness
ROOT = Path(__file__).parents[2]
SCHEDULES = 500
"""Enough for every bug here; the whole suite runs 10,000."""


def _copy(to: Path) -> Path:
    for name in ("orchestrator", "provisioning", "runs", "trainer", "tests/simulation", "tests/unit"):
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def _plant(bug: Bug, where: Path) -> None:
    for name, old, new in bug.edits:
        text = (where / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} has {text.count(old)} times: {old!r}"
        (where / name).write_text(text.replace(old, new), encoding="utf-8")


def _run(where: Path, test: str) -> subprocess.CompletedProcess[str]:
    if test == "simulation":
        command = ["-m", "tests.simulation", "--schedules", str(SCHEDULES), "--processes", "1", "--no-shrink"]
    else:
        command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", test]
    environment = {**os.environ, "PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_every_bug_can_still_be_planted() -> None:
    """Each edit names text that stands in its file exactly once, however the code moves on."""
    for bug in BUGS:
        for name, old, _ in bug.edits:
            assert (ROOT / name).read_text(encoding="utf-8").count(old) == 1, f"{bug.name}: {name}: {old!r}"


@harness
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_planted_bug_is_seen(bug: Bug, tmp_path: Path) -> None:
    """Red, by a broken rule or a failed assertion: not because nothing could be imported."""
    where = _copy(tmp_path)
    _plant(bug, where)
    for test in bug.seen_by:
        result = _run(where, test)
        told = result.stdout + result.stderr
        assert result.returncode == 1, f"{test} did not see that {bug.name}:\n{told[-2000:]}"
        assert ("one failed" if test == "simulation" else " failed") in result.stdout, told[-2000:]


@harness
def test_the_copy_is_what_is_tested_and_is_green(tmp_path: Path) -> None:
    """Without a bug the same runs pass, on the copy."""
    where = _copy(tmp_path)
    probe = "import orchestrator, provisioning, runs, tests.simulation as s; print(orchestrator.__file__, runs.__file__, s.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(where)}
    told = subprocess.run(
        [sys.executable, "-c", probe], cwd=where, env=environment, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(where)) for path in told.stdout.split())
    for test in sorted({test for bug in BUGS for test in bug.seen_by}):
        result = _run(where, test)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
