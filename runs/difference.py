"""In what two runs differ: spec, hardware, versions, and then results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runs.compare import COLUMNS, LOSSES, SETS, TEXT, Entry, Row, flat, number, rows, within_noise


@dataclass(frozen=True)
class Difference:
    """One thing in which two runs differ."""

    part: Literal["spec", "hardware", "versions", "result"]
    key: str
    left: Any
    right: Any
    note: str = ""
    """For results: by how much; or why they cannot be compared."""


def diff(
    left: Entry, right: Entry, test_set: str | None = None, sigmas: Mapping[str, float] | None = None
) -> list[Difference]:
    """What differs between two runs: in spec, hardware and versions, and then in result; `sigmas` is the noise of each
    loss column, as far as it is known."""
    found = _changes("spec", flat(left.spec or {}), flat(right.spec or {}))
    hardware = ("provider", "instance_type", "gpu", "gpus", "microbatch_size")
    found += _changes(
        "hardware", {key: left.row[key] for key in hardware}, {key: right.row[key] for key in hardware}
    )
    places = ("region", "world_size")
    found += _changes(
        "hardware",
        {key: left.facts.get(key) for key in places},
        {key: right.facts.get(key) for key in places},
    )
    found += _changes("versions", left.facts.get("versions") or {}, right.facts.get("versions") or {})
    common = test_set or next((name for name in left.test_losses if name in right.test_losses), None)
    one, other = rows([left], common)[0], rows([right], common)[0]
    for key in COLUMNS:
        if key in TEXT or key in {"gpus", "microbatch_size"} or one[key] == other[key]:
            continue
        found.append(
            Difference("result", key, one[key], other[key], _note(key, one, other, (sigmas or {}).get(key)))
        )
    return found


def _changes(part: Literal["spec", "hardware", "versions"], left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Difference]:  # fmt: skip
    keys = [*left, *(key for key in right if key not in left)]
    return [
        Difference(part, key, left.get(key), right.get(key))
        for key in keys
        if left.get(key) != right.get(key)
    ]


def _note(key: str, one: Row, other: Row, sigma: float | None) -> str:
    left, right, of = number(one[key]), number(other[key]), SETS.get(key)
    if left is None or right is None:
        return ""
    if of and one.get(of) != other.get(of):
        return "not comparable: measured on different sets"
    change = f"{right - left:+.4f}" if key in LOSSES else f"{right / left - 1:+.1%}" if left else ""
    if key in LOSSES and sigma is not None:
        change += " (within noise)" if within_noise(left, right, sigma) else ""
    return change
