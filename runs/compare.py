"""Loss against dollars: one row a run, beside what others published.

A loss belongs to the set it was measured on. Rows are ranked by loss only within one set, a difference below the noise
of the seed is called so, and what is not known is None, never zero.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from runs.rows import SEED, TUNE_SEED, UNREADABLE, cost_now, label, usd

Row = dict[str, Any]

COLUMNS = (
    "run", "name", "source", "state", "provider", "instance_type", "gpu", "gpus", "parameters", "tokens",
    "global_batch_size", "microbatch_size", "train_loss", "validation_loss", "validation_set", "test_loss", "test_set",
    "hellaswag", "hellaswag_set", "judge_score", "judge_panel", "tokens_per_second", "mfu", "training_hours", "billed_hours", "training_usd", "cost_usd",
    "usd_per_billion_tokens", "overhead_fraction", "started",
)  # fmt: skip
"""The keys of `compare --json`, in order."""
VARIANT = "variant"
"""What a sweep set in a run's spec, but for the seed: a key to group by."""
LOSSES = {"validation_loss": "validation_set", "test_loss": "test_set", "train_loss": "train_set"}
"""Loss columns, and the key that says on what; `train_set` is in rows but no column."""
SETS = {**LOSSES, "hellaswag": "hellaswag_set", "judge_score": "judge_panel"}
"""Every column that means something only within a set: for a judge's score the panel of models that were graded together."""
TEXT = {
    "run",
    "name",
    "source",
    "state",
    "provider",
    "instance_type",
    "gpu",
    "validation_set",
    "test_set",
    "hellaswag_set",
    "judge_panel",
    "started",
}
"""Columns that are no figures."""


