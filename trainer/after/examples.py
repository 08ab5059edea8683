"""Examples as JSON lines of token numbers. Standard library only.

instruction     {"prompt": [1, 2], "response": [3, 4]}
classification  {"tokens": [1, 2], "label": 0}
preference      {"prompt": [1, 2], "chosen": [3], "rejected": [4, 5]}
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar


class ExampleError(Exception):
    """An example that cannot be trained on; the message names the file and the line."""


@dataclass(frozen=True)
class Answered:
    """A prompt and the response that the model shall learn."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True)
class Labelled:
    """A text and the number of its class."""

    tokens: tuple[int, ...]
    label: int


@dataclass(frozen=True)
class Preferred:
    """A prompt and two responses, the better one first."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


Example = TypeVar("Example")


@dataclass
class Limits:
    """What the model takes; `cut` counts the examples that were longer."""

    vocab_size: int
    max_length: int
    classes: int = 0
    cut: int = 0


def read(
    paths: Sequence[str], parse: Callable[[dict[str, Any], Limits], Example], limits: Limits
) -> list[Example]:
    """All examples of some files, in order. Raises ExampleError naming file and line."""
    found: list[Example] = []
    for name in paths:
        path = Path(name)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ExampleError(f"{path}: {error}") from error
        before = len(found)
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    found.append(parse(_mapping(line), limits))
                except ValueError as error:
                    raise ExampleError(f"{path}, line {number}: {error}") from None
        if len(found) == before:
            raise ExampleError(f"{path} holds no example")
    return found


def answered(raw: dict[str, Any], limits: Limits) -> Answered:
    """Raises ValueError."""
    prompt, response = _tokens(raw, "prompt", limits), _tokens(raw, "response", limits)
    return Answered(prompt, _fit(prompt, response, limits))


def labelled(raw: dict[str, Any], limits: Limits) -> Labelled:
    """Raises ValueError. A text that is too long loses its end."""
    tokens, label = _tokens(raw, "tokens", limits), raw.get("label")
    if type(label) is not int or not 0 <= label < limits.classes:
        raise ValueError(f"label {label!r} is no number from 0 to {limits.classes - 1}")
    if len(tokens) > limits.max_length:
        limits.cut += 1
    return Labelled(tokens[: limits.max_length], label)


def preferred(raw: dict[str, Any], limits: Limits) -> Preferred:
    """Raises ValueError."""
    prompt = _tokens(raw, "prompt", limits)
    chosen, rejected = (_fit(prompt, _tokens(raw, key, limits), limits) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return Preferred(prompt, chosen, rejected)


def _mapping(line: str) -> dict[str, Any]:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError("is no mapping")  # noqa: TRY004  one kind of error for one kind of fault
    return raw


def _tokens(raw: dict[str, Any], key: str, limits: Limits) -> tuple[int, ...]:
    value = raw.get(key)
    if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
        raise ValueError(f"{key} must be a list of token numbers, and not empty")
    wrong = next((token for token in value if not 0 <= token < limits.vocab_size), None)
    if wrong is not None:
        raise ValueError(f"{key} has token {wrong}, the model's vocabulary has {limits.vocab_size}; "
                         "the examples were made with another tokenizer")  # fmt: skip
    return tuple(value)


def _fit(prompt: Sequence[int], response: tuple[int, ...], limits: Limits) -> tuple[int, ...]:
    room = limits.max_length + 1 - len(prompt)  # the last token is only ever a target
    if room < 1:
        raise ValueError(
            f"the prompt's {len(prompt)} tokens leave no room for a response within {limits.max_length}"
        )
    if len(response) > room:
        limits.cut += 1
    return response[:room]


def order(count: int, seed: int, epoch: int) -> list[int]:
    """The examples' order in an epoch: a pure function of its arguments, the same everywhere."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    indices = list(range(count))
    random.Random(digest).shuffle(indices)  # noqa: S311  an order, not a secret
    return indices


def set_name(path: str) -> str:
    """The name of a test set: the file's stem and the beginning of its hash, so that only equal sets meet."""
    stem, digest = Path(path).stem, hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    return stem if stem.endswith(f"-{digest}") else f"{stem}-{digest}"
