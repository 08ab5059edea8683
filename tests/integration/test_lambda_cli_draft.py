"""The whole command line against the Lambda-shaped server: zero instances left, at most one launch per intent, the right
exit code, and the provider's own bill.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lambda_fixtures import Cloud, lambda_cloud_factory, outside_environment

__all__ = ["lambda_cloud_factory"]
LLMCTL = Path(sys.executable).with_name("llmctl")
LAUNCH, TERMINATE = "instance-operations/launch", "instance-operations/terminate"
pytestmark = pytest.mark.slow
SPEC = """\
name: cli
hardware: {provider: lambda, instance_type: [cpu_4x_general], regions: REGIONS}
budget: {max_usd: 1, max_hours: 0.5}
node: {python: PYTHON, boot_timeout: BOOT}
data: {train: ["builtin:python-stdlib"], validation: ["builtin:python-stdlib"], tokenizer: bytes}
model: {vocab_size: 256, context_length: 64, emb_dim: 32, n_heads: 2, n_layers: 1}
train:
  steps: 6
  global_batch_size: 4
  microbatch_size: 2
  learning_rate: 1e-3
  warmup_steps: 2
  precision: fp32
  device: cpu
  processes_per_node: 2
  compile: false
  validation_tokens: 4096
"""


class Program:
    """llmctl as a user has it: a console script, an LLMCTL_HOME, a spec in the working directory."""

    def __init__(self, made: Cloud, directory: Path, *, regions: list[str], boot_timeout: str) -> None:
        self.cloud = made
        self.directory = directory
        self.home = directory / "home"
        text = SPEC.replace("PYTHON", sys.executable).replace("REGIONS", json.dumps(regions)).replace("BOOT", boot_timeout)
        (directory / "run.yaml").write_text(text)
        self.environment = outside_environment() | made.environment(self.home) | {"OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [LLMCTL, *arguments],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def launch(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("launch", "run.yaml", "-y", *arguments)

    def show(self) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.run("show", "--json").stdout)
        return shown


@pytest.fixture
def program(lambda_cloud_factory: Callable[..., Cloud], tmp_path: Path) -> Callable[..., Program]:
    def make(regions: list[str] | None = None, boot_timeout: str = "30m", **switches: Any) -> Program:
        return Program(lambda_cloud_factory(**switches), tmp_path, regions=regions or [], boot_timeout=boot_timeout)

    return make


def one_launch_per_intent(made: Cloud) -> None:
    names = [machine["name"].rsplit("-t", 1)[0] for machine in made.machines()]
    assert len(names) == len(set(names))


def succeeded(program: Program, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    shown = program.show()
    assert shown["state"] == "succeeded"
    assert shown["checkpoints"][-1]["fetched"]
    assert program.cloud.billing() == []
    one_launch_per_intent(program.cloud)
    minute = 0.20 / 60
    assert abs(shown["cost_usd"] - program.cloud.usd()) <= minute + 1e-6


def test_launch_train_fetch_terminate(program: Callable[..., Program]) -> None:
    made = program()
    succeeded(made, made.launch())
    assert len(made.cloud.sent(TERMINATE)) == 1


@pytest.mark.parametrize("kind", ["lose-answer", "lie"])
def test_a_lost_answer_to_launch(program: Callable[..., Program], kind: str) -> None:
    made = program(list_lag=10.0)
    made.cloud.fault(LAUNCH, kind, status=503, code=None)
    succeeded(made, made.launch())
    assert len(made.cloud.sent(LAUNCH)) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_storm(program: Callable[..., Program], status: int) -> None:
    made = program()
    made.cloud.fault("", "refuse", times=4, status=status, code=None)
    made.cloud.fault(LAUNCH, "refuse", times=1, status=status, code=None)
    made.cloud.fault(TERMINATE, "refuse", times=2, status=status, code=None)
    succeeded(made, made.launch())


def test_no_capacity_anywhere(program: Callable[..., Program]) -> None:
    made = program(capacity={"cpu_4x_general": []})
    done = made.launch()
    assert done.returncode == 5, done.stdout + done.stderr
    assert made.cloud.sent(LAUNCH) == []


def test_capacity_in_the_third_region_only(program: Callable[..., Program]) -> None:
    places = ["us-west-1", "us-east-1", "us-south-2"]
    made = program(places, ghost_capacity=[f"cpu_4x_general/{place}" for place in places[:2]])
    succeeded(made, made.launch())
    assert [machine["region"] for machine in made.cloud.machines()] == ["us-south-2"]


def test_a_boot_that_never_ends(program: Callable[..., Program]) -> None:
    made = program(["us-west-1"], "5s", boot_seconds=1e9)
    done = made.launch()
    assert done.returncode in (6, 100), done.stdout + done.stderr
    assert made.cloud.billing() == []
    assert {machine["status"] for machine in made.cloud.machines()} == {"terminated"}


def test_ssh_that_never_opens(program: Callable[..., Program]) -> None:
    made = program(["us-west-1"], "8s", ssh="never")
    done = made.launch()
    assert done.returncode == 6, done.stdout + done.stderr
    assert made.cloud.billing() == []


def test_a_wrong_host_key(program: Callable[..., Program]) -> None:
    made = program(["us-west-1"], user_data_ignored=True)
    done = made.launch()
    assert done.returncode == 6, done.stdout + done.stderr
    assert made.cloud.billing() == []


def test_terminate_failing_five_times(program: Callable[..., Program]) -> None:
    made = program()
    made.cloud.fault(TERMINATE, "refuse", times=5, status=500)
    succeeded(made, made.launch())


def test_terminate_lying(program: Callable[..., Program]) -> None:
    made = program(terminate_lies=2)
    succeeded(made, made.launch())
    assert len(made.cloud.sent(TERMINATE)) == 3
