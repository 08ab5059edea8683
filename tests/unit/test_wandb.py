"""What wandb is given: the real library, offline; what it wrote is read back from its file."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from orchestrator.actions.named import Found
from orchestrator.driver.sinks import Wandb
from orchestrator.models import measuring
from tests.seeds import Seed
from tests.wandb_files import told
from trainer import report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("wandb") is None, reason="wandb is not installed: pip install 'llmctl[wandb]'"
    ),
]


def test_a_driver_that_takes_over_continues_the_same_wandb_run(tmp_path: Path) -> None:
    seed = Seed(tmp_path, wandb={"mode": "offline"}).rented().trained().logged()
    said: list[str] = []
    metrics = seed.directory / "metrics.jsonl"
    everything = metrics.read_text().splitlines(keepends=True)
    validation = {
        "kind": "validation",
        "step": 50,
        "tokens": 12_800,
        "time": json.loads(everything[49])["time"],
        "validation_loss": 2.9,
    }
    metrics.write_text("".join(everything[:50]) + json.dumps(validation) + "\n")
    first = Wandb(seed.record, seed.directory, said.append)
    first(seed.record)
    first._sink.close(30)  # type: ignore[union-attr]  # killed: no summary, and its run is not finished
    first._run.finish()
    metrics.write_text("".join(everything[:50]) + json.dumps(validation) + "\n" + "".join(everything[50:]))
    second = Wandb(seed.record, seed.directory, said.append)
    second(seed.record)
    seed.checkpoint(100).released().ended()
    second.finish(seed.record)

    ids, history, summary, config = told(seed.directory)
    assert said == []
    assert ids == {seed.run}
    steps = [item["_step"] for item in history if "loss" in item]
    assert sorted(steps) == list(range(1, 101)), "each step once, over both drivers"
    assert sum("validation_loss" in item for item in history) == 1
    dollars = [item["cost_usd"] for item in history if "loss" in item]
    assert dollars == sorted(dollars) and dollars[-2] == pytest.approx(2.38)
    assert config["hardware_used"]["world_size"] == 2 and config["train"]["steps"] == 100
    assert (summary["cost_usd"], summary["state"], summary["validation_loss"]) == (2.52, "succeeded", 2.7)
    phases = summary.get("phases_usd") or {
        key.removeprefix("phases_usd."): value
        for key, value in summary.items()
        if key.startswith("phases_usd.")
    }
    assert phases["training"] == 2.0 and sum(phases.values()) == pytest.approx(2.52)


def test_the_base_s_validation_and_what_is_measured_later_are_there_too(tmp_path: Path) -> None:
    """A tuning run validates before its first step; HellaSwag came after the end: the same wandb run has both."""
    seed = Seed(tmp_path, wandb={"mode": "offline"}).rented().trained().logged()
    metrics = seed.directory / "metrics.jsonl"
    first = {
        "kind": "validation",
        "step": 0,
        "tokens": 0,
        "time": json.loads(metrics.read_text().splitlines()[0])["time"],
    }
    metrics.write_text(json.dumps({**first, "validation_loss": 5.5}) + "\n" + metrics.read_text())
    seed.checkpoint(100).released().ended()
    Wandb(seed.record, seed.directory, print).finish(seed.record)
    found = Found(tmp_path, "demo", seed.run, 100)
    measuring.keep(
        seed.store, found, [{"kind": "hellaswag", "name": "hellaswag-1", "accuracy_normalised": 0.25}]
    )
    ids, history, summary, _ = told(seed.directory)
    assert ids == {seed.run} and sum("loss" in item for item in history) == 100, "nothing is sent twice"
    assert [item["validation_loss"] for item in history if item["_step"] == 0] == [5.5]
    assert (summary["hellaswag"], summary["hellaswag_set"]) == (0.25, "hellaswag-1")


def test_where_the_node_writes_this_machine_adds_the_end_alone(tmp_path: Path) -> None:
    """The steps are the node's; the dollars, the phases and the row are known here only, and only at the end."""
    seed = Seed(tmp_path, wandb={"mode": "offline", "from": "node"}).rented().trained().logged()
    sink = Wandb(seed.record, seed.directory, print)
    sink(seed.record)
    seed.checkpoint(100).released().ended()
    sink.finish(seed.record)
    ids, history, summary, _ = told(seed.directory)
    assert ids == {seed.run}
    assert [(item["_step"], item["cost_usd"], "loss" in item) for item in history] == [(100, 2.52, False)]
    assert (summary["cost_usd"], summary["state"]) == (2.52, "succeeded")


def test_without_a_network_it_logs_offline_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "INIT_SECONDS", 2)
    synced: list[list[str]] = []
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if command[1:4] != ["-m", "wandb", "sync"]:
            return real(command, **options)
        synced.append(command)
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(report.subprocess, "run", run)
    for name, value in (("WANDB_API_KEY", "a" * 40), ("WANDB_BASE_URL", "http://127.0.0.1:9")):
        monkeypatch.setenv(name, value)
    seed = Seed(tmp_path, wandb={"mode": "online"}).rented().trained().logged()
    said: list[str] = []
    sink = Wandb(seed.record, seed.directory, said.append)
    sink(seed.record)
    assert sink._run is None, "the call came back before wandb had found out"
    sink.finish(seed.checkpoint(100).released().ended().record)
    _, history, summary, _ = told(seed.directory)
    assert len(history) == 100 and summary["state"] == "succeeded"
    assert [Path(command[-1]).name.startswith("offline-run-") for command in synced] == [True]
    assert "not reachable" in said[0] and "`wandb sync " in said[1] and len(said) == 2
