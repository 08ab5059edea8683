"""`report`: one HTML file that holds everything it shows, opens offline, and asks nothing of anyone.

The page's data is one JSON island; its script draws the charts with Observable Plot, which is in the page too. Text of runs
(names, logs, samples) goes in as text and never as markup.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from runs import charges, compare
from runs.curves import at, meter
from runs.events import PHASES
from runs.record import RunRecord
from runs.rows import usd
from runs.series import series
from runs.store import Store, StoreError, run_dir

CHARTS = ("d3.min.js", "plot.min.js")
"""The chart library, as it was published (runs/page/vendor/NOTICE)."""
POINTS = 300
"""Of each curve."""
EVENTS = 200
"""Of each run, the newest."""
_QUIET = frozenset({"ProgressSeen", "NodeObserved"})


def html(
    store: Store, runs: Sequence[str] | None = None, *, published: bool = True, now: datetime | None = None
) -> str:
    """The page for `runs` (None: all), and for the published ones."""
    from jinja2 import Environment

    folder = resources.files("runs").joinpath("page")
    parts = {
        name: folder.joinpath(f"report.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")
    }
    template = Environment(autoescape=True).from_string(parts["html"])
    return template.render(
        style=_raw(parts["css"]),
        charts=_raw("\n".join((folder / "vendor" / name).read_text(encoding="utf-8") for name in CHARTS)),
        script=_raw(parts["js"]),
        data=_raw(_island(document(store, runs, published=published, now=now))),
    )


def _raw(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)  # noqa: S704  our own files, and JSON without a "<"


def _island(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    """The value with null where JSON has no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def document(
    store: Store, runs: Sequence[str] | None, *, published: bool, now: datetime | None = None
) -> dict[str, Any]:
    """Everything that the page shows."""
    now = now or datetime.now(UTC)
    summaries = list(reversed(store.summaries()))
    if runs is not None:
        wanted = set(runs)
        summaries = [row for row in summaries if row["run"] in wanted]
    entries = [compare.entry(row) for row in summaries]
    others = compare.published() if published else []
    rows = compare.rows([*entries, *others])
    sources = [item.facts.get("published_by") for item in [*entries, *others]]
    details = [_run(store, row["run"], now) for row in summaries]
    return {
        "made": now.isoformat(timespec="seconds"),
        "columns": list(compare.COLUMNS),
        "rows": [{**row, "published_by": source} for row, source in zip(rows, sources, strict=True)],
        "totals": compare.totals(rows),
        "fronts": {loss: compare.pareto(rows, loss=loss) for loss in ("validation_loss", "test_loss")},
        "phases": list(PHASES),
        "runs": [item for item in details if item is not None],
    }


def _run(store: Store, run: str, now: datetime) -> dict[str, Any] | None:
    try:
        record = store.record(run)
    except StoreError:  # its row is in the table, as what it is
        record = None
    if record is None:
        return None
    marks = meter(store, run)
    total = charges.totals(record, now)
    best = record.best
    return {
        "run": run,
        "state": record.state,
        "reason": record.reason,
        "spec": dict(record.spec),
        "summary": dict(record.summary),
        "curves": {
            "training": _curve(store, run, "loss", marks),
            "validation": _curve(store, run, "validation_loss", marks),
        },
        "phases": {
            phase: {"usd": usd(micro), "seconds": total.seconds_by_phase.get(phase, 0.0)}
            for phase, micro in total.by_phase.items()
        },
        "cost_usd": usd(total.micro_usd),
        "final": total.final,
        "charges": [
            {"node": item.node, "phase": item.phase, "start": item.start.timestamp(), "end": item.end.timestamp(),
             "usd": usd(item.micro_usd)}
            for item in charges.charges(record, now)
        ],
        "checkpoints": [
            {"step": item.step, "bytes": item.bytes, "sha256": item.sha256, "here": item.path is not None,
             "best": best is not None and best.step == item.step, "validation_loss": item.validation_loss}
            for _, item in sorted(record.checkpoints.items())
        ],
        "evaluations": [dict(item) for item in record.evaluations],
        "events": _events(store, record),
    }  # fmt: skip


def _events(store: Store, record: RunRecord) -> list[dict[str, Any]]:
    told = [
        {"at": when, "of": stream.partition(":")[2], "kind": body["kind"],
         "detail": {key: value for key, value in body.items() if key not in {"at", "kind", "spec", "run"}}}
        for when, stream, body in store.history(record.run)
        if body["kind"] not in _QUIET
    ]  # fmt: skip
    return told[-EVENTS:]


def _curve(store: Store, run: str, key: str, marks: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    """One metric over all four axes."""
    found = series(run_dir(store.home, run) / "metrics.jsonl", key, POINTS)
    start = marks[0][0] if marks else (found.times[0] if found.times else 0.0)
    return {
        "loss": found.values,
        "steps": [float(step) for step in found.steps],
        "tokens": [float(token) for token in found.tokens],
        "hours": [(time - start) / 3600 for time in found.times],
        "dollars": at(marks, found.times),
    }
