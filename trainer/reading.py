"""Configurations as plain JSON and back, with names and types checked. Standard library only."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainer.config import ConfigError, TrainerConfig, check, require


def load(path: Path) -> TrainerConfig:
    """Read `config.json`. Raises ConfigError for an unknown key, a missing one or a wrong type; sections that the trainer
    does not know (a spec's `hardware`, `budget`, …) are refused too: config.json has its own shape."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), error.strerror or str(error)) from error
    except ValueError as error:
        raise ConfigError(str(path), f"is not JSON: {error}") from error
    config: TrainerConfig = from_dict(TrainerConfig, raw, "")
    check(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The plain JSON value of a configuration or one of its sections."""
    return dataclasses.asdict(config)


def from_dict(cls: Any, raw: Any, where: str) -> Any:
    """Build the dataclass `cls` from a plain mapping, checking names and types. Raises ConfigError."""
    require(isinstance(raw, dict), where or "config", f"must be a mapping, not {type(raw).__name__}")
    hints = get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for key in raw:
        require(key in fields, f"{where}{key}", f"is not a field of {cls.__name__}")
    values = {}
    for name, item in fields.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], f"{where}{name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name}", "is required")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{where}.")
    if origin is Literal:
        require(value in args, where, f"{value!r} is none of {', '.join(map(str, args))}")
        return value
    if origin is list:
        require(isinstance(value, list), where, "must be a list")
        return [_convert(args[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is tuple:
        require(
            isinstance(value, (list, tuple)) and len(value) == len(args), where, f"must be {len(args)} values"
        )
        return tuple(_convert(kind, item, where) for kind, item in zip(args, value, strict=True))
    if origin is Union or type(hint).__name__ == "UnionType":
        return _convert_union(args, value, where)
    if hint is float:
        require(
            isinstance(value, (int, float)) and not isinstance(value, bool),
            where,
            f"must be a number, not {value!r}",
        )
        return float(value)
    require(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), where,
             f"must be {hint.__name__}, not {value!r}")  # fmt: skip
    return value


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    error: ConfigError | None = None
    for option in options:
        if option is type(None):
            if value is None:
                return None
            continue
        try:
            return _convert(option, value, where)
        except ConfigError as failed:
            error = failed
    raise error or ConfigError(where, "has no value")
