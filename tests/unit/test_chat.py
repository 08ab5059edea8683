"""Chat formats, and a model that was tuned on one answers in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.data import templates
from orchestrator.data.templates import Turn
from orchestrator.errors import Invalid, Usage
from orchestrator.models import chat, judge
from orchestrator.models.chat import respond, template_of
from orchestrator.models.load import Drawing, Opened, open_model
from tests.unit.test_models import MODEL, one_thread, write  # noqa: F401
from trainer.config import Tuned


def test_alpaca_with_and_without_an_input() -> None:
    assert templates.prompt("alpaca", "Name a colour.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\n"
    )
    assert templates.prompt("alpaca", "Translate.", "rouge") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nTranslate.\n\n### Input:\nrouge\n\n### Response:\n"
    )


def test_llama2_with_a_system_text_and_a_conversation() -> None:
    turns = [Turn("Hello", answer="Hi!"), Turn("Name a colour.")]
    assert templates.template("llama2").render(turns, "Be brief.") == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST] Hi! </s><s>[INST] Name a colour. [/INST]"
    )
    assert chat.answered([Turn("Name a colour.")], "Red.") == [Turn("Name a colour.", "", "Red.")]


class Scripted:
    """Stands for a model: says what it is told to, whatever it is asked."""

    def __init__(self, says: str) -> None:
        self.says = says.encode()
        self.config = MODEL
        self.token_embedding = torch.nn.Embedding(1, 1)
        self.blocks: list[Any] = []
        self.prompts: list[bytes] = []
        self._at = 0

    def logits(self, tokens_bt: torch.Tensor, _cache: Sequence[Any]) -> torch.Tensor:
        self.prompts.append(bytes(tokens_bt[0].tolist()))
        token = self.says[self._at % len(self.says)]
        self._at += 1
        return torch.nn.functional.one_hot(torch.tensor([[token]]), 256).float() * 100


def scripted(says: str, tmp_path: Path, template: str | None = "alpaca") -> tuple[Opened, Scripted]:
    opened = open_model(write(tmp_path))
    model = Scripted(says)
    tuned = Tuned("instruction", template) if template else None
    roomy = replace(MODEL, context_length=1000)
    model.config = roomy
    return Opened(model, replace(opened.config, tuned=tuned, model=roomy), "bytes"), model  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("says", "template", "expected"),
    [
        (" Red.\0 and more", "alpaca", "Red."),
        ("Red.\n\n### Instruction:\nNow", "alpaca", "Red.\n\n"),
        (" Red. </s><s>[INST]", "llama2", "Red. "),
        ("Red", "alpaca", "RedRedRedR"),
    ],
)
def test_an_answer_ends_where_the_format_ends_it(
    tmp_path: Path, says: str, template: str, expected: str
) -> None:
    opened, model = scripted(says, tmp_path, template)
    how = Drawing(temperature=0, tokens=10 if says == "Red" else 100)
    assert "".join(respond(opened, [Turn("Name a colour.")], how)) == expected
    assert model.prompts[0] == templates.prompt(template, "Name a colour.").encode()


def test_a_model_without_a_format_asks_for_one(tmp_path: Path) -> None:
    opened, _ = scripted("x", tmp_path, None)
    with pytest.raises(Usage, match="was not tuned on a chat format") as caught:
        template_of(opened)
    assert "--template alpaca or llama2" in caught.value.hint
    assert template_of(opened, "llama2").name == "llama2"
    with pytest.raises(Usage, match="there is no chat template 'vicuna'"):
        template_of(opened, "vicuna")
    for empty in ([], [Turn("  ")]):
        with pytest.raises(Invalid, match="the instruction is empty"):
            list(respond(opened, empty, Drawing(), name="alpaca"))


def test_all_models_answer_before_the_judge_is_asked_and_none_twice(tmp_path: Path) -> None:
    questions = judge.questions_of("builtin:instructions", limit=3)
    assert len({question.id for question in questions}) == 3 and all(
        question.reference for question in questions
    )
    opened: list[str] = []

    def opening(name: str, says: str) -> Any:
        def open_it() -> Opened:
            opened.append(name)
            return scripted(says, tmp_path / name)[0]

        return open_it

    models = {"a": ("weights-1", opening("a", "Yes.\0")), "b": ("weights-2", opening("b", "No.\0"))}
    folder = tmp_path / "judge"
    found = judge.respond(models, questions, folder)
    assert found == {
        "a": dict.fromkeys([q.id for q in questions], "Yes."),
        "b": dict.fromkeys([q.id for q in questions], "No."),
    }
    assert judge.respond(models, questions, folder) == found and opened == ["a", "b"]
    lines = (folder / "responses.jsonl").read_text().splitlines()
    (folder / "responses.jsonl").write_text(
        "\n".join(lines[:-1]) + "\n" + lines[-1][:20]
    )  # killed in the last answer
    assert judge.respond(models, questions, folder) == found and opened == ["a", "b", "b"]
    models["a"] = ("weights-3", opening("a", "Maybe.\0"))  # other weights, other answers
    assert judge.respond(models, questions, folder)["a"][questions[0].id] == "Maybe."
    assert all(
        json.loads(line)["model"] in {"a", "b"}
        for line in (folder / "responses.jsonl").read_text().splitlines()
        if line[-1] == "}"
    )
