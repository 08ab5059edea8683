"""The loss on held-out tokens, by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer import shards
from trainer.batches import Reader
from trainer.config import ConfigError, EvaluateConfig, ModelConfig, TestSet
from trainer.distributed import World
from trainer.progress import log, write_json
from trainer.shards import Order

SAMPLE_TOKENS = 64
"""Tokens by which each prompt is continued at the end."""


@dataclass(frozen=True)
class Loss:
    """A mean cross-entropy in nats, and the tokens that it is the mean over."""

    loss: float
    tokens: int


def mean_loss(
    model: nn.Module,
    paths: Sequence[str | Path],
    *,
    offset: int = 0,
    tokens: int,
    config: ModelConfig,
    microbatch_size: int,
    here: World,
    fewer: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    moved: Callable[[int], None] = lambda _: None,
) -> Loss | None:
    """Mean cross-entropy of `tokens` predictions from token `offset` of the shards on, in sequences of the model's
    context length at that stride; each shard's tail is dropped, the last sequence counts in part.

    Every rank calls this, and every rank gets the same result; None: a rank was told to stop (`stopped` is asked
    between batches). `moved` is told the number of each batch that is done. `fewer` takes what is there where that is less. Raises ShardError, and ConfigError where the
    shards do not hold that many tokens.
    """
    reader, wanted = _slice(paths, offset, tokens, config, fewer)
    sequences = -(-wanted // config.context_length)
    rows = -(-sequences // microbatch_size)
    total = torch.zeros((), dtype=torch.float64, device=here.device)
    training = model.training
    model.eval()
    buffer = np.empty((microbatch_size, config.context_length + 1), dtype=np.int64)
    flags = here.agree(stopped())
    try:
        for row in range(here.rank, -(-rows // here.size) * here.size, here.size):
            if flags.result()[0]:
                return None
            flags = here.agree(stopped())
            batch = _batch(reader, row * microbatch_size, sequences, wanted, buffer).to(here.device)
            with torch.no_grad():
                total += model(batch[:, :-1].clamp(min=0), batch[:, 1:], 1.0)
            moved(row)
        flags.result()
    finally:
        model.train(training)
    return Loss(float(here.sum(total)) / wanted, wanted)


def _slice(
    paths: Sequence[str | Path], offset: int, tokens: int, config: ModelConfig, fewer: bool
) -> tuple[Reader, int]:
    infos = [shards.probe(path) for path in paths]
    starts, skip = [], offset
    for info in infos:
        starts.append(min(skip, info.tokens))
        skip -= starts[-1]
    lengths = [info.tokens for info in infos]
    order = Order(lengths, config.context_length, starts)
    held = order.sequences * config.context_length
    if held == 0 or (held < tokens and not fewer):
        raise ConfigError("evaluate.test_sets" if not fewer else "data.validation",
                          f"{', '.join(map(str, paths))}: from token {offset} on there are {held} tokens in whole sequences "
                          f"of {config.context_length}, not {tokens}")  # fmt: skip
    return Reader([str(path) for path in paths], lengths, order, config.vocab_size), min(held, tokens)


def _batch(reader: Reader, first: int, sequences: int, tokens: int, buffer: Any) -> torch.Tensor:
    """Sequences first … of the slice; targets beyond it are −1, so that every batch has one shape."""
    size, width = buffer.shape
    count = max(0, min(size, sequences - first))
    if count:
        reader.read(range(first, first + count), buffer[:count])
    batch = torch.from_numpy(buffer).clone()
    batch[count:, :] = 0
    batch[count:, 1:] = -1
    left = tokens - (first + count - 1) * (width - 1)
    if 0 < left < width - 1 and count:
        batch[count - 1, left + 1 :] = -1
    return batch


def evaluate_checkpoint(
    path: Path,
    shard_paths: Sequence[str | Path],
    *,
    offset: int,
    tokens: int,
    microbatch_size: int = 8,
    device: str = "cpu",
) -> Loss:
    """The loss of a checkpoint on a slice, in this process alone, in float32. Raises ConfigError, ShardError."""
    from trainer.sample import load_model

    model, config = load_model(path, device)
    here = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device(device))
    result = mean_loss(
        model,
        shard_paths,
        offset=offset,
        tokens=tokens,
        config=config.model,
        microbatch_size=microbatch_size,
        here=here,
    )
    assert result is not None
    return result


def summary(test_set: TestSet, loss: Loss, step: int) -> dict[str, Any]:
    """A line of evaluations.json. Bits per byte are loss · tokens / (bytes · ln 2)."""
    bits = loss.loss * loss.tokens / (test_set.bytes * math.log(2)) if test_set.bytes else None
    return {
        "name": test_set.name,
        "loss": loss.loss,
        "tokens": loss.tokens,
        "bytes": test_set.bytes,
        "perplexity": math.exp(min(loss.loss, 700.0)),
        "bits_per_byte": bits,
        "checkpoint_step": step,
    }


def slices(
    model: nn.Module,
    wanted: EvaluateConfig,
    config: ModelConfig,
    *,
    microbatch_size: int,
    here: World,
    step: int,
    stopped: Callable[[], bool] = lambda: False,
    moved: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]] | None:
    """A line of evaluations.json for each test set; None: a rank was told to stop. Every rank calls this. Raises ConfigError,
    ShardError."""
    results = []
    for test_set in wanted.test_sets:
        if not isinstance(test_set, TestSet):
            raise ConfigError(
                "evaluate.test_sets",
                f"{test_set!r} is a name; config.json needs {{name, data, offset, tokens}}",
            )
        result = mean_loss(
            model, test_set.data, offset=test_set.offset, tokens=test_set.tokens, config=config,
            microbatch_size=microbatch_size, here=here, stopped=stopped, moved=moved,
        )  # fmt: skip
        if result is None:
            return None
        results.append(summary(test_set, result, step))
    return results


def samples(path: Path, prompts: Sequence[Sequence[int]], device: torch.device) -> list[dict[str, Any]]:
    """How the model in `path` continues each prompt, always in the same way."""
    if not prompts:
        return []
    from trainer.sample import generate, load_model

    model, _ = load_model(path, device)
    return [
        {"prompt_index": index, "tokens": list(generate(model, prompt, max_tokens=SAMPLE_TOKENS, temperature=0.8, top_k=50, seed=0))}
        for index, prompt in enumerate(prompts)
    ]  # fmt: skip


def report(out: Path, results: list[dict[str, Any]], texts: list[dict[str, Any]], step: int) -> None:
    """evaluations.json, and a line of the log for each loss."""
    write_json(out / "evaluations.json", {"test_sets": results, "samples": texts})
    for item in results:
        loss = "not finite" if item["loss"] is None else f"{item['loss']:.4f}"
        on = f"{item['examples']} examples" if "examples" in item else f"{item['tokens']:,} tokens"
        log(f"{item['name']}: loss {loss} on {on} (checkpoint of step {step})")
