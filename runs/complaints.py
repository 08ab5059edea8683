"""Validation errors in the words of the person who wrote the file: which key, why not, and what would do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runs.sections import HARDWARE, SECTIONS, field_names, known_keys
from runs.yamlfile import Path, describe, dotted
from trainer.after.settings import METHODS

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

_EXPECTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "int_parsing": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "string_type": "text", "bool_type": "true or false", "bool_parsing": "true or false",
    "list_type": "a list", "tuple_type": "a list", "dict_type": "a mapping",
    "model_type": "a mapping", "dataclass_type": "a mapping", "model_attributes_type": "a mapping",
    "none_required": "null",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("must be above", "gt"), "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be below", "lt"), "less_than_equal": ("must be at most", "le"),
}  # fmt: skip
_PATTERNS = {
    "name": "must be 1 to 32 of a-z, 0-9 and -",
    "hardware.host": "must be a host name or an address",
    "hardware.user": "must be a user name",
}
_TAGS: dict[str, tuple[Path, Iterable[str]]] = {
    "hardware": (("hardware", "provider"), HARDWARE),
    "tune": (("tune", "method"), METHODS),
}
"""Sections that come in several kinds: the key that tells them apart, and its values."""
_EXAMPLES = {
    "name": "Add `name: my-first-run`",
    "hardware": "Add `hardware: {provider: local}`",
    "hardware.host": "Add `host: 192.0.2.7` under hardware",
    "tune": "Add `tune: {method: finetune, base: RUN, data: {train: [examples.jsonl]}}`",
    "tune.base": "Add `base: RUN` under tune: a run, a folder, or hf://owner/name",
    "tune.data": "Add `data: {train: [examples.jsonl]}` under tune",
    "tune.data.train": "Add `train: [examples.jsonl]` under tune.data",
    "data": "Add `data: {train: [shards/*.bin]}`",
    "data.train": "Add `train: [shards/*.bin]` under data",
    "train": "Add `train: {tokens: 1_000_000, global_batch_size: 64}`",
    "train.global_batch_size": "Add `global_batch_size: 64` under train: sequences per step over all processes",
}


@dataclass(frozen=True)
class Complaint:
    """What is wrong at `path`, and what would do."""

    path: Path
    message: str
    hint: str = ""


def translate(error: ValidationError, data: dict[str, Any]) -> list[Complaint]:
    """One complaint for each faulty place in `data`."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_path.setdefault(_written(detail, data), []).append(detail)
    complaints = []
    for path, details in by_path.items():
        inside = any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
        if inside and all(detail["type"] in _EXPECTED for detail in details):
            continue  # the other branch of a union: what is wrong inside says more
        complaints.append(_complaint(path, details, data))
    return complaints


