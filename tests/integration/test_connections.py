"""Links that break, stall and move under a whole run: training is not disturbed, and each byte of log and metrics arrives once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.__main__ import attempt
from tests.faults.kinds import KINDS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", ["link-reset:1", "server-moved:1", "host-key-changed:1"])
def test_a_broken_link_loses_nothing(case: str, shards: Path) -> None:
    """Cut in mid-transfer; the node's server gone and back at another address; another host key, which ends the run at once."""
    name, _, seed = case.partition(":")
    outcome = attempt(KINDS[name], int(seed), shards, None, plain=True)
    assert {column: found for column, found in outcome.found.items() if found} == {}
    assert outcome.injected == KINDS[name].times
