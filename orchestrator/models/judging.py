"""`judge`: all models answer the questions of a file, a judge grades the answers; scores of runs go into their records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.data import bases
from orchestrator.data.templates import Turn
from orchestrator.errors import Invalid
from orchestrator.models import chat, judge, judge_table, measuring
from orchestrator.models import load as models
from orchestrator.models.judge import Endpoint, JudgeError, Question
from orchestrator.models.load import Drawing, Opened
from orchestrator.models.names import Found, opened
from runs.store import Store


@dataclass(frozen=True)
class Ask:
    """What the command line says."""

    questions: str
    limit: int | None
    endpoint: Endpoint
    repeats: int
    tokens: int
    template: str | None
    seed: int
    device: str


def questions(ask: Ask) -> list[Question]:
    """The questions. Raises DataError naming the line."""
    return judge.questions_of(ask.questions, ask.limit)


def that_fit(found: list[Found], asked: list[Question], ask: Ask) -> list[Question]:
    """The questions that every model has room for. Of a built-in set the others are left out: all models answer the same.

    Raises Invalid, which names the question, for another file, and where none is left.
    """
    short = asked
    for item in found:
        base = bases.look(item.path, item.tokenizer)
        template = chat.template_for(base.config, ask.template)
        tokenizer, longest = bases.fitting(base.tokenizer, base.model.vocab_size), base.model.context_length
        for question in asked:
            prompt = template.render([Turn(question.instruction, question.context)], None)
            if (size := len(tokenizer.encode(prompt))) <= longest:
                continue
            if not ask.questions.startswith("builtin:"):
                raise Invalid(
                    f"{question.where}: the prompt has {size} tokens, and {item.label} was trained on at most {longest}",
                    "leave the question out",
                )
            short = [one for one in short if one is not question]
    if not short:
        raise Invalid(f"no question of {ask.questions} fits all models' contexts", "give shorter --questions")
    return short


def run(
    store: Store, found: list[Found], asked: list[Question], ask: Ask, progress: judge.Progress
) -> dict[str, Any]:
    """The judge's table, in the records of the runs in it once it is whole. Answers are kept in LLMCTL_HOME/judge: what was
    made or paid for once is not asked for again.

    Raises Invalid, Usage, and JudgeError where the endpoint refuses or says nothing that can be read; then no record changes.
    """
    models.need_torch(ask.device)
    folder = store.home / "judge"
    how = Drawing(temperature=0.0, tokens=ask.tokens)
    panel = {item.name: (bases.identity(item.path), _opening(item, ask.device)) for item in found}
    responses = judge.respond(panel, asked, folder, how=how, template=ask.template, progress=progress)
    table = judge.judge(
        asked, responses, ask.endpoint, folder, repeats=ask.repeats, seed=ask.seed, progress=progress
    )
    results = judge_table.results(table)
    if not results:
        raise JudgeError(
            f"none of the {table['answers']} answers of {ask.endpoint.model} could be read, so there is no score",
            f"they are in {folder / judge.ANSWERS}; choose another judge, and nothing is recorded",
        )
    recorded = [item for item in found if item.run is not None and item.name in results]
    for item in recorded:
        measuring.keep(store, item, [results[item.name]])
    return {**table, "recorded": [item.run for item in recorded]}


def _opening(found: Found, device: str) -> Callable[[], Opened]:
    return lambda: opened(found, device)
