"""`compare`: which runs, which columns, in which order. The arithmetic is in `runs.compare`, the printing in `render_compare`."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import Invalid, NoSuchRun, Usage
from runs import compare
from runs.difference import diff
from runs.store import Store

WITH_SPECS = 1000
"""Up to so many runs their specs are read too, so that repeated seeds tell the noise."""


@dataclass(frozen=True)
class Ask:
    """What the command line says."""

    runs: list[str] | None = None
    """None: all."""
    sort: str | None = None
    """A column; with `-` before it the other way round."""
    published: bool = False
    group_by: str | None = None
    columns: list[str] | None = None
    test_set: str | None = None
    sigma: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows with what is to be said about them."""

    rows: list[dict[str, Any]]
    columns: list[str] | None
    grouped: bool = False
    totals: dict[str, Any] = field(default_factory=dict)
    noise: dict[str, str] = field(default_factory=dict)
    """Loss column → a sentence about its noise."""
    best: dict[str, frozenset[int]] = field(default_factory=dict)
    """Loss column → rows as good as the best on their set."""
    front: frozenset[int] = frozenset()
    """Rows that no other beats in both loss and dollars."""
    fast: frozenset[int] = frozenset()
    """Rows that no other beats in both loss and billed hours."""


def sweep(store: Store, name: str) -> str:
    """`name`, where there is a sweep of that name. Raises NoSuchRun."""
    if not store.sweeps([name]):
        raise NoSuchRun(f"no sweep is called {name!r}", "`llmctl sweep SWEEP.yaml` makes one")
    return name


def entries(store: Store, ask: Ask) -> list[compare.Entry]:
    """The runs, oldest first, and the published ones before them."""
    if ask.runs is None:
        rows = list(reversed(store.summaries()))
    else:
        rows = [row for run in ask.runs if (row := store.summary(run)) is not None]
    specs = (
        store.specs([row["run"] for row in rows]) if len(rows) <= WITH_SPECS or _dotted(ask.group_by) else {}
    )
    own = [compare.entry(row, specs.get(row["run"])) for row in rows]
    return [*compare.published(), *own] if ask.published else own


def _dotted(key: str | None) -> bool:
    return key is not None and key not in compare.COLUMNS


def table(store: Store, ask: Ask, *, bare: bool = False) -> Table:
    """The table; `bare`: the rows alone. Raises Usage for a column that there is not."""
    _check_columns(ask)
    with _uncollected():
        return _table(store, ask, bare=bare)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cyclic collector, which would walk ten thousand rows again and again and find nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _whole_name(found: Sequence[compare.Entry], word: str | None) -> str | None:
    """The test set that the word means: its name, or the part before the hash. Raises Usage where it means none, or several."""
    known = sorted({name for item in found for name in item.test_losses})
    if word is None or word in known:
        return word
    meant = [name for name in known if re.fullmatch(rf"{re.escape(word)}-[0-9a-f]{{12}}@\S+", name)]
    if len(meant) == 1:
        return meant[0]
    what = f"{len(meant)} test sets are called {word!r}" if meant else f"no loss on {word!r} is recorded"
    raise Usage(
        what, f"there are {', '.join(meant or known)}" if known else "llmctl evaluate RUN measures one"
    )


def _table(store: Store, ask: Ask, *, bare: bool) -> Table:
    found = entries(store, ask)
    ask = replace(ask, test_set=_whole_name(found, ask.test_set))
    if ask.group_by:
        rows = compare.grouped(found, ask.group_by, ask.test_set)
        return Table(rows, ask.columns, grouped=True)
    rows = compare.rows(found, ask.test_set)
    order = {id(row): index for index, row in enumerate(rows)}
    ranked = _sorted(rows, ask.sort)
    if bare:
        return Table(ranked, ask.columns)
    # Without their specs runs cannot tell which of them are repetitions.
    by_order = [found[order[id(row)]] for row in ranked] if len(found) <= WITH_SPECS else []
    noise, best = {}, {}
    for loss in ("validation_loss", "test_loss"):
        sentence, good = _noise(by_order, ranked, loss, ask.sigma)
        if sentence:
            noise[loss] = sentence
        best[loss] = good
    return Table(
        ranked, ask.columns, totals=compare.totals(ranked), noise=noise, best=best, front=_front(ranked, "cost_usd"),
        fast=_front(ranked, "billed_hours"),
    )  # fmt: skip


