"""Token shards: what a file holds, and which tokens step n reads.

Three formats, all of them little-endian integers from some offset on: llm.c's `.bin` (256 int32 of header: magic,
version, tokens; magic 20240520 v1 has uint16 tokens, 20240801 v7 uint32), safetensors with one 1-D uint16 tensor
`tokens`, and headerless uint16. Standard library only.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

HEADER_BYTES = 1024
MAGIC_UINT16 = (20240520, 1)
MAGIC_UINT32 = (20240801, 7)
_FOREIGN = {
    b"PAR1": "a parquet file",
    b"\x93NUM": "a NumPy file",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b\x08": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
}
_WIDTH = {"uint16": 2, "uint32": 4}


class ShardError(Exception):
    """A shard that cannot be trained on: the message names the file and the byte offset of the fault."""

    def __init__(self, path: Path | str, offset: int, message: str) -> None:
        super().__init__(f"{path} at byte {offset}: {message}")
        self.path = Path(path)
        self.offset = offset


@dataclass(frozen=True)
class ShardInfo:
    """`tokens` integers of type `dtype` (uint16 | uint32), little-endian, from byte `offset` of `path` on."""

    path: Path
    tokens: int
    dtype: str
    offset: int


def probe(path: Path | str) -> ShardInfo:
    """What the shard at `path` holds, from its header and size. Raises ShardError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
            if path.suffix == ".safetensors" or _looks_like_safetensors(head, size):
                return _safetensors(path, head[:8], size)
    except OSError as error:
        raise ShardError(path, 0, error.strerror or str(error)) from error
    if size == 0:
        raise ShardError(path, 0, "the file is empty")
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise ShardError(path, 0, f"is {what}, not token data; `llmctl data prepare` makes shards")
    return _llm_c(path, head, size) or _headerless(path, size)


def _llm_c(path: Path, head: bytes, size: int) -> ShardInfo | None:
    if len(head) < 12:
        return None
    magic, version, tokens = struct.unpack_from("<iii", head)
    dtypes = {MAGIC_UINT16: "uint16", MAGIC_UINT32: "uint32"}
    dtype = dtypes.get((magic, version))
    if dtype is None:
        known = {key[0]: key[1] for key in dtypes}
        if magic in known:
            raise ShardError(
                path, 4, f"version {version}; with magic {magic} only version {known[magic]} is known"
            )
        if len(head) == HEADER_BYTES and not any(head[12:]):
            raise ShardError(
                path, 0, f"magic {magic}; token shards have {MAGIC_UINT16[0]} or {MAGIC_UINT32[0]}"
            )
        return None
    expected = HEADER_BYTES + tokens * _WIDTH[dtype]
    if tokens < 0 or size != expected:
        relation = "ends early" if size < expected else "has more"
        raise ShardError(path, min(size, max(0, expected)),
                         f"{relation}: {tokens} {dtype} tokens take {expected} bytes, the file has {size}")  # fmt: skip
    return ShardInfo(path, tokens, dtype, HEADER_BYTES)


def _looks_like_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= min(size, 100 << 20)


def _safetensors(path: Path, length: bytes, size: int) -> ShardInfo:
    header_bytes = int.from_bytes(length, "little")
    if len(length) < 8 or header_bytes + 8 > size:
        raise ShardError(
            path, 0, f"the safetensors header would take {header_bytes} bytes of a file of {size}"
        )
    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(header_bytes))
            entry = header["tokens"]
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (ValueError, KeyError, TypeError):
            raise ShardError(path, 8, "the safetensors header describes no tensor `tokens`") from None
    if dtype not in {"U16", "U32"} or len(shape) != 1:
        raise ShardError(
            path,
            8,
            f"`tokens` is {dtype} with {len(shape)} dimensions; it must be one-dimensional U16 or U32",
        )
    name = "uint16" if dtype == "U16" else "uint32"
    offset = 8 + header_bytes + begin
    if end - begin != shape[0] * _WIDTH[name] or 8 + header_bytes + end > size:
        raise ShardError(path, min(size, offset), f"ends early: {shape[0]} tokens reach to byte {8 + header_bytes + end}, the file has {size}")  # fmt: skip
    return ShardInfo(path, shape[0], name, offset)


