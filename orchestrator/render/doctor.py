"""`doctor` and `reap` for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.figures import dollars, red, sane
from orchestrator.render import text as render
from orchestrator.render.text import Column
from provisioning import console_of
from provisioning.base import Check

if TYPE_CHECKING:
    from orchestrator.actions.reap import Found, Orphan


def checks(found: Sequence[Check]) -> None:
    """One line a check; under a fault, or something that could be better, what to do."""
    for item in found:
        mark, style = ("ok  ", "green") if item.ok else ("FAIL", "bold red")
        render.line(f"{mark}  {item.name}: {item.detail}", style="" if item.ok else style)
        if item.hint:
            render.line(
                f"      {'try' if not item.ok else 'could'}: {item.hint}", style="dim" if item.ok else ""
            )
    bad = sum(not item.ok for item in found)
    render.line(f"\n{bad} fault{'s' if bad != 1 else ''} found." if bad else "\nEverything needed is there.")


_NODES = (
    Column("NODE", lambda item: item.facts.name, right=False, keep=9),
    Column("AT", lambda item: item.provider, right=False, keep=8),
    Column("TYPE", lambda item: item.facts.instance_type, right=False, keep=4),
    Column("STATUS", lambda item: item.facts.status, right=False, keep=5),
    Column("$/H", lambda item: dollars(item.facts.micro_usd_per_hour / 1e6), keep=9),
    Column("SO FAR", lambda item: dollars(item.cost_usd), keep=6),
    Column("WHY", lambda item: item.why, right=False, keep=7),
)


def found(seen: Found) -> None:
    """What nobody answers for, what else bills, and what could not be asked."""
    if seen.nodes:
        render.table(_NODES, seen.nodes)
    else:
        render.line("No node is left over.")
    for text in seen.leftovers:
        render.line(f"also bills: {sane(text)}", style="yellow")
    for name, error in seen.errors.items():
        sys.stderr.write(f"{name} could not be asked: {error}\n")


def reaped(done: Found) -> None:
    """What was ended, and loudly what was not."""
    for item in done.terminated:
        render.line(f"gone: {item.facts.name} ({item.facts.id})", style="green")
    for item in done.unconfirmed:
        sys.stderr.write(red(shout(item), sys.stderr) + "\n")


def shout(item: Orphan) -> str:
    """A node whose end nobody confirms."""
    return (
        f"WARNING: {item.facts.name} ({item.facts.id}) at {item.provider} MAY STILL BE BILLING"
        f" {dollars(item.facts.micro_usd_per_hour / 1e6)}/h: its end is not confirmed. Run `llmctl reap` again,"
        f" or end it at {console_of(item.provider)}"
    )
