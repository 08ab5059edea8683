"""From text to the examples of a tuning run: read, checked with the line of every fault, written as token numbers.

    instruction     Alpaca: {"instruction": …, "input": "" or absent, "output": …}; JSON lines, or one JSON list
    classification  {"text": …, "label": …}; JSON lines
    preference      Alpaca with "chosen" and "rejected" in place of "output"; JSON lines, or one JSON list

A file is a path or `builtin:NAME`, one of the small demonstration sets made for this project. A built-in set has its own
train, validation and test parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.data import templates
from orchestrator.data.bases import fitting
from orchestrator.data.errors import DataError

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
    tests: tuple[Path, ...]
    counts: dict[str, int]
    """Examples of each part."""
    classes: list[str]
    longest: int
    """Tokens of the longest example."""
    epoch_tokens: int
    """Tokens of one pass over the training examples that are computed with."""


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
    kind: Kind, train: Sequence[str], to: Path, *, tokenizer: str, vocab_size: int, template: str = "alpaca",
    validation: Sequence[str] = (), test: Sequence[str] = (), classes: Sequence[str] = (), max_length: int | None = None,
) -> Prepared:  # fmt: skip
    """Write `train.jsonl`, `validation.jsonl` and one file for each test set, of token numbers, into `to`.

    Without `validation`, a built-in set's own parts are taken, and of any other file every tenth item. The labels are
    `classes`, or those of the training items, sorted. Raises DataError, Invalid.
    """
    loaded = fitting(tokenizer, vocab_size)
    parts = _split(kind, train, validation, test)
    labels = list(classes) or sorted(
        {item.label for item in parts["train"]} if kind == "classification" else []
    )
    if kind == "classification" and len(labels) < 2:
        raise DataError(
            f"{', '.join(train)} has one label only: {labels[0]!r}", "A classifier needs at least two"
        )
    to.mkdir(parents=True, exist_ok=True)
    longest = epoch_tokens = 0
    counts: dict[str, int] = {}
    for part, items in parts.items():
        rows = []
        for item in items:
            row = _tokens(kind, item, loaded, template, labels)
            if max_length is not None and len(row.get("prompt", ())) > max_length:
                if item.where.startswith(str(DEMO)):
                    continue  # of a demonstration, what fits a small model's context is enough
                raise _no_room(item, row, max_length)
            rows.append(row)
        if not rows:
            raise DataError(
                f"no {part} example fits within {max_length} tokens", "Take a base with a longer context"
            )
        counts[part] = len(rows)
        longest = max([longest, *(_length(row) for row in rows)])
        if part == "train":
            epoch_tokens = sum(_computed(row, max_length) for row in rows)
        temporary = to / f".{part}.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(to / f"{part}.jsonl")
    tests = tuple(to / f"{part}.jsonl" for part in parts if part not in {"train", "validation"})
    return Prepared(to / "train.jsonl", to / "validation.jsonl", tests, counts,
                    labels, longest, epoch_tokens)  # fmt: skip


def _split(
    kind: Kind, train: Sequence[str], validation: Sequence[str], test: Sequence[str]
) -> dict[str, list[Item]]:
    """Items by part; a test set has the name of its file, a built-in one `NAME-test`."""
    parts: dict[str, list[Item]] = {
        "train": [],
        "validation": [item for source in validation for item in read(source, kind)],
    }
    tests: dict[str, list[Item]] = {}
    for source in train:
        builtin = source.startswith("builtin:")
        if builtin:
            tests[f"{source.removeprefix('builtin:')}-test"] = read(source, kind, "test")
        if validation or builtin:
            parts["train"] += read(source, kind, "train" if builtin else None)
            parts["validation"] += read(source, kind, "validation") if builtin and not validation else []
            continue
        items = read(source, kind)
        if len(items) < 2:
            raise DataError(
                f"{source} holds one item only", "One is trained on, another is needed for validation"
            )
        held = {*range(9, len(items), 10)} or {len(items) - 1}
        parts["train"] += [item for i, item in enumerate(items) if i not in held]
        parts["validation"] += [item for i, item in enumerate(items) if i in held]
    named = {
        Path(source).stem.replace(":", "-"): read(
            source, kind, "test" if source.startswith("builtin:") else None
        )
        for source in test
    }
    for name, items in (named or tests).items():
        parts[name if name not in parts else f"{name}-test"] = items
    return parts


def _tokens(
    kind: Kind, item: Item, tokenizer: Tokenizer, template: str, classes: Sequence[str]
) -> dict[str, Any]:
    if kind == "classification":
        if item.label not in classes:
            raise DataError(f"{item.where}: label {item.label!r} is not among those of the training items: {', '.join(classes)}",
                            "Correct the label")  # fmt: skip
        return {"tokens": tokenizer.encode(item.text), "label": list(classes).index(item.label)}
    lead = templates.template(template).lead
    end = [tokenizer.separator] if tokenizer.separator is not None else []
    prompt = tokenizer.encode(templates.prompt(template, item.instruction, item.context))
    response = [*tokenizer.encode(lead + item.output), *end]
    if kind == "instruction":
        return {"prompt": prompt, "response": response}
    return {"prompt": prompt, "chosen": response, "rejected": [*tokenizer.encode(lead + item.rejected), *end]}


def _length(row: dict[str, Any]) -> int:
    if "tokens" in row:
        return len(row["tokens"])
    return len(row["prompt"]) + max(len(row[key]) for key in ("response", "chosen", "rejected") if key in row)


def _computed(row: dict[str, Any], max_length: int | None) -> int:
    """Tokens that a step computes with: the last one is only ever a target."""
    limit = max_length or 1 << 60
    if "tokens" in row:
        return min(len(row["tokens"]), limit)
    return sum(
        min(len(row["prompt"]) + len(row[key]) - 1, limit)
        for key in ("response", "chosen", "rejected")
        if key in row
    )


def _no_room(item: Item, row: dict[str, Any], max_length: int) -> DataError:
    return DataError(
        f"{item.where}: the prompt's {len(row['prompt'])} tokens leave no room for an answer within {max_length}",
        "Shorten it, leave it out, or take a base with a longer context",
    )


def digest(made: Prepared) -> str:
    """What changes with the examples."""
    whole = hashlib.sha256()
    for path in (made.train, made.validation, *made.tests):
        whole.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()
