"""What the commands share: their common options, the store, completion from it, and the two ways of answering."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.actions.show import find as find_run
from orchestrator.actions.show import print_json
from orchestrator.completion import complete_run
from orchestrator.errors import Usage
from runs.store import Store, default_home


class Form(StrEnum):
    """What `-o` takes."""

    TEXT = "text"
    JSON = "json"


OUTPUT = "Output"
Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON document on stdout, and nothing else.", rich_help_panel=OUTPUT),
]
Output = Annotated[
    Form,
    typer.Option(
        "-o",
        "--output",
        help="text, or json: the same as --json.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="An id, a unique prefix of one, or a name (its newest run).",
        autocompletion=complete_run,
        show_default=False,
    ),
]
AnyRun = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="An id, a prefix of one, or a name. Without it: the newest live run, else the newest.",
        autocompletion=complete_run,
        show_default=False,
    ),
]
Runs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN]...", help="Ids, prefixes or names; none: all.", autocompletion=complete_run,
                   show_default=False),
]  # fmt: skip
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the spec, as --set train.learning_rate=1e-3."
    ),
]
MaxUsd = Annotated[
    float | None, typer.Option("--max-usd", min=0.0, metavar="N", help="Dollars over all attempts.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def examples(*lines: str) -> str:
    """The epilogue of a command's help."""
    return "Examples: " + " · ".join(f"`{line}`" for line in lines)


def add(app: typer.Typer, panel: str, name: str, function: Callable[..., Any], *lines: str) -> None:
    """Add a command to a panel of the help, with examples."""
    app.command(name, epilog=examples(*lines), rich_help_panel=panel)(function)


def machine(as_json: bool, output: Form) -> bool:
    """Whether the result goes out as JSON."""
    return as_json or output is Form.JSON


def answer(document: Any, *, as_json: bool, human: Callable[[], None]) -> None:
    """The result on stdout: as JSON, or as `human` prints it."""
    if as_json:
        print_json(document)
    else:
        human()


def tell(text: str) -> None:
    """A line of chatter, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def interactive() -> bool:
    """Someone is there to answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str, *, yes: bool) -> bool:
    """Ask on stderr. Raises Usage where nobody is there to ask."""
    if yes:
        return True
    if not interactive():
        raise Usage(f"{question} There is no terminal to ask", "add -y to go ahead without being asked")
    return typer.confirm(question, err=True)


def open_store(home: Path | None = None) -> Store:
    """The store of this LLMCTL_HOME."""
    return Store(home or default_home())


def find_all(store: Store, words: Sequence[str] | None) -> list[str] | None:
    """The runs that `words` mean, each once; None for all. The name of a sweep means all of its runs."""
    if not words:
        return None
    sweeps = store.sweeps(words)
    return list(dict.fromkeys(run for word in words for run in sweeps.get(word) or [find_run(store, word)]))
