"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from trainer.config import TrainConfig


def factor(step: int, steps: int, train: TrainConfig) -> float:
    """What the peak learning rates are multiplied by in update number `step` (1 … `steps`).

    A linear warm-up from zero reaches 1 in step `warmup_steps`. Then constant; or half a cosine to the minimum in the last
    step; or 1 until the last `cooldown_fraction` of the steps, and linear from there to the minimum (wsd).
    """
    if step <= train.warmup_steps:
        return step / train.warmup_steps
    floor = train.min_learning_rate / train.learning_rate
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "cosine":
        progress = (step - train.warmup_steps) / max(1, steps - train.warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    start = max(train.warmup_steps, steps - round(train.cooldown_fraction * steps))
    progress = max(0, step - start) / max(1, steps - start)
    return 1 + (floor - 1) * min(1.0, progress)
