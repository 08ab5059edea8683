"""The files that a run needs, from its spec: token shards for pretraining; for what comes after, the base and the examples.

A spec with `tune` is completed first (`complete`): what the base is, how many examples and tokens there are, which labels. Both
are done before anything is rented, so that whatever is wrong is said while it costs nothing.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.data import bases, examples, sources
from orchestrator.data.bases import Base
from orchestrator.data.buckets import objects_for
from orchestrator.data.examples import Kind, Prepared
from orchestrator.data.hashes import HashCache, Progress, quiet
from orchestrator.data.sources import DataPlan, Shard
from orchestrator.errors import Invalid
from runs import spec as specs
from runs.sections import RunSpec
from trainer.after import settings
from trainer.after.settings import Classify, Known, Measure
from trainer.config import ConfigError

KINDS: dict[str, Kind] = {"finetune": "instruction", "classify": "classification", "dpo": "preference"}


def files(spec: RunSpec, cache: Path, *, pinned: bool = True, progress: Progress = quiet) -> DataPlan:
    """Everything that is on the node when the run reads it. A spec with `tune` must be complete. Raises DataError, Invalid."""
    config = spec.trainer_config()
    objects = objects_for(config)
    if spec.tune is None:
        return sources.resolve_spec(config, cache=cache, objects=objects, pinned=pinned, progress=progress)
    assert spec.tune.known is not None
    base = bases.look(spec.tune.known.path, spec.data.tokenizer)
    plan = sources.resolve(
        spec.data, cache=cache, needed_tokens=0, context_length=spec.model.context_length, vocab_size=spec.model.vocab_size,
        test_sets=spec.evaluate.test_sets, prompts=spec.evaluate.prompts, objects=objects, pinned=pinned, progress=progress,
        tokens=False,
    )  # fmt: skip
    hashes = HashCache(cache)
    whole = [_shard(base.path / name, f"{_folder(base)}/{name}", hashes, progress) for name in base.files]
    if isinstance(spec.tune, Measure):
        return replace(plan, base=tuple(whole))
    made = _examples(spec.tune, base, cache)
    train, validation, *tests = (
        _shard(path, f"{path.stem}-{hashes.sha256(path)[:12]}.jsonl", hashes, progress)
        for path in (made.train, made.validation, *made.tests)
    )
    return replace(plan, base=tuple(whole), train=(train,), validation=(validation,), tests=tuple(tests))


def complete(
    spec: RunSpec, base: Base, cache: Path, *, run: str | None = None, step: int | None = None
) -> RunSpec:
    """`spec` with what follows from its base and its examples: model, length, labels, template. Raises DataError, Invalid,
    SpecError."""
    tune = spec.tune
    assert tune is not None
    tuned = base.config.tuned
    if tuned is not None and tuned.kind == "classification":
        raise Invalid(
            f"{tune.base} is a classifier, no language model", "name the model that it was made from"
        )
    known = Known(str(_kept(base, cache) if run else base.path), base.sha256, run, step)
    model = replace(base.model, drop_rate=getattr(tune.train, "drop_rate", 0.0))
    if isinstance(tune, Measure):
        ready: settings.Tune = replace(tune, tokenizer=base.tokenizer, known=known)
    else:
        _check_model(tune, base)
        template = tune.data.template or (tuned.template if tuned is not None else None) or "alpaca"
        data = replace(
            tune.data, tokenizer=base.tokenizer, template=None if tune.method == "classify" else template
        )
        tune = replace(tune, data=data)
        made = _examples(tune, base, cache)
        hashes = HashCache(cache)
        known = replace(
            known, examples=made.counts["train"], epoch_tokens=made.epoch_tokens, held_out=hashes.sha256(made.validation)
        )  # fmt: skip
        ready = replace(tune, known=known)
        if isinstance(ready, Classify):
            ready = replace(ready, classes=made.classes)
    return specs.from_dict({
        **spec.to_dict(), "tune": asdict(ready), "model": asdict(model), "data": asdict(settings.data_config(ready)),
        "train": asdict(settings.train_config(ready, known.examples)),
    })  # fmt: skip


def node_section(spec: RunSpec, plan: DataPlan, up: str) -> dict[str, Any]:
    """The section `tune` as the script on the node reads it; `up` leads there from a run's directory to the data."""
    tune = spec.tune
    assert tune is not None
    values = settings.to_dict(tune)
    values["base"] = f"{up}/{Path(plan.base[0].node_name).parent}"
    for key, shards in (("train", plan.train), ("validation", plan.validation), ("test", plan.tests)):
        if "data" in values:
            values["data"][key] = [f"{up}/{item.node_name}" for item in shards]
    return values


def _check_model(tune: settings.Finetune | Classify | settings.Dpo, base: Base) -> None:
    """What the base cannot do. Raises Invalid."""
    try:
        settings.max_length(tune.data, base.model)
    except ConfigError as error:
        raise Invalid(f"tune.{error}", "shorten it, or leave it out") from error
    if tune.lora is not None and "gate" in tune.lora.targets and base.model.activation != "swiglu":
        raise Invalid(
            "tune.lora.targets: the base has no gate; only activation swiglu has one", "leave it out"
        )


def _examples(tune: settings.Finetune | Classify | settings.Dpo, base: Base, cache: Path) -> Prepared:
    """The examples as tokens, in a folder of the cache that is named by what they hold. Raises DataError, Invalid."""
    folder = cache / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        data = tune.data
        made = examples.prepare(
            KINDS[tune.method], data.train, staging, tokenizer=base.tokenizer, vocab_size=base.model.vocab_size,
            template=data.template or "alpaca", validation=data.validation, test=data.test,
            classes=tune.classes if isinstance(tune, Classify) else (), max_length=settings.max_length(data, base.model),
        )  # fmt: skip
        final = folder / examples.digest(made)[:16]
        if not final.exists():
            staging.rename(final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return dataclasses.replace(
        made, train=final / made.train.name, validation=final / made.validation.name,
        tests=tuple(final / path.name for path in made.tests),
    )  # fmt: skip


def _shard(path: Path, node_name: str, hashes: HashCache, progress: Progress) -> Shard:
    name = "/".join(re.sub(r"[^A-Za-z0-9._-]", "_", part) for part in node_name.split("/"))
    digest = hashes.sha256(path, progress)
    return Shard(str(path), "local", path, None, None, digest, path.stat().st_size, None, name)


def _folder(base: Base) -> str:
    return f"base-{base.sha256[:16]}"


def _kept(base: Base, cache: Path) -> Path:
    """The base of a run as a folder of the cache: the run may be removed while this one still needs it."""
    final = cache / "bases" / base.sha256[:16]
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".new-", dir=final.parent))
    for name in base.files:
        try:
            os.link(base.path / name, staging / name)
        except OSError:  # another file system, or one without links
            shutil.copy2(base.path / name, staging / name)
    try:
        staging.rename(final)
    except OSError:  # another process was quicker
        shutil.rmtree(staging, ignore_errors=True)
    return final
