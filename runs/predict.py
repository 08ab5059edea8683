"""What a run will need, take and cost on an offer, before anything is rented: pure arithmetic, and what it rests on.

Speed comes from this user's own runs where there are any (`history`), else from the roofline (`roofline`); of a CPU
without history nothing is known, and nothing is made up.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from runs import roofline
from runs.charges import billed, price
from runs.facts import Offer
from runs.history import Past, alike, evaluated_tokens, same_machine
from runs.rows import usd
from runs.sections import RunSpec
from trainer import flops
from trainer.config import ConfigError, ModelConfig, TrainConfig, check_batch
from trainer.gpus import GPUS, Gpu

Basis = Literal["history", "roofline", "unknown"]

_BOOT = {"local": 5.0, "ssh": 5.0, "ec2": 60.0, "lambda": 60.0}
"""Billed seconds until SSH answers, without history."""
_NOTES = {
    "lambda": "Lambda bills from the moment the node is active; before that, booting takes a few minutes, with 8 GPUs up to 25"
}
"""What a plan says beside its figures, by provider."""
_PREPARE = {True: 90.0, False: 20.0}
"""Environment, first shards and, on a GPU, the first step's compiling."""
_RELEASE = {True: 20.0, False: 2.0}
_PULL_BYTES_PER_SECOND = {"local": 200e6}
_PULLED_FROM_AFAR = 10e6
"""Checkpoints from a node on this machine, and to a home connection (7 to 12 MB/s were published)."""
_UNKNOWN = "hours and dollars of tuning and measuring are known only from an earlier run of the same method on this kind of machine"
_AT_MOST = "all epochs are counted; it ends earlier where the validation loss rises"
_SAME = {"cuda": 0.1, "cpu": 0.15}
_ALIKE = 0.2
"""Relative error where the same run has been here before, and where only its like has."""
_RECENT = 5
"""So many of the newest of the same runs tell how far such runs lie apart; the newest alone tells what to expect, since
machines and versions change."""


@dataclass(frozen=True)
class Transfer:
    """What must leave this machine before and while the node trains."""

    bytes: int = 0
    first_bytes: int = 0
    """Of the shards without which training cannot start."""
    bytes_per_second: float = 2.5e6
    """The uplink; 20 Mbit/s where nothing was measured."""
    measured: bool = False
    """By an earlier run that sent its data to the same provider."""


