"""The program `llmctl`: the one boundary at which every error gets its exit code, and the footer under every command.

`status --json` and completion need no argument parser: they tell what is stored, and are done before one would be loaded. Nor does
a driver, which llmctl starts itself.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator import exits

if TYPE_CHECKING:
    from orchestrator.errors import Failure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the process ends with the exit code of what happened."""
    # Modules are no garbage: looking through them, now and when all is over, takes a tenth of a command's time.
    gc.set_threshold(10_000, 50, 100)
    words = list(sys.argv[1:] if arguments is None else arguments)
    code: int = exits.OK
    try:
        code = _ended(words)
        if _talkative(words):
            from orchestrator import footer

            footer.show()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever was reading is gone: `llmctl ... | head` is no error of ours
        code = code or exits.READER_GONE
        for stream in (1, 2):  # what is left in their buffers goes nowhere, in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    gc.freeze()
    raise SystemExit(code)


def _ended(words: Sequence[str]) -> int:
    """Run the command line; the exit code. Raises BrokenPipeError where nobody reads any more."""
    debug = "--debug" in own(words)
    try:
        code = _run(words, debug=debug)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # what Typer and rich make of it
            raise end.__context__ from None
        raise
    except BrokenPipeError:
        raise
    except Exception as error:  # the boundary: nothing behind it would show the error
        if debug:
            raise
        code = _report(_read(error), words)
    return code if isinstance(code, int) else exits.OK


def _run(words: Sequence[str], *, debug: bool) -> Any:
    """The command's exit code, or None."""
    if plain_status(words):
        from orchestrator.actions import show

        return show.print_status(words[1] if words[1:2] and not words[1].startswith("-") else None)
    if words[:1] == ["internal-driver"] and words[1:]:  # [--force] [--] RUN
        from orchestrator.driver import main as driver
        from runs.store import default_home

        return driver.main(default_home(), words[-1], force="--force" in words[1:-1])
    if shell := os.environ.get("_LLMCTL_COMPLETE"):
        from orchestrator import completion

        code = completion.answered(shell)
        if code is not None:
            return code
    from orchestrator.app import app

    rest = [word for word in words if word != "--debug"] if debug else list(words)
    return app(args=rest, prog_name="llmctl", standalone_mode=False)


def plain_status(words: Sequence[str]) -> bool:
    """Whether the command line is `status [RUN] --json` or `status [RUN] -o json`."""
    tail = list(words[2:] if words[1:2] and not words[1].startswith("-") else words[1:])
    return list(words[:1]) == ["status"] and tail in (["--json"], ["-o", "json"])


def _read(error: Exception) -> Failure:
    from orchestrator.errors import Failure, failure

    if type(error).__name__ == "Abort":
        return Failure(exits.USAGE, "declined", "nothing was done")
    return failure(error)


def own(words: Sequence[str]) -> list[str]:
    """The arguments that are llmctl's, not those of a command behind `--`."""
    return list(words[: words.index("--")] if "--" in words else words)


def wants_json(words: Sequence[str]) -> bool:
    """Whether the caller asked for JSON, known even where the arguments do not parse."""
    mine = own(words)
    pairs = itertools.pairwise(mine)
    return (
        not {"--json", "-ojson", "--output=json", "--format=json"}.isdisjoint(mine)
        or any(one in {"-o", "--output", "--format"} and other == "json" for one, other in pairs)
    )  # fmt: skip


def _report(problem: Failure, words: Sequence[str]) -> int:
    if wants_json(words):
        sys.stdout.write(json.dumps(problem.document(), ensure_ascii=False) + "\n")
    else:
        from orchestrator.figures import on_stderr

        sys.stderr.write(on_stderr(problem.text()) + "\n")
    return problem.exit_code


def _talkative(words: Sequence[str]) -> bool:
    """Whether the footer belongs under this command: not under help, completion or a driver."""
    mine = own(words)
    return bool(mine) and {"--help", "-h", "--version"}.isdisjoint(mine) and not any(
        word.startswith(("internal-driver", "--show-completion", "--install-completion")) for word in mine[:2]
    )  # fmt: skip


if __name__ == "__main__":
    main()
