"""From text to examples: formats, the line of every fault, and a tuned model that knows its own format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.data import examples, templates
from orchestrator.data.errors import DataError
from orchestrator.errors import Invalid
from orchestrator.models import chat
from orchestrator.models.load import open_model
from tests.unit.test_models import MODEL, one_thread, write  # noqa: F401
from trainer.after import finetune


@pytest.mark.parametrize(("name", "count"), [("instructions", 118), ("reviews", 200), ("preferences", 42)])
def test_the_built_in_sets_are_whole_and_their_parts_apart(name: str, count: int) -> None:
    kind = examples.DEMOS[name][0]
    whole = examples.read(f"builtin:{name}", kind)
    parts = {part: examples.read(f"builtin:{name}", kind, part) for part in ("train", "validation", "test")}
    assert len(whole) == count == sum(len(items) for items in parts.values())
    texts = [{(i.instruction, i.context, i.text) for i in items} for items in parts.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    if kind == "classification":
        for items in parts.values():
            assert {item.label for item in items} == {"positive", "negative"}


def test_examples_are_the_template_and_the_answer_with_its_end(tmp_path: Path) -> None:
    source = tmp_path / "alpaca.json"
    source.write_text(json.dumps([{"instruction": "Say it.", "input": "", "output": "It."}] * 10))
    for template, lead in (("alpaca", ""), ("llama2", " ")):
        made = examples.prepare(
            "instruction",
            [str(source)],
            tmp_path / template,
            tokenizer="bytes",
            vocab_size=256,
            template=template,
        )
        assert made.counts == {"train": 9, "validation": 1} and made.tests == ()
        row = json.loads(made.train.read_text().splitlines()[0])
        assert bytes(row["prompt"]).decode() == templates.prompt(template, "Say it.")
        assert bytes(row["response"]).decode() == f"{lead}It.\0"
        assert made.longest == len(row["prompt"]) + len(row["response"])


def test_classes_are_numbered_in_order_and_unknown_ones_named(tmp_path: Path) -> None:
    train, other = tmp_path / "train.jsonl", tmp_path / "other.jsonl"
    train.write_text('{"text": "a", "label": "spam"}\n\n{"text": "b", "label": "ham"}\n')
    other.write_text('{"text": "c", "label": "ham"}\n{"text": "d", "label": "eggs"}\n')
    made = examples.prepare(
        "classification",
        [str(train)],
        tmp_path / "out",
        tokenizer="bytes",
        vocab_size=256,
        validation=[str(train)],
    )
    assert made.classes == ["ham", "spam"]
    assert [json.loads(line)["label"] for line in made.train.read_text().splitlines()] == [1, 0]
    with pytest.raises(DataError, match=r"other\.jsonl, line 2: label 'eggs' is not among"):
        examples.prepare(
            "classification",
            [str(train)],
            tmp_path / "out",
            tokenizer="bytes",
            vocab_size=256,
            validation=[str(other)],
        )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "x"', "is not JSON"),
        ("[]", "is no JSON object"),
        ('{"output": "y"}', "has no instruction"),
        ('{"instruction": "x", "output": 3}', "output must be text, not 3"),
        ('{"instruction": "x", "output": " "}', "output must be text and not empty"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "alpaca.jsonl"
    path.write_text('{"instruction": "x", "output": "y"}\n\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        examples.read(str(path), "instruction")
    assert str(caught.value).startswith(f"{path}, line 3: {message}")


def test_other_faults_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no built-in preference set 'reviews'"):
        examples.read("builtin:reviews", "preference")
    with pytest.raises(DataError, match="No such file"):
        examples.read(str(tmp_path / "missing.jsonl"), "instruction")
    (tmp_path / "same.jsonl").write_text('{"instruction": "x", "chosen": "y", "rejected": "y"}')
    with pytest.raises(DataError, match="line 1: chosen and rejected are the same"):
        examples.read(str(tmp_path / "same.jsonl"), "preference")
    (tmp_path / "latin.jsonl").write_bytes(b'{"instruction": "\xe9"}')
    with pytest.raises(DataError, match="is not UTF-8"):
        examples.read(str(tmp_path / "latin.jsonl"), "instruction")
    with pytest.raises(Invalid, match="do not belong together"):
        examples.prepare("instruction", ["builtin:instructions"], tmp_path, tokenizer="bytes", vocab_size=100)


def test_a_run_on_a_built_in_set_makes_a_model_that_knows_its_format(tmp_path: Path) -> None:
    from dataclasses import replace

    base = write(tmp_path / "base", replace(MODEL, context_length=272))
    made = examples.prepare(
        "instruction",
        ["builtin:instructions"],
        tmp_path / "data",
        tokenizer="bytes",
        vocab_size=256,
        template="llama2",
    )
    assert made.counts == {"train": 70, "validation": 24, "instructions-test": 24} and made.longest <= 273
    config = {"base": str(base), "data": {"train": [str(made.train)], "validation": [str(made.validation)], "test": [str(path) for path in made.tests],
              "tokenizer": "bytes", "template": "llama2"},
              "train": {"epochs": 1, "global_batch_size": 35, "microbatch_size": 7, "learning_rate": 3e-3, "precision": "fp32", "device": "cpu"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert finetune.main(["--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "out")]) == 0
    opened = open_model(tmp_path / "out" / "checkpoints" / "best")
    assert opened.tokenizer == "bytes" and chat.template_of(opened).name == "llama2"
    results = json.loads((tmp_path / "out" / "evaluations.json").read_text())["test_sets"]
    assert results[0]["examples"] == 24 and 0 < results[0]["loss"] < 5.6