@dataclass(frozen=True)
class Prediction:
    """One offer's answer. None where nothing honest can be said."""

    offer: Offer
    parameters: int
    flops_per_token: int
    memory_parts_gib: dict[str, float]
    """weights, gradients, optimizer, activations_and_logits, context: of one process."""
    memory_gib: float | None
    fits: bool | None
    microbatch_size: int | None
    tokens_per_second: float | None
    mfu: float | None
    basis: Basis
    error: float | None
    """Relative, of hours and dollars."""
    phases: dict[str, float]
    """Seconds of one node."""
    upload_usd: float
    """Part of the bill: a node that waits for data from this machine."""
    cost_usd: float | None
    notes: tuple[str, ...] = ()

    @property
    def training_hours(self) -> float | None:
        """Hours of steps."""
        return self.phases["training"] / 3600 if "training" in self.phases else None

    @property
    def overhead_hours(self) -> float | None:
        """Hours of everything else that is billed."""
        return (
            sum(value for key, value in self.phases.items() if key != "training") / 3600
            if self.phases
            else None
        )

    @property
    def hours(self) -> float | None:
        """Hours from launch to release."""
        return sum(self.phases.values()) / 3600 if self.phases else None

    @property
    def low_usd(self) -> float | None:
        """The optimistic end."""
        return (
            self.cost_usd * (1 - self.error) if self.cost_usd is not None and self.error is not None else None
        )

    @property
    def high_usd(self) -> float | None:
        """The pessimistic end."""
        return (
            self.cost_usd * (1 + self.error) if self.cost_usd is not None and self.error is not None else None
        )

    def phase_usd(self) -> dict[str, float]:
        """Dollars of each phase, the provider's rounding in the last."""
        total = sum(self.phases.values())
        cost = self.cost_usd or 0.0
        return {key: cost * value / total for key, value in self.phases.items()} if total else {}

    def document(self) -> dict[str, Any]:
        """`predicted` of `plan --json`."""
        return {
            "parameters": self.parameters, "flops_per_token": self.flops_per_token, "memory_gib": self.memory_gib,
            "fits": self.fits, "microbatch_size": self.microbatch_size, "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu, "training_hours": self.training_hours, "overhead_hours": self.overhead_hours,
            "cost_usd": self.cost_usd, "basis": self.basis, "error": self.error, "low_usd": self.low_usd,
            "high_usd": self.high_usd, "flops_formula": flops.FORMULA, "memory_parts_gib": self.memory_parts_gib,
            "phases": {key: {"seconds": value, "usd": self.phase_usd()[key]} for key, value in self.phases.items()},
            "upload_usd": self.upload_usd, "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the budget says to a prediction."""

    refused: bool = False
    """Even the optimistic end does not fit."""
    reasons: list[str] = field(default_factory=list)


def predict(
    spec: RunSpec, offer: Offer, history: Sequence[Past] = (), transfer: Transfer | None = None
) -> Prediction:
    """The run of `spec` on `offer`; `history` is oldest first. Raises ConfigError where its batch does not divide over the offer's GPUs."""
    world = spec.processes(offer.gpus)
    check_batch(spec.train, world)
    gpu = GPUS.get(offer.gpu) if offer.gpu and spec.train.device == "cuda" else None
    memory = gpu.memory_gib if gpu else None
    size = microbatch(spec, world, memory)
    needed = flops.memory_gib(spec.model, spec.train, size or 1, world)
    method = spec.tune.method if spec.tune is not None else None
    kin = [item for item in history if item.method == method]
    speed, basis, error, notes = _speed(spec, offer, None if method else gpu, size or 1, kin)
    if method is not None:
        notes = (
            *([] if speed else [_UNKNOWN]),
            *(notes if speed else ()),
            *([] if method == "evaluate" else [_AT_MOST]),
        )
    phases: dict[str, float] = {}
    upload = 0.0
    if speed is not None:
        same = (item for item in reversed(kin) if item.finished and alike(item, spec, offer) == "same")
        if (newest := next(same, None)) is not None:
            phases = _as_before(spec, newest)
        else:
            phases, upload = _modelled(spec, offer, speed, history, transfer or Transfer())
    cost = _cost(offer, spec.hardware.nodes, sum(phases.values())) if phases else None
    if offer.provider in _NOTES:
        notes += (_NOTES[offer.provider],)
    if gpu is None and spec.train.device == "cuda":
        what = (
            f"{offer.gpu} is not in the GPU table"
            if offer.gpu
            else "train.device is cuda, and there is no GPU"
        )
        notes += (f"{what}: neither speed nor whether it fits can be predicted",)
    return Prediction(
        offer=offer,
        parameters=flops.parameters(spec.model),
        flops_per_token=flops.flops_per_token(spec.model),
        memory_parts_gib=memory_parts(spec.model, spec.train, size or 1, world),
        memory_gib=needed,
        fits=None if memory is None else size is not None and needed <= flops.USABLE * memory,
        microbatch_size=size,
        tokens_per_second=speed,
        mfu=_mfu(spec, offer, gpu, speed),
        basis=basis,
        error=error,
        phases=phases,
        upload_usd=usd(price(upload, offer.tariff.micro_usd_per_hour)) * spec.hardware.nodes,
        cost_usd=cost,
        notes=notes,
    )


def rank(predictions: Sequence[Prediction], by: Literal["usd", "hours"] = "usd") -> list[Prediction]:
    """Cheapest (or fastest) first; what does not fit after what does, and what is unknown last."""

    def key(item: Prediction) -> tuple[bool, bool, float]:
        value = item.cost_usd if by == "usd" else item.hours
        return (item.fits is False, value is None, value if value is not None else math.inf)

    return sorted(predictions, key=key)


def trades(chosen: Prediction, others: Sequence[Prediction]) -> list[str]:
    """What the cheapest and the fastest of `others` would change, each where it beats `chosen`."""
    if chosen.cost_usd is None or chosen.hours is None:
        return []
    known = [item for item in others if item.cost_usd is not None and item.hours is not None]
    said = []
    for word, order in (("cheapest", "usd"), ("fastest", "hours")):
        best = next(iter(rank([chosen, *known], "usd" if order == "usd" else "hours")))
        if best is chosen or best.cost_usd is None or best.hours is None:
            continue
        change, ratio = best.cost_usd - chosen.cost_usd, best.hours / chosen.hours
        money = f"${abs(change):,.2f} {'less' if change < 0 else 'more'}"
        time = f"{ratio:.1f} times as long" if ratio >= 1 else f"{1 / ratio:.1f} times as fast"
        said.append(f"{word} that is free: {best.offer.instance_type}, {money}, {time}")
    return said


def verdict(prediction: Prediction, max_usd: float | None, max_hours: float | None) -> Verdict:
    """Whether a budget will hold: refused where even the optimistic end exceeds it, with by how much."""
    reasons: list[str] = []
    refused = False
    for value, limit, form in (
        (prediction.cost_usd, max_usd, "${:.2f}"),
        (prediction.hours, max_hours, "{:.2f} h"),
    ):
        if value is None or limit is None or value <= limit:
            continue
        best = value * (1 - (prediction.error or 0.0))
        hopeless = best > limit
        refused = refused or hopeless
        shown, budget = best if hopeless else value, form.format(limit)
        reasons.append(
            f"{'at best' if hopeless else 'about'} {form.format(shown)}, {form.format(shown - limit)} over the budget of {budget}"
        )
    return Verdict(refused, reasons)


def microbatch(spec: RunSpec, world: int, memory_gib: float | None) -> int | None:
    """The microbatch of the spec, or for `auto` the largest divisor that is predicted to fit; None where none does."""
    if spec.train.microbatch_size != "auto":
        return spec.train.microbatch_size
    return flops.largest_microbatch(spec.model, spec.train, world, memory_gib)


def memory_parts(
    model: ModelConfig, train: TrainConfig, microbatch_size: int, world: int
) -> dict[str, float]:
    """GiB of one process by what holds it; they sum to `flops.memory_gib`."""
    state = flops.state_bytes(model, train, world) / 2**30
    weights = 4 * flops.parameters(model) / 2**30 / (world if train.sharding == "fsdp" else 1)
    activations = flops.activation_bytes(model, train, microbatch_size) / 2**30
    total = flops.memory_gib(model, train, microbatch_size, world)
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": state - 2 * weights,
        "activations_and_logits": activations,
        "context": total - state - activations,
    }


