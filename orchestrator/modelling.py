"""`sample` and `evaluate`: a checkpoint on this side, loaded with torch where torch is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import render
from orchestrator.errors import Invalid, Unverified, Usage
from orchestrator.figures import number
from runs.store import Store

if TYPE_CHECKING:
    from orchestrator.sources import Shard
    from trainer.config import TestSet


@dataclass(frozen=True)
class How:
    """How text is drawn."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    tokens: int
    device: str


@dataclass(frozen=True)
class Found:
    """A checkpoint on this side."""

    path: Path
    run: str | None
    step: int | None
    tokenizer: str
    prompts: tuple[str, ...] = ()
    test_sets: tuple[Any, ...] = ()

    @property
    def label(self) -> str:
        """How it is called in what is printed."""
        return f"{self.run} at step {self.step}" if self.run else str(self.path)


def need_torch() -> None:
    """Raise Invalid, naming the extra, where torch is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("torch", "numpy", "safetensors") if find_spec(name) is None]
    if missing:
        raise Invalid(
            f"this needs {', '.join(missing)} on this machine",
            "pip install 'llmctl[trainer]'",
            code="no-extra",
        )


def find(store: Store, word: str, which: str) -> Found:
    """The checkpoint that a run or a path means. Raises NoSuchRun, NothingToFetch, Invalid."""
    path = Path(word).expanduser()
    if path.is_dir() and (path / "config.json").exists():
        return _of_path(path)
    if "/" in word or path.exists():
        raise Invalid(
            f"{word} is no folder of a checkpoint: it has no config.json",
            "name a run, or a step-NNNNNN folder",
        )
    from orchestrator import fetch
    from orchestrator.show import find_record

    record = find_record(store, word)
    if which == "all":
        raise Usage("one model is needed, not all", "--which best, latest or a step")
    chosen = fetch.choose(record, which)
    whole = fetch.fetch(store, record, chosen, weights_only=True)[0]
    evaluate = record.spec["evaluate"]
    return Found(whole.path, record.run, whole.step, record.spec["data"]["tokenizer"], tuple(evaluate["prompts"]),
                 tuple(evaluate["test_sets"]))  # fmt: skip


def _of_path(path: Path) -> Found:
    from trainer import manifest

    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        tokenizer = str(raw["data"]["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Invalid(
            f"{path / 'config.json'} cannot be read: {error}", "name the folder of a checkpoint"
        ) from error
    return Found(path, None, manifest.step_of(path.resolve().name), tokenizer)


def sample(found: Found, prompt: str | None, how: How) -> dict[str, Any]:
    """A prompt and what the model makes of it. Raises Usage without a prompt."""
    need_torch()
    from orchestrator import sources
    from trainer.sample import generate, load_model

    chosen = prompt if prompt is not None else next(iter(found.prompts), None)
    if not chosen:
        raise Usage("there is no prompt", f"llmctl sample {found.run or found.path} 'Every effort moves you'")
    model, _ = load_model(found.path, how.device)
    ids = sources.encode_prompts(found.tokenizer, [chosen])[0]
    try:
        drawn = list(generate(model, ids, max_tokens=how.tokens, temperature=how.temperature, top_k=how.top_k,
                              top_p=how.top_p, seed=how.seed))  # fmt: skip
    except ValueError as error:
        raise Usage(
            f"the prompt does not suit the model: {error}", f"its tokenizer is {found.tokenizer!r}"
        ) from error
    text = sources.decode(found.tokenizer, drawn)
    return {"run": found.run, "path": str(found.path), "step": found.step, "prompt": chosen, "text": text,
            "tokens": len(drawn), "seed": how.seed, "temperature": how.temperature}  # fmt: skip


def say_samples(samples: Sequence[dict[str, Any]]) -> None:
    """The texts; with their models' names where there are several."""
    for item in samples:
        if len(samples) > 1:
            render.heading(f"{item['run'] or item['path']} (step {item['step']})")
        render.line(item["prompt"] + item["text"])


def test_sets(
    found: Found, *, data: Sequence[str], name: str | None, offset: int, tokens: int
) -> list[TestSet | str]:
    """What is to be measured: given shards, a built-in set, or those of the run's spec. Raises Usage."""
    from trainer.config import TestSet, from_dict

    if data:
        shards = [item if ":" in item else str(Path(item).expanduser().absolute()) for item in data]
        return [TestSet("shards", shards, offset, tokens)]
    if name is not None:
        return [name]
    if not found.test_sets:
        raise Usage(f"{found.label} names no test set", "give --test-set NAME or --data SHARD")
    return [
        item if isinstance(item, str) else from_dict(TestSet, dict(item), "test_sets.")
        for item in found.test_sets
    ]


def evaluate(home: Path, found: Found, sets: Sequence[TestSet | str], *, device: str) -> list[dict[str, Any]]:
    """The loss on each set, in nats per token. Raises DataError, ConfigError."""
    need_torch()
    from orchestrator import sources
    from trainer.checkpoint import load_config
    from trainer.config import DataConfig
    from trainer.evaluate import evaluate_checkpoint

    model = load_config(found.path.resolve()).model
    plan = sources.resolve(
        DataConfig([], tokenizer=found.tokenizer), cache=home / "cache", needed_tokens=0, context_length=model.context_length,
        vocab_size=model.vocab_size, test_sets=list(sets),
    )  # fmt: skip
    results = []
    for item in plan.test_sets:
        paths = [_here(home, shard) for shard in item.shards]
        asked = item.test_set
        loss = evaluate_checkpoint(found.path, paths, offset=asked.offset, tokens=asked.tokens, device=device)
        bits = loss.loss * loss.tokens / math.log(2) / asked.bytes if asked.bytes else None
        results.append(
            {"test_set": asked.name, "loss": loss.loss, "tokens": loss.tokens, "bits_per_byte": bits}
        )
    return results


def _here(home: Path, shard: Shard) -> Path:
    """A shard as a file on this machine: where it lies, or fetched into the cache."""
    if shard.path is not None:
        return shard.path
    from orchestrator import sources
    from trainer import pull

    path = home / "cache" / "shards" / shard.node_name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        wish = path.with_suffix(".pull.json")
        wish.write_text(json.dumps({"files": [sources.pull_item(shard, str(path))]}), encoding="utf-8")
        said: list[str] = []
        items, told = pull.read_manifest(wish), lambda **words: said.append(str(words.get("error", "")))
        failed = pull.Pull(items, pull.WORKERS, pull.CHUNK_BYTES, 30, told).run()
        wish.unlink()
        if failed:
            raise Unverified(
                f"{shard.source} could not be fetched: {'; '.join(filter(None, said))}", "try again"
            )
    return path


def say_losses(results: Sequence[dict[str, Any]]) -> None:
    """One line a test set."""
    for item in results:
        render.line(
            f"{item['test_set']}: {number(item['loss'])} nats per token over {item['tokens']:,} tokens"
        )
