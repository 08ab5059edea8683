"""Ten thousand stored runs, and a million lines of metrics.

    python -m benchmarks scale [--runs 10000] [--lines 1000000] [--rounds 5]

The runs are one seeded, finished run with its node and its events, stored under other names and with other losses.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from benchmarks.measure import in_turns, load

CHARTED = "base-00000"


def fill(home: Path, count: int) -> None:
    """A store of `count` runs."""
    from tests.seeds import Seed

    first = Seed(home, CHARTED).finished()
    first.store.close()
    with closing(sqlite3.connect(home / "llmctl.db")) as db, db:
        for table in ("runs", "nodes", "events"):
            rows = db.execute(f"SELECT * FROM {table}").fetchall()
            if table == "events":
                rows = [(None, *row[1:]) for row in rows]  # seq is given by the table
            places = ",".join("?" * len(rows[0]))
            db.executemany(
                f"INSERT INTO {table} VALUES ({places})",
                (
                    tuple(_other(value, number, count) for value in row)
                    for number in range(1, count)
                    for row in rows
                ),
            )


def _other(value: object, number: int, count: int) -> object:
    """The value in a run of another name, at another loss."""
    if not isinstance(value, str):
        return value
    loss = f'"validation_loss": {2 + number / count:.6f}'
    return value.replace(CHARTED, f"base-{number:05}").replace('"validation_loss": 2.7', loss)


def log(path: Path, lines: int) -> None:
    """A metrics.jsonl as the trainer writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for step in range(1, lines + 1):
            file.write(
                f'{{"kind": "step", "step": {step}, "tokens": {step * 524288}, "time": {1.77e9 + step * 0.5}, "loss": {2 + 9 / (1 + step / 1000):.6f},'
                f' "learning_rate": 0.0004, "grad_norm": 0.31, "step_seconds": 0.5, "tokens_per_second": 1048576.0, "memory_gib": 61.2}}\n'
            )


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(arguments)
    ours = str(Path(sys.executable).with_name("llmctl"))
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        fill(home, asked.runs)
        log(home / "runs" / CHARTED / "metrics.jsonl", asked.lines)
        env = {"PATH": os.environ["PATH"], "HOME": name, "LLMCTL_HOME": name, "NO_COLOR": "1"}
        words = (["status"], ["status", "--json"], ["compare"], ["compare", "--json"])
        commands = {f"llmctl {' '.join(item)}": ([ours, *item], env) for item in words}
        chart = f"chart of {asked.lines:,} lines"
        commands[chart] = ([ours, "compare", CHARTED, "--plot"], env)
        print(f"{load()}; {asked.runs:,} runs, a store of {(home / 'llmctl.db').stat().st_size / 1e6:.0f} MB")
        print(f"{'command':26}{'wall s':>8}{'best s':>8}{'cpu s':>8}  target")
        for what, item in in_turns(commands, asked.rounds).items():
            limit = "under 2 s" if what == chart else "under 1 s"
            print(f"{what:26}{item.wall:8.2f}{item.best:8.2f}{item.cpu:8.2f}  {limit}")


if __name__ == "__main__":
    main()
