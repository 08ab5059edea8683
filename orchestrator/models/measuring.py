"""`evaluate`: the loss of a model on named test sets, and HellaSwag; for a run also in its record."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.data import find
from orchestrator.errors import Invalid, Unverified, Usage
from orchestrator.models import evaluation
from orchestrator.models.load import Opened
from orchestrator.models.names import Found, opened
from runs.store import Store, run_dir, utcnow

if TYPE_CHECKING:
    from orchestrator.data.shares import Shard
    from trainer.config import TestSet

UNNAMED = "shards"
HUB = "hub"
"""What stands for HellaSwag's file on the Hugging Face Hub."""


@dataclass(frozen=True)
class Ask:
    """What the command line wants to have measured."""

    data: tuple[str, ...] = ()
    """Shards; none: `test_sets`, else those of the run's spec."""
    test_sets: tuple[str, ...] = ()
    offset: int = 0
    tokens: int = 1_000_000
    context: int | None = None
    """Tokens a sequence, where not the model's own."""
    hellaswag: str | None = None
    """A file, or `hub`."""
    items: int | None = None
    """Only so many items of HellaSwag."""
    device: str = "cpu"
    tokenizer: str | None = None


def measure(store: Store, found: Found, ask: Ask) -> dict[str, Any]:
    """Measure everything, then put all of it into the run's record, where there is a run; a failure leaves no trace.

    Raises Usage, Invalid, DataError, Unverified.
    """
    sets = asked(found, ask)
    ready = opened(found, ask.device, ask.tokenizer)
    results = [_loss(ready, item, ask.context) for item in _here(store.home, ready, sets, ask)]
    if ask.hellaswag is not None:
        path = evaluation.fetch_hellaswag() if ask.hellaswag == HUB else Path(ask.hellaswag).expanduser()
        results.append({"kind": "hellaswag", **evaluation.hellaswag(ready, path, limit=ask.items)})
    for item in results:
        item["checkpoint_step"] = found.step
        bad = next(
            (key for key, value in item.items() if isinstance(value, float) and not math.isfinite(value)),
            None,
        )
        if bad is not None:
            raise Invalid(
                f"{bad} on {item['name']} is {item[bad]}: the weights of {found.label} are broken",
                "choose another step with --which",
            )
    keep(store, found, results)
    return {
        "run": found.run,
        "path": str(found.path),
        "step": found.step,
        "results": results,
        "recorded": found.run is not None,
    }


def keep(store: Store, found: Found, results: Sequence[dict[str, Any]]) -> None:
    """Put results, each under its `name`, into the record of the model's run, all of them or none; and into its wandb run,
    which a living driver brings up to date by itself."""
    if found.run is None:
        return
    from orchestrator.driver.sinks import Wandb
    from runs import events as e

    stream, now = e.run_stream(found.run), utcnow()
    store.commit(
        [
            (stream, e.EvaluationRecorded(at=now, name=item["name"], step=found.step,
                                          result={key: value for key, value in item.items() if key != "name"}))
            for item in results
        ]
    )  # fmt: skip
    record = store.record(found.run)
    if record is not None and record.outcome is not None and record.spec["wandb"]["mode"] != "disabled":
        Wandb(record, run_dir(store.home, found.run), _tell).finish(record)


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def asked(found: Found, ask: Ask) -> list[TestSet | str]:
    """The test sets: given shards, named ones, or those of the run's spec. Raises Usage where nothing is asked for."""
    from trainer.config import TestSet
    from trainer.reading import from_dict

    own = [
        item if isinstance(item, str) else from_dict(TestSet, dict(item), "test_sets.")
        for item in found.test_sets
    ]
    if ask.data:
        return [TestSet(UNNAMED, list(ask.data), ask.offset, ask.tokens)]
    if ask.test_sets:
        by_name = {item.name: item for item in own if isinstance(item, TestSet)}
        return [by_name.get(name, name) for name in ask.test_sets]
    if not own and ask.hellaswag is None:
        raise Usage(
            f"{found.label} names no test set", "give --test-set NAME, --data SHARD or --hellaswag FILE"
        )
    return [] if ask.hellaswag is not None else own


def _loss(ready: Opened, test_set: TestSet, context: int | None) -> dict[str, Any]:
    """One loss; a sequence length that is not the model's own is part of its name."""
    result = evaluation.evaluate_slice(ready, test_set, context_length=context)
    if context not in {None, ready.config.model.context_length}:
        result["name"] = f"{result['name']} (context {context})"
    return {"kind": "test_set", **result}


def _here(home: Path, ready: Opened, sets: Sequence[TestSet | str], ask: Ask) -> list[TestSet]:
    """The sets, each under its whole name, with their shards as files of this machine. Raises DataError, Unverified."""
    made: list[TestSet] = []
    for item in sets:
        if not isinstance(item, str) and not any(":" in source for source in item.data):
            files = [path for source in item.data for path in find.paths(source)]
            short = item.name if item.name != UNNAMED else files[0].stem
            name = evaluation.slice_name(files, item.offset, item.tokens, short)
            made.append(replace(item, name=name, data=[str(path) for path in files]))
        else:
            made.append(_resolved(home, ready, item, ask))
    return made


def _resolved(home: Path, ready: Opened, item: TestSet | str, ask: Ask) -> TestSet:
    from orchestrator.data import sources
    from trainer.config import DataConfig

    if not isinstance(item, str) and item.name == UNNAMED:
        item = replace(item, name=Path(item.data[0]).stem)
    objects = None
    if not isinstance(item, str) and any(source.startswith("s3://") for source in item.data):
        from provisioning.objects import S3

        objects = S3()
    model = ready.config.model
    plan = sources.resolve(
        DataConfig([], tokenizer=ready.tokenizer), cache=home / "cache", needed_tokens=0, objects=objects,
        context_length=min(ask.context or model.context_length, model.context_length), vocab_size=model.vocab_size, test_sets=[item],
    )  # fmt: skip
    (one,) = plan.test_sets
    return replace(one.test_set, data=[str(_fetched(home, shard, objects)) for shard in one.shards])


def _fetched(home: Path, shard: Shard, objects: Any) -> Path:
    """A shard as a file on this machine: where it lies, or fetched into the cache."""
    if shard.path is not None:
        return shard.path
    from orchestrator.data import sources
    from trainer import pull

    path = home / "cache" / "shards" / shard.node_name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        wish = path.with_suffix(".pull.json")
        wish.write_text(
            json.dumps({"files": [sources.pull_item(shard, str(path), objects)]}), encoding="utf-8"
        )
        said: list[str] = []
        items, told = pull.read_manifest(wish), lambda **words: said.append(str(words.get("error", "")))
        failed = pull.Pull(items, pull.WORKERS, pull.CHUNK_BYTES, 30, told).run()
        wish.unlink()
        if failed:
            raise Unverified(
                f"{shard.source} could not be fetched: {'; '.join(filter(None, said))}", "try again"
            )
    return path
