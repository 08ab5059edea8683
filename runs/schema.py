"""The published forms of the spec: a JSON Schema for editors, and `docs/run-yaml.md` for people.

Both are generated from the models; `python -m runs.schema` writes them, and a test keeps them current.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from runs.sections import (
    DURATION_PATTERN,
    HARDWARE,
    SECTIONS,
    TUNE_PARTS,
    WRITTEN_BY_LLMCTL,
    RunSpec,
    factory_defaults,
)
from runs.tuning import DERIVED
from trainer.after.settings import METHODS, MeasureTrain

DOCS = Path(__file__).resolve().parent.parent / "docs"
_TITLES = {
    "local": "this machine",
    "ssh": "a machine of yours",
    "lambda": "Lambda Cloud",
    "ec2": "AWS EC2",
}


class _Documented(GenerateJsonSchema):
    """With what stands below a field in its source as its description. Pydantic can do that itself, but would read the sources
    at each start of the program."""

    def model_schema(self, schema: Any) -> dict[str, Any]:
        return _described(schema["cls"], super().model_schema(schema))

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        return _described(schema["cls"], super().dataclass_schema(schema))


def _described(cls: type[Any], schema: dict[str, Any]) -> dict[str, Any]:
    for base in reversed(cls.__mro__[:-1]):
        if base.__module__.partition(".")[0] not in {"runs", "trainer"}:
            continue
        (definition,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    key = name.rstrip("_")  # the alias of a field that would be a keyword
                    if key in schema["properties"]:
                        schema["properties"][key]["description"] = inspect.cleandoc(text)
    return schema


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a run.yaml, conditional requirements included."""
    schema = RunSpec.model_json_schema(by_alias=True, schema_generator=_Documented)
    definitions = schema["$defs"]
    for cls in METHODS.values():
        del definitions[cls.__name__]["properties"]["known"]
        definitions[cls.__name__]["required"] = sorted({*definitions[cls.__name__]["required"], "method"})
    definitions.pop("Known", None)
    for cls in (*METHODS.values(), *TUNE_PARTS.values(), MeasureTrain):
        for key, default in factory_defaults(cls).items():
            if cls is not TUNE_PARTS["known"]:
                definitions[cls.__name__]["properties"].get(key, {})["default"] = (
                    default if not dataclasses.is_dataclass(default) else {}
                )
    for key in WRITTEN_BY_LLMCTL:
        section, field = key.split(".")
        del definitions[SECTIONS[section].__name__]["properties"][field]
    for cls in SECTIONS.values():
        for key, default in factory_defaults(cls).items():
            definitions[cls.__name__]["properties"].get(key, {})["default"] = default
    definitions["CheckpointConfig"]["properties"]["every"]["anyOf"][0]["pattern"] = DURATION_PATTERN
    definitions["TrainConfig"]["oneOf"] = [_needs("tokens"), _needs("steps")]
    for provider in ("lambda", "ec2"):
        definitions[HARDWARE[provider].__name__]["oneOf"] = [_needs("gpu"), _needs("instance_type")]
    rented = {"properties": {"hardware": {"properties": {"provider": {"enum": ["lambda", "ec2"]}}}}}
    # With `tune`, `data` and `train` follow from it.
    schema["required"] = [key for key in schema["required"] if key not in {"data", "train"}]
    schema["oneOf"] = [
        {"required": ["data", "train"], "properties": {"tune": {"type": "null"}}},
        {"required": ["tune"], "properties": dict.fromkeys(DERIVED, False)},
    ]
    limits = {"allOf": [_needs("max_usd"), _needs("max_hours")]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "llmctl run.yaml",
        "if": rented,
        "then": {"required": ["budget"], "properties": {"budget": limits}},
    }


def _needs(key: str) -> dict[str, Any]:
    return {"required": [key], "properties": {key: {"not": {"type": "null"}}}}


