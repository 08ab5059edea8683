"""A model that answers: the conversation as a prompt of its own format, and the answer, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.data.templates import TEMPLATES, Template, Turn, template
from orchestrator.errors import Invalid, Usage
from orchestrator.models.load import Drawing, Opened, stream

if TYPE_CHECKING:
    from trainer.config import TrainerConfig


def template_of(opened: Opened, name: str | None = None) -> Template:
    """The template that the caller or the checkpoint names. Raises Usage where neither does."""
    return template_for(opened.config, name)


def template_for(config: TrainerConfig, name: str | None = None) -> Template:
    """The template that the caller or a model's configuration names. Raises Usage where neither does."""
    tuned = config.tuned
    chosen = name or (tuned.template if tuned is not None else None)
    if chosen is None:
        raise Usage("the model was not tuned on a chat format here",
                    f"name the one it knows: --template {' or '.join(TEMPLATES)}")  # fmt: skip
    return template(chosen)


def respond(
    opened: Opened, turns: Sequence[Turn], how: Drawing, *, name: str | None = None, system: str | None = None
) -> Iterator[str]:
    """The answer to the last turn, piece by piece. Raises Invalid, Usage."""
    if not turns or not turns[-1].instruction.strip():
        raise Invalid("the instruction is empty", "say what the model is to do")
    chosen = template_of(opened, name)
    first = True
    for text in stream(opened, chosen.render(turns, system), how, stop=chosen.stop):
        shown = text.lstrip() if first else text
        if shown:
            first = False
            yield shown


def answered(turns: Sequence[Turn], answer: str) -> list[Turn]:
    """The conversation with its last turn answered."""
    return [*turns[:-1], replace(turns[-1], answer=answer)]
