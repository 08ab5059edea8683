"""From text to the examples of a tuning run: read, checked with the line of every fault, written as token numbers.

    instruction     Alpaca: {"instruction": …, "input": "" or absent, "output": …}; JSON lines, or one JSON list
    classification  {"text": …, "label": …}; JSON lines
    preference      Alpaca with "chosen" and "rejected" in place of "output"; JSON lines, or one JSON list

A file is a path or `builtin:NAME`, one of the small demonstration sets made for this project. A built-in set has its own
train, validation and test parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.data.errors import DataError
from orchestrator.models import chat
from orchestrator.models.load import fitting

if TYPE_CHECKING:
    from trainer.tokenize import Tokenizer

Kind = Literal["instruction", "classification", "preference"]
DEMO = Path(__file__).with_name("demo")
DEMOS: dict[str, tuple[Kind, str]] = {
    "instructions": ("instruction", "small tasks with a short, checkable answer"),
    "reviews": ("classification", "reviews of household goods, positive or negative"),
    "preferences": ("preference", "a plain answer against a bloated or wrong one"),
}
PARTS = {"test": 5, "validation": 5}
"""A built-in set's items whose number leaves 0 on division by this go to the test part, those that leave 1 to validation."""


@dataclass(frozen=True)
class Item:
    """One instruction of any of the formats, as text."""

    where: str
    """File and line, for messages."""
    instruction: str = ""
    context: str = ""
    output: str = ""
    rejected: str = ""
    text: str = ""
    label: str = ""


@dataclass(frozen=True)
class Prepared:
    """Files that a script of trainer.after reads."""

    train: Path
    validation: Path
    test: Path | None
    counts: dict[str, int]
    classes: list[str]
    longest: int
    """Tokens of the longest example."""

    def data_section(self, tokenizer: str, template: str | None) -> dict[str, Any]:
        """The section `data` of the script's config.json."""
        return {"train": [str(self.train)], "validation": [str(self.validation)], "test": [str(self.test)] if self.test else [],
                "tokenizer": tokenizer, "template": template}  # fmt: skip


def read(source: str, kind: Kind, part: str | None = None) -> list[Item]:
    """All items of a file or a built-in set (of its `part` only). Raises DataError naming file and line."""
    name = source.removeprefix("builtin:")
    if name == source:
        path = Path(source).expanduser()
    elif name in DEMOS and DEMOS[name][0] == kind:
        path = DEMO / f"{name}.jsonl"
    else:
        fitting_ones = [key for key, (what, _) in DEMOS.items() if what == kind]
        raise DataError(
            f"there is no built-in {kind} set {name!r}",
            f"Write builtin:{' or builtin:'.join(fitting_ones)}, or a path",
        )
    items = [_PARSERS[kind](raw, where) for raw, where in _objects(path)]
    if not items:
        raise DataError(f"{path} holds no item", "An item is one JSON object a line")
    return [item for number, item in enumerate(items) if part is None or _part(number) == part]


def _part(number: int) -> str:
    return next((part for rest, (part, every) in enumerate(PARTS.items()) if number % every == rest), "train")


def _objects(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The JSON objects of a file with their places."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "Give a file of JSON lines") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, byte {error.start}: is not UTF-8", "Write it again as UTF-8") from error
    if text.lstrip().startswith("["):
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{path}: {error}", "The file begins as one JSON list, and must be one"
            ) from error
        for number, item in enumerate(raw, 1):
            yield _mapping(item, f"{path}, item {number}"), f"{path}, item {number}"
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                item = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: is not JSON: {error}", "Each line is one JSON object") from error
            yield _mapping(item, where), where


