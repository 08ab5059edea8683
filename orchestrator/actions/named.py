"""Which model a word on the command line or in a spec means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.actions.show import find_record
from orchestrator.data import bases
from orchestrator.errors import Invalid, NoSuchRun, Usage
from runs.store import Store
from trainer import manifest


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


def is_path(word: str) -> bool:
    """Whether a word names a folder or a model on the Hub, and no run."""
    return word.startswith("hf://") or "/" in word or (Path(word).expanduser() / "config.json").exists()


def find(store: Store, word: str, which: str = "best") -> Found:
    """The model that a run, a folder or `hf://owner/name` means; a run's checkpoint is fetched if it is not here.

    Raises NoSuchRun, NothingToFetch, Invalid, DataError.
    """
    path = Path(word).expanduser()
    if is_path(word):
        place = bases.locate(word)
        return Found(place, word, step=manifest.step_of(place.name))
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
