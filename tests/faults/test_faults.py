"""The short pass of the fault harness: kinds that no other test injects. `make faults` runs them all, from several seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.__main__ import attempt
from tests.faults.kinds import KINDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards, tokenised once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    "case",
    [
        "driver-killed-after-launch:1",
        "trainer-hangs:1",
        "full-disk-here:3",
    ],
)
def test_nothing_is_lost(case: str, cache: Path) -> None:
    """No instance, launch, checkpoint, line or dollar; and the fault did happen."""
    name, _, seed = case.partition(":")
    outcome = attempt(KINDS[name], int(seed), cache, None, plain=True)
    assert {column: found for column, found in outcome.found.items() if found} == {}
    assert outcome.injected == KINDS[name].times
