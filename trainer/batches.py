"""Batches of tokens: memory-mapped shards, read ahead by one thread into pinned memory.

No worker processes: a step of half a million tokens reads one megabyte.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer import shards
from trainer.config import ConfigError, DataConfig
from trainer.shards import Order, ShardError, ShardInfo

AHEAD = 3
"""Microbatches that are read ahead: one is trained on, one is on its way to the device, one is being filled."""


class Reader:
    """Sequences by number, from shards that may still arrive."""

    def __init__(self, paths: Sequence[str], tokens: Sequence[int], order: Order, vocab_size: int) -> None:
        self.paths, self.order = [Path(path) for path in paths], order
        self._tokens, self._vocab_size = tokens, vocab_size
        self._maps: dict[int, Any] = {}

    def present(self, indices: set[int]) -> bool:
        """Whether these shards are there (a shard appears whole, by a rename)."""
        return all(index in self._maps or self.paths[index].exists() for index in indices)

    def _map(self, index: int) -> Any:
        found = self._maps.get(index)
        if found is None:
            info = shards.probe(self.paths[index])
            if info.tokens != self._tokens[index]:
                raise ShardError(info.path, info.offset,
                                 f"holds {info.tokens} tokens, the configuration says {self._tokens[index]}")  # fmt: skip
            found = self._maps[index] = map_tokens(info)
        return found

    def read(self, sequences: Sequence[int], into: Any) -> None:
        """Copy sequences into `into` (int64, len(sequences) × context_length + 1). Raises ShardError, also for a token
        outside the vocabulary."""
        width = self.order.context_length + 1
        for row, sequence in enumerate(sequences):
            shard, start = self.order.locate(sequence)
            into[row] = self._map(shard)[start : start + width]
        if into.max() >= self._vocab_size:
            row, column = np.argwhere(into >= self._vocab_size)[0]
            shard, start = self.order.locate(sequences[row])
            info = shards.probe(self.paths[shard])
            offset = info.offset + (start + int(column)) * (2 if info.dtype == "uint16" else 4)
            raise ShardError(info.path, offset,
                             f"token {into[row, column]}, but model.vocab_size is {self._vocab_size}; "
                             "the shard was made with another tokenizer")  # fmt: skip


def map_tokens(info: ShardInfo) -> Any:
    """The tokens of a shard as a read-only, memory-mapped 1-D array."""
    if info.tokens == 0:
        raise ShardError(info.path, info.offset, "holds no tokens")
    dtype = np.dtype("<u2" if info.dtype == "uint16" else "<u4")
    return np.memmap(info.path, dtype=dtype, mode="r", offset=info.offset, shape=(info.tokens,))


def training_reader(data: DataConfig, context_length: int, vocab_size: int) -> Reader:
    """The reader of `data.train`. Raises ShardError for a missing or broken shard, ConfigError where the shards hold no
    sequence at all. With `data.train_tokens` shards may be missing still."""
    if data.train_tokens is not None:
        if len(data.train_tokens) != len(data.train):
            raise ConfigError(
                "data.train_tokens", f"{len(data.train_tokens)} numbers for {len(data.train)} shards"
            )
        tokens = data.train_tokens
    else:
        tokens = [shards.probe(path).tokens for path in data.train]
    order = Order(tokens, context_length)
    if order.sequences == 0:
        raise ConfigError("model.context_length", f"{context_length} tokens and the next one are more than any shard of data.train holds (at most {max(tokens)})")  # fmt: skip
    return Reader(data.train, tokens, order, vocab_size)


@dataclass
class _Slot:
    """A buffer in host memory and, on a GPU, the event after which it may be filled again."""

    buffer: Tensor
    copied: Any = None


class Batches:
    """One rank's microbatches from `first_step` on, in order, read ahead.

    Rank r of w has the r-th of w equal parts of each global batch. `next` gives (tokens, targets), both (b, t) int64 on
    the device; a failure to read is raised there.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        global_batch_size: int,
        microbatch_size: int,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
        device: torch.device,
    ) -> None:
        self._reader, self._device = reader, device
        self._share = global_batch_size // world_size
        self._first = (first_step - 1) * global_batch_size + rank * self._share
        self._shape = (global_batch_size, microbatch_size)
        self._steps = last_step - first_step + 1
        pin = device.type == "cuda"
        width = reader.order.context_length + 1
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(AHEAD):
            self._free.put(_Slot(torch.empty(microbatch_size, width, dtype=torch.int64, pin_memory=pin)))
        self._ready: queue.SimpleQueue[_Slot | BaseException] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="read-ahead", daemon=True)
        self._thread.start()

    def _read_ahead(self) -> None:
        global_batch_size, size = self._shape
        try:
            if self._device.type == "cuda":
                # A thread begins on GPU 0, and waiting for an event would open a context there.
                torch.cuda.set_device(self._device)
            for step in range(self._steps):
                base = self._first + step * global_batch_size
                for start in range(base, base + self._share, size):
                    sequences = range(start, start + size)
                    wanted = {self._reader.order.locate(sequence)[0] for sequence in sequences}
                    while not self._reader.present(wanted):
                        if self._closed.wait(0.1):
                            return
                    slot = self._free.get()
                    if self._closed.is_set():
                        return
                    if slot.copied is not None:
                        slot.copied.synchronize()
                    self._reader.read(sequences, slot.buffer.numpy())
                    self._ready.put(slot)
        except (ShardError, OSError, ValueError, RuntimeError) as error:  # the last: from CUDA
            self._ready.put(error)

    def next(self) -> tuple[Tensor, Tensor]:
        """The next microbatch. Raises ShardError."""
        slot = self._ready.get()
        if isinstance(slot, BaseException):
            raise slot
        if self._device.type == "cuda":
            tokens = slot.buffer.to(self._device, non_blocking=True)
            slot.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.copied.record()
        else:
            tokens = slot.buffer.clone()
        self._free.put(slot)
        return tokens[:, :-1], tokens[:, 1:]

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._free.put(_Slot(torch.empty(0)))
        self._thread.join()


def await_shards(
    reader: Reader,
    needed: set[int],
    exchange: Callable[[bool], Sequence[bool]],
    waiting: Callable[[Path], None],
) -> bool:
    """Wait until every rank has the shards `needed`. Each rank must call this for the same step.

    `exchange(missing)` tells all ranks and returns (any rank misses one, any rank was told to stop); `waiting` is called
    with the missing shard's path each time round. False: stopped meanwhile.
    """
    while True:
        missing = [reader.paths[index] for index in sorted(needed) if not reader.present({index})]
        anyone, stop = exchange(bool(missing))
        if not anyone:
            return True
        if stop:
            return False
        if missing:
            waiting(missing[0])