def _speed(
    spec: RunSpec, offer: Offer, gpu: Gpu | None, size: int, history: Sequence[Past]
) -> tuple[float | None, Basis, float | None, tuple[str, ...]]:
    """(tokens/s, what it rests on, relative error, notes)."""
    same = [item.tokens_per_second for item in history if alike(item, spec, offer) == "same"][-_RECENT:]
    if same:
        spread = (max(same) - min(same)) / statistics.median(same) / 2
        newest = "an earlier run" if len(same) == 1 else f"the newest of {len(same)} runs"
        note = f"as {newest} of this kind on {offer.instance_type} was"
        return same[-1], "history", max(spread, _SAME[spec.train.device]), (note,)
    if gpu is None:
        return _scaled(spec, offer, history)
    modelled = roofline.predict(
        spec.model, spec.train, gpu, offer.gpus, spec.hardware.nodes, microbatch_size=size
    )
    if modelled is None:
        return None, "unknown", None, (f"{gpu.key} has no bf16 tensor cores: its speed is not predicted",)
    ratios = [ratio for item in history if (ratio := _ratio(item, gpu)) is not None]
    if ratios:
        factor = statistics.median(ratios)
        note = f"roofline x {factor:.2f}, as measured in {len(ratios)} earlier run{'s' * (len(ratios) > 1)} on {gpu.key}"
        spread = (max(ratios) - min(ratios)) / factor / 2
        return modelled.tokens_per_second * factor, "history", max(spread, _ALIKE), (note,)
    note = "roofline and communication model, no run of yours on this GPU yet"
    return modelled.tokens_per_second, "roofline", roofline.ERROR, (note,)


def _ratio(past: Past, gpu: Gpu) -> float | None:
    """Measured over modelled speed of an earlier run on the same GPU."""
    if past.gpu != gpu.key or past.device != "cuda":
        return None
    modelled = roofline.predict(
        past.model, past.train, gpu, past.gpus, past.nodes, microbatch_size=past.microbatch_size
    )
    return past.tokens_per_second / modelled.tokens_per_second if modelled else None


