"""A sweep: one base spec, many overrides, one budget. Reading and expanding a sweep.yaml, and splitting its money. Pure.

sweep = load(Path("sweep.yaml"))        SpecError: what is wrong with the file, or with one of its runs
points = expand(sweep, folder)          one for each run, each with a spec of its own
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from runs import spec as specs
from runs.hardware import Count, Dollars, Section
from runs.rows import SEED, TUNE_SEED
from runs.sections import Duration, RunSpec
from runs.yamlfile import Problem, SpecError
from runs.yamlfile import parse as parse_yaml

_OURS = ("name", "hardware", "budget", "node.on_finish")
"""Keys that the sweep itself decides, or that would make one node unfit for the next run."""
Key = Annotated[str, Field(pattern=r"^[a-z_0-9]+(\.[a-z_0-9]+)*$")]


class SweepBudget(Section):
    """What all runs may cost together."""

    max_usd: Dollars
    """Dollars over all runs, the time for which nodes wait between them included."""


class SweepSpec(Section):
    """Many runs of one spec, under one budget."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")]
    """1 to 32 of a-z, 0-9 and `-`; the runs are called so too. The same name again carries the sweep on."""
    spec: Annotated[str, Field(min_length=1)]
    """The run.yaml that all runs share; relative to this file."""
    budget: SweepBudget
    """One for all."""
    nodes: Count = 1
    """Nodes at once. Runs share them one after the other."""
    grid: dict[Key, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values by dotted key of the spec: every combination is a run."""
    runs: list[dict[Key, Any]] = Field(default_factory=list)
    """Overrides run by run; with a grid as well, each with each."""
    seeds: Count | Annotated[list[int], Field(min_length=1)] | None = None
    """How many seeds, from the spec's own on, or a list of them: each run is made with each."""
    keep: Duration = "5m"
    """How long a node waits for the next run if the sweep is not there to give it one."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    overrides: dict[str, Any]
    spec: RunSpec
    fingerprint: str
    """Of everything in the spec that makes it another run. With `tune` only once its base was looked at."""


def load(path: Path) -> SweepSpec:
    """Read a file. Raises SpecError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise SpecError([Problem(str(path), None, "", why, "docs/sweeps.md shows one")]) from None
    document = parse_yaml(text, str(path))
    try:
        sweep = SweepSpec.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            where = tuple(
                part for part in detail["loc"] if not str(part).startswith(("constrained", "list["))
            )
            hint = ""
            if detail["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(where[-1]), SweepSpec.model_fields, 1)
                hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(SweepSpec.model_fields)}"
            place = document.place(where)
            message = "unknown key" if detail["type"] == "extra_forbidden" else detail["msg"]
            problems.append(Problem(place.file, place.line, ".".join(map(str, where)), message, hint))
        raise SpecError(problems) from None
    taken = [key for key in {*sweep.grid, *(key for run in sweep.runs for key in run)} if _ours(key)]
    if taken:
        hint = "Runs of a sweep take over each other's nodes: set it in the spec, for all of them"
        raise SpecError(
            [Problem(str(path), None, key, "cannot differ between runs", hint) for key in sorted(taken)]
        )
    return sweep


def _ours(key: str) -> bool:
    return any(key == ours or key.startswith(f"{ours}.") for ours in _OURS)


def expand(sweep: SweepSpec, folder: Path) -> list[Point]:
    """The runs, in the order of the file, each once. Raises SpecError, which names the override at fault."""
    path = folder / sweep.spec
    base = specs.load(path)
    seed_key = SEED if base.tune is None else TUNE_SEED
    seeds: Sequence[int | None] = [None]
    if isinstance(sweep.seeds, int):
        seeds = range(base.train.seed, base.train.seed + sweep.seeds)
    elif sweep.seeds is not None:
        seeds = sweep.seeds
    grids = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    points: dict[str, Point] = {}
    for run, grid, seed in itertools.product(sweep.runs or [{}], grids, seeds):
        overrides = {**run, **grid, **({seed_key: seed} if seed is not None else {})}
        spec = specs.load(path, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
        name = fingerprint(spec.to_dict())
        points.setdefault(name, Point(overrides, spec, name))
    return list(points.values())


def fingerprint(spec: Mapping[str, Any]) -> str:
    """What two specs share that are the same run of a sweep."""
    node = {key: value for key, value in spec["node"].items() if key != "on_finish"}
    same = {key: value for key, value in spec.items() if key not in {"name", "budget", "node"}}
    return hashlib.sha256(json.dumps([same, node], sort_keys=True).encode()).hexdigest()[:16]


def allowance(free: int, margin: int, predicted: Sequence[int | None], cap: int | None = None) -> int | None:
    """Micro-dollars that the first of the runs that are left may spend, or None where the money does not reach.

    `free`: what is neither spent nor promised. `margin`: what a run may cost beyond its limit (the time that its end takes).
    `predicted`: what each of the runs that are left is expected to cost, the next one first. Each has its share by what it
    is expected to cost; where that is too little for all, the next one gets what it can use of the whole.
    """
    known = [cost for cost in predicted if cost is not None]
    total = sum(known)
    first = predicted[0]
    weight = first / total if first and total and len(known) == len(predicted) else 1 / len(predicted)
    share = int(free * weight) - margin
    need = first or 1
    if share < need:
        share = free - margin
    limit = share if cap is None else min(share, cap)
    return limit if limit >= need else None
