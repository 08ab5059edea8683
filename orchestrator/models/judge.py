"""An instruction test with a judge: all models answer first, then the judge sees each item's answers side by side.

Both stages append to files of their own and go on from there when they are called again: `responses.jsonl` and
`answers.jsonl` in one folder. Nothing is asked, or paid for, twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.data import examples
from orchestrator.data.templates import Turn
from orchestrator.errors import Usage
from orchestrator.models import chat, judge_prompt, judge_table
from orchestrator.models.judge_client import Client, Endpoint, JudgeError, micro_usd
from orchestrator.models.judge_file import Lines
from orchestrator.models.judge_prompt import Question
from orchestrator.models.load import Drawing, Opened

__all__ = ["Endpoint", "JudgeError", "Question", "judge", "questions_of", "respond"]

RESPONSES, ANSWERS = "responses.jsonl", "answers.jsonl"
ASKS = 3
"""Answers that are asked for where one cannot be read, for one item and repeat."""
GREEDY = Drawing(temperature=0.0, tokens=256)
Progress = Callable[[str, int, int], None]


def _quiet(_what: str, _done: int, _total: int) -> None:
    """The progress callback of someone who does not look."""


def questions_of(source: str, limit: int | None = None) -> list[Question]:
    """The items of an Alpaca file, or of the test part of a built-in set. Raises DataError naming the line."""
    part = "test" if source.startswith("builtin:") else None
    items = examples.read(source, "instruction", part)[:limit]
    return [
        Question(
            f"{index:05d}-{_digest([item.instruction, item.context])[:8]}",
            item.instruction,
            item.context,
            item.output,
            item.where,
        )
        for index, item in enumerate(items)
    ]


def respond(
    models: Mapping[str, tuple[str, Callable[[], Opened]]],
    questions: Sequence[Question],
    folder: Path,
    *,
    how: Drawing = GREEDY,
    template: str | None = None,
    progress: Progress = _quiet,
) -> dict[str, dict[str, str]]:
    """Every model's answer to every question; those that `responses.jsonl` has already are not made again.

    `models` gives for each name an identity (that changes with the weights) and a function that opens it: one model is in
    memory at a time, and none whose answers are all there. Raises Usage where a model's chat format is not known.
    """
    lines = Lines(folder / RESPONSES)
    try:
        result: dict[str, dict[str, str]] = {}
        for name, (identity, opening) in models.items():
            key = _digest([identity, template, asdict(how)])
            mine = {row["question"]: row["response"] for row in lines.rows if row.get("key") == key}
            missing = [question for question in questions if question.id not in mine]
            opened = opening() if missing else None
            for done, question in enumerate(missing):
                assert opened is not None
                turn = Turn(question.instruction, question.context)
                text = "".join(chat.respond(opened, [turn], how, name=template)).strip()
                lines.append({"key": key, "model": name, "question": question.id, "response": text})
                mine[question.id] = text
                progress(f"{name} answers", done + 1, len(missing))
            result[name] = {question.id: mine[question.id] for question in questions}
        return result
    finally:
        lines.close()


def judge(
    questions: Sequence[Question],
    responses: Mapping[str, Mapping[str, str]],
    endpoint: Endpoint,
    folder: Path,
    *,
    repeats: int = 5,
    seed: int = 0,
    progress: Progress = _quiet,
) -> dict[str, Any]:
    """The judge's table (see `judge_table.table`). Answers that `answers.jsonl` has of this panel are not asked for again.

    Raises Usage for nothing to judge, JudgeError where the endpoint refuses or does not answer; what was answered stays.
    """
    if not questions or not responses:
        raise Usage("there is nothing to judge", "give at least one model and one question")
    if repeats < 1 or endpoint.concurrency < 1:
        raise Usage("repeats and concurrency must be at least 1", "--repeats 5 --concurrency 4 is usual")
    panel = judge_prompt.panel(endpoint.model, questions, responses)
    lines, client = Lines(folder / ANSWERS), Client(endpoint)
    try:
        mine = [row for row in lines.rows if row.get("panel") == panel]
        left = [
            (question, repeat, asked)
            for repeat in range(repeats)
            for question in questions
            if (asked := _asked(mine, question, repeat)) < ASKS
        ]

        def work(question: Question, repeat: int, asked: int) -> None:
            for _ in range(asked, ASKS):
                row = _ask(client, endpoint, question, responses, repeat=repeat, seed=seed)
                lines.append({"panel": panel, **row})
                if row["scores"] is not None:
                    return

        _all(left, work, endpoint.concurrency, progress)
        mine = [row for row in lines.rows if row.get("panel") == panel and row["repeat"] < repeats]
    finally:
        client.close()
        lines.close()
    return judge_table.table(mine, judge=endpoint.model, panel=panel, models=list(responses),
                             questions=[question.id for question in questions], repeats=repeats)  # fmt: skip


def _asked(rows: Sequence[Mapping[str, Any]], question: Question, repeat: int) -> int:
    """How often this was asked; as often as may be, where there is an answer."""
    mine = [row for row in rows if row["question"] == question.id and row["repeat"] == repeat]
    return ASKS if any(row["scores"] is not None for row in mine) else len(mine)


def _ask(
    client: Client,
    endpoint: Endpoint,
    question: Question,
    responses: Mapping[str, Mapping[str, str]],
    *,
    repeat: int,
    seed: int,
) -> dict[str, Any]:
    """One answer of the judge, as a row of the file."""
    order = judge_prompt.shuffled(list(responses), seed, question.id, repeat)
    answer = client.ask(judge_prompt.messages(question, [responses[model][question.id] for model in order]))
    return {
        "question": question.id, "repeat": repeat, "order": order, "content": answer.content,
        "scores": judge_prompt.scores(answer.content, order), "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "micro_usd": micro_usd(endpoint, answer.prompt_tokens, answer.completion_tokens),
    }  # fmt: skip


def _all(
    jobs: Sequence[tuple[Question, int, int]],
    work: Callable[[Question, int, int], None],
    workers: int,
    progress: Progress,
) -> None:
    """Do all jobs, some at once. The first failure ends it; what is under way then is still written down."""
    done = 0
    with ThreadPoolExecutor(max_workers=workers) as pool:
        pending = {pool.submit(work, *job) for job in jobs}
        try:
            while pending:
                ended, pending = wait(pending, return_when=FIRST_EXCEPTION, timeout=1.0)
                for future in ended:
                    future.result()
                done += len(ended)
                progress("judging", done, len(jobs))
        finally:
            for future in pending:
                future.cancel()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
