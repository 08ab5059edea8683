"""What this machine has found out about a configuration: a microbatch size that fits, and compiled code.

Kept in $LLMCTL_TRAINER_CACHE, or `llmctl-trainer` in the user's cache directory, under a key of model, training
settings, GPU, torch and triton. Losing it costs time and nothing else, so no failure here ends a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch

from trainer import reading
from trainer.config import HARMLESS, TrainerConfig
from trainer.progress import write_json


def directory() -> Path:
    """Where the cache lives."""
    named = os.environ.get("LLMCTL_TRAINER_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmctl-trainer"


def key(config: TrainerConfig, device: torch.device, processes: int) -> str:
    """Hex digest of everything that memory and compiled code depend on."""
    train = reading.to_dict(config.train)
    train = {name: value for name, value in train.items() if name not in HARMLESS}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    facts = [reading.to_dict(config.model), train, name, processes, str(torch.__version__), triton]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def recall(entry: str, name: str) -> Any:
    """What was remembered as `name` under key `entry`, or None."""
    try:
        return json.loads((directory() / f"{entry}.json").read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        return None


def remember(entry: str, name: str, value: Any) -> None:
    """Keep a plain value under key `entry`."""
    with contextlib.suppress(OSError):
        directory().mkdir(parents=True, exist_ok=True)
        path = directory() / f"{entry}.json"
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, {**held, name: value})


def load_compiled(entry: str) -> bool:
    """Give torch.compile the code that a run with this key left behind. False: there is none."""
    path = directory() / f"{entry}.compiled"
    try:
        blob = path.read_bytes()
    except OSError:
        return False
    try:
        return torch.compiler.load_cache_artifacts(blob) is not None
    except (RuntimeError, ValueError, AssertionError):
        with contextlib.suppress(OSError):
            path.unlink()
        return False


def save_compiled(entry: str) -> int:
    """Keep what torch.compile has made in this process; its size in bytes, 0 where there is nothing new to keep."""
    artefacts = torch.compiler.save_cache_artifacts()
    path = directory() / f"{entry}.compiled"
    if artefacts is None or path.exists():
        return 0
    with contextlib.suppress(OSError):
        directory().mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(artefacts[0])
        temporary.replace(path)
        return len(artefacts[0])
    return 0
