"""The program `llmctl`: its commands in panels, and the one boundary at which every error gets its exit code."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from orchestrator import exits
from orchestrator.commands import data, finish, hidden, models, results, start, watch
from orchestrator.errors import Failure, failure

app = typer.Typer(
    name="llmctl",
    help="Pretrain GPT-style models on rented GPU nodes: one command, one honest bill.",
    epilog=exits.epilog(),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (start, watch, finish, results, models, data, hidden):
    module.register(app)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        sys.stdout.write(f"llmctl {version('llmctl')}\n")
        raise typer.Exit


@app.callback()
def root(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where a command fails.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Pretrain GPT-style models on rented GPU nodes: one command, one honest bill."""
    del version
    if debug:
        os.environ["LLMCTL_DEBUG"] = "1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the process ends with the exit code of what happened."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in own(words)
    try:
        code = app(args=[word for word in words if word != "--debug"] if debug else words, prog_name="llmctl",
                   standalone_mode=False)  # fmt: skip
    except typer.Abort:
        code = _report(Failure(exits.USAGE, "declined", "nothing was done"), words)
    except Exception as error:  # the boundary: nothing behind it would show the error
        if debug:
            raise
        code = _report(failure(error), words)
    if _talkative(words):
        from orchestrator import footer

        footer.show()
    _flush()
    raise SystemExit(code if isinstance(code, int) else exits.OK)


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
        sys.stderr.write(problem.text() + "\n")
    return problem.exit_code


def _talkative(words: Sequence[str]) -> bool:
    """Whether the footer belongs under this command: not under help, completion or the hidden ones."""
    mine = own(words)
    return bool(mine) and {"--help", "-h", "--version"}.isdisjoint(mine) and not any(
        word.startswith(("internal-", "--show-completion", "--install-completion")) for word in mine[:2]
    )  # fmt: skip


def _flush() -> None:
    """Write out what is left; whoever was reading may be gone, which is no error of ours."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