def unknown_key(path: Path, data: dict[str, Any]) -> Complaint:
    """An unknown key, with the nearest known one."""
    key, section = str(path[-1]), path[:-1]
    hardware = data.get("hardware")
    tune = data.get("tune")
    known = known_keys(section, hardware.get("provider") if isinstance(hardware, dict) else None,
                       tune.get("method") if isinstance(tune, dict) else None)  # fmt: skip
    near = nearest(key, known)
    if near and _similarity(key, near) >= 0.6:
        return Complaint(path, "unknown key", f"Did you mean {near}?")
    elsewhere = nearest(key, [f"{home}.{name}" for home, names in _homes().items() for name in names])
    if elsewhere and _similarity(key, elsewhere.partition(".")[2]) >= 0.75:
        return Complaint(path, "unknown key", f"Did you mean {elsewhere}?")
    listed = ", ".join(known)
    return Complaint(
        path, "unknown key", f"The nearest known key is {near}; known here: {listed}" if near else ""
    )


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The most similar of `known`; of dotted names the last part counts."""
    return max(known, key=lambda candidate: _similarity(word, candidate.rpartition(".")[2]), default=None)


def _similarity(word: str, candidate: str) -> float:
    plain = word.lower().replace("-", "_").replace(" ", "_")
    return difflib.SequenceMatcher(None, plain, candidate.lower()).ratio()


def _homes() -> dict[str, list[str]]:
    """The keys of each section."""
    homes = {section: field_names(cls) for section, cls in SECTIONS.items()}
    return homes | {"hardware": [key for cls in HARDWARE.values() for key in field_names(cls)]}


def _written(detail: ErrorDetails, data: dict[str, Any]) -> Path:
    """The place in the file that an error's location means: pydantic's labels of union branches are no keys."""
    loc = detail["loc"]
    here: object = data
    path: Path = ()
    for index, part in enumerate(loc):
        is_label = path == ("hardware",) and index == 1 and part in HARDWARE
        step = None if is_label else _inner(here, part)
        if step is not None:
            here = step[0]
        elif detail["type"] != "missing" or index < len(loc) - 1 or not isinstance(part, str):
            continue
        path = (*path, part)
    return path


def _inner(here: object, part: str | int) -> tuple[object] | None:
    """What stands at `part` in a mapping or a list, or None."""
    if isinstance(here, dict) and part in here:
        return (here[part],)
    if isinstance(here, list) and isinstance(part, int) and part < len(here):
        return (here[part],)
    return None


def _complaint(path: Path, details: list[ErrorDetails], data: dict[str, Any]) -> Complaint:
    key, kind, context = dotted(path), details[0]["type"], details[0].get("ctx", {})
    value = details[0]["input"]
    if kind in {"missing", "too_long"} and isinstance(value, list):
        length = context["max_length"] if kind == "too_long" else int(details[-1]["loc"][-1]) + 1
        return Complaint(path, f"must be a list of {length} values, not {len(value)}")
    if kind == "missing":
        return Complaint(path, "is required", _EXAMPLES.get(key, ""))
    if kind in {"extra_forbidden", "unexpected_keyword_argument"}:
        return unknown_key(path, data)
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        return _tagged(value, *_TAGS[str(path[0])])
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return Complaint(path, f"{words} {context[bound]:g}, not {describe(value)}")
    if kind == "string_pattern_mismatch":
        return Complaint(path, f"{_PATTERNS.get(key, 'has the wrong form')}, not {describe(value)}")
    if kind == "string_too_short":
        return Complaint(path, "must not be empty")
    wanted = list(dict.fromkeys(word for detail in details for word in _wanted(detail)))
    if wanted:
        return Complaint(path, f"must be {' or '.join(wanted)}, not {describe(value)}", _hint(wanted, value))
    if kind == "value_error":
        return Complaint(path, str(context["error"]))
    message = details[0]["msg"]
    return Complaint(path, message[:1].lower() + message[1:])


def _tagged(section: object, path: Path, choices: Iterable[str]) -> Complaint:
    known = ", ".join(choices)
    if not isinstance(section, dict):
        return Complaint(path[:1], f"must be a mapping, not {describe(section)}", _EXAMPLES[str(path[0])])
    if path[1] not in section:
        return Complaint(path, "is required", f"One of {known}")
    given = section[path[1]]
    hint = f"Did you mean {nearest(given, choices)}?" if isinstance(given, str) else ""
    return Complaint(path, f"must be one of {known}, not {describe(given)}", hint)


def _wanted(detail: ErrorDetails) -> list[str]:
    kind = detail["type"]
    if kind in _EXPECTED:
        return [_EXPECTED[kind]]
    if kind == "literal_error":
        options = str(detail["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
        return [f"one of {options}" if ", " in options else options]
    if kind == "value_error" and "duration" in str(detail["ctx"]["error"]):
        return ["a duration such as 90s, 30m, 6h or 2d"]
    return []


def _hint(wanted: list[str], value: object) -> str:
    options = [option for words in wanted for option in words.removeprefix("one of ").split(", ")]
    if isinstance(value, str):
        near = nearest(value, options) if options else None
        if "true or false" in wanted and value.lower() in {"yes", "no", "on", "off", "y", "n"}:
            return "YAML 1.2 knows only true and false"
        if near and _similarity(value, near) >= 0.6:
            return f"Did you mean {near}?"
    if wanted == ["a mapping"] and value is None:
        return "Delete the line, or put keys below it"
    if "text" in wanted and value is not None and not isinstance(value, (dict, list, str)):
        return "Write it in quotes"
    return ""
