"""The section `tune` in the words of the other sections: what a tuning run reads, how long it is, what it may not say.

Hardware, limits, predictions and records look at `data`, `model` and `train`. In a spec with `tune` nobody writes those: `data`
and `train` follow from the section, `model` and the number of steps from the base and the examples, once llmctl has looked at
them (`known`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trainer.after import settings
from trainer.config import ConfigError
from trainer.reading import from_dict

BUILTIN = {"finetune": "instructions", "classify": "reviews", "dpo": "preferences"}
"""The demonstration set of each method."""
DERIVED = ("data", "model", "train")
"""Sections that a spec with `tune` does not have."""
_STAND_IN: dict[str, Any] = {
    "data": {"train": ["-"]},
    "train": {"global_batch_size": 1, "steps": 1},
}


def section(raw: Any) -> settings.Tune | None:
    """The section as the trainer's own class; None where it is none yet: what is wrong with it is reported elsewhere."""
    if not isinstance(raw, Mapping) or raw.get("method") not in settings.METHODS:
        return None
    try:
        found: settings.Tune = from_dict(settings.METHODS[raw["method"]], dict(raw), "")
    except (ConfigError, TypeError):
        return None
    return found


def lowered(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the sections that follow from `tune`; as it is where it has none, or where llmctl has filled them in."""
    if raw.get("tune") is None:
        return raw
    tune = section(raw["tune"])
    rest = {key: value for key, value in raw.items() if key not in DERIVED}
    if tune is None:
        return {**rest, **_STAND_IN}
    if tune.known is not None:
        return raw
    try:
        train = settings.train_config(tune, 0)
    except ZeroDivisionError:
        return {**rest, **_STAND_IN}
    made = {"data": asdict(settings.data_config(tune)), "train": asdict(train)}
    return {**rest, **json.loads(json.dumps(made))}


def entry(spec: Mapping[str, Any]) -> list[str]:
    """What the supervisor runs under torchrun for a stored spec: a module, and its first arguments."""
    tune = spec.get("tune")
    return [f"trainer.after.{tune['method']}"] if tune else ["trainer", "train"]


def validation_set(tune: Mapping[str, Any]) -> list[Any] | None:
    """What a validation loss of a tuning run was measured on and how; None where there is none."""
    known, data = tune.get("known") or {}, tune.get("data") or {}
    if not known.get("held_out"):
        return None
    how = [tune.get(key) for key in ("method", "mask_prompt", "beta")]
    reference = known.get("sha256") if tune["method"] == "dpo" else None  # the loss is relative to it
    return [*how, data.get("max_length"), known["held_out"], reference]
