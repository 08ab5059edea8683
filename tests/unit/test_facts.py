"""Names of nodes, and what an inventory shows."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs.facts import Inventory, Marker, NodeFacts, base36, key_of, lease_minutes, run_of
from tests.simulation.builders import at

_names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,31}-[a-z0-9]{4}", fullmatch=True)


@given(_names, st.integers(1, 999), st.integers(0, 99), st.integers(0, 10**6))
def test_a_name_is_read_back_as_it_was_written(run: str, attempt: int, index: int, minutes: int) -> None:
    marker = Marker(run=run, attempt=attempt, index=index, lease_end=at(0) + timedelta(minutes=minutes))
    assert Marker.parse(marker.name) == marker
    assert key_of(marker.name) == key_of(marker.key) == marker.key
    assert run_of(marker.key) == run


@pytest.mark.parametrize(
    "name",
    [
        "",
        "llmctl-",
        "my-node",
        "llmctl-demo-a1-n0",
        "llmctl-demo-0001-a1-n0-tZZ",
        "xllmctl-demo-0001-a1-n0-t1",
    ],
)
def test_other_names_are_not_ours(name: str) -> None:
    assert Marker.parse(name) is None
    assert key_of(name) is None
    with pytest.raises(ValueError, match="not the key"):
        run_of(name)


@given(st.integers(0, 10**12))
def test_base36(number: int) -> None:
    assert int(base36(number), 36) == number


@pytest.mark.parametrize(("seconds", "minutes"), [(0, 0), (1, 1), (59.5, 1), (60, 1), (60.000001, 2)])
def test_a_lease_is_rounded_up_to_whole_minutes(seconds: float, minutes: int) -> None:
    assert lease_minutes(at(seconds)) == at(60 * minutes)


def test_an_inventory_finds_by_key_or_id_the_living_first() -> None:
    def node(node_id: str, status: str, key: str | None = "k") -> NodeFacts:
        return NodeFacts(id=node_id, name="", status=status, provider="p", key=key)  # type: ignore[arg-type]

    inventory = Inventory(
        at=at(0), nodes=[node("a", "terminated"), node("b", "active"), node("c", "active", None)]
    )
    assert inventory.find("k").id == "b"  # type: ignore[union-attr]
    assert inventory.find("unknown", "c").id == "c"  # type: ignore[union-attr]
    assert inventory.find("unknown") is None
    assert Inventory(at=at(0), nodes=[node("a", "terminated")]).find("k").id == "a"  # type: ignore[union-attr]
