"""Reading a run.yaml: text → RunSpec, or every problem of the file at once.

spec = load(Path("run.yaml"), ["train.learning_rate=1e-3"])

SpecError          all problems, each with file, line, key, why and what would do; exit_code 3
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from runs.complaints import Complaint, translate
from runs.rules import beside_tune, broken
from runs.sections import RunSpec
from runs.tuning import lowered
from runs.yamlfile import Document, Path, Problem, SpecError, dotted, override
from runs.yamlfile import parse as parse_yaml

__all__ = ["Problem", "RunSpec", "SpecError", "from_dict", "load", "parse"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.]+:")
_STAND_INS: dict[str, Any] = {
    "name": "stand-in", "hardware": {"provider": "local"}, "hardware.host": "stand-in", "hardware.gpu": "A100",
    "budget.max_usd": 1, "budget.max_hours": 1, "data": {"train": ["stand-in.bin"]}, "data.train": ["stand-in.bin"],
    "tune": {"method": "finetune", "base": "stand-in", "data": {"train": ["stand-in.jsonl"]}},
}  # fmt: skip
_TOGETHER: dict[Path, dict[str, Any]] = {
    ("train", "tokens"): {"tokens": 10**18, "steps": None},
    ("train", "global_batch_size"): {"global_batch_size": 1, "microbatch_size": "auto"},
}
"""For a required key that is missing or wrong, so that the rest of the file can still be looked at."""


def load(path: pathlib.Path | str, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a file. Relative paths in it are relative to its folder, those in `overrides` (`a.b=c`) to this process's.
    Raises SpecError, also where there is no such file."""
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = f"Write one with `llmctl init {path}`"
        raise SpecError([Problem(str(path), None, "", "there is no such file", hint)]) from None
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise SpecError([Problem(str(path), None, "", message, "Save it as UTF-8")]) from None
    except OSError as error:
        raise SpecError([Problem(str(path), None, "", f"cannot be read: {error.strerror}")]) from None
    return parse(text, str(path), overrides, base=path.absolute().parent)


def parse(text: str, source: str, overrides: Sequence[str] = (), base: pathlib.Path | None = None) -> RunSpec:
    """Read a spec's text; `source` names it in errors. With `base`, relative paths are resolved. Raises SpecError."""
    document = parse_yaml(text, source)
    if base is not None:
        _anchor(document.data, base)
    if overrides:
        document = override(document, overrides)
        if base is not None:
            _anchor(document.data, pathlib.Path.cwd())
    return _validated(document)


def from_dict(data: dict[str, Any], source: str = "spec") -> RunSpec:
    """A spec from plain values, as `RunSpec.to_dict` gives them. Raises SpecError."""
    return _validated(Document(source, data))


def _validated(document: Document) -> RunSpec:
    """Look, set aside what is wrong, and look again, so that one reading reports everything."""
    data, complaints = document.data, {item.path: item for item in beside_tune(document.data)}
    while True:
        spec, found = _look(data)
        fresh = [complaint for complaint in found if complaint.path not in complaints]
        if spec is not None and not complaints and not fresh:
            return spec
        if not fresh:
            break
        complaints |= {complaint.path: complaint for complaint in fresh}
        data = _set_aside(data, fresh)
    raise SpecError(sorted((_problem(document, complaint) for complaint in complaints.values()),
                           key=lambda problem: (problem.line or 0, problem.key)))  # fmt: skip


def _look(data: dict[str, Any]) -> tuple[RunSpec | None, list[Complaint]]:
    from pydantic import ValidationError

    data = lowered(data)
    try:
        # JSON mode is strict about types and still takes lists as tuples and mappings as dataclasses.
        spec = RunSpec.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        return None, translate(error, data)
    return spec, list(broken(spec))


def _set_aside(data: dict[str, Any], complaints: Sequence[Complaint]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(data))
    for complaint in sorted(complaints, key=lambda complaint: dotted(complaint.path), reverse=True):
        path = complaint.path
        if path[:1] == ("tune",):
            copy["tune"] = json.loads(json.dumps(_STAND_INS["tune"]))
            continue
        if path[:1] == ("hardware",) and path[1:] in {("provider",), ()}:
            copy["hardware"] = _STAND_INS["hardware"]
            continue
        if not path:
            continue
        parent: Any = copy
        for part in path[:-1]:
            parent = parent.setdefault(part, {}) if isinstance(parent, dict) else parent[part]
        if path in _TOGETHER:
            parent |= _TOGETHER[path]
        elif dotted(path) in _STAND_INS:
            parent[path[-1]] = _STAND_INS[dotted(path)]
        elif isinstance(parent, dict):
            parent.pop(path[-1], None)
        elif path[0] == "data":
            parent[path[-1]] = "stand-in.bin"
        else:
            del parent[path[-1]]
    return copy


def _problem(document: Document, complaint: Complaint) -> Problem:
    place = document.place(complaint.path)
    return Problem(place.file, place.line, dotted(complaint.path), complaint.message, complaint.hint)


def _anchor(data: dict[str, Any], base: pathlib.Path) -> None:
    """Make relative paths absolute, in place; globs stay globs. What has the wrong type is left to validation."""
    evaluate = _mapping(data.get("evaluate"))
    test_sets = evaluate.get("test_sets")
    lists: list[tuple[dict[str, Any], tuple[str, ...]]]
    lists = [(_mapping(data.get("data")), ("train", "validation"))]
    tune = _mapping(data.get("tune"))
    examples = _mapping(tune.get("data"))
    lists += [(examples, ("train", "validation", "test"))]
    lists += [(_mapping(item), ("data",)) for item in (test_sets if isinstance(test_sets, list) else [])]
    for section, keys in lists:
        for key in keys:
            if isinstance(section.get(key), list):
                section[key] = [_absolute(item, base) for item in section[key]]
    singles = (("data", "tokenizer"), ("trainer", "path"), ("hardware", "identity_file"))
    found = [(_mapping(data.get(name)), key) for name, key in singles]
    for section, key in [*found, (examples, "tokenizer"), (tune, "tokenizer")]:
        if isinstance(section.get(key), str) and section[key] not in {"gpt2", "bytes"}:
            section[key] = _absolute(section[key], base)
    word = tune.get("base")
    if isinstance(word, str) and (word.startswith((".", "~")) or "/" in word):  # anything else names a run
        tune["base"] = _absolute(word, base)


def _absolute(item: Any, base: pathlib.Path) -> Any:
    if not isinstance(item, str) or not item or _SCHEME.match(item):
        return item
    return os.path.normpath(base / os.path.expanduser(item))  # noqa: PTH111 - "~" may stand before a glob


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
