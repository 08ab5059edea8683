"""What is text only: command lines, paths, and what a terminal may be shown."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.figures import sane
from orchestrator.remote.node import node_path
from orchestrator.remote.session import command_line

plain = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)))


@given(st.lists(plain, min_size=1, max_size=4))
def test_arguments_survive_the_shell(words: list[str]) -> None:
    line, first = command_line(["printf", "%s\\0", *words])
    shown = subprocess.run(["sh", "-c", line], input=first, capture_output=True, check=True)
    assert shown.stdout.decode() == "".join(f"{word}\0" for word in words)
    assert shown.stderr.strip().isdigit(), "the process id comes first"


@given(st.dictionaries(st.sampled_from(["A", "B_1", "_x"]), plain, min_size=1))
def test_environment_survives_and_stays_out_of_the_line(env: dict[str, str]) -> None:
    names = sorted(env)
    line, first = command_line(
        ["sh", "-c", "".join(f'printf "%s\\0" "${name}";' for name in names) + "cat"], env
    )
    shown = subprocess.run(["sh", "-c", line], input=first + b"input", capture_output=True, check=True)
    assert shown.stdout.decode() == "".join(f"{env[name]}\0" for name in names) + "input"
    assert (
        line
        == command_line(
            ["sh", "-c", "".join(f'printf "%s\\0" "${name}";' for name in names) + "cat"],
            dict.fromkeys(env, ""),
        )[0]
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/a", "a"),
        ("~", "."),
        ("a/b", "a/b"),
        ("/abs", "/abs"),
        ("-rf", "./-rf"),
        ("~/-x", "./-x"),
        ("a~b", "a~b"),
    ],
)
def test_node_path(path: str, expected: str) -> None:
    assert node_path(path) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é\ttext\n", "plain é\ttext\n"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]52;c;ZXZpbA==\x1b\\after", "after"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bP$q\x1b\\after", "after"),
        ("\x9b31mred", "red"),
        ("\x1b(Bx\x1bcy\x1b[?1049hz\x1b[2J", "xyz"),
        ("10%\r20%\r\n", "10%\n20%\n"),
        ("a\x00b\x07c\x08d\x7f\x85", "abcd"),
        ("abc\u202edef\u2066g", "abcdefg"),
        ("cut \x1b[", "cut "),
        ("cut \x1b", "cut "),
    ],
)
def test_what_a_node_prints_is_made_safe(text: str, expected: str) -> None:
    assert sane(text) == expected


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = sane(text)
    assert not any(ord(letter) < 32 and letter not in "\t\n" for letter in shown)
    assert not any(0x7F <= ord(letter) <= 0x9F for letter in shown)
    assert sane(shown) == shown
