"""Named, immutable test sets: slices of published token shards on which a loss means the same for ever.

`bytes` is what the tokens' text takes in UTF-8, for bits per byte; llmctl fills it in once it has the slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """Tokens [offset, offset + tokens) of a published shard, each predicting the next."""

    name: str
    source: str
    """`hf://repo/file`."""
    offset: int
    tokens: int
    tokenizer: str
    reference: str
    """Who reports losses on it, and what published weights score."""


SLICES: Mapping[str, Slice] = {
    item.name: item
    for item in (
        Slice(
            name="fineweb-gpjt",
            source="hf://gpjt/fineweb-gpt2-tokens/validation.safetensors",
            offset=50_000_000,
            tokens=19_660_800,
            tokenizer="gpt2",
            reference="gilesthomas.com, LLM from scratch, part 29; OpenAI's GPT-2 small weights score 3.500, medium 3.231",
        ),
        Slice(
            name="fineweb-llmc",
            source="hf://kjj0/fineweb10B-gpt2/fineweb_val_000000.bin",
            offset=0,
            tokens=10_485_760,
            tokenizer="gpt2",
            reference="karpathy/llm.c and KellerJordan/modded-nanogpt; OpenAI's GPT-2 small weights score 3.4250, medium 3.083",
        ),
    )
}
