"""Two tiny language models for tests of the commands: one trained here as a run's checkpoint, one made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runs import events as e
from tests.seeds import SPEC, Seed, at
from trainer import checkpoint, manifest
from trainer.after.bases import assemble
from trainer.checkpoint import Snapshot
from trainer.config import DataConfig, ModelConfig, TrainConfig, TrainerConfig
from trainer.model import initial_weights
from trainer.shards import write_bin

MODEL = ModelConfig(vocab_size=256, context_length=64, emb_dim=32, n_heads=2, n_layers=2, tie_weights=True)
TEXT = ("The cat sat on the mat. The dog sat on the log. " * 60).encode()


def trained(folder: Path, steps: int = 80) -> Path:
    """A checkpoint of a model that has learnt TEXT a little."""
    torch.manual_seed(0)
    model = assemble(MODEL, dict(initial_weights(MODEL, 1))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = torch.tensor(list(TEXT))
    for step in range(steps):
        rows = torch.stack([data[start : start + 65] for start in range(step % 48, step % 48 + 8 * 64, 64)])
        optimizer.zero_grad()
        (model(rows[:, :-1], rows[:, 1:], 1.0) / rows[:, 1:].numel()).backward()
        optimizer.step()
    named = {
        name: tensor.detach().clone() for name, tensor in model.named_parameters() if name != "head.weight"
    }
    config = TrainerConfig(
        DataConfig(["-"], tokenizer="bytes"), MODEL, TrainConfig(1, steps=1, device="cpu", precision="fp32")
    )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder, Snapshot(steps, named, {}, {}), config)
    return folder / manifest.directory_name(steps)


def run_with(home: Path, path: Path, run: str = "demo-0001", **spec: Any) -> Seed:
    """A finished run whose only checkpoint is the one at `path`."""
    seed = Seed(home, run, **{"model": {**SPEC["model"], "context_length": 64, "tie_weights": True}, **spec})
    seed.rented().trained()
    step = manifest.step_of(path.name)
    assert step is not None
    known = {"step": step, "sha256": manifest.digest(path), "bytes": manifest.read(path).bytes}
    seed.tell(
        e.CheckpointSeen(at=at(240), validation_loss=2.5, **known),
        e.CheckpointVerified(at=at(245), path=str(path), **known),
    )
    return seed.released().ended()


def of_transformers(folder: Path, **changes: Any) -> Path:
    """A GPT-2 of transformers with random weights and one token a byte."""
    import transformers

    torch.manual_seed(3)
    shape = {
        "vocab_size": 256,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = transformers.GPT2Config(**{**shape, **changes})
    transformers.GPT2LMHeadModel(config).eval().save_pretrained(folder)
    return folder


def shard(folder: Path) -> Path:
    """TEXT as tokens."""
    return write_bin(folder / "held.bin", list(TEXT)).path