@dataclass(frozen=True)
class Entry:
    """A run, or a published one, before a test set was chosen for its row."""

    row: Row
    test_losses: Mapping[str, float]
    spec: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else `diff` shows: versions, region, seed, world size, the source of a published row."""


def entry(
    summary: Mapping[str, Any], spec: Mapping[str, Any] | None = None, now: float | None = None
) -> Entry:
    """A stored run as an entry; what a broken or unfinished record lacks is None."""
    tokens = number(summary.get("tokens"))
    cost = _cost(summary, now)
    training = number(summary.get("training_seconds"))
    billed = number(summary.get("billed_seconds"))
    micro = number(summary.get("training_micro_usd"))
    row: Row = {key: summary.get(key) if key in TEXT else number(summary.get(key)) for key in COLUMNS}
    row |= {
        "source": "run",
        "training_hours": training / 3600 if training is not None else None,
        "billed_hours": billed / 3600 if billed is not None else None,
        "training_usd": usd(round(micro)) if micro is not None else None,
        "cost_usd": cost,
        "usd_per_billion_tokens": cost / tokens * 1e9 if cost is not None and tokens else None,
    }
    row["train_set"] = _train_set(spec or {})
    evaluations = [item for item in summary.get("evaluations") or [] if isinstance(item, Mapping)]
    losses = {
        str(item.get("name")): loss
        for item in evaluations
        if item.get("kind") == "test_set" and (loss := number(item.get("loss"))) is not None
    }
    row |= _latest(evaluations)
    facts = {key: summary.get(key) for key in ("region", "seed", "world_size", "versions", "epochs", "best_step", "memory_gib", "reason")}  # fmt: skip
    facts[VARIANT] = label(summary.get("overrides") or {})
    return Entry(row, losses, spec, facts)


def _latest(evaluations: Sequence[Mapping[str, Any]]) -> Row:
    """HellaSwag's length-normalised accuracy and the judge's score, as they were measured last, each with its set."""
    found: Row = {}
    for item in evaluations:
        if item.get("kind") == "hellaswag":
            found |= {
                "hellaswag": number(item.get("accuracy_normalised")),
                "hellaswag_set": item.get("name"),
            }
        if item.get("kind") == "judge":
            found |= {"judge_score": number(item.get("score")), "judge_panel": item.get("name")}
    return found


def _cost(summary: Mapping[str, Any], now: float | None) -> float | None:
    """Dollars so far; None where the record does not tell."""
    if summary.get("state") == UNREADABLE:
        return None
    try:
        return usd(cost_now(summary, now))
    except (KeyError, TypeError):
        return None


def _train_set(spec: Mapping[str, Any]) -> str | None:
    data = spec.get("data") or {}
    return f"{data.get('tokenizer')}: {', '.join(data['train'])}" if data.get("train") else None


def published() -> list[Entry]:
    """The published runs that come with llmctl."""
    return [_published(item) for item in _read_published()["runs"]]


def published_noise() -> dict[str, float]:
    """Published standard deviations of a loss over seeds, by test set."""
    return {name: float(item["sigma"]) for name, item in _read_published()["noise"].items()}


def _read_published() -> dict[str, Any]:
    from runs.yamlfile import parse

    text = resources.files("runs").joinpath("published.yaml").read_text(encoding="utf-8")
    return parse(text, "published.yaml").data


def _published(item: Mapping[str, Any]) -> Entry:
    row: Row = dict.fromkeys(COLUMNS)
    row |= {key: item[key] for key in COLUMNS if key in item}
    cost, price, tokens = item.get("cost_usd"), item.get("usd_per_hour"), item.get("tokens")
    seconds, training = item.get("training_seconds"), item.get("training_usd")
    row |= {
        "source": "published",
        "training_hours": seconds / 3600 if seconds else None,
        "billed_hours": cost / price if cost and price else None,
        "usd_per_billion_tokens": cost / tokens * 1e9 if cost and tokens else None,
        "overhead_fraction": 1 - training / cost if training and cost else None,
    }
    return Entry(row, dict(item["test_losses"]), None, {"published_by": item["source"]})


def rows(entries: Sequence[Entry], test_set: str | None = None) -> list[Row]:
    """One row an entry, in their order, each with its loss on `test_set`; without one, on the set that most entries
    share, so that as many rows as possible can be compared."""
    counts = Counter(name for item in entries for name in item.test_losses)
    result = []
    for item in entries:
        chosen = test_set
        if chosen is None:
            chosen = max(item.test_losses, key=lambda name: (counts[name], name), default=None)
        loss = item.test_losses.get(chosen) if chosen else None
        test = {"test_loss": loss, "test_set": chosen if loss is not None else None}
        result.append({**item.row, **test, "published_by": item.facts.get("published_by")})
    return result


def sort_rows(items: Iterable[Row], key: str, *, descending: bool = False) -> list[Row]:
    """By any column, what is missing last; by a loss or a score, within each set, the set with the most rows first.

    Raises KeyError for a column that there is not.
    """
    if key not in COLUMNS:
        raise KeyError(f"there is no column {key}; there are {', '.join(COLUMNS)}")
    known: list[Row] = []
    missing: list[Row] = []
    for item in items:
        value = item.get(key)
        there = isinstance(value, str) if key in TEXT else number(value) is not None
        (known if there else missing).append(item)
    known.sort(key=lambda item: item[key], reverse=descending)
    of = SETS.get(key)
    if of:
        sizes = Counter(item.get(of) for item in known)
        known.sort(
            key=lambda item: (-sizes[item.get(of)], str(item.get(of)))
        )  # stable: keeps the order within a set
    return known + missing


def totals(items: Sequence[Row]) -> dict[str, Any]:
    """Of the user's own runs: how many, hours, dollars, tokens. Published rows cost this user nothing."""
    own = [item for item in items if item["source"] == "run"]
    sums: dict[str, Any] = {"runs": len(own)}
    for key in ("cost_usd", "training_usd", "billed_hours", "training_hours", "tokens"):
        values = [value for item in own if (value := number(item.get(key))) is not None]
        sums[key] = math.fsum(values) if values else None
    return sums


def pareto(items: Sequence[Row], cost: Literal["cost_usd", "billed_hours", "training_hours"] = "cost_usd",
           loss: str = "validation_loss") -> list[int]:  # fmt: skip
    """Indices of the rows that no other row on the same set beats in both loss and cost. A run that trained nothing is
    none of them: its dollars are not what the loss cost."""
    of = LOSSES[loss]
    fronts: dict[Any, float] = {}
    front: list[int] = []
    points = [
        (float(item[cost]), float(item[loss]), index)
        for index, item in enumerate(items)
        if number(item.get(cost)) is not None
        and number(item.get(loss)) is not None
        and item.get("tokens") != 0
    ]
    for _, value, index in sorted(points):
        name = items[index].get(of)
        if value < fronts.get(name, math.inf):
            fronts[name] = value
            front.append(index)
    return sorted(front)


