"""`sweep` for people: what will be made, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.figures import dollars
from orchestrator.render import text as render

if TYPE_CHECKING:
    from runs.store import Store


def planned(document: dict[str, Any]) -> None:
    """The runs that are left, cheapest first, each with what it is expected to cost."""
    made = f", {len(document['runs'])} made already" if document["runs"] else ""
    render.line(
        f"{document['sweep']}: {len(document['left'])} runs to make{made}, at most {dollars(document['max_usd'])}"
    )
    for item in document["left"]:
        values = " ".join(f"{key}={value}" for key, value in item["overrides"].items())
        cost = dollars(item["predicted_usd"]) if item["predicted_usd"] is not None else "?"
        render.line(f"  {cost:>9}  {values or 'as the spec says'}")


def result(store: Store, document: dict[str, Any]) -> None:
    """The table of the sweep, one row a variant, and what it cost."""
    from orchestrator.actions import comparing
    from orchestrator.render import compare

    runs = [item["run"] for item in document["runs"]]
    compare.say(comparing.table(store, comparing.Ask(runs, group_by="variant")), "table")
    left = (
        f"; {len(document['left'])} runs were not made: the money does not reach" if document["left"] else ""
    )
    render.line(f"{dollars(document['cost_usd'])} of {dollars(document['max_usd'])}{left}")
    render.line(f"each run: llmctl compare {document['sweep']}")
