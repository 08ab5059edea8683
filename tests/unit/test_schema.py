"""The JSON Schema accepts and refuses what the models do, and the generated files are current."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from runs import recipes, schema
from runs.sections import HARDWARE, SECTIONS, WRITTEN_BY_LLMCTL, field_names
from runs.spec import SpecError, from_dict, parse
from runs.yamlfile import parse as parse_yaml

RENTED = """\
name: rented
hardware: {provider: lambda, gpu: A100-40GB:8}
budget: {max_usd: 45, max_hours: 6}
data: {train: [s3://bucket/a.bin]}
train: {tokens: 1e9, global_batch_size: 104}
"""


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(schema.json_schema())
    return Draft202012Validator(schema.json_schema())


@pytest.mark.parametrize("name", recipes.names())
def test_the_recipes_are_valid_as_written(validator: Draft202012Validator, name: str) -> None:
    validator.validate(parse_yaml(recipes.text(name), name).data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "Big Name"), ("foo", 1), ("hardware.provider", "azure"), ("hardware.usd_per_hour", 1),
        ("hardware.gpu", None), ("hardware.instance_type", "gpu_8x_a100"), ("budget.max_usd", None),
        ("budget.max_usd", -1), ("budget", {}), ("train.steps", 5), ("train.tokens", None),
        ("train.global_batch_size", "8"), ("train.schedule", "linear"), ("train.betas", [0.9]),
        ("model.n_layer", 3), ("node.boot_timeout", "soon"), ("node.on_finish", "kep"), ("wandb.from_", "node"),
        ("data.train_tokens", [1]), ("evaluate.test_sets", [{"name": "a"}]), ("checkpoint.fetch", "some"),
    ],
)  # fmt: skip
def test_what_the_models_refuse_the_schema_refuses(
    validator: Draft202012Validator, path: str, value: Any
) -> None:
    data = parse_yaml(RENTED, "run.yaml").data
    validator.validate(data)
    section, _, key = path.rpartition(".")
    target = data.setdefault(section, {}) if section else data
    target[key] = value
    assert not validator.is_valid(data)
    with pytest.raises(SpecError):
        from_dict(data)


def test_every_key_is_on_the_page_with_a_meaning() -> None:
    page = schema.markdown()
    for section, cls in {**SECTIONS, **HARDWARE}.items():
        for key in field_names(cls):
            if f"{section}.{key}" in WRITTEN_BY_LLMCTL or key == "provider":
                continue
            rows = [line for line in page.splitlines() if line.startswith(f"| `{key}` |")]
            assert rows, f"{section}.{key}"
            assert all(len(row.split(" | ")[3]) > 4 for row in rows), f"{section}.{key} has no docstring"


def test_the_defaults_on_the_page_are_those_of_a_spec() -> None:
    page = schema.markdown()
    spec = parse(RENTED, "run.yaml")
    assert f"| `max_restarts` | whole number | `{spec.node.max_restarts}` |" in page
    assert "| `learning_rate` | number | `4e-4` |" in page
    assert '| `secrets` | list of text | `["HF_TOKEN"]` |' in page


def test_the_files_in_docs_are_current(tmp_path: Path) -> None:
    for path in schema.write(tmp_path):
        committed = schema.DOCS / path.name
        assert committed.read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), (
            f"{committed.name} is out of date: run python -m runs.schema"
        )
    assert json.loads((tmp_path / "run.schema.json").read_text())["title"] == "llmctl run.yaml"
