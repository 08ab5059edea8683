"""Opening what there is to go on from: a checkpoint of ours, or a folder as transformers writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer import checkpoint, hf, hf_config, manifest
from trainer.config import ConfigError, ModelConfig, TrainerConfig
from trainer.model import GPT


@dataclass(frozen=True)
class Base:
    """A model's configuration and weights, on the CPU."""

    path: Path
    weights: dict[str, Tensor]
    config: TrainerConfig

    @property
    def model(self) -> ModelConfig:
        """The model's configuration."""
        return self.config.model


def load(name: str | Path) -> Base:
    """The model at a path. Raises ConfigError where it is neither, or not whole."""
    path = Path(name).resolve()
    if not path.is_dir():
        raise ConfigError(
            "base", f"{path} is no directory; give a checkpoint (step-000500) or a Hugging Face folder"
        )
    try:
        if hf_config.is_hf(path):
            return Base(path, *hf.load(path))
        return _ours(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError("base", f"{path} cannot be read: {error}; fetch it again") from error


def _ours(path: Path) -> Base:
    for file in (checkpoint.CONFIG, checkpoint.WEIGHTS):
        if not (path / file).is_file():
            raise ConfigError(
                "base", f"{path} has no {file}, so it is neither a checkpoint nor a Hugging Face folder"
            )
    if (path / manifest.NAME).exists():  # a copy without optimizer state is whole for this
        try:
            entries = manifest.read(path).files
        except manifest.ManifestError as error:
            raise ConfigError("base", f"{error}; fetch it again") from error
        for entry in entries:
            file_path = path / entry.name
            if (
                entry.name in {checkpoint.CONFIG, checkpoint.WEIGHTS}
                and manifest.sha256(file_path) != entry.sha256
            ):
                raise ConfigError(
                    "base", f"{file_path} does not have the checksum of its manifest; fetch it again"
                )
    return Base(path, checkpoint.weights(path), checkpoint.load_config(path))


def assemble(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    drop_rate: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """A GPT on the CPU with these weights; `drop_rate` replaces the model's own. Raises ConfigError where they are of
    another model."""
    shape = model if drop_rate is None else replace(model, drop_rate=drop_rate)
    with torch.device("meta"):
        gpt = GPT(shape, compute_dtype=dtype)
    gpt.allocate("cpu")
    checkpoint.restore_weights(gpt, weights)
    return gpt
