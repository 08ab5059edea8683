"""Completion from the table says what Typer says, in every shell, for every command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer import _completion_classes as typers

from orchestrator import completion
from orchestrator.app import app
from tests import completions
from tests.seeds import Seed

COMMAND = typer.main.get_command(app)
SHELLS = {
    "complete_bash": typers.BashComplete,
    "complete_zsh": typers.ZshComplete,
    "complete_fish": typers.FishComplete,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Seed(tmp_path).finished()
    Seed(tmp_path, "other-0002").finished()
    monkeypatch.setenv("LLMCTL_HOME", str(tmp_path))


def both(
    words: list[str],
    incomplete: str,
    shell: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[str, str]:
    """What Typer says, and what the table says, with the white space of long help texts made alike."""
    line = " ".join(["llmctl", *words, incomplete])
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) + 1))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    theirs = SHELLS[shell](COMMAND, {}, "llmctl", "_LLMCTL_COMPLETE").complete()
    assert completion.answered(shell) == 0, "the table tells"
    return " ".join(theirs.split()), " ".join(capsys.readouterr().out.split())


def lines(command: completion.Table, path: list[str]) -> Iterator[tuple[list[str], str]]:
    """Command lines that reach all of a command: (words, the incomplete one)."""
    for incomplete in ("", "-", "--j", "d", "zzz"):
        yield path, incomplete
    for name, option in command["options"].items():
        yield [*path, name, *(["1"] if option["value"] else [])], "--"
        if option["value"]:
            yield [*path, name], ""
            yield [*path, name], "j"
    if not command["commands"]:
        yield [*path, "one"], ""
        yield [*path, "one", "two"], "d"
        if "--json" in command["options"]:
            yield [*path, "one", "--json"], "o"
    for name, inner in command["commands"].items():
        yield from lines(inner, [*path, name])


@pytest.mark.parametrize("shell", SHELLS)
def test_the_table_says_what_typer_says(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = 0
    for words, incomplete in lines(completion.table(), []):
        theirs, ours = both(words, incomplete, shell, monkeypatch, capsys)
        # Typer names the options of the help in an order by chance.
        assert ours == theirs or ("-h" in ours and sorted(ours) == sorted(theirs)), (words, incomplete)
        seen += bool(theirs)
    assert seen > 200


def test_the_table_is_that_of_the_app() -> None:
    assert completions.PLACE.read_text() == completions.text(), "run `python -m tests.completions`"


@pytest.mark.parametrize(
    "line",
    ["llmctl show --json=", "llmctl ssh demo -- l", "llmctl nope ", "llmctl show --nope ", "llmctl show 'd"],
)
def test_what_the_table_does_not_tell_is_left_to_the_app(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    assert completion.answered("complete_bash") is None
    assert completion.answered("complete_powershell") is None


def test_fish_asks_whether_there_is_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "is-args")
    for line, code in (("llmctl show de", 0), ("llmctl show zzz", 1)):
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        assert completion.answered("complete_fish") == code