def _headerless(path: Path, size: int) -> ShardInfo:
    if size % 2:
        raise ShardError(
            path, size - 1, f"headerless uint16 data has an even number of bytes, not {size}; it was cut off"
        )
    return ShardInfo(path, size // 2, "uint16", 0)


def write_bin(path: Path | str, tokens: Iterable[int] | bytes | bytearray | memoryview) -> ShardInfo:
    """Write an llm.c v1 shard (uint16) under a temporary name, sync it and rename it to `path`.

    `tokens` are numbers below 65,536, or the little-endian bytes of such. Raises ValueError for a token that does not
    fit, OSError where the disk does not take it; nothing half-written stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(bytes(HEADER_BYTES))
            count = 0
            for block in _blocks(tokens):
                file.write(block)
                count += len(block) // 2
            file.seek(0)
            file.write(struct.pack("<iii", *MAGIC_UINT16, count))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return ShardInfo(path, count, "uint16", HEADER_BYTES)


def _blocks(tokens: Iterable[int] | bytes | bytearray | memoryview) -> Iterable[bytes | memoryview]:
    if isinstance(tokens, (bytes, bytearray, memoryview)):
        view = memoryview(tokens).cast("B")
        if len(view) % 2:
            raise ValueError(f"uint16 tokens take an even number of bytes, not {len(view)}")
        yield view
        return
    numbers = iter(tokens)
    while block := list(islice(numbers, 1 << 20)):
        try:
            packed = array("H", block)
        except OverflowError:
            wrong = next(number for number in block if not 0 <= number < 1 << 16)
            raise ValueError(f"token {wrong} does not fit into 16 bits") from None
        if sys.byteorder == "big":
            packed.byteswap()
        yield packed.tobytes()


class Order:
    """Which tokens sequence i is: the data order of the whole run, a pure function of the shards' lengths.

    A sequence is `context_length` tokens and the one after them, at stride `context_length` from `start` of its shard; it
    never spans shards, what is left at a shard's end is dropped. Sequence numbers go on into further epochs.
    """

    def __init__(
        self, tokens: Sequence[int], context_length: int, starts: Sequence[int] | None = None
    ) -> None:
        self.context_length = context_length
        self._starts = list(starts) if starts is not None else [0] * len(tokens)
        counts = [max(0, (n - s - 1) // context_length) for n, s in zip(tokens, self._starts, strict=True)]
        self._ends = list(accumulate(counts))

    @property
    def sequences(self) -> int:
        """Sequences in one epoch."""
        return self._ends[-1] if self._ends else 0

    def locate(self, sequence: int) -> tuple[int, int]:
        """(shard index, first token) of sequence number `sequence`, counted from 0 over all epochs."""
        index = sequence % self.sequences
        shard = bisect.bisect_right(self._ends, index)
        before = self._ends[shard - 1] if shard else 0
        return shard, self._starts[shard] + (index - before) * self.context_length

    def shards_of_step(self, step: int, global_batch_size: int) -> set[int]:
        """Indices of the shards that step number `step` (from 1) reads."""
        begin = (step - 1) * global_batch_size % self.sequences
        end = begin + global_batch_size
        parts = [(begin, min(end, self.sequences)), (0, min(max(0, end - self.sequences), self.sequences))]
        return {
            shard
            for shard, upto in enumerate(self._ends)
            for low, high in parts
            if max(low, self._ends[shard - 1] if shard else 0) < min(high, upto)
        }

    def epoch_of_step(self, step: int, global_batch_size: int) -> int:
        """Epoch, from 0, of the last sequence of step number `step`."""
        return (step * global_batch_size - 1) // self.sequences
