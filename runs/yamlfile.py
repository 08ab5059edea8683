"""YAML 1.2 with the line of every key, and the errors that point at them.

`4e-4` is a number, `no` is text, `1_000` is a thousand, a duplicate key is refused. Values given with `--set` are
read the same way.

    SpecError          a file that cannot be used: all of its problems; exit_code 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Path = tuple[str | int, ...]
"""Where a value sits: `("data", "train", 0)`."""

MAX_VALUES = 20_000
"""Values that one file may hold, repeated aliases included: a bound on what a hostile file can cost."""
_CORE = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what and why, and what would do."""

    file: str
    line: int | None
    """Counted from 1; None where the value came from the command line or from nowhere."""
    key: str
    """Dotted: `train.learning_rate`; empty for the file as a whole."""
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        named = not self.key or self.file == f"--set {self.key}"
        what = self.message if named else f"{self.key}: {self.message}"
        hint = f" {self.hint}{'' if self.hint.endswith('?') else '.'}" if self.hint else ""
        return f"{where}: {what}.{hint}"


class SpecError(Exception):
    """A file that cannot be used, with every problem that was found in it."""

    exit_code = 3

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


@dataclass(frozen=True)
class Place:
    """Where a value was written."""

    file: str
    line: int | None


@dataclass
class Document:
    """Plain values, and where each of them was written."""

    source: str
    data: dict[str, Any]
    places: dict[Path, Place] = field(default_factory=dict)

    def place(self, path: Path) -> Place:
        """Where `path` was written; where it was not, the nearest thing around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Place(self.source, None)


def dotted(path: Path) -> str:
    """`train.betas[1]` of `("train", "betas", 1)`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def parse(text: str, source: str) -> Document:
    """Read a YAML mapping. Raises SpecError naming file and line."""
    places: dict[Path, Place] = {}
    data = _read(text, source, places)
    if data is None:
        raise SpecError([Problem(source, None, "", "the file is empty", "Write one with `llmctl init`")])
    if not isinstance(data, dict):
        what = f"holds {describe(data)} where a mapping of keys to values belongs"
        raise SpecError([Problem(source, 1, "", what, "Write one with `llmctl init`")])
    return Document(source, data, places)


def override(document: Document, assignments: Sequence[str]) -> Document:
    """`document` with each `a.b=c` of `--set` applied, the later winning. Raises SpecError."""
    result = Document(document.source, _copy(document.data), dict(document.places))
    problems: list[Problem] = []
    for assignment in assignments:
        try:
            _assign(result, assignment)
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    return result


def describe(value: Any) -> str:
    """A value as an error message shows it: short, and as YAML would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}…'"


def _assign(document: Document, assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    source = f"--set {key.strip()}"  # without the value: it may be a secret in the wrong place
    if not equals or not key.strip():
        raise SpecError(
            [Problem(source, None, "", "is not KEY=VALUE", "Write --set train.learning_rate=1e-3")]
        )
    path = tuple(int(part) if part.isascii() and part.isdigit() else part for part in key.strip().split("."))
    value = _read(text, source, {})
    target: Any = document.data
    for depth, part in enumerate(path[:-1]):
        target = _step_into(target, part, source, path[: depth + 1])
    last = path[-1]
    if isinstance(target, list) and isinstance(last, int) and last < len(target):
        target[last] = value
    elif isinstance(target, dict):
        target[str(last)] = value
    else:
        raise SpecError([_no_such_place(source, path)])
    for place in [place for place in document.places if place[: len(path)] == path]:
        del document.places[place]
    document.places[path] = Place(source, None)


def _step_into(target: Any, part: str | int, source: str, path: Path) -> Any:
    if isinstance(target, list) and isinstance(part, int) and part < len(target):
        inner = target[part]
    elif isinstance(target, dict):
        inner = target.setdefault(str(part), {})
        if inner is None:
            inner = target[str(part)] = {}
    else:
        inner = None
    if not isinstance(inner, (dict, list)):
        raise SpecError([_no_such_place(source, path)])
    return inner


def _no_such_place(source: str, path: Path) -> Problem:
    return Problem(source, None, dotted(path), "is not a place that can be set",
                   "A list takes the index of an item it has, a section takes a key")  # fmt: skip


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _read(text: str, source: str, places: dict[Path, Place]) -> Any:
    """The plain value of a YAML text, its places noted in `places`. Raises SpecError."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    reader = YAML(typ="safe", pure=True)
    try:
        node = reader.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        hint = "Check quotes, brackets, colons and the indentation (spaces, not tabs) there"
        line = mark.line + 1 if mark and not source.startswith("--set") else None
        raise SpecError([Problem(source, line, "", f"not YAML: {what}", hint)]) from None
    except YAMLError as error:
        what = str(error).splitlines()[0]
        raise SpecError(
            [Problem(source, None, "", f"not YAML: {what}", "Save it as plain UTF-8 text")]
        ) from None
    except RecursionError:
        raise SpecError([Problem(source, None, "", "is nested too deeply to be a spec")]) from None
    walk = _Walk(source, places, reader.constructor)
    value = walk.value(node, ()) if node is not None else None
    if walk.problems:
        raise SpecError(walk.problems)
    return value


