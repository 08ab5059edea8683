"""How long llmctl takes to say anything, beside an empty Python and beside `lai`, the quickest of its peers, in the same run.

    python -m benchmarks startup [--rounds 15]

`lai` is the command of the PyPI package lambda-ai-cloud-api-client; it is installed into .venv-bench, a virtual environment
of its own made with the same Python. Where it cannot be installed the ratios are left out, and the reason is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import in_turns, load

ROOT = Path(__file__).resolve().parents[1]
PEER = "lambda-ai-cloud-api-client"
TARGETS = {"llmctl --help": 0.9, "llmctl status --json": 0.6, "llmctl completion": 0.6}
"""At most so much of the peer's wall time."""


def peer() -> tuple[Path | None, str]:
    """The peer's command, or None and why there is none."""
    folder = ROOT / ".venv-bench"
    command = folder / "bin" / "lai"
    try:
        if not command.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
            pip = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q"]
            subprocess.run([*pip, PEER], check=True, capture_output=True, timeout=300)
    except subprocess.CalledProcessError as error:
        return None, f"{PEER} cannot be installed: {error.stderr.decode(errors='replace').strip()[-200:]}"
    except subprocess.TimeoutExpired:
        return None, f"{PEER} was not installed within five minutes"
    return (command, "") if command.exists() else (None, f"{PEER} brings no command `lai`")


def modules(python: str, script: Path, arguments: list[str], env: dict[str, str]) -> int:
    """How many modules a console script has loaded when it ends."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "finally: sys.stderr.write(f'\\n{len(sys.modules)}')"
    )
    done = subprocess.run(
        [python, "-c", code, str(script), *arguments], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stderr.rsplit("\n", 1)[-1])


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args(arguments)
    from tests.seeds import Seed

    ours = Path(sys.executable).with_name("llmctl")
    lai, reason = peer()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        for number in range(3):
            Seed(home, f"demo-000{number}").finished().store.close()
        env = {"PATH": os.environ["PATH"], "HOME": name, "LLMCTL_HOME": name, "NO_COLOR": "1"}
        completing = {
            "_LLMCTL_COMPLETE": "complete_bash",
            "COMP_WORDS": "llmctl show demo",
            "COMP_CWORD": "2",
        }
        commands = {
            "python -c pass": ([sys.executable, "-c", "pass"], env),
            "llmctl --help": ([str(ours), "--help"], env),
            "llmctl status --json": ([str(ours), "status", "--json"], env),
            "llmctl completion": ([str(ours)], env | completing),
        }
        if lai:
            commands["lai --help"] = ([str(lai), "--help"], env)
        print(load())
        took = in_turns(commands, asked.rounds)
        base = took.get("lai --help")
        print(
            f"{'command':22}{'wall ms':>9}{'best ms':>9}{'cpu ms':>8}{'modules':>9}{'of lai':>8}{'cpu':>6}  target"
        )
        for what, item in took.items():
            argv, given = commands[what]
            count = (
                modules(str(Path(argv[0]).with_name("python")), Path(argv[0]), list(argv[1:]), dict(given))
                if Path(argv[0]) in {ours, lai}
                else 0
            )
            ratios = (
                f"{item.wall / base.wall:8.2f}{item.cpu / base.cpu:6.2f}" if base else f"{'-':>8}{'-':>6}"
            )
            target = f"  at most {TARGETS[what]}" if what in TARGETS else ""
            print(
                f"{what:22}{item.wall * 1000:9.0f}{item.best * 1000:9.0f}{item.cpu * 1000:8.0f}"
                f"{count or '':>9}{ratios}{target}"
            )
    if not lai:
        print(f"without the peer: {reason}")


if __name__ == "__main__":
    main()
