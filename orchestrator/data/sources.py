"""From the spec's `data` and `evaluate` to the exact files a node needs, before anything is rented.

    DataError      3: no such file, no match, wrong magic, truncated, too short, ids beyond the vocabulary
    └── Offline    3: the source is on the network, and nobody answers

Only what the run reads is shipped: as many training shards as its steps take, the tokens of one validation, the
slice of a test set. Of a file that is much larger than its share (published 20 GB files), and of a published one that
is so large that training would wait for it, pieces are taken: ranges of its bytes behind an llm.c header. A piece holds a
multiple of `context_length` tokens and the one after, so the sequences of the pieces are those of the file, in the same
order (trainer/shards.py, Order).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.data.errors import DataError, Offline
from orchestrator.data.find import Finder, ObjectStore
from orchestrator.data.hashes import HashCache, Progress, quiet
from orchestrator.data.hub import HttpHub, Hub
from orchestrator.data.shares import Cutter, Shard, TestSetPlan, header
from trainer import shards, tokenize
from trainer.config import DataConfig, TestSet, TrainerConfig
from trainer.slices import SLICES

__all__ = [
    "DataPlan",
    "Shard",
    "TestSetPlan",
    "decode",
    "encode_prompts",
    "load_plan",
    "pull_item",
    "resolve",
    "resolve_spec",
    "save_plan",
]


@dataclass(frozen=True)
class DataPlan:
    """Everything that a run reads."""

    train: tuple[Shard, ...]
    validation: tuple[Shard, ...] = ()
    test_sets: tuple[TestSetPlan, ...] = ()
    tests: tuple[Shard, ...] = ()
    """Test examples, of tuning."""
    base: tuple[Shard, ...] = ()
    """The files of the model that is tuned or measured."""
    prompt_tokens: list[list[int]] = field(default_factory=list)
    needed_tokens: int = 0
    train_tokens: int | None = None
    """Tokens in whole sequences of the training files; None: unknown."""
    warnings: tuple[str, ...] = ()

    @property
    def shards(self) -> list[Shard]:
        """Each file once, in the order in which training wants them."""
        wanted = [
            *self.base,
            *self.train[:1],
            *self.validation,
            *self.train[1:],
            *self.tests,
            *(s for item in self.test_sets for s in item.shards),
        ]
        return list({item.node_name: item for item in wanted}.values())

    @property
    def first(self) -> frozenset[str]:
        """Node names of what must be there before training starts."""
        return frozenset(item.node_name for item in (*self.base, *self.train[:1], *self.validation))

    @property
    def epochs(self) -> float | None:
        """How often the training data is read; None: unknown."""
        return self.needed_tokens / self.train_tokens if self.train_tokens else None

    @property
    def local_bytes(self) -> int:
        """Bytes that this machine sends."""
        return sum(item.bytes or 0 for item in self.shards if item.path is not None)

    @property
    def remote_bytes(self) -> int:
        """Bytes that the node fetches by itself, as far as they are known."""
        return sum(item.bytes or 0 for item in self.shards if item.url is not None)


def resolve_spec(
    spec: TrainerConfig, *, cache: Path, objects: ObjectStore | None = None, hub: Hub | None = None, pinned: bool = True,
    progress: Progress = quiet,
) -> DataPlan:  # fmt: skip
    """The plan of a run from the sections of its spec. See resolve."""
    return resolve(
        spec.data, cache=cache, needed_tokens=spec.steps * spec.tokens_per_step, context_length=spec.model.context_length,
        vocab_size=spec.model.vocab_size, validation_tokens=spec.train.validation_tokens, test_sets=spec.evaluate.test_sets,
        prompts=spec.evaluate.prompts, objects=objects, hub=hub, pinned=pinned, progress=progress,
    )  # fmt: skip


def resolve(
    data: DataConfig, *, cache: Path, needed_tokens: int, context_length: int = 1024, vocab_size: int | None = None,
    validation_tokens: int = 1_000_000, test_sets: Sequence[TestSet | str] = (), prompts: Sequence[str] = (),
    objects: ObjectStore | None = None, hub: Hub | None = None, pinned: bool = True, progress: Progress = quiet,
    tokens: bool = True,
) -> DataPlan:  # fmt: skip
    """Which files a run of `needed_tokens` reads; without `tokens`, only those of its test sets. `pinned=False` lets an hf:// name stand for itself where the Hub cannot be
    asked (a plan may be made offline; a launch may not). Raises DataError."""
    finder = Finder(cache, data.tokenizer, hub or HttpHub(cache / "hub"), objects, pinned, progress)
    cutter = Cutter(cache, HashCache(cache), context_length, vocab_size, progress)
    listed = data if tokens else DataConfig([])
    train_files = [found for source in listed.train for found in finder.find(source, "train")]
    train, train_tokens = cutter.share(train_files, -(-needed_tokens // context_length), "data.train")
    validation: tuple[Shard, ...] = ()
    if listed.validation:
        held_out = [found for source in listed.validation for found in finder.find(source, "validation")]
        validation, _ = cutter.share(held_out, -(-validation_tokens // context_length), "data.validation")
    plans = []
    for item in test_sets:
        test_set = _published(item, data.tokenizer) if isinstance(item, str) else item
        files = [found for source in test_set.data for found in finder.find(source, "validation")]
        plan = cutter.slice(test_set, files, data.tokenizer)
        name = item if isinstance(item, str) else cutter.named(item, files)
        plans.append(dataclasses.replace(plan, test_set=dataclasses.replace(plan.test_set, name=name)))
    try:
        prompt_tokens = encode_prompts(data.tokenizer, prompts)
    except Offline as error:
        if pinned:
            raise
        prompt_tokens = []
        finder.warnings.append(f"the prompts were not tokenised: {error}")
    return DataPlan(train, validation, tuple(plans), prompt_tokens=prompt_tokens, needed_tokens=needed_tokens,
                    train_tokens=train_tokens, warnings=tuple(finder.warnings))  # fmt: skip


def _published(name: str, tokenizer: str) -> TestSet:
    known = SLICES.get(name)
    if known is None:
        raise DataError(
            f"there is no built-in test set {name!r}", f"The built-in ones are {', '.join(SLICES)}"
        )
    if known.tokenizer != tokenizer:
        raise DataError(
            f"{name} is in tokens of {known.tokenizer}, and the model's tokenizer is {tokenizer}",
            "A loss compares only within one tokenizer; name another test set",
        )
    return TestSet(name, [known.source], known.offset, known.tokens)


def pull_item(shard: Shard, path: str, objects: ObjectStore | None = None) -> dict[str, Any]:
    """One entry of the manifest that trainer/pull.py reads: `shard` shall become `path` on the node. Raises DataError."""
    url = shard.url or ""
    if url.startswith("s3://"):
        if objects is None:
            raise DataError(
                f"{url}: no S3 client is set up", "Install llmctl[aws] and configure AWS credentials"
            )
        url = objects.presign_get(url)
    item: dict[str, Any] = {"url": url, "path": path, "bytes": shard.bytes, "sha256": shard.sha256}
    if shard.source.startswith("hf://"):
        item["bearer_env"] = "HF_TOKEN"  # where the node has it: gated repositories
    if shard.span is not None and shard.tokens is not None:
        item.update(
            span=list(shard.span),
            header=header(shard.tokens, shard.dtype).rstrip(b"\0").hex(),
            header_bytes=shards.HEADER_BYTES,
        )
    return item


def save_plan(plan: DataPlan, path: Path) -> None:
    """Keep a plan: what was resolved once holds for every attempt of the run."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(dataclasses.asdict(plan), default=str), encoding="utf-8")
    temporary.replace(path)


