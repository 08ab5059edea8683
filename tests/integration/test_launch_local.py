"""The main job on real parts: a node that answers SSH, a real transfer, two processes of torchrun, a bill."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import images
from tests.cli import Cli, spec
from tests.plain_trainer import plain_trainer
from tests.wandb_files import told
from trainer import cache, manifest, reading
from trainer.watchdog import SCRATCH

pytestmark = pytest.mark.slow


def plain(cli: Cli, **changes: Any) -> str:
    """A spec whose trainer has no tensors: the case is about the node, the files and the bill."""
    return spec(trainer={"path": plain_trainer(cli.home)}, **changes)


def finished(cli: Cli, run: str, steps: int = 60) -> None:
    """What is true of every run that succeeded, however it got there."""
    document = cli.show(run)
    assert (document["state"], document["reason"]) == ("succeeded", "finished")
    made = [line["step"] for line in cli.metrics(run) if line["kind"] == "step"]
    assert made == list(range(1, steps + 1)), "each step's metrics once, in order"
    charges = document["charges"]
    assert sum(charge["usd"] for charge in charges) == pytest.approx(document["cost_usd"], abs=1e-6)
    assert document["cost_usd"] == pytest.approx(document["billed_seconds"] * 3.6 / 3600, abs=2e-6)
    assert 0 < document["training_seconds"] < document["billed_seconds"]
    overhead = 1 - document["training_seconds"] / document["billed_seconds"]
    assert document["overhead_fraction"] == pytest.approx(overhead, abs=1e-4)  # each figure is rounded once
    best = [item for item in document["checkpoints"] if item["best"]]
    assert best and best[0]["fetched"]
    assert manifest.verify(Path(best[0]["path"])) == []


def test_launch_trains_collects_releases_and_prices(cli: Cli) -> None:
    """From a spec to a verified checkpoint and a bill, with one command; then nothing is left running."""
    images.unknown(cli.home / "node-home" / "0")
    temporary = cli.home / "temporary"
    temporary.mkdir()
    (cli.home / "run.yaml").write_text(spec(node={"env": {"TMPDIR": str(temporary)}}))
    cli.run("launch", "run.yaml")
    run = cli.only()
    finished(cli, run)
    assert list(temporary.iterdir()) == [], "nothing stays in the node's temporary folder"
    (folder,) = cli.home.glob(f"node-home/*/llmctl/runs/{run}")
    assert not (folder / SCRATCH).exists()
    fetched = cli.json("fetch-checkpoint", run)
    assert fetched["verified"] and manifest.digest(Path(fetched["path"])) == fetched["sha256"]
    (row,) = cli.json("compare")
    assert row["run"] == run and row["cost_usd"] == cli.show(run)["cost_usd"]
    assert row["validation_loss"] < 5.6
    predicted = cli.json("plan", "run.yaml")["predicted"]
    assert predicted["basis"] == "history", (
        "the same again is expected to be the same again, whatever this machine's speed"
    )
    assert predicted["cost_usd"] == pytest.approx(row["cost_usd"], rel=0.01)
    hours = predicted["training_hours"] + predicted["overhead_hours"]
    assert hours == pytest.approx(row["billed_hours"], rel=0.01)
    log = cli.run("tail", run, "--no-follow").stdout.splitlines()
    assert len(log) == len((cli.home / "runs" / run / "train.log").read_text().splitlines())


def test_wandb_from_the_node_comes_home(cli: Cli) -> None:
    """The node logs each step once, in files that are here when it is gone; this machine adds what the run cost."""
    pytest.importorskip("wandb")
    (cli.home / "run.yaml").write_text(plain(cli, wandb={"mode": "offline", "from": "node"}))
    cli.run("launch", "run.yaml")
    run = cli.only()
    finished(cli, run)
    (folder,) = cli.home.glob(f"node-home/*/llmctl/runs/{run}")
    (there,) = folder.glob("report/wandb/offline-run-*/run-*.wandb")
    assert (cli.home / "runs" / run / there.relative_to(folder / "report")).read_bytes() == there.read_bytes()
    assert cli.left() == [], "the driver has told it the end, and is gone"
    ids, history, summary, config = told(cli.home / "runs" / run)
    assert ids == {run} and config["hardware_used"]["provider"] == "local"
    made = {line["step"]: line["loss"] for line in cli.metrics(run) if line["kind"] == "step"}
    assert [(item["_step"], item["loss"]) for item in history if "loss" in item] == list(made.items())
    assert summary["cost_usd"] == pytest.approx(cli.show(run)["cost_usd"], abs=1e-3)


@pytest.mark.parametrize("driver_too", [pytest.param(False, marks=pytest.mark.harness), True])
def test_a_reporter_that_was_killed_is_made_good(cli: Cli, driver_too: bool) -> None:
    """When memory runs out it goes before the trainer does. The next driver starts another, at the latest the run's end does."""
    pytest.importorskip("wandb")
    (cli.home / "run.yaml").write_text(
        plain(cli, train__steps=1_000_000, wandb={"mode": "offline", "from": "node"})
    )
    cli.run("launch", "run.yaml", "--detach")
    run = cli.only()
    (folder,) = cli.wait(lambda: list(cli.home.glob(f"node-home/*/llmctl/runs/{run}")))
    cli.wait(lambda: list(folder.glob("report/wandb/offline-run-*/run-*.wandb")))
    if driver_too:
        os.kill(cli.driver_pid(run), signal.SIGKILL)
    (reporter,) = cli.running("../../report.py")
    reporter.kill()
    cli.run("stop", run)
    assert cli.left() == []
    made = [line["step"] for line in cli.metrics(run) if line["kind"] == "step"]
    _, history, _, _ = told(cli.home / "runs" / run)
    assert [item["_step"] for item in history if "loss" in item] == made
    assert [event for event in cli.show(run)["events"] if event["kind"] == "JobFailed"] == []


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.harness)])
def test_what_a_trainer_found_out_goes_along_to_the_next_node(cli: Cli, real: bool) -> None:
    """What lies where the trainer keeps the microbatch size that held, and compiled code, is fetched while steps run, and read
    on a fresh node by a run of the same settings (in the case with the real trainer)."""
    kind: dict[str, Any] = (
        {"train__microbatch_size": "auto"} if real else {"trainer": {"path": plain_trainer(cli.home)}}
    )
    (cli.home / "first.yaml").write_text(spec(train__steps=1_000_000, **kind))
    cli.run("launch", "first.yaml", "--detach")
    (job,) = cli.wait(lambda: list(cli.home.rglob("llmctl/runs/tiny-*/job.json")))
    settings = reading.load(job.with_name("config.json"))
    there = job.parent / json.loads(job.read_text())["env"]["LLMCTL_TRAINER_CACHE"]
    there.mkdir(parents=True)
    name = f"{cache.key(settings, torch.device('cpu'), 2)}.json"
    (there / name).write_text('{"microbatch_size": 2}')  # no run would choose that by itself
    (found,) = cli.wait(lambda: list((cli.home / "cache" / "found").glob(f"*/{name}")))
    cli.run("stop", cli.only(), "--now", code=None)
    shutil.rmtree(there)  # nodes of this machine share their home directory; the next one shall be fresh
    (cli.home / "next.yaml").write_text(spec(name="next", train__steps=5, **kind))
    cli.run("launch", "next.yaml")
    document = cli.show("next")
    (lane,) = [
        item for item in document["events"] if item["kind"] == "LaneDone" and item["lane"] == "findings"
    ]
    assert lane["sent_bytes"] == found.stat().st_size
    assert (there / name).read_bytes() == found.read_bytes()
    assert document["attempts"][0]["microbatch_size"] == (2 if real else 4)


