"""One metric over a run, for charts: a few hundred points from a file of any size."""

from __future__ import annotations

import mmap
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs.metrics import number, read_line


@dataclass(frozen=True)
class Series:
    """One metric over a run, for a chart; the four lists have one length."""

    steps: list[int]
    tokens: list[int]
    times: list[float]
    values: list[float]


def series(path: Path, key: str = "loss", points: int = 500) -> Series:
    """`key` of a metrics.jsonl in at most `points` points, each the mean of the lines that were looked at around it.

    Validations are all looked at; of the steps of a long run a few neighbours for each point, so that a file of any
    size takes the same time. A file that is not there gives an empty series.
    """
    if not path.exists() or path.stat().st_size == 0:
        return Series([], [], [], [])
    kind = b"validation" if key == "validation_loss" else b"step"
    found: list[list[dict[str, Any]]] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if kind == b"step" and len(data) > points * _LOOK:
            size = len(data) / points
            found = [_block(data, int(index * size), _LOOK) for index in range(points)]
        elif kind == b"step":
            found = _grouped(_block(data, 0, len(data)), points)
        else:
            found = _grouped(_sparse(data, kind), points)
    wanted = [[item for item in group if number(item.get(key)) is not None] for group in found]
    means = [
        (group[len(group) // 2], statistics.fmean(item[key] for item in group)) for group in wanted if group
    ]
    return Series(
        [item["step"] for item, _ in means],
        [int(number(item.get("tokens")) or 0) for item, _ in means],
        [item["time"] for item, _ in means],
        [value for _, value in means],
    )


_LOOK = 2048
"""Bytes that are looked at for one point of a long run: about eight steps."""


def _block(data: mmap.mmap, begin: int, length: int) -> list[dict[str, Any]]:
    """The step records that begin in `data[begin : begin + length]`."""
    begin = data.find(b"\n", begin - 1) + 1 if begin else 0
    end = data.find(b"\n", begin + length)
    lines = data[begin : end if end >= 0 else len(data)].splitlines()
    records = [read_line(line) for line in lines if b"step_seconds" in line]
    return [record for record in records if record is not None and record["kind"] == "step"]


def _sparse(data: mmap.mmap, kind: bytes) -> list[dict[str, Any]]:
    """All records of a kind that is rare."""
    records, at = [], data.find(kind)
    while at >= 0:
        begin, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
        end = end if end >= 0 else len(data)
        record = read_line(data[begin:end])
        if record is not None and record["kind"].encode() == kind:
            records.append(record)
        at = data.find(kind, end)
    return records


def _grouped(records: list[dict[str, Any]], points: int) -> list[list[dict[str, Any]]]:
    size = max(1, -(-len(records) // points))
    return [records[index : index + size] for index in range(0, len(records), size)]