class _Walk:
    """One pass over a composed document: plain values out, places and problems noted."""

    def __init__(self, source: str, places: dict[Path, Place], constructor: Any) -> None:
        self.source = source
        self.places = places
        self.constructor = constructor
        self.problems: list[Problem] = []
        self.count = 0
        self.open: list[int] = []

    def value(self, node: Any, path: Path) -> Any:
        self.count += 1
        if id(node) in self.open or self.count > MAX_VALUES:
            raise SpecError(
                [self.problem(node, path, "an alias that repeats itself, or far too many values")]
            )
        if node.id == "scalar":
            return self.scalar(node, path)
        self.open.append(id(node))
        plain = self.mapping(node, path) if node.id == "mapping" else self.sequence(node, path)
        self.open.pop()
        return plain

    def mapping(self, node: Any, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.id != "scalar":
                self.problems.append(self.problem(key_node, path, "a key must be a word"))
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in result:
                first = self.places[here].line
                twice = f"is given twice, first in line {first}" if first else "is given twice"
                self.problems.append(self.problem(key_node, here, twice, "Delete one of the two"))
                continue
            self.places[here] = Place(self.source, self.line(key_node))
            result[key] = self.value(value_node, here)
        return result

    def sequence(self, node: Any, path: Path) -> list[Any]:
        result = []
        for index, item in enumerate(node.value):
            self.places[*path, index] = Place(self.source, self.line(item))
            result.append(self.value(item, (*path, index)))
        return result

    def scalar(self, node: Any, path: Path) -> Any:
        tag, text = str(node.tag), str(node.value)
        if tag == f"{_CORE}null":
            return None
        read = {"float": self.constructor.construct_yaml_float, "int": self.constructor.construct_yaml_int,
                "bool": self.constructor.construct_yaml_bool}.get(tag.removeprefix(_CORE))  # fmt: skip
        if not tag.startswith(_CORE):
            self.problems.append(self.problem(node, path, f"has a tag {tag} that nothing here understands"))
        if read is None:
            return text
        try:
            plain = read(node)
        except (ValueError, KeyError):
            self.problems.append(
                self.problem(node, path, f"{describe(text)} is no {tag.removeprefix(_CORE)}")
            )
            return text
        return _whole(plain, text) if isinstance(plain, float) else plain

    def problem(self, node: Any, path: Path, message: str, hint: str = "") -> Problem:
        return Problem(self.source, self.line(node), dotted(path), message, hint)

    def line(self, node: Any) -> int | None:
        # A value of --set has no file that a line could be looked up in.
        return None if self.source.startswith("--set") else int(node.start_mark.line) + 1


def _whole(number: float, text: str) -> int | float:
    """`3e9` counts tokens as well as 3000000000 does; `1.0` stays a float, and so does what a float cannot count."""
    exponent = "e" in text.lower() and number.is_integer() and abs(number) < 2**53
    return int(number) if exponent else number