# ---------------------------------------------------------------- noise and groups


@dataclass(frozen=True)
class Noise:
    """How far a loss moves when only the seed changes."""

    sigma: float
    source: str
    """`given`, `seeds` (this user's repeated runs), or `published`."""


def noise(entries: Sequence[Entry], loss: str, of: str | None, given: float | None = None) -> Noise | None:
    """The noise of a loss column on the set `of`: as given, else pooled from runs that differ in nothing but seed and
    name, else as published; None where nobody knows."""
    if given is not None:
        return Noise(given, "given")
    groups: dict[str, list[float]] = {}
    own = [item for item in entries if item.spec is not None]
    for item, row in zip(own, rows(own, of if loss == "test_loss" else None), strict=True):
        value = number(row.get(loss))
        if item.spec is not None and value is not None and row.get(LOSSES[loss]) == of:
            groups.setdefault(_but_seed(item.spec), []).append(value)
    repeated = [values for values in groups.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in repeated)
    if freedom:
        squares = math.fsum(statistics.variance(values) * (len(values) - 1) for values in repeated)
        return Noise(math.sqrt(squares / freedom), "seeds")
    sigma = published_noise().get(of) if of else None
    return Noise(sigma, "published") if sigma is not None else None


def within_noise(left: float, right: float, sigma: float) -> bool:
    """Whether two single runs differ by less than chance would in 19 of 20 cases: 1.96 standard deviations of a difference."""
    return abs(left - right) <= 1.96 * math.sqrt(2) * sigma


def as_good_as_best(items: Sequence[Row], loss: str, noises: Mapping[str | None, Noise]) -> list[int]:
    """Indices of the rows whose loss is within the noise of the lowest on their set; `noises` is keyed by set."""
    of = LOSSES[loss]
    best: dict[Any, float] = {}
    for item in items:
        value = number(item.get(loss))
        if value is not None:
            name = item.get(of)
            best[name] = min(value, best.get(name, math.inf))
    result = []
    for index, item in enumerate(items):
        value, name = number(item.get(loss)), item.get(of)
        sigma = noises[name].sigma if name in noises else 0.0
        if value is not None and within_noise(value, best[name], sigma):
            result.append(index)
    return result


def grouped(entries: Sequence[Entry], key: str, test_set: str | None = None) -> list[Row]:
    """Mean and spread of each number over the entries with one value of `key`: a column, a dotted key of the spec, or
    `variant`, what a sweep set but for the seed.

    `COLUMN_sd` is the standard deviation, None below two values; a loss is averaged only where the set is one.
    """
    groups: dict[str, list[Row]] = {}
    labels: dict[str, Any] = {}
    for item, row in zip(entries, rows(entries, test_set), strict=True):
        value = row[key] if key in COLUMNS else flat(item.spec or {}).get(key)
        value = item.facts.get(key) if key == VARIANT else value
        groups.setdefault(repr(value), []).append(row)
        labels[repr(value)] = value
    return [
        {key: labels[name], "runs": len(members), **_averages(members, key)}
        for name, members in groups.items()
    ]


def _averages(members: Sequence[Row], key: str) -> Row:
    result: Row = {}
    for column in COLUMNS:
        if column in TEXT or column == key:
            continue
        values = [value for row in members if (value := number(row.get(column))) is not None]
        of = SETS.get(column)
        sets = {row.get(of) for row in members if number(row.get(column)) is not None} if of else set()
        if len(sets) > 1:
            values = []
        elif of in COLUMNS:
            result[of] = next(iter(sets), None)
        result[column] = statistics.fmean(values) if values else None
        result[f"{column}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return result


def _but_seed(spec: Mapping[str, Any]) -> str:
    """What two runs share that are repetitions of each other."""
    same = {
        key: value for key, value in flat(spec).items() if not key.startswith(("budget.", "wandb.", "notify"))
    }
    return repr(
        sorted((key, repr(value)) for key, value in same.items() if key not in {"name", SEED, TUNE_SEED})
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay whole."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    return value if type(value) is int else None