def load_plan(path: Path) -> DataPlan | None:
    """A plan that was kept, or None."""
    if not path.exists():
        return None
    raw = json.loads(path.read_text(encoding="utf-8"))
    tests = [TestSetPlan(TestSet(**item["test_set"]), _shards(item["shards"])) for item in raw["test_sets"]]
    raw.update(
        train=_shards(raw["train"]),
        validation=_shards(raw["validation"]),
        tests=_shards(raw.get("tests", [])),
        base=_shards(raw.get("base", [])),
        test_sets=tuple(tests),
        warnings=tuple(raw["warnings"]),
    )
    return DataPlan(**raw)


def _shards(raw: list[dict[str, Any]]) -> tuple[Shard, ...]:
    for item in raw:
        item["path"] = Path(item["path"]) if item["path"] else None
        item["span"] = tuple(item["span"]) if item["span"] else None
    return tuple(Shard(**item) for item in raw)


def encode_prompts(tokenizer: str, prompts: Sequence[str]) -> list[list[int]]:
    """The prompts as tokens, since the node has no tokenizer. Raises DataError."""
    try:
        return [tokenize.encode(tokenizer, prompt) for prompt in prompts]
    except tokenize.TokenizerUnreachable as error:
        raise Offline(str(error)) from error
    except tokenize.TokenizerError as error:
        raise DataError(str(error)) from error


def decode(tokenizer: str, ids: Sequence[int]) -> str:
    """Text of tokens. Raises DataError."""
    try:
        return tokenize.decode(tokenizer, ids)
    except tokenize.TokenizerError as error:
        raise DataError(str(error)) from error
