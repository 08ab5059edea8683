"""Instruction tuning: `python -m trainer.after.finetune --config config.json --out DIR [--resume]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.after import batch, examples, script
from trainer.after.examples import Answered
from trainer.after.heads import Completion
from trainer.after.settings import FinetuneConfig, load, trainer_config
from trainer.after.work import Work
from trainer.config import Tuned


def build(path: Path) -> Work[Answered]:
    """Everything the session needs, from a config.json. Raises ConfigError, ExampleError."""
    settings = load(FinetuneConfig, path)
    start = script.open_base(settings)
    held = script.read_all(settings, start.limits, examples.answered)
    adapters = script.adapt(start.gpt, settings)
    mask = settings.mask_prompt
    tuned = Tuned("instruction", settings.data.template)

    def weigh(item: Answered) -> int:
        return len(item.response) if mask else len(item.prompt) + len(item.response) - 1

    return Work(
        config=trainer_config(settings, start.model, len(held.train), tuned), settings=settings.train,
        module=Completion(start.gpt), columns=Completion.columns, train=held.train, validation=held.validation, test=held.test,
        weigh=weigh, length=lambda item: len(item.prompt) + len(item.response) - 1,
        collate=lambda rows: batch.answered(rows, mask_prompt=mask), adapters=adapters, announce=script.facts(settings, start, adapters),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    return script.main("trainer.after.finetune", build, argv)


if __name__ == "__main__":
    sys.exit(main())
