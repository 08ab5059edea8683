"""All measurements one after the other, or the ones that are named: `python -m benchmarks [startup] [scale] [transfer] [kept-node] [fleet] [trainer]`.

What a benchmark can be told besides is behind its own `--help`: `python -m benchmarks scale --help`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "startup": ["-m", "benchmarks.startup"],
    "scale": ["-m", "benchmarks.scale"],
    "transfer": ["-m", "benchmarks.transfer"],
    "kept-node": ["-m", "benchmarks.kept_node"],
    "fleet": ["-m", "benchmarks.fleet"],
    "trainer": ["benchmarks/trainer.py", "ratio"],
}


def main() -> None:
    """Each in a process of its own: one that cannot run here says why, and the next begins."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, add_help="--help" not in sys.argv[2:]
    )
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(COMMANDS)}; all by default")
    asked, rest = parser.parse_known_args()
    unknown = [name for name in asked.names if name not in COMMANDS]
    # `scale --runs 100`: figures after an option are its own.
    if asked.names and asked.names[0] in COMMANDS and rest:
        asked.names, rest, unknown = asked.names[:1], sys.argv[2:], []
    if unknown or (rest and not asked.names):
        parser.error(f"there is no benchmark {' '.join(unknown or rest)}; there are {', '.join(COMMANDS)}")
    failed = []
    for name in asked.names or COMMANDS:
        print(f"\n== {name}", flush=True)
        done = subprocess.run([sys.executable, *COMMANDS[name], *rest], cwd=ROOT, check=False)
        if done.returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
