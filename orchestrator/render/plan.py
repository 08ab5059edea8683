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
    from runs.predict import Prediction

SHOWN = 12
"""Alternatives that a plan lists; `offers SPEC` lists all."""


def plan(made: Plan) -> None:
    """Print a plan: the choice, its memory, its phases, and what else there is."""
    for text in made.lines():
        render.line(text, style="yellow" if text.startswith("warning") else "")
    told = made.chosen
    if told is None:
        return
    render.line()
    _model(made, told)
    _memory(told)
    _phases(told)
    for note in told.notes:
        render.line(f"note: {note}", style="dim")
    if made.others:
        render.line()
        render.heading("OTHER OFFERS, cheapest first")
        render.table(_OFFERS, [told, *made.others[:SHOWN]])


def _model(made: Plan, told: Prediction) -> None:
    spec = made.spec
    render.line(
        f"model       {count(told.parameters)} parameters, {count(told.flops_per_token)} FLOPs per token = {flops.FORMULA}"
    )
    render.line(f"training    {spec.steps} steps of {spec.train.global_batch_size} × {spec.model.context_length} tokens"
                f" = {count(spec.tokens)} tokens")  # fmt: skip
    if made.data is not None:
        epochs = f", {made.data.epochs:.2f} epochs" if made.data.epochs is not None else ""
        upload = f"; waiting for them costs {dollars(told.upload_usd)}" if told.upload_usd else ""
        render.line(f"data        {size(made.data.local_bytes)} from this machine, {size(made.data.remote_bytes)} fetched by the node"
                    f"{epochs}{upload}")  # fmt: skip
    if told.tokens_per_second is not None:
        mfu = f", MFU {percent(told.mfu)}" if told.mfu is not None else ""
        error = f" ± {percent(told.error)}" if told.error is not None else ""
        render.line(f"speed       {count(told.tokens_per_second)} tokens/s{error}{mfu}, from {told.basis}")


def _memory(told: Prediction) -> None:
    if told.memory_gib is None:
        return
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value:.2f}" for name, value in told.memory_parts_gib.items()
    )
    fits = {True: "fits", False: "DOES NOT FIT", None: "the GPU's memory is not known"}[told.fits]
    micro = f", microbatch {told.microbatch_size}" if told.microbatch_size else ""
    render.line(f"memory      {told.memory_gib:.2f} GiB a process ({fits}{micro}): {parts}")


def _phases(told: Prediction) -> None:
    if not told.phases:
        return
    cost = told.phase_usd()
    render.line()
    columns = (
        Column("PHASE", lambda item: item[0], right=False, keep=9),
        Column("TIME", lambda item: duration(item[1]), keep=9),
        Column("COST", lambda item: dollars(cost[item[0]]), keep=9),
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
        Column("REGIONS", lambda line: ", ".join(line.regions) or "sold out", right=False, keep=3),
    )
    render.table(columns, found.lines)


_PREDICTED = (
    Column(
        "HOURS",
        lambda line: duration(line.predicted.hours * 3600) if line.predicted.hours is not None else NONE,
        keep=7,
    ),
    Column("COST", lambda line: dollars(line.predicted.cost_usd), keep=9),
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
