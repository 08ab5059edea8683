"""Sweeps on real parts: many runs, few nodes, one budget, and kills in the middle."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections import Counter
from typing import Any

import pytest

from tests.cli import Cli, spec
from tests.plain_trainer import plain_trainer

pytestmark = pytest.mark.slow


def made(cli: Cli) -> list[dict[str, Any]]:
    """Every run of the sweep so far."""
    return [row for row in cli.json("status") if row["name"] == "rates"]


def sweep_through_kills(cli: Cli, rates: list[float], seeds: int, nodes: int) -> dict[str, Any]:
    """Make the runs, killing the sweep and a driver in the middle; what the sweep says at its end."""
    # Long enough for a busy machine to see one of them train.
    tiny = spec(train__steps=80, train__validate_every=40, train__processes_per_node=1, checkpoint={"every_steps": 40},
                trainer={"path": plain_trainer(cli.home, step_seconds=0.05)})  # fmt: skip
    (cli.home / "run.yaml").write_text(tiny)
    values = {"name": "rates", "spec": "run.yaml", "budget": {"max_usd": 5}, "nodes": nodes,
              "grid": {"train.learning_rate": rates}, "seeds": seeds}  # fmt: skip
    (cli.home / "sweep.yaml").write_text(json.dumps(values))
    count = len(rates) * seeds
    rehearsed = cli.json("sweep", "sweep.yaml", "--dry-run")
    assert (len(rehearsed["left"]), rehearsed["runs"], made(cli)) == (count, [], [])
    sweep = cli.start("sweep", "sweep.yaml", "-y")
    # Two runs are begun, whatever else is: one of them loses its driver, and the sweep dies too.
    cli.wait(lambda: len(made(cli)) >= 2)
    row = cli.wait(
        lambda: next((row for row in made(cli) if row["state"] == "training" and row["driver"]), None)
    )
    sweep.kill()
    sweep.communicate()
    os.kill(cli.driver_pid(row["run"]), signal.SIGKILL)
    return dict(cli.json("sweep", "sweep.yaml", "-y"))


def well_done(cli: Cli, document: dict[str, Any], count: int, nodes: int) -> None:
    """Each run once, within the budget, on nodes that were rented once and handed on; each node's bill is paid once."""
    runs = [item["run"] for item in document["runs"]]
    assert [item["state"] for item in document["runs"]] == ["succeeded"] * count and document["left"] == []
    assert len({json.dumps(item["overrides"]) for item in document["runs"]}) == count == len(runs)
    assert document["cost_usd"] <= document["max_usd"] == 5
    assert all(item["cost_usd"] <= item["max_usd"] for item in document["runs"])
    shown = {run: cli.show(run) for run in runs}
    kinds = Counter(item["kind"] for one in shown.values() for item in one["events"])
    keys = {key for item in document["runs"] for key in item["nodes"]}
    assert kinds["LaunchIntended"] == len(keys) <= nodes, "a node takes the next run"
    assert kinds["TerminateIntended"] == len(keys) == kinds["NodeGone"]
    for key in keys:  # the shares of a node join, from its first moment to its last
        parts = sorted(
            (item["start"], item["end"])
            for one in shown.values()
            for item in one["charges"]
            if item["node"] == key
        )
        assert all(left[1] == right[0] for left, right in itertools.pairwise(parts))
    again = cli.json("sweep", "sweep.yaml", "-y")
    assert [item["run"] for item in again["runs"]] == runs, "nothing is made twice"


def test_a_sweep_shares_a_node_and_survives_kills(cli: Cli) -> None:
    """Four runs on one node: the sister of the twelve below."""
    document = sweep_through_kills(cli, [1e-3, 3e-3], 2, 1)
    well_done(cli, document, 4, 1)
    groups = cli.json("compare", "--sweep", "rates")
    assert [(row["variant"], row["runs"]) for row in groups] == [
        ("learning_rate=0.001", 2),
        ("learning_rate=0.003", 2),
    ]
    assert all(row["validation_loss"] and row["validation_loss_sd"] is not None for row in groups)
    assert len(cli.json("compare", "rates")) == 4
    (cli.home / "sweep.yaml").write_text(
        (cli.home / "sweep.yaml").read_text().replace('"seeds": 2', '"seeds": 900')
    )
    assert "will cost about" in cli.run("sweep", "sweep.yaml", "-y", code=5).stderr
    assert cli.run("compare", "--sweep", "nothing", code=102).stderr


@pytest.mark.harness
def test_twelve_runs_on_two_nodes(cli: Cli) -> None:
    """kill -9 of the sweep and of a driver in the middle; each run is made once."""
    document = sweep_through_kills(cli, [1e-3, 2e-3, 3e-3, 4e-3], 3, 2)
    well_done(cli, document, 12, 2)