def test_what_the_nodes_gpus_do_is_told_here(cli: Cli) -> None:
    """From nvidia-smi on the node (here a script that answers like it) to `show`."""
    tool = cli.home / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\ncase "$*" in *utilization*) echo "96, 61440, 71, 640.25";; esac\n')
    tool.chmod(0o755)
    cli.env["PATH"] = f"{tool.parent}:{cli.env['PATH']}"
    own = Path(plain_trainer(cli.home))
    main = own / "__main__.py"
    main.write_text(main.read_text().replace('"gpus": 0', '"gpus": 1'))
    (cli.home / "run.yaml").write_text(spec(trainer={"path": str(own)}))
    cli.run("launch", "run.yaml")
    run = cli.only()
    assert "GPU 96%, 60.0 GiB, 71 °C, 640 W" in cli.run("show", run).stdout


def test_checkpoints_that_the_node_lets_go_too_soon_hold_nothing_up(cli: Cli) -> None:
    """All are to be fetched, and a trainer of the user's own keeps two however slow the link: those that are there are pulled, the
    others are said to be gone, and the run ends as it should."""
    changes = {"checkpoint": {"every_steps": 2, "keep": 2, "fetch": "all"}, "train__steps": 60}
    (cli.home / "run.yaml").write_text(spec(trainer={"path": plain_trainer(cli.home)}, **changes))
    cli.run("launch", "run.yaml")
    run = cli.only()
    document = cli.show(run)
    assert (document["state"], document["reason"]) == ("succeeded", "finished")
    here = [item["step"] for item in document["checkpoints"] if item["fetched"]]
    gone = [item["step"] for item in document["events"] if item["kind"] == "CheckpointGone"]
    assert {58, 60} <= set(here) and gone
    assert sorted({*here, *gone}) == list(range(2, 61, 2)), "each is here, or said to be gone"
    assert [item["step"] for item in cli.json("fetch-checkpoint", run, "--which", "all")] == sorted(here)


def test_second_launch_sends_nothing_again(cli: Cli) -> None:
    """What the first run left on the node's home is used by the second: no shard is sent, no environment is looked for."""
    (cli.home / "run.yaml").write_text(plain(cli, train__steps=10, train__validate_every=10))
    cli.run("launch", "run.yaml")
    cli.run("launch", "run.yaml")
    newest, oldest = [row["run"] for row in cli.json("status")]
    sent = {}
    for run in (oldest, newest):
        lanes = [
            item for item in cli.show(run)["events"] if item["kind"] == "LaneDone" and item["lane"] == "data"
        ]
        sent[run] = lanes[-1]["sent_bytes"]
    assert sent[oldest] > 1_000_000 and sent[newest] == 0


def test_kill_everything_here_then_resume(cli: Cli) -> None:
    """kill -9 of the follower and of the driver in mid-training; `resume` ends in the same result, each step once."""
    (cli.home / "run.yaml").write_text(plain(cli, train__steps=400, train__validate_every=100))
    launch = cli.start("launch", "run.yaml")
    cli.wait(lambda: cli.json("status") and (cli.json("status")[0]["step"] or 0) > 20)
    run = cli.only()
    launch.kill()
    launch.communicate()
    os.kill(cli.driver_pid(run), signal.SIGKILL)
    cli.run("resume", run)
    finished(cli, run, steps=400)
    starts = [item for item in cli.show(run)["events"] if item["kind"] == "DriverStarted"]
    assert len(starts) >= 2
    launches = [item for item in cli.show(run)["events"] if item["kind"] == "LaunchIntended"]
    assert len(launches) == 1, "the node lived on: no second one was launched"
