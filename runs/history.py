"""Earlier runs as evidence: what a stored run says about the speed and the overheads of its machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from runs.facts import Offer
from runs.sections import RunSpec
from runs.spec import SpecError, from_dict
from trainer.config import ModelConfig, TestSet, TrainConfig
from trainer.slices import SLICES


@dataclass(frozen=True)
class Past:
    """What one earlier run measured."""

    provider: str
    instance_type: str
    gpu: str | None
    gpus: int
    """Of one node."""
    nodes: int
    model: ModelConfig
    train: TrainConfig
    world_size: int
    microbatch_size: int
    tokens_per_second: float
    steps: int
    """Steps that were made."""
    training_seconds: float
    phases: Mapping[str, float]
    """Seconds of one node by phase."""
    finished: bool = True
    """It came to its end, so that each of its phases is whole."""
    evaluated_tokens: int = 0
    """Of all validations and test sets of its spec."""
    uplink: float | None = None
    """Bytes a second at which its data left this machine."""
    method: str | None = None
    """Of tuning; None: pretraining."""

    @property
    def device(self) -> str:
        """cuda or cpu."""
        return self.train.device


def past(row: Mapping[str, Any], spec: Mapping[str, Any]) -> Past | None:
    """The evidence in a stored run (its projection row and its spec); None where it has none, or cannot be read."""
    try:
        read = from_dict(dict(spec))
    except SpecError:
        return None
    speed, steps, seconds = row.get("tokens_per_second"), row.get("step"), row.get("training_seconds")
    if not speed or not steps or not seconds or not row.get("instance_type"):
        return None
    nodes = max(1, read.hardware.nodes)
    return Past(
        provider=row["provider"],
        instance_type=row["instance_type"],
        gpu=row.get("gpu"),
        gpus=(row.get("gpus") or 0) // nodes,
        nodes=nodes,
        model=read.model,
        train=read.train,
        world_size=row.get("world_size") or 1,
        microbatch_size=row.get("microbatch_size") or 1,
        tokens_per_second=float(speed),
        steps=int(steps),
        training_seconds=float(seconds) / nodes,
        phases=_phases(row, nodes),
        finished=row.get("state") == "succeeded",
        evaluated_tokens=evaluated_tokens(read),
        uplink=row.get("uplink"),
        method=read.tune.method if read.tune is not None else None,
    )


def _phases(row: Mapping[str, Any], nodes: int) -> dict[str, float]:
    """Seconds by phase of one node; of runs without them, the dollars' shares of the billed time."""
    seconds = row.get("seconds_by_phase")
    if not seconds:
        dollars = row.get("phases") or {}
        total = sum(dollars.values())
        billed = row.get("billed_seconds") or 0.0
        seconds = {key: billed * value / total for key, value in dollars.items()} if total else {}
    return {key: value / nodes for key, value in seconds.items()}


def same_machine(item: Past, offer: Offer) -> bool:
    """Whether the run was on this kind of machine."""
    return (item.provider, item.instance_type, item.gpus) == (offer.provider, offer.instance_type, offer.gpus)


def alike(item: Past, spec: RunSpec, offer: Offer) -> Literal["same", "alike", "other"]:
    """same: this machine, and everything that speed depends on is equal; alike: the same GPUs."""
    if not same_machine(item, offer):
        return "alike" if item.gpu is not None and item.gpu == offer.gpu else "other"
    equal = (
        item.nodes == spec.hardware.nodes
        and item.world_size == spec.processes(offer.gpus)
        and item.model == spec.model
        and _speed_fields(item.train) == _speed_fields(spec.train)
    )
    return "same" if equal else "alike"


def _speed_fields(train: TrainConfig) -> TrainConfig:
    """`train` with everything that does not change the speed set to one value."""
    return replace(
        train, tokens=None, steps=1, learning_rate=1e-3, min_learning_rate=0.0, warmup_steps=0, weight_decay=0.0,
        schedule="constant", betas=(0.9, 0.95), eps=1e-8, muon_learning_rate=0.02, cooldown_fraction=0.5, seed=0,
        log_every=10, validate_every=0, validation_tokens=1, grad_clip=1.0,
    )  # fmt: skip


def evaluated_tokens(spec: RunSpec) -> int:
    """Tokens of all validations and test sets; a forward pass costs a third of a step."""
    every = spec.train.validate_every
    times = (-(-spec.steps // every) if every else 1) if spec.data.validation and spec.tune is None else 0
    tests = (
        item.tokens if isinstance(item, TestSet) else SLICES[item].tokens for item in spec.evaluate.test_sets
    )
    return times * spec.train.validation_tokens + sum(tests)
