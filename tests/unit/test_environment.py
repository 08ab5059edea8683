"""Which of an image's Pythons the trainer gets. The interpreters are scripts that answer the probe."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestrator.remote.connection import CommandFailed, Result
from orchestrator.site import environment, prepare


class Shell:
    """A node that is a folder."""

    def __init__(self, home: Path) -> None:
        self.home, self.probes = home, 0

    def run(self, argv: list[str], *, check: bool, timeout: float = 60, env: Any = None) -> Result:
        self.probes += argv[-1] == environment._PROBE
        try:
            done = subprocess.run(argv, cwd=self.home, capture_output=True, timeout=timeout, check=False)
        except FileNotFoundError:
            done = subprocess.CompletedProcess(argv, 127, b"", b"")
        return Result(done.stdout, done.stderr, done.returncode)

    def read(self, path: str) -> bytes:
        try:
            return (self.home / path.removeprefix("~/")).read_bytes()
        except FileNotFoundError as error:
            raise CommandFailed("cat", Result(b"", str(error).encode(), 1)) from None

    def write(self, path: str, data: bytes, mode: int) -> None:
        file = self.home / path.removeprefix("~/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def python(self, name: str, **packages: str | None) -> str:
        """An interpreter with these packages."""
        path = self.home / name
        found = {"executable": str(path), "version": [3, 12], "packages": packages}
        path.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n")
        path.chmod(0o755)
        return str(path)


WHOLE = {"torch": "2.9.1", "numpy": "2.1.0", "safetensors": "0.5.0"}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.mark.parametrize(
    "system",
    [None, {"torch": None, "numpy": "1.26.4", "safetensors": None}, {**WHOLE, "torch": "2.5.1"},
     {**WHOLE, "safetensors": None}],
)  # fmt: skip
def test_torch_that_the_image_keeps_elsewhere_is_found_and_remembered(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, system: dict[str, str | None] | None
) -> None:
    first = shell.python("python3", **system) if system else str(shell.home / "nothing-here")
    second = shell.python("elsewhere", **WHOLE)
    monkeypatch.setattr(environment, "IMAGE_PYTHONS", (first, second))
    chosen = environment.ensure(shell, "auto", cuda=False)  # type: ignore[arg-type]
    assert (chosen["python"], chosen["kind"]) == (second, "image")
    probes = shell.probes
    assert environment.ensure(shell, "auto", cuda=False) == chosen  # type: ignore[arg-type]
    assert shell.probes == probes
    shell.python("elsewhere", **WHOLE, more="1")  # another interpreter now: looked at again
    environment.ensure(shell, "auto", cuda=False)  # type: ignore[arg-type]
    assert shell.probes > probes


def test_the_systems_python_comes_first_and_a_given_one_alone(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = shell.python("python3", **WHOLE), shell.python("elsewhere", **WHOLE)
    monkeypatch.setattr(environment, "IMAGE_PYTHONS", (first, second))
    assert environment.ensure(shell, "auto", cuda=False)["python"] == first  # type: ignore[arg-type]
    bare = shell.python("bare", torch=None, numpy=None, safetensors=None)
    with pytest.raises(environment.EnvironmentFailed, match="lacks torch"):
        environment.ensure(shell, bare, cuda=False)  # type: ignore[arg-type]


def test_what_was_chosen_without_gpus_is_not_taken_for_a_run_that_needs_them(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = shell.python("python3", **WHOLE)  # its torch cannot use a GPU
    monkeypatch.setattr(environment, "IMAGE_PYTHONS", (python,))
    made: list[str] = []
    monkeypatch.setattr(
        environment, "_isolated", lambda _remote, image, cuda: made.append(image) or {"python": python}
    )
    environment.ensure(shell, "auto", cuda=False)  # type: ignore[arg-type]
    assert made == []
    for _ in range(2):
        environment.ensure(shell, "auto", cuda=True)  # type: ignore[arg-type]
    assert len(made) == 1, "made once, and remembered for this image"


def test_shards_and_environments_live_in_the_filesystem_where_it_is_mounted(
    shell: Shell, tmp_path: Path
) -> None:
    mount = tmp_path / "nfs" / "cache"
    shell.run(["sh", "-c", prepare._KEEP, "sh", str(mount / "llmctl")], check=False)
    assert not (shell.home / "llmctl").exists(), "it is not mounted: the node's own disk serves"
    mount.mkdir(parents=True)
    for _ in range(2):
        shell.run(["sh", "-c", prepare._KEEP, "sh", str(mount / "llmctl")], check=False)
    (shell.home / "llmctl" / "data" / "shard.bin").write_bytes(b"tokens")
    assert (mount / "llmctl" / "data" / "shard.bin").read_bytes() == b"tokens"
    next_node = Shell(tmp_path / "next")
    next_node.home.mkdir()
    next_node.run(["sh", "-c", prepare._KEEP, "sh", str(mount / "llmctl")], check=False)
    assert (next_node.home / "llmctl" / "data" / "shard.bin").read_bytes() == b"tokens"
    assert (next_node.home / "llmctl" / "environments").is_symlink()
