"""Opening what there is to go on from: a checkpoint of ours, or a GPT-2-shaped Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer import checkpoint, manifest
from trainer.after import hf
from trainer.config import ConfigError, ModelConfig, TrainerConfig
from trainer.model import GPT


@dataclass(frozen=True)
class Base:
    """A model's configuration and weights; `config` is None for a Hugging Face folder."""

    path: Path
    model: ModelConfig
    weights: dict[str, Tensor]
    config: TrainerConfig | None


def load(name: str | Path) -> Base:
    """The model at a path, on the CPU. Raises ConfigError where it is neither, or not whole."""
    path = Path(name).resolve()
    if not path.is_dir():
        raise ConfigError("base", f"{path} is no directory; give a checkpoint (step-000500) or a Hugging Face folder")
    if hf.is_folder(path):
        model = hf.model_config(path)
        return Base(path, model, hf.weights(path, model), None)
    for file in (checkpoint.CONFIG, checkpoint.WEIGHTS):
        if not (path / file).is_file():
            raise ConfigError("base", f"{path} has no {file}, so it is neither a checkpoint nor a Hugging Face folder")
    if problem := _damage(path):
        raise ConfigError("base", f"{problem}; fetch it again")
    config = checkpoint.load_config(path)
    try:
        return Base(path, config.model, checkpoint.weights(path), config)
    except (OSError, SafetensorError) as error:
        raise ConfigError("base", f"{path / checkpoint.WEIGHTS} cannot be read: {error}; fetch it again") from error


def _damage(path: Path) -> str | None:
    """What is wrong with the files that are here; a copy without optimizer state, or without a manifest, is fine."""
    if not (path / manifest.NAME).exists():
        return None
    try:
        entries = manifest.read(path).files
    except manifest.ManifestError as error:
        return str(error)
    for entry in entries:
        file = path / entry.name
        if entry.name in {checkpoint.CONFIG, checkpoint.WEIGHTS} and manifest.sha256(file) != entry.sha256:
            return f"{file} does not have the checksum of its manifest"
    return None


def assemble(
    model: ModelConfig, weights: Mapping[str, Tensor], *, drop_rate: float | None = None, dtype: torch.dtype = torch.float32
) -> GPT:
    """A GPT on the CPU with these weights; `drop_rate` replaces the model's own. Raises ConfigError where they are of
    another model."""
    shape = model if drop_rate is None else replace(model, drop_rate=drop_rate)
    with torch.device("meta"):
        gpt = GPT(shape, compute_dtype=dtype)
    gpt.to_empty(device="cpu")
    if shape.tie_weights:  # leaving the meta device unties them
        gpt.head.weight = gpt.token_embedding.weight
    checkpoint.restore_weights(gpt, weights)
    return gpt
