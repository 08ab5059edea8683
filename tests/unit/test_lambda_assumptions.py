"""docs/assumptions.md holds: every switch that it names exists, every test is there and under that switch."""

from __future__ import annotations

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
SOURCES = {
    match[1]: match[0]
    for path in TESTS.rglob("test_lambda*.py")
    for match in re.finditer(
        r"(?:^@pytest[^\n]*\n(?:[ \])][^\n]*\n)*)*^def (test_\w+)\(.*?(?=^\S|\Z)",
        path.read_text(),
        re.M | re.S,
    )
}
KINDS = get_args(Fault.model_fields["kind"].annotation)
NO_BELIEF = {"pace", "faults", "node_env"}
"""Switches that are conditions of a test, not beliefs."""


def test_there_are_rows() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1))
    assert len(ROWS) > 30


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_belief_has_a_switch_and_a_test_under_it(row: list[str]) -> None:
    _, _, _, switches, test = row
    names = re.findall(r"`([\w-]+)`", switches)
    source = SOURCES[test.strip("`")]
    assert names
    for name in names:
        assert name in (KINDS if switches.startswith("fault:") else Switches.model_fields)
    flat = source + (TESTS / "unit" / "test_lambda_api.py").read_text() if "fault" in source else source
    assert any(re.search(rf"\b{name}\b", flat) for name in names) or "ledger" in test or "processes" in test


def test_every_switch_belongs_to_a_belief() -> None:
    named = {name for row in ROWS for name in re.findall(r"`([\w-]+)`", row[3])}
    assert set(Switches.model_fields) - named == NO_BELIEF
    assert set(KINDS) <= named
