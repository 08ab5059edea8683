"""`python -m tests.simulation --schedules 100000 --seed 1`."""

from __future__ import annotations

import argparse
import sys
import time

from .campaign import campaign, ground, shrink, try_plan
from .plan import make


def main() -> int:
    """Run schedules; 1 where one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, help="one schedule, by its own seed")
    parser.add_argument("--no-shrink", action="store_true", help="report the first failure as it is")
    options = parser.parse_args()
    began = time.monotonic()
    if options.only is not None:
        with ground() as shared:
            failure, _ = try_plan(make(options.only), shared)
        failure, done = (shrink(failure) if failure else None), 1
    else:
        done, failure = campaign(
            options.schedules, options.seed, processes=options.processes, smallest=not options.no_shrink
        )
    print(
        f"{done} schedules in {time.monotonic() - began:.1f} s: {'one failed' if failure else 'all invariants hold'}"
    )
    if failure:
        print(failure)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
