"""What stands under every command while something needs the user's eye: meters that run, ends that nobody confirmed, runs
without a driver. Reads the stored rows only, and writes to stderr only."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.figures import on_stderr, red
from provisioning import console_of
from runs.lock import driver_lock, held
from runs.rows import LIVE, billing
from runs.store import Store, StoreError, default_home, run_dir

ALARM = "WARNING: "


def show() -> None:
    """Write the footer; nothing where there is nothing to say, or no store."""
    home = default_home()
    if not (home / "llmctl.db").exists():
        return
    try:
        store = Store(home)
    except StoreError:
        return
    try:
        rows = store.concerning()
    finally:
        store.close()
    for line in lines(home, rows):
        text = on_stderr(line)
        sys.stderr.write((red(text, sys.stderr) if line.startswith(ALARM) else text) + "\n")


def lines(home: Path, rows: Iterable[dict[str, Any]]) -> list[str]:
    """The footer's lines for rows that are live or have an unsettled node."""
    rows = list(rows)
    nodes = {node["key"]: node for row in rows for node in row["nodes"] if node["unsettled"]}
    meters = [node for node in nodes.values() if billing(node)]
    said = []
    if meters:
        rate = sum(node["usd_per_hour"] for node in meters)
        said.append(f"{len(meters)} node{'s' if len(meters) != 1 else ''} billing, ${rate:,.2f}/h")
    bare = [node["name"] for node in meters if node.get("unguarded")]
    if bare:
        which = bare[0] if len(bare) == 1 else f"{len(bare)} of them"
        said.append(
            f"while this machine sleeps or is off, nothing ends {which}: run `llmctl reap --yes` elsewhere as a cron job,"
            " or set node.self_terminate"
        )
    for row in rows:
        driven = held(driver_lock(run_dir(home, row["run"])))
        said += [_alarm(row, node) for node in row["nodes"] if unconfirmed(row, node, driven=driven)]
        if needs_driver(row) and not driven:
            said.append(
                f"{ALARM}{row['run']} has no driver: nobody watches it. `llmctl resume {row['run']}` starts one"
            )
    return said


def _alarm(row: dict[str, Any], node: dict[str, Any]) -> str:
    return (
        f"{ALARM}{node['name']} ({node['id'] or 'no id yet'}) was asked to end and MAY STILL BE BILLING"
        f" ${node['usd_per_hour']:,.2f}/h: nothing has confirmed that it is gone."
        f" Try `llmctl stop {row['run']}`, `llmctl reap`, or {console_of(row['provider'])}"
    )


def unconfirmed(row: dict[str, Any], node: dict[str, Any], *, driven: bool) -> bool:
    """The node should be gone and may not be. A first request that a living driver sent just now is no alarm yet."""
    if not node["unsettled"] or node["kept"]:
        return False
    if node["terminate_unconfirmed"]:
        return bool(node["terminate_tries"] > 1 or not driven)
    return row["state"] not in LIVE and not driven


def needs_driver(row: dict[str, Any]) -> bool:
    """A live run, or one with a node that is still to end, is nobody's business without a driver."""
    return row["state"] in LIVE or any(
        node["unsettled"] and not (node["kept"] and node["kept_until"] is None) for node in row["nodes"]
    )
