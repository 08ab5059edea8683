"""`plan`, `offers` and `launch --dry-run` for people."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from orchestrator.figures import NONE, count, dollars, duration, percent, size
from orchestrator.render import text as render
from orchestrator.render.text import Column
from trainer import flops

if TYPE_CHECKING:
    from orchestrator.actions.dryrun import Rehearsal
    from orchestrator.actions.market import Line, Listing
    from orchestrator.actions.plan import Plan
    from orchestrator.data.sources import DataPlan
    from runs.predict import Prediction

SHOWN = 12
"""Alternatives that a plan lists; `offers SPEC` lists all."""


def plan(made: Plan) -> None:
    """Print a plan: the choice, its memory, its phases, and what else there is."""
    for text in made.lines():
        render.note(text, style="yellow" if text.startswith("warning") else "")
    told = made.chosen
    if told is None:
        return
    render.line()
    _model(made, told)
    _memory(told)
    _phases(told)
    render.line()
    for note in told.notes:
        render.note(f"note: {note}", style="dim")
    if made.others:
        _offers(told, made)


def _offers(told: Prediction, made: Plan) -> None:
    from runs import predict

    everything = predict.rank([told, *made.others])
    fastest = {id(item): place for place, item in enumerate(predict.rank(everything, "hours"), 1)}
    shown = everything[:SHOWN] if told in everything[:SHOWN] else [*everything[: SHOWN - 1], told]
    render.line()
    render.heading("OFFERS, cheapest first (→ what the spec takes)")
    columns = (
        Column("", lambda item: "→" if item is told else "", right=False, keep=9),
        *_OFFERS[:4],
        Column("FASTEST", lambda item: str(fastest[id(item)]) if item.hours is not None else NONE, keep=4),
        *_OFFERS[4:],
    )
    render.table(columns, shown)
    for text in made.trades:
        render.note(text, style="dim")


def _model(made: Plan, told: Prediction) -> None:
    spec = made.spec
    render.fact("model",
                f"{count(told.parameters)} parameters, {count(told.flops_per_token)} FLOPs per token = {flops.FORMULA}")  # fmt: skip
    render.fact("training", f"{spec.steps:,} steps of {spec.train.global_batch_size} × {spec.model.context_length} tokens"
                f" = {count(spec.tokens)} tokens")  # fmt: skip
    if made.data is not None:
        render.fact("data", _data(made.data))
    if (waiting := _upload(made, told)) is not None:
        render.fact("upload", waiting)
    if told.tokens_per_second is not None:
        mfu = f", MFU {percent(told.mfu)}" if told.mfu is not None else ""
        error = f" ± {told.error:.0%}" if told.error is not None else ""
        render.fact("speed", f"{count(told.tokens_per_second)} tokens/s{error}{mfu}, from {told.basis}")


def _data(data: DataPlan) -> str:
    parts = []
    if data.local_bytes:
        parts.append(f"{size(data.local_bytes)} from this machine")
    if any(shard.url is not None for shard in data.shards):
        unknown = any(shard.url is not None and shard.bytes is None for shard in data.shards)
        known = size(data.remote_bytes) if data.remote_bytes else ""
        parts.append(
            f"{known or 'files of unknown size'} fetched by the node"
            + (" at least" if known and unknown else "")
        )
    if data.epochs is not None:
        parts.append(f"read {data.epochs:.2f} times")
    return ", ".join(parts)


def _upload(made: Plan, told: Prediction) -> str | None:
    """What it costs that a node waits for data from this machine; None where that is nothing to speak of."""
    if made.transfer is None or told.upload_usd < max(0.005, 0.005 * (told.cost_usd or 0.0)):
        return None
    seconds = told.upload_usd / (told.offer.usd_per_hour * made.nodes) * 3600
    speed = f"{made.transfer.bytes_per_second * 8 / 1e6:.0f} Mbit/s"
    basis = "as an earlier run measured" if made.transfer.measured else "assumed: no run has measured it"
    return (
        f"the node waits {duration(seconds)} for data from this machine at {speed} ({basis}): {dollars(told.upload_usd)} of idle"
        " GPUs. Shards in S3 or on the Hub cost none of it (`llmctl data push`)"
    )


def _memory(told: Prediction) -> None:
    if told.memory_gib is None:
        return
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value:.2f}" for name, value in told.memory_parts_gib.items()
    )
    from trainer.gpus import GPUS

    gpu = GPUS.get(told.offer.gpu) if told.offer.gpu else None
    of = f" of {gpu.memory_gib:.0f}" if gpu and told.fits is not None else ""
    fits = {True: ", fits", False: ", DOES NOT FIT", None: ""}[told.fits]
    micro = f", microbatch {told.microbatch_size}" if told.microbatch_size else ""
    render.fact("memory", f"{told.memory_gib:.2f}{of} GiB a process{fits}{micro}: {parts}")


def _phases(told: Prediction) -> None:
    if not told.phases:
        return
    cost = told.phase_usd()
    render.line()
    columns = (
        Column("PHASE", lambda item: item[0], right=False, keep=9),
        Column("TIME", lambda item: duration(item[1]), keep=9),
        Column("COST", lambda item: dollars(cost[item[0]], told.cost_usd), keep=9),
    )
    render.table(columns, list(told.phases.items()))


_OFFERS = (
    Column("TYPE", lambda item: item.offer.instance_type, right=False, keep=9),
    Column(
        "GPUS",
        lambda item: f"{item.offer.gpus} × {item.offer.gpu}" if item.offer.gpu else NONE,
        right=False,
        keep=7,
    ),
    Column("$/H", lambda item: dollars(item.offer.usd_per_hour), keep=6),
    Column("HOURS", lambda item: duration(item.hours * 3600) if item.hours is not None else NONE, keep=8),
    Column("COST", lambda item: dollars(item.cost_usd), keep=9),
    Column("TOK/S", lambda item: count(item.tokens_per_second), keep=5),
    Column("FITS", lambda item: {True: "yes", False: "no", None: "?"}[item.fits], keep=6),
    Column("FREE", lambda item: "yes" if item.offer.available else "no", keep=4),
    Column("FROM", lambda item: item.basis, right=False, keep=2),
)


def offers(found: Listing) -> None:
    """Print offers; predictions where a spec was given."""
    for name, error in found.errors.items():
        render.line(f"{name}: {error}", style="dim")
    if not found.lines:
        render.line("No offers. `--all` also shows what is sold out; `llmctl doctor` checks the providers.")
        return
    predicted = any(line.predicted for line in found.lines)
    fastest = _places(found)
    columns = (
        Column("TYPE", lambda line: line.offer.instance_type, right=False, keep=9),
        Column("AT", lambda line: line.offer.provider, right=False, keep=6),
        Column(
            "GPUS",
            lambda line: f"{line.offer.gpus} × {line.offer.gpu}" if line.offer.gpu else NONE,
            right=False,
            keep=7,
        ),
        Column("$/H", lambda line: dollars(line.offer.usd_per_hour), keep=9),
        Column("$/GPU-H", _per_gpu, keep=8),
        *(_PREDICTED if predicted else ()),
        *([Column("FASTEST", lambda line: fastest.get(id(line), NONE), keep=4)] if predicted else []),
        Column("REGIONS", lambda line: ", ".join(line.regions) or "sold out", right=False, keep=3),
    )
    render.table(columns, found.lines)
    if predicted:
        bases = sorted({line.predicted.basis for line in found.lines if line.predicted} - {"unknown"})
        render.note(
            f"cheapest first; hours and dollars of the whole run, from {' and '.join(bases)}", style="dim"
        )


def _places(found: Listing) -> dict[int, str]:
    """By identity of a line: its place in the order of hours."""
    known = [line for line in found.lines if line.predicted is not None and line.predicted.hours is not None]
    known.sort(
        key=lambda line: (line.predicted.fits is False, line.predicted.hours) if line.predicted else (True, 0)
    )
    return {id(line): str(place) for place, line in enumerate(known, 1)}


_PREDICTED = (
    Column(
        "HOURS",
        lambda line: duration(line.predicted.hours * 3600) if line.predicted.hours is not None else NONE,
        keep=7,
    ),
    Column("COST", lambda line: dollars(line.predicted.cost_usd), keep=9),
    Column(
        "±", lambda line: f"{line.predicted.error:.0%}" if line.predicted.error is not None else NONE, keep=5
    ),
    Column("TOK/S", lambda line: count(line.predicted.tokens_per_second), keep=4),
    Column("FITS", lambda line: {True: "yes", False: "no", None: "?"}[line.predicted.fits], keep=6),
)


def rehearsal(made: Rehearsal) -> None:
    """Print what a launch would do."""
    plan(made.plan)
    render.line()
    render.heading("FIRST EFFECTS")
    for effect in made.effects:
        told = {key: value for key, value in effect.items() if key not in {"effect", "offer"}}
        render.line(f"{effect['effect']}  " + "  ".join(f"{key}={value}" for key, value in told.items()))
    if made.request is not None:
        render.heading("REQUEST")
        render.line(json.dumps(made.request, indent=2, default=str))
    render.line("\nNothing was created and nothing was rented.")


def _per_gpu(line: Line) -> str:
    return dollars(line.offer.usd_per_hour / line.offer.gpus) if line.offer.gpus else NONE
