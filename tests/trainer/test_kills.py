"""kill -9 at any instant, then resume: bit for bit the run that was never killed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.trainer import forks
from tests.trainer.conftest import config_maker, losses, records
from trainer import checkpoint, loop, manifest

MakeConfig = Callable[..., Path]
INSTANTS = [
    # Steps and validations do not wait for the checkpoint before them, so that one may not be on the disk yet.
    ("step", 7, {0, 4}),
    ("backward", 14, {0, 4}),
    ("validation", 20, {0, 4}),
    ("weights-written", 2, {4}),
    ("manifest-written", 2, {4}),
    (
        "renamed",
        3,
        {4},
    ),  # each checkpoint here is latest and best: the third link is the second checkpoint's `latest`
    ("linked", 3, {8}),
]


@pytest.fixture(scope="module")
def uninterrupted(token_shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)  # as in each test: the reductions are in one order
    assert loop.run(config_maker(token_shards, folder)(), folder / "out", resume=False) == 0
    return folder / "out"


def run_killed(config: Path, out: Path, instant: str, count: int) -> None:
    words = [instant, str(count), "train", "--config", str(config), "--out", str(out)]
    done = forks.run("tests.trainer.killed", words, out.with_suffix(".log"))
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("instant", "count", "resumed_from"), INSTANTS, ids=[item[0] for item in INSTANTS])
def test_killed_and_resumed_is_bit_identical(
    make_config: MakeConfig,
    tmp_path: Path,
    uninterrupted: Path,
    *,
    instant: str,
    count: int,
    resumed_from: set[int],
) -> None:
    out = tmp_path / "killed"
    run_killed(make_config(), out, instant, count)
    assert loop.run(make_config(), out, resume=True) == 0
    assert {line["step"] for line in records(out, "resume")} <= resumed_from
    assert losses(out) == losses(uninterrupted)
    for name in ("model.safetensors", "training_state.pt"):
        ours, theirs = (folder / "checkpoints/latest" / name for folder in (out, uninterrupted))
        assert ours.read_bytes() == theirs.read_bytes(), name
    directory = out / "checkpoints"
    assert checkpoint.steps(directory) == checkpoint.steps(uninterrupted / "checkpoints")
    assert all(
        manifest.verify(directory / manifest.directory_name(step)) == []
        for step in checkpoint.steps(directory)
    )
    assert not list(directory.glob(".*")), "nothing half-written stays"


def test_what_a_kill_left_of_a_removal_is_cleared(make_config: MakeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert loop.run(make_config(), out, resume=False) == 0
    doomed = out / "checkpoints/.step-000004.123.tmp"
    doomed.mkdir()
    (doomed / "model.safetensors").write_bytes(b"half")
    assert loop.run(make_config(train={"steps": 13}), out, resume=True) == 0
    assert not doomed.exists()
