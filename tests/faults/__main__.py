"""`python -m tests.faults [--seeds 3] [--faults 60] [--jobs 1] [--to docs/reliability.md] [--only KIND[:SEED],…]`: the fault harness."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.faults.audit import COLUMNS, Reference, audit, reference, store_is_whole
from tests.faults.harness import Case, Outcome
from tests.faults.kinds import KINDS, Kind
from tests.faults.report import report


def undisturbed(cache: Path) -> Reference:
    """The run without a fault. Raises AssertionError where even that does not go well."""
    with stage() as root:
        case = Case("undisturbed", 0, root, cache)
        outcome = Outcome("undisturbed", 0)
        try:
            case.launch()
            code = case.carry_on()
            audit(case, outcome, code=code, expected=0, known=None)
            known = reference(case)
        finally:
            case.cli.end()
            case.close(outcome)
        wrong = {column: found for column, found in outcome.found.items() if found}
        assert not wrong, wrong
        return known


@contextmanager
def stage() -> Iterator[Path]:
    """A folder with a short name, since sockets live in it; gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="llmctl-fault-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def attempt(kind: Kind, seed: int, cache: Path, known: Reference | None, *, plain: bool = False) -> Outcome:
    """One case, from nothing to its audit. `plain`: see Case."""
    outcome, began = Outcome(kind.name, seed), time.monotonic()
    with stage() as root:
        case = Case(kind.name, seed, root, cache, plain=plain)
        try:
            end = kind.inject(case)
            case.rest()
            audit(case, outcome, code=end.code, expected=end.expected, known=known, exact=end.exact)
            if not store_is_whole(case):
                outcome.complain("other", "the rows of the store are not the fold of its events")
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            outcome.complain("other", f"{type(error).__name__}: {error}")
        finally:
            outcome.injected, outcome.announced = case.injected, case.tap.announced
            outcome.complain("intents", *case.tap.unannounced)
            if any(outcome.found.values()):
                sys.stderr.write(case.cli.driver_log() + "\n")
            case.close(outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def plan(seeds: int, faults: int, only: str | None) -> list[tuple[Kind, int]]:
    """The cases: every kind once, then again under another seed, until they inject so many faults. The seeds take turns."""
    chosen: list[tuple[Kind, int]] = []
    if only is not None:
        for word in only.split(","):
            name, _, seed = word.partition(":")
            chosen += [(KINDS[name], number) for number in ([int(seed)] if seed else range(1, seeds + 1))]
        return chosen
    for turn in range(seeds):
        for index, kind in enumerate(KINDS.values()):
            if turn and sum(item.times for item, _ in chosen) >= faults:
                return chosen
            chosen.append((kind, (index + turn) % seeds + 1))
    return chosen


def campaign(cases: list[tuple[Kind, int]], jobs: int, cache: Path) -> Iterator[Outcome]:
    """The cases' outcomes, as they come."""
    known = undisturbed(cache)
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda case: attempt(case[0], case[1], cache, known), cases)


def simulate(schedules: int) -> tuple[str, bool]:
    """What the simulation of so many schedules says, and whether all invariants hold."""
    command = ["tests.simulation", "--schedules", str(schedules)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    said = done.stdout.splitlines()[0] if done.stdout else "it did not run"
    return f"`python -m {' '.join(command)}`: {said}.", done.returncode == 0


def line(outcome: Outcome) -> str:
    """An outcome for the terminal."""
    wrong = [
        f"{COLUMNS[column]}: {sentence}" for column, found in outcome.found.items() for sentence in found
    ]
    head = f"{'ok  ' if not wrong else 'FAIL'} {outcome.kind}:{outcome.seed} ({outcome.injected} faults, {outcome.seconds:.0f} s)"
    return "\n".join([head, *(f"       {sentence}" for sentence in wrong)])


def main() -> int:
    """Run the cases; 1 where one of them lost something."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--faults", type=int, default=60, help="stop after so many, once every kind was tried"
    )
    parser.add_argument("--only", metavar="KIND[:SEED],…", help="these kinds or cases alone; writes no table")
    parser.add_argument("--jobs", type=int, default=1, help="cases at once")
    parser.add_argument(
        "--log", type=Path, help="append outcomes to it; the table is made of all that it holds"
    )
    parser.add_argument("--schedules", type=int, default=100_000, help="simulated ones, afterwards")
    parser.add_argument("--to", type=Path, default=Path("docs/reliability.md"), help="where the table goes")
    options = parser.parse_args()
    cases = plan(options.seeds, options.faults, options.only)
    outcomes = []
    with stage() as folder:
        for outcome in campaign(cases, options.jobs, folder / "cache"):
            outcomes.append(outcome)
            print(line(outcome), flush=True)
            if options.log is not None:
                with options.log.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
    failed = [outcome for outcome in outcomes if any(outcome.found.values())]
    print(
        f"{sum(outcome.injected for outcome in outcomes)} faults in {len(outcomes)} cases, {len(failed)} of them went wrong"
    )
    if options.only is None:
        if options.log is not None:
            outcomes = [Outcome(**json.loads(text)) for text in options.log.read_text().splitlines()]
        simulated, well = simulate(options.schedules)
        options.to.write_text(report(outcomes, simulated), encoding="utf-8")
        return 0 if well and not failed else 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
