"""Writes orchestrator/completions.json, the table that shells are answered from, of the app: `python -m tests.completions`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import typer
from typer import rich_utils

from orchestrator import completion
from orchestrator.app import app

PLACE = Path(completion.__file__).with_name("completions.json")


def plain(text: str | None) -> str:
    """Help without markup, in one line."""
    return " ".join(rich_utils.rich_render_text(text or "").split())


def source(param: Any) -> str | list[str] | None:
    """Where the values of an option or an argument come from."""
    custom = param._custom_shell_complete  # Typer tells it nowhere else
    if custom is not None:
        function = inspect.unwrap(inspect.getclosurevars(custom).nonlocals["autocompletion"])
        assert completion.SOURCES[function.__name__] is function
        return str(function.__name__)
    kind = param.type_descriptor
    assert not kind.is_file
    return [str(getattr(one, "value", one)) for one in kind.choices] if kind.is_choice else None


def described(command: Any, context: Any) -> dict[str, Any]:
    """One command, and those below it."""
    inner = command.make_context(command.name, [], parent=context, resilient_parsing=True)
    options: dict[str, Any] = {}
    arguments = []
    for param in command.get_params(inner):
        if param.param_type_name == "argument":
            arguments.append({"from": source(param), "multiple": param.nargs == -1})
            continue
        for name in sorted(param.opts) + param.secondary_opts:
            options[name] = {
                "is": param.name,
                "value": not (param.is_flag or param.count),
                "multiple": param.multiple,
                "listed": not param.hidden,
                "help": plain(param.help),
                "from": None if param.is_flag else source(param),
            }
    below = {name: command.get_command(inner, name) for name in command.list_commands(inner)} if hasattr(command, "commands") else {}  # fmt: skip
    return {
        "help": plain(command.get_short_help_str()),
        "listed": not command.hidden,
        "options": options,
        "arguments": arguments,
        "commands": {name: described(found, inner) for name, found in below.items()},
    }


def text() -> str:
    """The table as the file holds it."""
    return json.dumps(described(typer.main.get_command(app), None), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PLACE.write_text(text(), encoding="utf-8")
