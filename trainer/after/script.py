"""What the scripts have in common: the command line, the base, the examples, the adapters."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import torch

from trainer.after import bases, examples, session
from trainer.after.examples import Example, Limits
from trainer.after.lora import Adapters
from trainer.after.settings import Settings, max_length
from trainer.after.work import Work
from trainer.config import ModelConfig
from trainer.model import GPT


@dataclass(frozen=True)
class Start:
    """The base, ready to be trained on."""

    gpt: GPT
    model: ModelConfig
    limits: Limits


@dataclass(frozen=True)
class Held(Generic[Example]):
    """A run's examples."""

    train: list[Example]
    validation: list[Example]
    test: dict[str, Sequence[Example]]


def open_base(settings: Settings) -> Start:
    """The model to start from, on the CPU. Raises ConfigError."""
    base = bases.load(settings.base)
    model = replace(base.model, drop_rate=settings.train.drop_rate)
    length = max_length(settings.data, model)
    dtype = torch.bfloat16 if settings.train.precision == "bf16" else torch.float32
    return Start(bases.assemble(model, base.weights, dtype=dtype), model, Limits(model.vocab_size, length))


def read_all(
    settings: Settings, limits: Limits, parse: Callable[[dict[str, Any], Limits], Example]
) -> Held[Example]:
    """Training, validation and test examples. Raises ExampleError."""
    data = settings.data
    return Held(
        examples.read(data.train, parse, limits),
        examples.read(data.validation, parse, limits),
        {examples.set_name(path): examples.read([path], parse, limits) for path in data.test},
    )


def adapt(gpt: GPT, settings: Settings) -> Adapters | None:
    """Adapters where the configuration wants them. Raises ConfigError."""
    return Adapters(gpt, settings.lora, settings.train.seed) if settings.lora is not None else None


def facts(settings: Settings, start: Start, adapters: Adapters | None) -> dict[str, Any]:
    """What the metrics' first line says about this run."""
    lora = (
        None
        if adapters is None
        else {
            "rank": adapters.config.rank,
            "alpha": adapters.config.alpha,
            "targets": adapters.config.targets,
        }
    )
    known = settings.known
    return {
        "base": known.run or known.path if known else settings.base,
        "lora": lora,
        "examples_cut": start.limits.cut,
    }


def command_line(name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """`--config FILE --out DIR [--resume]`."""
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--config", type=Path, required=True, help="config.json")
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for metrics, status and checkpoints"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in --out")
    return parser.parse_args(argv)


def main(name: str, build: Callable[[Path], Work[Example]], argv: Sequence[str] | None) -> int:
    """Parse the command line and run; the exit code."""
    options = command_line(name, argv)
    return session.run(build, options.config, options.out, resume=options.resume)
