"""Shards are read in three formats, refused with the file and the offset, and ordered by one pure function."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from trainer.batches import map_tokens, training_reader
from trainer.config import ConfigError, DataConfig
from trainer.shards import Order, ShardError, probe, write_bin

TOKENS = list(range(1000, 1300))


def as_bin(path: Path) -> None:
    write_bin(path, TOKENS)


def as_wide_bin(path: Path) -> None:
    path.write_bytes(
        struct.pack("<256i", 20240801, 7, len(TOKENS), *[0] * 253) + np.array(TOKENS, dtype="<u4").tobytes()
    )


def as_safetensors(path: Path) -> None:
    save_file({"tokens": torch.tensor(TOKENS, dtype=torch.uint16)}, path)


def as_headerless(path: Path) -> None:
    path.write_bytes(np.array(TOKENS, dtype="<u2").tobytes())


@pytest.mark.parametrize("write", [as_bin, as_wide_bin, as_safetensors, as_headerless])
def test_every_format_reads_the_same(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "shard"
    write(path)
    info = probe(path)
    assert info.tokens == len(TOKENS)
    assert map_tokens(info).tolist() == TOKENS


def test_bytes_and_numbers_write_the_same_file(tmp_path: Path) -> None:
    write_bin(tmp_path / "a", TOKENS)
    write_bin(tmp_path / "b", np.array(TOKENS, dtype="<u2").tobytes())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert struct.unpack("<3i", (tmp_path / "a").read_bytes()[:12]) == (20240520, 1, 300)


def test_a_token_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="65536 does not fit"):
        write_bin(tmp_path / "a", [1, 65536])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "offset", "message"), [
    (b"", 0, "empty"),
    (struct.pack("<256i", 20240520, 2, 4, *[0] * 253) + bytes(8), 4, "version 2"),
    (struct.pack("<256i", 20240522, 1, 4, *[0] * 253) + bytes(8), 0, "magic 20240522"),
    (struct.pack("<256i", 20240520, 1, 9, *[0] * 253) + bytes(8), 1032, "ends early"),
    (struct.pack("<256i", 20240520, 1, 2, *[0] * 253) + bytes(8), 1028, "has more"),
    (struct.pack("<3i", 20240520, 1, 9), 12, "ends early"),
    (b"abc", 2, "cut off"),
    (b"PAR1" + bytes(20), 0, "parquet"),
    (struct.pack("<Q", 30) + b"{" + bytes(40), 8, "no tensor `tokens`"),
])  # fmt: skip
def test_a_broken_shard_names_itself_and_the_offset(
    tmp_path: Path, content: bytes, offset: int, message: str
) -> None:
    path = tmp_path / "shard"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=message) as caught:
        probe(path)
    assert caught.value.offset == offset
    assert str(path) in str(caught.value)


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    as_safetensors(tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ShardError, match="ends early"):
        probe(tmp_path / "b.safetensors")
    save_file({"tokens": torch.zeros(4)}, tmp_path / "c.safetensors")
    with pytest.raises(ShardError, match="F32"):
        probe(tmp_path / "c.safetensors")


def naive_sequences(lengths: list[int], context: int) -> list[tuple[int, int]]:
    """The definition: each shard's sequences at stride `context`, each with the token after it, tails dropped."""
    return [
        (shard, start)
        for shard, n in enumerate(lengths)
        for start in range(0, n, context)
        if start + context + 1 <= n
    ]


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 30),
)
def test_the_order_is_its_definition(lengths: list[int], context: int, batch: int, step: int) -> None:
    order, naive = Order(lengths, context), naive_sequences(lengths, context)
    assert order.sequences == len(naive)
    if not naive:
        return
    numbers = range((step - 1) * batch, step * batch)
    located = [order.locate(number) for number in numbers]
    assert located == [naive[number % len(naive)] for number in numbers]
    assert order.shards_of_step(step, batch) == {shard for shard, _ in located}
    assert order.epoch_of_step(step, batch) == numbers[-1] // len(naive)


def test_a_token_of_another_tokenizer_is_found(tmp_path: Path) -> None:
    write_bin(tmp_path / "a.bin", [5] * 100 + [999] + [5] * 100)
    reader = training_reader(DataConfig(train=[str(tmp_path / "a.bin")]), 10, 256)
    buffer = np.empty((1, 11), dtype=np.int64)
    reader.read([0], buffer)
    with pytest.raises(ShardError, match="token 999") as caught:
        reader.read([10], buffer)
    assert caught.value.offset == 1024 + 2 * 100


def test_numbers_that_do_not_match_are_refused(tmp_path: Path) -> None:
    write_bin(tmp_path / "a.bin", [5] * 100)
    with pytest.raises(ConfigError, match="2 numbers for 1"):
        training_reader(DataConfig(train=["a"], train_tokens=[1, 2]), 10, 256)
    with pytest.raises(ConfigError, match="more than any shard"):
        training_reader(DataConfig(train=[str(tmp_path / "a.bin")]), 100, 256)
    reader = training_reader(DataConfig(train=[str(tmp_path / "a.bin")], train_tokens=[101]), 10, 256)
    with pytest.raises(ShardError, match="the configuration says 101"):
        reader.read([0], np.empty((1, 11), dtype=np.int64))