def _mapping(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise DataError(f"{where}: is no JSON object", "Each item is one, with the keys of its format")
    return raw


def _text(raw: dict[str, Any], key: str, where: str, *, optional: bool = False) -> str:
    value = raw.get(key, "" if optional else None)
    if not isinstance(value, str) or not (optional or value.strip()):
        problem = (
            f"has no {key}"
            if value is None
            else f"{key} must be text" + ("" if isinstance(value, str) else f", not {value!r}")
        )
        raise DataError(f"{where}: {problem}{' and not empty' if value is not None and not optional else ''}",
                        "Correct the line, or leave it out")  # fmt: skip
    return value


def _instruction(raw: dict[str, Any], where: str) -> Item:
    return Item(
        where,
        _text(raw, "instruction", where),
        _text(raw, "input", where, optional=True),
        _text(raw, "output", where),
    )


def _classification(raw: dict[str, Any], where: str) -> Item:
    return Item(where, text=_text(raw, "text", where), label=_text(raw, "label", where))


def _preference(raw: dict[str, Any], where: str) -> Item:
    chosen, rejected = _text(raw, "chosen", where), _text(raw, "rejected", where)
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are the same", "Leave it out: it prefers nothing")
    return Item(
        where, _text(raw, "instruction", where), _text(raw, "input", where, optional=True), chosen, rejected
    )


_PARSERS: dict[Kind, Callable[[dict[str, Any], str], Item]] = {
    "instruction": _instruction, "classification": _classification, "preference": _preference,
}  # fmt: skip


def prepare(
    kind: Kind, train: str, to: Path, *, tokenizer: str, vocab_size: int, template: str = "alpaca",
    validation: str | None = None, test: str | None = None,
) -> Prepared:  # fmt: skip
    """Write `train.jsonl`, `validation.jsonl` and, where there is one, `test.jsonl` of token numbers into `to`.

    Without `validation`, a built-in set's own parts are taken, and of any other file every tenth item. Raises DataError,
    Invalid.
    """
    loaded = fitting(tokenizer, vocab_size)
    parts = _split(kind, train, validation, test)
    classes = sorted({item.label for item in parts["train"]}) if kind == "classification" else []
    if kind == "classification" and len(classes) < 2:
        raise DataError(f"{train} has one label only: {classes[0]!r}", "A classifier needs at least two")
    to.mkdir(parents=True, exist_ok=True)
    longest = 0
    for part, items in parts.items():
        rows = [_tokens(kind, item, loaded, template, classes) for item in items]
        longest = max([longest, *(_length(row) for row in rows)])
        temporary = to / f".{part}.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(to / f"{part}.jsonl")
    return Prepared(to / "train.jsonl", to / "validation.jsonl", to / "test.jsonl" if parts.get("test") else None,
                    {part: len(items) for part, items in parts.items()}, classes, longest)  # fmt: skip


def _split(kind: Kind, train: str, validation: str | None, test: str | None) -> dict[str, list[Item]]:
    if validation is not None:
        parts = {"train": read(train, kind), "validation": read(validation, kind)}
    elif train.startswith("builtin:"):
        parts = {part: read(train, kind, part) for part in ("train", "validation", "test")}
    else:
        items = read(train, kind)
        if len(items) < 2:
            raise DataError(
                f"{train} holds one item only", "One is trained on, another is needed for validation"
            )
        held = {*range(9, len(items), 10)} or {len(items) - 1}
        parts = {"train": [item for i, item in enumerate(items) if i not in held],
                 "validation": [item for i, item in enumerate(items) if i in held]}  # fmt: skip
    return {**parts, "test": read(test, kind)} if test is not None else parts


def _tokens(
    kind: Kind, item: Item, tokenizer: Tokenizer, template: str, classes: Sequence[str]
) -> dict[str, Any]:
    if kind == "classification":
        if item.label not in classes:
            raise DataError(f"{item.where}: label {item.label!r} is not among those of the training items: {', '.join(classes)}",
                            "Correct the label")  # fmt: skip
        return {"tokens": tokenizer.encode(item.text), "label": list(classes).index(item.label)}
    lead = chat.template(template).lead
    end = [tokenizer.separator] if tokenizer.separator is not None else []
    prompt = tokenizer.encode(chat.prompt(template, item.instruction, item.context))
    response = [*tokenizer.encode(lead + item.output), *end]
    if kind == "instruction":
        return {"prompt": prompt, "response": response}
    return {"prompt": prompt, "chosen": response, "rejected": [*tokenizer.encode(lead + item.rejected), *end]}


def _length(row: dict[str, Any]) -> int:
    if "tokens" in row:
        return len(row["tokens"])
    return len(row["prompt"]) + max(len(row[key]) for key in ("response", "chosen", "rejected") if key in row)
