"""Small real text, small models: what the trainer's tests train on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import loop
from trainer.shards import write_bin

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"vocab_size": 256, "context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Reductions in one order, in this process as in those that it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCTL_TRAINER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def text() -> bytes:
    """Two hundred kilobytes of the standard library's source."""
    library = Path(sysconfig.get_path("stdlib"))
    return b"".join((library / name).read_bytes() for name in ("argparse.py", "ast.py", "inspect.py"))[
        :200_000
    ]


@pytest.fixture(scope="session")
def token_shards(text: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two training shards and a held-out one, tokens being bytes."""
    folder = tmp_path_factory.mktemp("shards")
    parts = {"first": text[:60_000], "second": text[60_000:150_000], "held-out": text[150_000:]}
    for name, part in parts.items():
        write_bin(folder / f"{name}.bin", list(part))
    return {name: folder / f"{name}.bin" for name in parts}


@pytest.fixture
def make_config(token_shards: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a config.json; keyword arguments are sections whose keys replace the defaults."""
    return config_maker(token_shards, tmp_path)


def config_maker(token_shards: dict[str, Path], folder: Path) -> Callable[..., Path]:
    """What writes a config.json into `folder`."""

    def make(**sections: dict[str, Any]) -> Path:
        document: dict[str, dict[str, Any]] = {
            "data": {
                "train": [str(token_shards["first"]), str(token_shards["second"])],
                "validation": [str(token_shards["held-out"])],
                "tokenizer": "bytes",
            },
            "model": dict(MODEL),
            "train": {
                "global_batch_size": 8, "microbatch_size": 4, "steps": 12, "warmup_steps": 3, "learning_rate": 3e-3,
                "min_learning_rate": 3e-4, "precision": "fp32", "device": "cpu", "compile": False, "log_every": 4,
                "validate_every": 4, "validation_tokens": 2000,
            },
            "checkpoint": {"every_steps": 4, "keep": 2, "every": None},
        }  # fmt: skip
        for section, values in sections.items():
            document.setdefault(section, {}).update(values)
        path = folder / f"config-{len(list(folder.glob('config-*')))}.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        return path

    return make


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in metrics.jsonl."""
    lines = (
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if line.endswith("}")
    )
    return [line for line in lines if line["kind"] == kind]


def losses(out: Path) -> dict[int, float]:
    """The loss of each step; of a step made twice, the later."""
    return {line["step"]: line["loss"] for line in records(out, "step")}


def status(out: Path) -> dict[str, Any]:
    """status.json."""
    document: dict[str, Any] = json.loads((out / "status.json").read_text(encoding="utf-8"))
    return document


def poison(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Make the loss of these steps infinite."""
    original = loop._one_step

    def one_step(run: Any, batches: Any) -> None:
        handle = None
        if run.step + 1 in bad:
            handle = run.model.final_norm.register_forward_hook(
                lambda module, args, output: output * float("inf")
            )
        original(run, batches)
        if handle is not None:
            handle.remove()

    monkeypatch.setattr(loop, "_one_step", one_step)


def run_trainer(
    *arguments: str, killed: tuple[str, int] | None = None, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """The trainer in a process of its own, as on a node, or in several under torchrun; `killed`: an instant of tests.trainer.killed, and
    which occurrence of it is fatal, to the last rank."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    module = ["tests.trainer.killed", killed[0], str(killed[1])] if killed is not None else ["trainer"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "KILL_RANK": str(ranks - 1),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *launcher, "-m", *module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
