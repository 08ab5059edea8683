"""Preference tuning, the step after instruction tuning: `python -m trainer.after.dpo --config config.json --out DIR [--resume]`.

The reference is the base itself. Its log-probabilities are computed once, before the first step, so no second model is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.after import batch, examples, script
from trainer.after.examples import Preferred
from trainer.after.heads import Preference, response_log_probs
from trainer.after.settings import DpoConfig, load, trainer_config
from trainer.after.work import Work
from trainer.config import Tuned
from trainer.distributed import World


def build(path: Path) -> Work[Preferred]:
    """Everything the session needs, from a config.json. Raises ConfigError, ExampleError."""
    settings = load(DpoConfig, path)
    start = script.open_base(settings)
    held = script.read_all(settings, start.limits, examples.preferred)
    adapters = script.adapt(start.gpt, settings)
    module = Preference(start.gpt, settings.beta)
    everything = [*held.train, *held.validation, *(item for items in held.test.values() for item in items)]
    reference: dict[Preferred, tuple[float, float]] = {}

    def collate(rows: Sequence[Preferred | None]) -> tuple[Tensor, ...]:
        scores = [score for row in rows for score in ((0.0, 0.0) if row is None else reference[row])]
        counted = torch.tensor([0.0 if row is None else 1.0 for row in rows])
        return *batch.preferred(rows), torch.tensor(scores), counted

    def begin(here: World) -> None:
        reference.update(reference_scores(module, everything, here))

    return Work(
        config=trainer_config(settings, start.model, len(held.train), Tuned("preference", settings.data.template)),
        settings=settings.train, module=module, columns=Preference.columns, train=held.train, validation=held.validation,
        test=held.test, weigh=lambda _item: 1, collate=collate, begin=begin,
        length=lambda item: 2 * len(item.prompt) + len(item.chosen) + len(item.rejected) - 2,
        adapters=adapters, announce={**script.facts(settings, start, adapters), "beta": settings.beta},
    )  # fmt: skip


def reference_scores(
    module: Preference, pairs: Sequence[Preferred], here: World
) -> dict[Preferred, tuple[float, float]]:
    """Log-probabilities of both responses of each pair under the weights as they are; the ranks share the work."""
    scores = torch.zeros(len(pairs), 2, dtype=torch.float64, device=here.device)
    module.eval()
    for index in range(here.rank, len(pairs), here.size):
        tokens_bt, targets_bt = (tensor.to(here.device) for tensor in batch.preferred([pairs[index]]))
        with torch.no_grad():
            scores[index] = response_log_probs(module.gpt, tokens_bt, targets_bt).double()
    return {
        pair: (float(row[0]), float(row[1])) for pair, row in zip(pairs, here.sum(scores).cpu(), strict=True)
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    return script.main("trainer.after.dpo", build, argv)


if __name__ == "__main__":
    sys.exit(main())