def markdown() -> str:
    """`docs/run-yaml.md`: every section, key, type, default and meaning."""
    schema = json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    lines = [
        "# run.yaml",
        "",
        "One file describes a run: what to train, on which hardware, at what cost. It is YAML 1.2 (`4e-4` is a number, `no` is",
        "text, `3_260_190_720` and `3e9` are whole numbers), and so are the values of `--set a.b=c`. An unknown key is an error that names",
        "the file, the line, the key and the nearest known key. Relative paths are relative to the file's folder.",
        "",
        "`llmctl init --recipe NAME` writes a commented one to start from; [run.schema.json](run.schema.json) is for editors.",
        "",
        "This page is generated from the models by `python -m runs.schema`.",
        "",
        *_table(schema, definitions, skip=frozenset({"hardware", "tune"}) | SECTIONS.keys()),
        "",
        "## hardware",
        "",
        "`provider` decides which other keys there are.",
    ]
    for provider, cls in HARDWARE.items():
        lines += ["", f"### provider: {provider} ({_TITLES[provider]})", ""]
        lines += _table(definitions[cls.__name__], definitions, skip=frozenset({"provider"}))
        if provider in {"lambda", "ec2"}:
            lines += ["", "Required: `gpu` or `instance_type`, and both limits of `budget`."]
    for section, cls in SECTIONS.items():
        lines += ["", f"## {section}", "", _sentence(definitions[cls.__name__]["description"]), ""]
        lines += _table(definitions[cls.__name__], definitions)
        if section == "evaluate":
            lines += ["", "A test set of your own:", "", *_table(definitions["TestSet"], definitions)]
    return "\n".join([*lines, *_tuning(definitions)]) + "\n"


def _tuning(definitions: dict[str, Any]) -> list[str]:
    """The section `tune`, whose keys depend on its method."""
    lines = [
        "",
        "## tune",
        "",
        "Instead of `data`, `model` and `train`: what is done with an existing model. `method` decides which other keys there are.",
    ]
    for method, cls in METHODS.items():
        lines += ["", f"### method: {method}", "", _sentence(definitions[cls.__name__]["description"]), ""]
        lines += _table(definitions[cls.__name__], definitions, skip={"method"})
    parts = {f"tune.{key}": cls for key, cls in TUNE_PARTS.items() if key != "known"}
    for name, cls in {**parts, "tune.train (method: evaluate)": MeasureTrain}.items():
        lines += ["", f"### {name}", "", _sentence(definitions[cls.__name__]["description"]), ""]
        lines += _table(definitions[cls.__name__], definitions)
    return lines


def _table(
    schema: dict[str, Any], definitions: dict[str, Any], skip: frozenset[str] | set[str] = frozenset()
) -> list[str]:
    required = schema.get("required", [])
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, item in schema["properties"].items():
        if key in skip:
            continue
        default = "**required**" if key in required else f"`{_plain(item.get('default'))}`"
        meaning = item.get("description", "").replace("\n", " ").replace("|", "\\|")
        rows.append(f"| `{key}` | {_type(item, definitions)} | {default} | {meaning} |")
    return rows


def _plain(value: Any) -> str:
    """A default as one would write it in YAML."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and abs(value) < 1e-2:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def _type(item: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in item:
        return "mapping"
    if "enum" in item:
        return ", ".join(f"`{choice}`" for choice in item["enum"])
    if "const" in item:
        return f"`{item['const']}`"
    for union in ("anyOf", "oneOf"):
        if union in item:
            kinds = [_type(option, definitions) for option in item[union] if option.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    return _simple(item, definitions)


def _simple(item: dict[str, Any], definitions: dict[str, Any]) -> str:
    kind = item.get("type")
    if kind == "array":
        if "prefixItems" in item:
            return f"{len(item['prefixItems'])} numbers"
        return f"list of {_type(item['items'], definitions)}"
    if isinstance(kind, list):
        return " or ".join(kind)
    words = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "object": "mapping"}
    if kind == "string":
        return "duration" if "smhd" in item.get("pattern", "") else "text"
    return words.get(str(kind), "anything")


def _sentence(description: str) -> str:
    return description.split("\n\n", maxsplit=1)[0].replace("\n", " ")


def write(folder: Path) -> list[Path]:
    """Write the files into `folder` and return their paths."""
    from runs.sweep import SweepSpec

    sweep = folder / "sweep.schema.json"
    form = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **SweepSpec.model_json_schema(schema_generator=_Documented),
        "title": "llmctl sweep.yaml",
    }
    sweep.write_text(json.dumps(form, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    page, schema = folder / "run-yaml.md", folder / "run.schema.json"
    page.write_text(markdown(), encoding="utf-8")
    schema.write_text(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [page, schema, sweep]


if __name__ == "__main__":
    write(DOCS)
