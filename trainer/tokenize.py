"""Text to token ids and back, on the machine that prepares data and shows samples; the node needs no tokenizer.

`bytes` is the text's UTF-8 bytes (256 ids), `gpt2` tiktoken's encoding of that name (50,257), anything else the
path of a tokenizer.json (tokenizers). In a shard every document is preceded by a separator, as llm.c does it: <|endoftext|>
(50256) for gpt2, a zero byte for bytes, the tokenizer's own <|endoftext|> where it has one.
"""

from __future__ import annotations

import functools
import hashlib
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, cast

SHARD_TOKENS = 100_000_000
END_OF_TEXT = "<|endoftext|>"
BATCH_CHARACTERS = 1 << 20
"""Text that one process encodes at a time."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be had; the message says which, and what to do."""


class TokenizerUnreachable(TokenizerError):
    """Its vocabulary is on the network, and nobody answers."""


class Tokenizer(Protocol):
    """One encoding."""

    vocab_size: int
    separator: int | None
    """The id before each document of a shard."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are plain text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""

    def lengths(self) -> list[int]:
        """UTF-8 bytes that each id stands for; 0 for the separator and other special ones."""


class _Bytes:
    vocab_size = 256
    separator: int | None = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def lengths(self) -> list[int]:
        return [1] * 256


class _Gpt2:
    vocab_size = 50257
    separator: int | None = 50256

    def __init__(self) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise TokenizerError("the tokenizer gpt2 needs tiktoken: pip install 'llmctl[data]'") from error
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError, ImportError) as error:
            raise TokenizerUnreachable(
                f"tiktoken cannot get its gpt2 vocabulary ({type(error).__name__}); it downloads it once, or reads it from TIKTOKEN_CACHE_DIR"
            ) from error

    def encode(self, text: str) -> list[int]:
        return cast("list[int]", self._encoding.encode_ordinary(text))

    def decode(self, ids: Sequence[int]) -> str:
        return cast("str", self._encoding.decode(list(ids)))

    def lengths(self) -> list[int]:
        return [len(self._encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size - 1)] + [0]


class _File:
    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError as error:
            raise TokenizerError(
                f"the tokenizer {path} needs tokenizers: pip install 'llmctl[data]'"
            ) from error
        if not path.is_file():
            raise TokenizerError(
                f"there is no tokenizer {str(path)!r}; write gpt2, bytes, or the path of a tokenizer.json"
            )
        try:
            self._loaded: Any = Loaded.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise TokenizerError(f"{path} is no tokenizer.json: {error}") from error
        self.vocab_size = int(self._loaded.get_vocab_size())
        self.separator: int | None = self._loaded.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        return list(self._loaded.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._loaded.decode(list(ids), skip_special_tokens=False))

    def lengths(self) -> list[int]:
        special = {i for i, token in self._loaded.get_added_tokens_decoder().items() if token.special}
        if type(self._loaded.decoder).__name__ != "ByteLevel":
            raise TokenizerError("the bytes of a token are known for byte-level tokenizers only")
        # A byte-level token has one character for each byte.
        return [0 if i in special else len(self._loaded.id_to_token(i) or "") for i in range(self.vocab_size)]


@functools.lru_cache(maxsize=8)
def load(name: str) -> Tokenizer:
    """The tokenizer `gpt2`, `bytes`, or the one in a tokenizer.json. Raises TokenizerError."""
    if name == "bytes":
        return _Bytes()
    return _Gpt2() if name == "gpt2" else _File(Path(name))


def encode(name: str, text: str) -> list[int]:
    """Ids of a text. Raises TokenizerError."""
    return load(name).encode(text)


def decode(name: str, ids: Sequence[int]) -> str:
    """Text of ids. Raises TokenizerError, also for an id outside the vocabulary."""
    tokenizer = load(name)
    if wrong := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
        raise TokenizerError(f"id {wrong[0]} is not in the vocabulary of {name} ({tokenizer.vocab_size} ids)")
    return tokenizer.decode(ids)


def text_bytes(name: str, ids: Iterable[int]) -> int:
    """UTF-8 bytes that the ids stand for; separators count nothing, bytes are counted as they are."""
    lengths = load(name).lengths()
    return sum(lengths[i] for i in ids)


@dataclass
class Encoded:
    """A few whole documents as ids, each after its separator; in order."""

    documents: int
    train: array[int]
    held_out: array[int]


def encode_documents(
    name: str, documents: Iterable[str], *, processes: int | None = None, held_out: float = 0
) -> Iterator[Encoded]:
    """The documents' ids, a batch at a time, in order; `processes` encode side by side (default: one per core).

    A share `held_out` of the documents is kept apart, chosen by the SHA-256 of their text: the choice does not depend on
    their order, and copies of a document are on one side. Raises TokenizerError."""
    load(name)  # refuse here, not in a worker
    count = processes or os.cpu_count() or 1
    if count == 1:
        for batch in _batches(documents):
            yield _encode_batch(name, batch, held_out)
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        pending: deque[Future[Encoded]] = deque()
        for batch in _batches(documents):
            pending.append(pool.submit(_encode_batch, name, batch, held_out))
            if len(pending) > 2 * count:  # a bound on what waits in memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def train_bpe(documents: Iterable[str], vocab_size: int, path: Path, *, progress: bool = False) -> None:
    """Train a byte-level BPE with <|endoftext|> on the documents and write tokenizer.json. Raises TokenizerError."""
    if not 257 <= vocab_size <= 1 << 16:
        raise TokenizerError(f"a byte-level vocabulary has 257 to 65536 ids here, not {vocab_size}")
    try:
        from tokenizers import Tokenizer as Made
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise TokenizerError("training a tokenizer needs tokenizers: pip install 'llmctl[data]'") from error
    made = Made(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=progress,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    made.train_from_iterator(documents, trainer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        made.save(str(temporary))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_batch(name: str, documents: list[str], held_out: float) -> Encoded:
    tokenizer = load(name)
    code = "H" if tokenizer.vocab_size <= 1 << 16 else "I"
    encoded = Encoded(len(documents), array(code), array(code))
    for document in documents:
        place = int.from_bytes(hashlib.sha256(document.encode("utf-8", errors="replace")).digest()[:8], "big")
        block = encoded.held_out if place < held_out * 2**64 else encoded.train
        if tokenizer.separator is not None:
            block.append(tokenizer.separator)
        block.extend(tokenizer.encode(document))
    return encoded
