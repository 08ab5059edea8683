"""What comes after pretraining, as a person runs it: a run is tuned, and measured, on nodes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests import tiny_models
from tests.cli import Cli
from trainer import checkpoint, manifest
from trainer.checkpoint import Snapshot
from trainer.config import DataConfig, TrainConfig, TrainerConfig
from trainer.model import initial_weights

pytestmark = pytest.mark.slow
MODEL = replace(tiny_models.MODEL, context_length=192)


@pytest.fixture
def cli(cli: Cli, tmp_path: Path) -> Cli:
    """A CLI whose home holds a run `demo`."""
    cli.env["OMP_NUM_THREADS"] = "1"
    train = TrainConfig(1, steps=1, device="cpu", precision="fp32")
    config = TrainerConfig(DataConfig(["-"], tokenizer="bytes"), MODEL, train)
    checkpoint.write(tmp_path, Snapshot(80, dict(initial_weights(MODEL, 1)), {}, {}), config)
    tiny_models.run_with(cli.home, tmp_path / manifest.directory_name(80))
    return cli


def test_a_run_is_tuned_and_measured_on_nodes(cli: Cli, tmp_path: Path) -> None:
    """The shipped recipes on a run: the held-out loss falls, the best epoch is the one that is kept and fetched, the tuned model
    answers in its format, and a loss measured by two processes on a node is the one that a single process has here."""
    cli.run("init", "tune.yaml", "--recipe", "finetune")
    base, faster = (
        ("--set", "tune.base=demo"),
        ("--set", "tune.train.epochs=3", "--set", "checkpoint.fetch=all"),
    )
    plan = cli.json("plan", "tune.yaml", *base)
    assert plan["predicted"]["tokens_per_second"] is None and "tuning" in " ".join(plan["predicted"]["notes"])
    cli.run("launch", "tune.yaml", *base, *faster)
    document = next(item for item in cli.json("status") if item["name"] == "finetune")
    shown = cli.show(document["run"])
    assert (shown["state"], shown["reason"]) == ("succeeded", "finished")
    known = shown["spec"]["tune"]["known"]
    assert (known["run"], known["step"], shown["spec"]["model"]["context_length"]) == ("demo-0001", 80, 192)
    losses = {
        line["step"]: line["validation_loss"]
        for line in cli.metrics(document["run"])
        if line["kind"] == "validation"
    }
    best = next(item for item in shown["checkpoints"] if item["best"])
    assert losses[best["step"]] == min(losses.values()) < losses[0]
    assert manifest.verify(Path(best["path"])) == []
    answer = cli.json("sample", document["run"], "Name the capital of France.", "--chat", "--tokens", "8")
    assert answer
    rows = {row["name"]: row for row in cli.json("compare")}
    assert rows["finetune"]["validation_loss"] == pytest.approx(min(losses.values()))
    assert rows["finetune"]["test_set"].startswith("instructions-test-") and rows["finetune"]["cost_usd"] > 0

    shard = tiny_models.shard(tmp_path)
    words = f"[{{name: held, data: ['{shard}'], tokens: 640}}]"
    cli.run("init", "measure.yaml", "--recipe", "evaluate")
    cli.run(
        "launch",
        "measure.yaml",
        *base,
        "--set",
        f"evaluate.test_sets={words}",
        "--set",
        "evaluate.prompts=[]",
    )
    there = next(row for row in cli.json("compare") if row["name"] == "evaluate")
    here = cli.json("evaluate", "demo", "--data", str(shard), "--tokens", "640")["results"][0]
    assert there["test_loss"] == pytest.approx(here["loss"], abs=1e-4)


@pytest.mark.harness
def test_a_sweep_tunes_one_base_on_one_node(cli: Cli) -> None:
    """Two ranks of LoRA: each run once, its adapters beside the merged weights."""
    cli.run("init", "tune.yaml", "--recipe", "finetune")
    same = {
        "tune.base": "demo",
        "tune.train.epochs": 1,
        "tune.train.processes_per_node": 1,
        "evaluate.prompts": [],
    }
    values = {
        "name": "ranks",
        "spec": "tune.yaml",
        "budget": {"max_usd": 1},
        "runs": [same],
        "grid": {"tune.lora.rank": [2, 4]},
    }
    (cli.home / "sweep.yaml").write_text(json.dumps(values))
    first = cli.json("sweep", "sweep.yaml", "-y")
    assert [item["state"] for item in first["runs"]] == ["succeeded"] * 2
    assert len({node for item in first["runs"] for node in item["nodes"]}) == 1
    for item in first["runs"]:
        (best,) = [one for one in cli.show(item["run"])["checkpoints"] if one["best"]]
        shapes = {
            tuple(tensor.shape) for tensor in load_file(Path(best["path"]) / "adapter.safetensors").values()
        }
        assert {min(shape) for shape in shapes} == {item["overrides"]["tune.lora.rank"]}
    assert [item["run"] for item in cli.json("sweep", "sweep.yaml", "-y")["runs"]] == [
        item["run"] for item in first["runs"]
    ]


@pytest.mark.harness
def test_a_kill_in_the_middle_of_an_epoch_costs_that_epoch_at_most(cli: Cli) -> None:
    """kill -9 of every trainer process and of the driver: each step is there once, the best epoch is kept, one node."""
    cli.run("init", "tune.yaml", "--recipe", "finetune")
    words = ("tune.base=demo", "tune.train.epochs=6", "tune.train.patience=6", "evaluate.prompts=[]")
    cli.run("launch", "tune.yaml", "--detach", "-y", *(word for item in words for word in ("--set", item)))
    run = cli.wait(
        lambda: next((row["run"] for row in cli.json("status") if row["name"] == "finetune"), None)
    )
    cli.wait(
        lambda: (
            cli.row(run)["step"]
            and len([line for line in cli.metrics(run) if line["kind"] == "checkpoint"]) >= 2
        )
    )
    os.kill(cli.driver_pid(run), signal.SIGKILL)
    for process in cli.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # torchrun, once it is dead, takes its own along
            if "trainer.after.finetune" in process.cmdline():
                process.kill()
    cli.run("resume", run)
    shown, lines = cli.show(run), cli.metrics(run)
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    losses = {line["step"]: line["validation_loss"] for line in lines if line["kind"] == "validation"}
    assert (shown["state"], steps) == ("succeeded", list(range(1, shown["summary"]["step"] + 1)))
    (resumed,) = [line["step"] for line in lines if line["kind"] == "resume"]
    assert resumed > 0 and resumed in losses
    best = next(item for item in shown["checkpoints"] if item["best"])
    assert losses[best["step"]] == min(losses.values()) and manifest.verify(Path(best["path"])) == []
    assert len({node for attempt in shown["attempts"] for node in attempt["nodes"]}) == 1