def _scaled(
    spec: RunSpec, offer: Offer, history: Sequence[Past]
) -> tuple[float | None, Basis, float | None, tuple[str, ...]]:
    """On a CPU: an earlier run on the same machine, by FLOPs; None without one, or where the sizes differ too much."""
    if spec.train.device != "cpu":
        return None, "unknown", None, ()
    wanted = flops.flops_per_token(spec.model)
    near = [item for item in history if same_machine(item, offer) and item.device == "cpu"]
    near = [item for item in near if 0.1 <= wanted / flops.flops_per_token(item.model) <= 10]
    if not near:
        note = "the speed of a CPU is known only from a run: none like this one has been made on this machine yet"
        return None, "unknown", None, (note,)
    best = min(reversed(near), key=lambda item: abs(math.log(wanted / flops.flops_per_token(item.model))))
    factor = flops.flops_per_token(best.model) / wanted
    error = min(0.6, 0.2 + 0.3 * abs(math.log2(factor)))
    return (
        best.tokens_per_second * factor,
        "history",
        error,
        ("scaled by FLOPs from an earlier run on this machine",),
    )


_ORDER = ("booting", "preparing", "training", "evaluating", "idle", "collecting", "releasing")


def _as_before(spec: RunSpec, past: Past) -> dict[str, float]:
    """Seconds by phase of one node, as the same run took them before, scaled to this length."""
    longer = spec.steps / past.steps
    factors = {"training": longer, "idle": longer}  # most idle time lies between steps
    if past.evaluated_tokens:
        factors["evaluating"] = evaluated_tokens(spec) / past.evaluated_tokens
    measured = {**past.phases, "training": past.training_seconds}
    return {key: measured[key] * factors.get(key, 1.0) for key in _ORDER if measured.get(key)}


def _modelled(
    spec: RunSpec, offer: Offer, speed: float, history: Sequence[Past], transfer: Transfer
) -> tuple[dict[str, float], float]:
    """(seconds by phase of one node, of which it waits for uploads), of a run that has not been here yet."""
    training = spec.tokens / speed
    upload = max(
        transfer.first_bytes / transfer.bytes_per_second,
        transfer.bytes / transfer.bytes_per_second - training,
        0.0,
    )
    expected = {
        "booting": _BOOT.get(offer.provider, 60.0),
        "preparing": _PREPARE[spec.train.device == "cuda"],
        "training": training,
        "evaluating": evaluated_tokens(spec) / (3 * speed),
        "collecting": _pull_bytes(spec) / _PULL_BYTES_PER_SECOND.get(offer.provider, _PULLED_FROM_AFAR),
        "releasing": _RELEASE[spec.hardware.rented],
    }
    near = [item.phases for item in history if same_machine(item, offer)]
    for key in ("booting", "preparing", "collecting", "releasing"):
        measured = [item[key] for item in near if key in item]
        expected[key] = statistics.median(measured) if measured else expected[key]
    expected["preparing"] += upload
    return {key: expected[key] for key in _ORDER if expected.get(key)}, upload


def _pull_bytes(spec: RunSpec) -> int:
    """Of the last wanted weights, float32, which are pulled while the node waits."""
    return 0 if spec.checkpoint.fetch == "none" else 4 * flops.parameters(spec.model)


def _cost(offer: Offer, nodes: int, seconds: float) -> float:
    """Dollars of all nodes for `seconds` each, as the tariff counts."""
    return usd(price(billed(seconds, offer.tariff), offer.tariff.micro_usd_per_hour)) * nodes


def _mfu(spec: RunSpec, offer: Offer, gpu: Gpu | None, speed: float | None) -> float | None:
    if gpu is None or gpu.bf16_flops is None or speed is None:
        return None
    return speed * flops.flops_per_token(spec.model) / (gpu.bf16_flops * offer.gpus * spec.hardware.nodes)


def fitting(spec: RunSpec, offers: Sequence[Offer]) -> list[Offer]:
    """The offers over whose GPUs the spec's global batch divides."""

    def divides(offer: Offer) -> bool:
        try:
            check_batch(spec.train, spec.processes(offer.gpus))
        except ConfigError:
            return False
        return True

    return [offer for offer in offers if divides(offer)]
