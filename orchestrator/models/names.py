"""Which model a word on the command line means, and `export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import Invalid, NoSuchRun, Usage
from orchestrator.models import load as models
from orchestrator.models.load import Opened
from runs.store import Store


@dataclass(frozen=True)
class Found:
    """A model on this side: a run's checkpoint, or a folder."""

    path: Path
    word: str
    run: str | None = None
    step: int | None = None
    tokenizer: str | None = None
    """As the run's spec has it; None: the folder tells."""
    prompts: tuple[str, ...] = ()
    test_sets: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """The run, or the word that found it."""
        return self.run or self.word

    @property
    def label(self) -> str:
        """How it is called in what is printed."""
        return f"{self.name} at step {self.step}" if self.step is not None else self.name


def find(store: Store, word: str, which: str = "best") -> Found:
    """The model that a run, a folder or `hf://owner/name` means; a run's checkpoint is fetched if it is not here.

    Raises NoSuchRun, NothingToFetch, Invalid, DataError.
    """
    from trainer import manifest

    path = Path(word).expanduser()
    if word.startswith("hf://") or "/" in word or (path / "config.json").exists():
        place = models.locate(word)
        return Found(place, word, step=manifest.step_of(place.name))
    from orchestrator.actions.show import find_record
    from orchestrator.site import fetch

    try:
        record = find_record(store, word)
    except NoSuchRun as error:
        if path.exists():
            raise Invalid(
                f"{word} is neither a run nor the folder of a model: it has no config.json",
                "name a run, a step-NNNNNN folder, a Hugging Face folder, or hf://owner/name",
            ) from error
        raise
    if which == "all":
        raise Usage("one model is needed, not all", "--which best, latest or a step")
    whole = fetch.fetch(store, record, fetch.choose(record, which), weights_only=True)[0]
    evaluate = record.spec["evaluate"]
    return Found(whole.path, word, record.run, whole.step, record.spec["data"]["tokenizer"], tuple(evaluate["prompts"]),
                 tuple(evaluate["test_sets"]))  # fmt: skip


def find_all(store: Store, words: Sequence[str], which: str = "best") -> list[Found]:
    """Several models. Raises Usage where two words mean the same, and as `find`."""
    found = [find(store, word, which) for word in words]
    for index, item in enumerate(found):
        if any(other.path == item.path for other in found[:index]):
            raise Usage(f"{item.word} is named twice: {item.label}", "name each model once")
    return found


def opened(found: Found, device: str = "cpu", tokenizer: str | None = None) -> Opened:
    """The model, ready. Raises Invalid as models.open_model, and for a classifier, which says nothing."""
    made = models.open_model(found.path, device=device, tokenizer=tokenizer or found.tokenizer)
    if made.config.tuned is not None and made.config.tuned.kind == "classification":
        raise Invalid(
            f"{found.label} is a classifier, no language model", "name the model that it was made from"
        )
    return made


# ---------------------------------------------------------------- export


def export(
    store: Store,
    found: Found,
    to: Path,
    *,
    push: str | None = None,
    public: bool = False,
    licence: str | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Write a Hugging Face folder, and upload it where `push` names a repository. Raises Invalid; what was written stays
    where only the upload failed."""
    from orchestrator.models import export as engine

    models.need_torch()
    from trainer import hf

    if hf.is_hf(found.path):
        raise Invalid(f"{found.label} is in that form already", f"it is at {found.path}")
    if push is not None:
        engine.may_push(push)
    facts = {**_facts(store, found), "licence": licence}
    folder = engine.export(found.path, to.expanduser(), facts=facts, tokenizer=tokenizer or found.tokenizer)
    url = engine.push(folder, push, private=not public) if push is not None else None
    return {"run": found.run, "step": found.step, "path": str(folder.resolve()), "format": "hf",
            "bytes": sum(file.stat().st_size for file in folder.iterdir()), "url": url}  # fmt: skip


def _facts(store: Store, found: Found) -> dict[str, Any]:
    """What the model card says of a run and its checkpoint."""
    record = store.record(found.run) if found.run is not None else None
    summary = store.summary(found.run) if found.run is not None else None
    if record is None or summary is None or found.step is None:
        return {"step": found.step}
    from runs.compare import entry

    row = entry(summary).row
    known = record.checkpoints.get(found.step)
    return {
        "run": found.run, "step": found.step, "cost_usd": row["cost_usd"], "billed_hours": row["billed_hours"],
        "instance_type": row["instance_type"], "train_loss": row["train_loss"],
        "validation_loss": known.validation_loss if known is not None else None,
        "evaluations": [item for item in record.evaluations if item.get("loss") is not None and item["step"] == found.step],
    }  # fmt: skip
