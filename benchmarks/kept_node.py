"""How long a node that is paid for does not train: before the first step, and after the last.

    python -m benchmarks kept-node [--runs 4] [--boot-seconds 30]

Against the Lambda-shaped server of the tests, in real time, with its nodes behind real SSH. The first run rents a node, which
boots; each further one takes over the node that the one before keeps, with its data and its environment; the last one ends it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import load

TARGET_FIRST, TARGET_LAST = 10.0, 5.0
"""Seconds: from SSH-ready to the first step, from the last step to the request to terminate."""
HEADER = ("node", "first step", "of which start", "let go", "sent", "billed", "not training")


@dataclass(frozen=True)
class Took:
    """One run; seconds."""

    node: str
    before: float
    """From the moment at which the node answers SSH and is this run's to the end of its first step."""
    start: float
    """From the request to start the trainer on: torchrun, the import of torch, the first step."""
    after: float
    """From its last step to the request to terminate, or to the decision to keep."""
    sent_bytes: int
    billed: float
    overhead: float
    phases: dict[str, float]


def seconds(text: str) -> float:
    """A time of an event as POSIX seconds."""
    return datetime.fromisoformat(text).timestamp()


def took(document: dict[str, Any], metrics: list[dict[str, Any]], *, claimed: bool) -> Took:
    """From `show --json` and metrics.jsonl."""
    at: dict[str, float] = {}
    for item in document["events"]:
        at.setdefault(item["kind"], seconds(item["at"]))
    steps = [line["time"] for line in metrics if line["kind"] == "step"]
    ended = at.get("TerminateIntended") or at["NodeKept"]
    phases: dict[str, float] = {}
    for item in document["charges"]:
        spent = seconds(item["end"]) - seconds(item["start"])
        phases[item["phase"]] = phases.get(item["phase"], 0.0) + spent
    lanes = [
        item["sent_bytes"]
        for item in document["events"]
        if item["kind"] == "LaneDone" and item["lane"] in {"code", "data"}
    ]
    return Took(
        "kept, taken over" if claimed else "rented, fresh",
        steps[0] - at["NodeClaimed" if claimed else "NodeReady"],
        steps[0] - at["TrainerStarted"],
        ended - steps[-1],
        sum(lanes),
        document["billed_seconds"],
        document["overhead_fraction"],
        phases,
    )


def measure(runs: int, boot_seconds: float, folder: Path) -> list[Took]:
    """The first run on a fresh node, and the others on it one after the other."""
    from tests.cli import Cli, spec
    from tests.lambda_fixtures import Cloud

    cloud = Cloud(folder / "cloud", pace=1.0, boot_seconds=boot_seconds)
    cli = Cli(folder / "home", cloud.environment(folder / "home"))
    found: list[Took] = []
    try:
        last = ""
        for number in range(runs):
            keep = "30m" if number < runs - 1 else "terminate"
            text = spec(
                name=f"run{number}",
                hardware={"provider": "lambda", "gpu": "A10:1"},
                budget={"max_usd": 5, "max_hours": 1},
                node={"on_finish": keep},
                train__steps=200,
                train__processes_per_node=1,
                train__validate_every=100,
                checkpoint={"every_steps": 100},
            )
            (cli.home / "run.yaml").write_text(text)
            cli.run("launch", "run.yaml", "-y", *(["--on", last] if last else []), timeout=400)
            (run,) = [row["run"] for row in cli.json("status") if row["name"] == f"run{number}"]
            found.append(took(cli.show(run), cli.metrics(run), claimed=bool(last)))
            last = run
    finally:
        cli.left()
        cli.end()
        cloud.may_bill()
        cloud.close()
    return found


def main() -> None:
    """Measure and print the table that stands in docs/performance.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kept-node", description=__doc__)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--boot-seconds", type=float, default=30.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmctl-kept-") as folder:
        found = measure(asked.runs, asked.boot_seconds, Path(folder))
    print(f"{load()}; seconds")
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for item in found:
        print(
            f"| {item.node} | {item.before:.1f} | {item.start:.1f} | {item.after:.1f} | {item.sent_bytes:,} B"
            f" | {item.billed:.0f} | {item.overhead:.0%} |"
        )
    print(
        "by phase of the last: "
        + json.dumps({name: round(spent, 1) for name, spent in found[-1].phases.items()})
    )
    kept = found[1:]
    before, after = max(item.before for item in kept), max(item.after for item in kept)
    print(f"worst on the kept node: first step after {before:.1f} s (target {TARGET_FIRST:g}),"
          f" let go after {after:.1f} s (target {TARGET_LAST:g})")  # fmt: skip


if __name__ == "__main__":
    main()
