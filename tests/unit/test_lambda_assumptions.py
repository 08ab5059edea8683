"""docs/assumptions.md holds: every switch that it names exists, every test is there and under that switch."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from tests.lambda_server.switches import Fault, Switches

TESTS = Path(__file__).resolve().parents[1]
DOCUMENT = TESTS.parent / "docs" / "assumptions.md"
ROWS = [
    [cell.strip() for cell in line.strip("|\n ").split(" | ")]
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ \|", line)
]
KINDS = set(get_args(Fault.model_fields["kind"].annotation))
NO_BELIEF = {"pace", "faults", "node_env"}
"""Switches that are conditions of a test, not beliefs."""


def sources() -> dict[str, str]:
    """The text of each test, its decorators and the module's constants that it names."""
    found = {}
    for path in TESTS.rglob("test_lambda*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            ast.unparse(node.target): ast.unparse(node)
            for node in tree.body
            if isinstance(node, ast.AnnAssign)
        }
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                text = ast.unparse(node)
                found[node.name] = text + "".join(value for name, value in constants.items() if name in text)
    return found


SOURCES = sources()


def test_the_rows_are_numbered() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1))
    assert len(ROWS) > 30


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_belief_has_a_switch_and_a_test_under_it(row: list[str]) -> None:
    _, _, _, switches, test = row
    names = re.findall(r"`([\w-]+)`", switches)
    assert names
    assert set(names) <= (KINDS if switches.startswith("fault:") else set(Switches.model_fields))
    assert any(re.search(rf"\b{name}\b", SOURCES[test.strip("`")]) for name in names)


def test_every_switch_belongs_to_a_belief() -> None:
    named = {name for row in ROWS for name in re.findall(r"`([\w-]+)`", row[3])}
    assert set(Switches.model_fields) - named == NO_BELIEF
    assert named >= KINDS
