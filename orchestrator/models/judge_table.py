"""From the judge's answers to a table: means with confidence intervals, the bill, and what could not be used."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

RESAMPLES = 2000
INTERVAL = "95% percentile bootstrap over items, 2000 resamples"


def item_means(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each item with at least one answer that could be read, each model's mean over the repeats."""
    found: dict[str, list[Mapping[str, float]]] = {}
    for row in rows:
        if row["scores"] is not None:
            found.setdefault(row["question"], []).append(row["scores"])
    return {
        item: {model: statistics.fmean(one[model] for one in all_) for model in models}
        for item, all_ in sorted(found.items())
    }


def intervals(
    means: Mapping[str, Mapping[str, float]], models: Sequence[str], seed: str
) -> dict[str, tuple[float, float]]:
    """The 95% interval of each model's mean score, by drawing the items again with replacement; the same draws for all
    models."""
    items = list(means.values())
    generator = random.Random(seed)  # noqa: S311  statistics, not secrets
    draws: dict[str, list[float]] = {model: [] for model in models}
    for _ in range(RESAMPLES):
        drawn = generator.choices(items, k=len(items))
        for model in models:
            draws[model].append(sum(item[model] for item in drawn) / len(drawn))
    result = {}
    for model, values in draws.items():
        values.sort()
        result[model] = (values[round(0.025 * (RESAMPLES - 1))], values[round(0.975 * (RESAMPLES - 1))])
    return result


def table(
    rows: Sequence[Mapping[str, Any]],
    *,
    judge: str,
    panel: str,
    models: Sequence[str],
    questions: Sequence[str],
    repeats: int,
) -> dict[str, Any]:
    """The result as a JSON document: a row a model, best first. A score carries its panel and the models beside it; an
    item without an answer that could be read has no part in it and is listed."""
    models = sorted(models)
    means = item_means(rows, models)
    bounds = intervals(means, models, panel) if means else {}
    lines = [
        {
            "model": model, "score": statistics.fmean(item[model] for item in means.values()) if means else None,
            "low": bounds[model][0] if means else None, "high": bounds[model][1] if means else None,
            "items": len(means), "panel": panel, "judged_with": models, "judge": judge,
        }
        for model in models
    ]  # fmt: skip
    known = [row["micro_usd"] for row in rows if row["micro_usd"] is not None]
    return {
        "judge": judge, "panel": panel, "models": models, "questions": len(questions), "repeats": repeats, "interval": INTERVAL,
        "rows": sorted(lines, key=lambda line: (-(line["score"] or 0.0), line["model"])),
        "unjudged": [question for question in questions if question not in means],
        "answers": len(rows), "unparsed": sum(row["scores"] is None for row in rows),
        "prompt_tokens": sum(row["prompt_tokens"] or 0 for row in rows),
        "completion_tokens": sum(row["completion_tokens"] or 0 for row in rows),
        "cost_usd": round(sum(known) / 1_000_000, 6) if known else None, "answers_without_price": len(rows) - len(known),
    }  # fmt: skip


def comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two scores may be set against each other: only those of one panel."""
    return bool(one["panel"] == other["panel"])


def results(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each model the name and content of the evaluation that belongs into its run's record; the name has the panel in
    it, so that scores of different panels never stand in one column. Models without a score have none."""
    name = f"judge {table['judge']} {table['panel']}"
    return {
        line["model"]: {
            "kind": "judge",
            "name": name,
            "repeats": table["repeats"],
            "interval": table["interval"],
            **line,
        }
        for line in table["rows"]
        if line["score"] is not None
    }