def _front(rows: list[dict[str, Any]], cost: Literal["cost_usd", "billed_hours"]) -> frozenset[int]:
    losses = ("validation_loss", "test_loss")
    return frozenset(index for loss in losses for index in compare.pareto(rows, cost, loss))


def _check_columns(ask: Ask) -> None:
    for key in [*(ask.columns or []), *([ask.sort.lstrip("-")] if ask.sort else [])]:
        if key not in compare.COLUMNS:
            from difflib import get_close_matches

            near = get_close_matches(key, compare.COLUMNS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(compare.COLUMNS)}"
            raise Usage(f"there is no column {key!r}", hint)


def _sorted(rows: list[dict[str, Any]], sort: str | None) -> list[dict[str, Any]]:
    return compare.sort_rows(rows, sort.lstrip("-"), descending=sort.startswith("-")) if sort else rows


def _noise(
    found: Sequence[compare.Entry], rows: Sequence[dict[str, Any]], loss: str, given: float | None
) -> tuple[str, frozenset[int]]:
    of = compare.LOSSES[loss]
    assert of is not None
    noises: dict[str | None, compare.Noise] = {}
    for name in {row[of] for row in rows if row[loss] is not None}:
        one = compare.noise(found, loss, name, given)
        if one is not None:
            noises[name] = one
    if not noises:
        return "", frozenset()
    good = compare.as_good_as_best(rows, loss, noises)
    # One alone is the best, and as good as nothing.
    members = Counter(rows[index][of] for index in good)
    good = [index for index in good if members[rows[index][of]] > 1]
    told = ", ".join(
        f"{one.sigma:.4f} on {name} ({_SOURCES[one.source]})" for name, one in sorted(noises.items(), key=str)
    )
    return f"one sigma of {loss}: {told}", frozenset(good)


_SOURCES = {"given": "as given", "seeds": "from repeated seeds", "published": "as published"}


def difference(store: Store, ask: Ask) -> list[dict[str, Any]]:
    """What differs between exactly two runs. Raises Usage for another number of them."""
    if ask.runs is None or len(ask.runs) != 2:
        raise Usage("--diff compares two runs", "llmctl compare A B --diff")
    left, right = entries(store, ask)[-2:]
    wanted = _whole_name([left, right], ask.test_set)
    everything = [] if ask.sigma is not None else entries(store, Ask())
    chosen = wanted or next((name for name in left.test_losses if name in right.test_losses), None)
    sets = {
        "validation_loss": left.row["validation_set"],
        "train_loss": left.row["train_set"],
        "test_loss": chosen,
    }
    known = {loss: compare.noise(everything, loss, name, ask.sigma) for loss, name in sets.items() if name}
    sigmas = {loss: one.sigma for loss, one in known.items() if one is not None}
    found = diff(left, right, wanted, sigmas)
    return [
        {
            "part": item.part,
            "key": item.key,
            ask.runs[0]: item.left,
            ask.runs[1]: item.right,
            "note": item.note,
        }
        for item in found
    ]


def report(store: Store, runs: list[str] | None, to: Path, *, published: bool) -> dict[str, Any]:
    """Write the page. Raises Invalid where it cannot be written."""
    from runs import report as page

    text = page.html(store, runs, published=published)
    try:
        to.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Invalid(
            f"{to} cannot be written: {error.strerror}", "choose a folder that you can write to"
        ) from error
    shown = len(runs) if runs is not None else len(store.runs())
    return {"path": str(to), "runs": shown, "bytes": len(text.encode())}
