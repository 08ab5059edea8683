"""Completion in the shell, from a table of the commands: no argument parser has to be loaded for it.

`completions.json` is made of the app by `python -m tests.completions`; a test holds the two together. What the table does not tell
(other shells, `--option=value`, what stands behind `--`) the app answers, as Typer does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runs.store import Store, default_home

Candidate = tuple[str, str]
"""(what is offered, what it is; "": nothing to say)."""
Table = dict[str, Any]


def complete_run(incomplete: str) -> list[Candidate]:
    """Runs of the local store that begin so, newest first, with their state."""
    home = default_home()
    if not (home / "llmctl.db").exists():
        return []
    store = Store(home)
    try:
        found = store.runs()
    finally:
        store.close()
    return [(run, state) for run, _, state in found if run.startswith(incomplete)][:100]


def complete_recipe(incomplete: str) -> list[str]:
    """The shipped recipes that begin so."""
    from runs import recipes

    return [name for name in recipes.names() if name.startswith(incomplete)]


SOURCES: dict[str, Callable[[str], Sequence[Candidate | str]]] = {
    function.__name__: function for function in (complete_run, complete_recipe)
}


def table() -> Table:
    """The commands, their options and arguments."""
    return dict(json.loads(Path(__file__).with_name("completions.json").read_text(encoding="utf-8")))


def answered(shell: str) -> int | None:
    """Answer the shell on stdout; the exit code, or None where the app must answer. `shell`: as in `complete_bash`."""
    words = _words(shell)
    found = candidates(table(), *words) if words else None
    if found is None:
        return None
    if shell == "complete_fish" and os.environ.get("_TYPER_COMPLETE_FISH_ACTION") == "is-args":
        return 0 if found else 1
    lines = [_FORMS[shell](*candidate) for candidate in found]
    if shell == "complete_zsh":
        lines = [f"_arguments '*: :(({chr(10).join(lines)}))'"] if lines else ["_files"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def candidates(command: Table, words: Sequence[str], incomplete: str) -> list[Candidate] | None:
    """What may stand in place of `incomplete` behind `words`; None where the table does not tell."""
    if "=" in incomplete or not {"=", "--"}.isdisjoint(words):
        return None
    used, values, pending, rest = set[str](), list[str](), None, list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if command["commands"]:
                command, used = command["commands"].get(word), set()
                if command is None:
                    return None
            else:
                values.append(word)
            continue
        name = word.partition("=")[0]
        option = command["options"].get(name)
        if option is None:
            return None
        used.add(option["is"])
        if option["value"] and "=" not in word:
            pending = None if rest else option
            del rest[:1]
    if incomplete.startswith("-"):
        return [(name, option["help"]) for name, option in command["options"].items()
                if name.startswith(incomplete) and option["listed"]
                and (option["multiple"] or option["is"] not in used)]  # fmt: skip
    if pending is not None:
        return _offered(pending["from"], incomplete)
    for place, argument in enumerate(command["arguments"]):
        if argument["multiple"] or place >= len(values):
            return _offered(argument["from"], incomplete)
    return [(name, inner["help"]) for name, inner in command["commands"].items()
            if name.startswith(incomplete) and inner["listed"]]  # fmt: skip


def _offered(source: str | list[str] | None, incomplete: str) -> list[Candidate]:
    """From a function of SOURCES or a list of choices; nothing for what the shell itself completes, as paths."""
    found = SOURCES[source](incomplete) if isinstance(source, str) else source or []
    pairs = [(item, "") if isinstance(item, str) else item for item in found]
    return [pair for pair in pairs if pair[0].startswith(incomplete)]


def _words(shell: str) -> tuple[list[str], str] | None:
    """(the words before the one that is completed, that one)."""
    import shlex

    try:
        if shell == "complete_bash":
            words, place = shlex.split(os.environ["COMP_WORDS"]), int(os.environ["COMP_CWORD"])
            return words[1:place], words[place] if place < len(words) else ""
        if shell in _FORMS:
            line = os.environ["_TYPER_COMPLETE_ARGS"]
            words = shlex.split(line)[1:]
            return (words, "") if not words or line.endswith(" ") else (words[:-1], words[-1])
    except (KeyError, ValueError):  # a quote that is still open
        pass
    return None


_ZSH = str.maketrans({'"': '""', "'": "''", "$": "\\$", "`": "\\`", ":": "\\\\:"})


def _zsh(value: str, what: str) -> str:
    return ":".join(f'"{text.translate(_ZSH)}"' for text in (value, what) if text)


_FORMS: dict[str, Callable[[str, str], str]] = {
    "complete_bash": lambda value, _: value,
    "complete_zsh": _zsh,
    "complete_fish": lambda value, what: f"{value}\t{what}" if what else value,
}
