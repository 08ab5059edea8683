"""What is in the files of wandb's offline runs."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB), with protocol buffers inside."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:
            record = pb.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def told(directory: Path) -> tuple[set[str], list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(run ids, history, last summary, config) of all offline runs in `directory`."""
    ids, history, summary, config = set[str](), list[dict[str, Any]](), dict[str, Any](), dict[str, Any]()
    for path in sorted((directory / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in records(path):
            which = record.WhichOneof("record_type")
            if which == "run":
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif which == "history":
                items = {
                    (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                    for item in record.history.item
                }
                history.append({**items, "_step": record.history.step.num})
            elif which == "summary":
                summary |= {(item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                            for item in record.summary.update}  # fmt: skip
    return ids, history, summary, config
