"""Ctrl-C, stop and resume: following is not the run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.cli import Cli, spec
from tests.plain_trainer import plain_trainer
from trainer import manifest

pytestmark = pytest.mark.slow


def test_ctrl_c_stops_following_and_says_what_it_costs_then_stop_and_resume(cli: Cli) -> None:
    (cli.home / "run.yaml").write_text(
        spec(
            train__steps=100_000,
            train__validate_every=0,
            checkpoint__every_steps=100_000,
            trainer={"path": plain_trainer(cli.home)},
        )
    )
    launch = cli.start("launch", "run.yaml")
    cli.wait(lambda: (cli.json("status") or [{}])[0].get("step"))
    run = cli.only()
    launch.send_signal(signal.SIGINT)
    out, err = launch.communicate(timeout=30)
    assert launch.returncode == 101, err
    assert f"{run} goes on without you: it costs $3.60/h" in err and f"llmctl tail {run}" in err
    assert "Traceback" not in err and out.splitlines()
    tail = cli.start("tail", run)
    assert tail.stdout is not None
    assert tail.stdout.readline() == out.splitlines(keepends=True)[0], "from the start again"
    tail.send_signal(signal.SIGINT)
    tail.communicate(timeout=30)
    assert tail.returncode == 101

    document = cli.json("stop", run)
    assert (document["state"], document["reason"]) == ("stopped", "user")
    newest = document["checkpoints"][-1]
    assert newest["fetched"], "a stopped run leaves its last full checkpoint here"
    assert manifest.verify(Path(newest["path"])) == []
    made = newest["step"]
    assert made > 0 and cli.run("status").stderr == ""

    told = cli.json("resume", run, "--detach")
    assert told["run"] == run and told["state"] != "stopped"
    cli.wait(lambda: (cli.row(run)["step"] or 0) > made)
    assert [item["from_step"] for item in cli.show(run)["attempts"]] == [0, made]
    assert cli.json("stop", run, "--now")["state"] == "stopped"
    lines = cli.run("tail", run, "--no-follow").stdout.splitlines()
    assert len(lines) == len((cli.home / "runs" / run / "train.log").read_text().splitlines())
    steps = [
        json.loads(line)["step"]
        for line in cli.run("tail", run, "--json").stdout.splitlines()
        if '"kind": "step"' in line
    ]
    assert steps == sorted(set(steps)), "each step once"
    raw = (cli.home / "runs" / run / "metrics.raw.jsonl").read_text().splitlines()
    assert [line["step"] for line in map(json.loads, raw) if line["kind"] == "resume"] == [made]
