"""Chat and instruction formats: how a request becomes a prompt, and where the answer ends.

`alpaca` is the format of Stanford Alpaca (2023), `llama2` that of Llama 2's chat models (Touvron et al., 2023, appendix
A). A model that was tuned here names its format in its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import Invalid, Usage


@dataclass(frozen=True)
class Turn:
    """One request; `answer` is None for the one that is to be answered."""

    instruction: str
    context: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class Template:
    """One format."""

    name: str
    render: Callable[[Sequence[Turn], str | None], str]
    """The prompt of a conversation whose last turn is open, with an optional system text."""
    lead: str
    """What an answer begins with, so that its first word is one token as it is in running text."""
    stop: tuple[str, ...]
    """Texts at which an answer ends where the model does not end it itself."""


def _alpaca(turns: Sequence[Turn], system: str | None) -> str:
    parts: list[str] = []
    for turn in turns:
        task = "Below is an instruction that describes a task"
        given = ", paired with an input that provides further context" if turn.context else ""
        head = system or f"{task}{given}. Write a response that appropriately completes the request."
        body = f"### Instruction:\n{turn.instruction}\n\n"
        body += f"### Input:\n{turn.context}\n\n" if turn.context else ""
        answer = "" if turn.answer is None else f"{turn.answer}\n\n"
        parts.append(("" if parts else f"{head}\n\n") + body + "### Response:\n" + answer)
    return "".join(parts)


def _llama2(turns: Sequence[Turn], system: str | None) -> str:
    text = ""
    for index, turn in enumerate(turns):
        request = f"{turn.instruction}\n\n{turn.context}" if turn.context else turn.instruction
        head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and index == 0 else ""
        text += f"<s>[INST] {head}{request} [/INST]" + ("" if turn.answer is None else f" {turn.answer} </s>")
    return text


TEMPLATES: Mapping[str, Template] = {
    item.name: item
    for item in (
        Template("alpaca", _alpaca, "", ("### Instruction:", "### Input:", "### Response:")),
        Template("llama2", _llama2, " ", ("</s>", "[INST]")),
    )
}


def template(name: str) -> Template:
    """The template of that name. Raises Usage."""
    if name not in TEMPLATES:
        raise Usage(f"there is no chat template {name!r}", f"there are: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def prompt(name: str, instruction: str, context: str = "", *, system: str | None = None) -> str:
    """The prompt of one request. Raises Invalid for an empty one, Usage for an unknown template."""
    if not instruction.strip():
        raise Invalid("the instruction is empty", "say what the model is to do")
    return template(name).render([Turn(instruction, context)], system)
