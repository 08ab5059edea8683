"""What a script gives to the session, and what one process holds while it tunes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from torch import Tensor, nn

from trainer.after import lora
from trainer.after.examples import Example
from trainer.after.settings import TuneTrain, steps_per_epoch
from trainer.checkpoint import HostCopies, Writer
from trainer.config import ConfigError, ModelConfig, TrainerConfig
from trainer.distributed import World
from trainer.model import GPT, unpadded
from trainer.optim import Optimizer
from trainer.progress import Metrics, Status, Voice


@dataclass
class Work(Generic[Example]):
    """What one script gives to the session."""

    config: TrainerConfig
    """What a checkpoint says it is."""
    settings: TuneTrain
    module: nn.Module
    """forward(*batch, denominator) → one number per column; see `trainer.after.heads`."""
    columns: tuple[str, ...]
    """Names of these numbers, `loss` first."""
    train: Sequence[Example]
    validation: Sequence[Example]
    test: dict[str, Sequence[Example]]
    weigh: Callable[[Example], int]
    """How much an example counts in the mean."""
    length: Callable[[Example], int]
    """Tokens of an example that are computed with."""
    collate: Callable[[Sequence[Example | None]], tuple[Tensor, ...]]
    """Examples as one batch on the CPU; None fills up and counts nothing."""
    begin: Callable[[World], None] = lambda _here: None
    """Called once the base's weights are on the device, before anything is trained."""
    adapters: lora.Adapters | None = None
    """Kept as a file of their own in each checkpoint, where there are any."""
    announce: dict[str, Any] = field(default_factory=dict)
    """More facts for the metrics' first line."""

    @property
    def model(self) -> ModelConfig:
        """The base's configuration."""
        return self.config.model

    def language_model(self) -> nn.Module:
        """What predicts the next token, adapters included. Raises ConfigError for a classifier, which does not."""
        gpt = getattr(self.module, "gpt", None)
        if not isinstance(gpt, GPT) or (
            self.config.tuned is not None and self.config.tuned.kind == "classification"
        ):
            raise ConfigError("evaluate.test_sets", "a classifier predicts no tokens; give data.test instead")
        return gpt

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by the names of a checkpoint."""
        return {_plain(name): p for name, p in self.module.named_parameters() if p.requires_grad}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds: every weight, adapters merged."""
        for name, tensor in lora.plain_weights(self.module):
            yield _plain(name), unpadded(_plain(name), tensor, self.model)


def _plain(name: str) -> str:
    return name.removeprefix("gpt.")


class Trainable:
    """The part of a model that an optimizer sees."""

    def __init__(self, named: dict[str, nn.Parameter]) -> None:
        self._named = named

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._named.items())


@dataclass
class Session(Voice, Generic[Example]):
    """Everything that one process holds while it tunes."""

    work: Work[Example]
    out: Path
    here: World
    wrapped: nn.Module
    optimizer: Optimizer
    microbatch_size: int
    stop: threading.Event
    status: Status | None
    metrics: Metrics | None
    writer: Writer | None
    copies: HostCopies
    step: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0
    best: tuple[int, float] | None = None
    """Step and validation loss of the best epoch."""
    rises: int = 0
    """Epochs in a row that were not better."""
    saved_step: int | None = None
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def epoch_steps(self) -> int:
        """Steps of one epoch."""
        return steps_per_epoch(self.work.settings, len(self.work.train))

    @property
    def over(self) -> bool:
        """Whether nothing is left to train."""
        return self.step >= self.work.config.steps or self.rises >= self.work.settings.patience
