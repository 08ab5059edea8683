"""Two real processes are one, and die and come back as one, under torchrun. What torchrun has no part in is shown by forks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer import forks
from tests.trainer.conftest import losses, records, run_trainer, status
from trainer import checkpoint, loop, manifest

MakeConfig = Callable[..., Path]
pytestmark = pytest.mark.slow


def arguments(config: Path, out: Path, *, resume: bool) -> list[str]:
    return ["train", "--config", str(config), "--out", str(out), *(["--resume"] if resume else [])]


def torchrun(
    config: Path, out: Path, *, resume: bool = False, killed: tuple[str, int] | None = None
) -> subprocess.CompletedProcess[str]:
    return run_trainer(*arguments(config, out, resume=resume), killed=killed, ranks=2)


def forked(config: Path, out: Path, *, resume: bool = False) -> subprocess.CompletedProcess[str]:
    return forks.run("trainer", arguments(config, out, resume=resume), out.with_suffix(".log"), ranks=2)


def test_two_processes_equal_one_and_survive_a_kill(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(train={"microbatch_size": 2})
    alone, pair, killed = tmp_path / "alone", tmp_path / "pair", tmp_path / "killed"
    assert loop.run(config, alone, resume=False) == 0
    done = torchrun(config, pair)
    assert done.returncode == 0, done.stderr
    assert losses(pair) == pytest.approx(losses(alone), abs=2e-5)
    ours = {line["step"]: line["validation_loss"] for line in records(pair, "validation")}
    theirs = {line["step"]: line["validation_loss"] for line in records(alone, "validation")}
    assert ours == pytest.approx(theirs, abs=2e-5)

    assert torchrun(config, killed, killed=("step", 7)).returncode != 0
    assert status(killed)["state"] == "failed"
    assert torchrun(config, killed, resume=True).returncode == 0
    assert records(killed, "resume")[0]["step"] in {0, 4}  # step 4 may not have been on the disk yet
    assert losses(killed) == losses(pair)
    for name in ("model.safetensors", "training_state.pt"):
        assert (killed / "checkpoints/latest" / name).read_bytes() == (
            pair / "checkpoints/latest" / name
        ).read_bytes()


def test_another_world_size_sees_the_same_batches(make_config: MakeConfig, tmp_path: Path) -> None:
    changes = {"microbatch_size": 2, "schedule": "constant"}
    config, longer = make_config(train={**changes, "steps": 12}), make_config(train={**changes, "steps": 16})
    moved, alone = tmp_path / "moved", tmp_path / "alone"
    assert loop.run(config, moved, resume=False) == 0
    assert forked(longer, moved, resume=True).returncode == 0
    line = records(moved, "resume")[0]
    assert (line["from_world_size"], line["world_size"]) == (1, 2)
    assert loop.run(longer, alone, resume=False) == 0
    assert losses(moved) == pytest.approx(losses(alone), abs=5e-5)


def test_sharded_training_equals_replicated(make_config: MakeConfig, tmp_path: Path) -> None:
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    changes = {"microbatch_size": 2, "steps": 8}
    assert loop.run(make_config(train=changes), plain, resume=False) == 0
    done = forked(make_config(train={**changes, "sharding": "fsdp"}), sharded)
    assert done.returncode == 0, done.stderr
    assert losses(sharded) == pytest.approx(losses(plain), abs=5e-5)
    left, right = (
        checkpoint.weights(plain / "checkpoints/latest"),
        checkpoint.weights(sharded / "checkpoints/latest"),
    )
    assert {name: tensor.shape for name, tensor in left.items()} == {
        name: tensor.shape for name, tensor in right.items()
    }
    assert (
        forked(
            make_config(train={**changes, "steps": 12, "schedule": "constant", "sharding": "fsdp"}),
            sharded,
            resume=True,
        ).returncode
        == 0
    )
    assert manifest.verify(sharded / "checkpoints/latest") == []
    assert status(sharded)["state"] == "finished"


def test_a_refusal_on_another_rank_reaches_the_status(
    make_config: MakeConfig, tmp_path: Path, token_shards: dict[str, Path]
) -> None:
    """Rank 1's half of a batch has a token outside the vocabulary: rank 0 must not be left waiting, nor overwrite the reason."""
    from trainer.shards import write_bin

    write_bin(tmp_path / "mixed.bin", [5] * (32 * 4 + 1) + [250] * (32 * 8))
    config = make_config(
        data={"train": [str(tmp_path / "mixed.bin")], "validation": []},
        model={"vocab_size": 100},
        train={"microbatch_size": 4},
    )
    out = tmp_path / "out"
    done = forked(config, out)
    assert done.returncode != 0
    assert status(out)["reason"] == "data"
    assert "token 250" in status(out)["message"]
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
