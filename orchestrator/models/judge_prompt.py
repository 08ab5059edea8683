"""What the judge is asked, and what counts as its answer.

One prompt an item shows every model's answer, so that all are held to one standard; their order is shuffled anew for
each item and repeat, so that no model profits from its place.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERSION = 1
"""Part of a panel's identity: scores under another wording are other scores."""
LOWEST, HIGHEST = 0, 100
_SYSTEM = (
    "You grade answers to a task. Judge only what the answer says: is it correct, complete, to the point and in good "
    f"language? Give each answer a whole number from {LOWEST} (useless) to {HIGHEST} (as good as can be). Use the same standard for all."
)


@dataclass(frozen=True)
class Question:
    """One item of the test: a task, and an answer that would do."""

    id: str
    instruction: str
    context: str = ""
    reference: str = ""
    where: str = ""
    """File and line, for messages."""


def labels(count: int) -> list[str]:
    """A, B, … Z, AA, AB, …"""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return [(letters[i // 26 - 1] if i >= 26 else "") + letters[i % 26] for i in range(count)]


def shuffled(models: Sequence[str], seed: int, question: str, repeat: int) -> list[str]:
    """The models in the order in which this prompt shows them: a function of the arguments alone."""
    order = sorted(models)
    digest = hashlib.sha256(f"{seed}/{question}/{repeat}".encode()).digest()
    random.Random(digest).shuffle(order)  # noqa: S311  an order, not a secret
    return order


def messages(question: Question, answers: Sequence[str]) -> list[dict[str, str]]:
    """The chat messages that show a task and the answers, labelled in their order."""
    names = labels(len(answers))
    parts = [f"Task:\n{question.instruction}"]
    if question.context:
        parts.append(f"Input:\n{question.context}")
    if question.reference:
        parts.append(f"An answer that would be right:\n{question.reference}")
    parts += [
        f"Answer {name}:\n{answer.strip() or '(empty)'}" for name, answer in zip(names, answers, strict=True)
    ]
    form = ", ".join(f'"{name}": <number>' for name in names)
    parts.append(f"Reply with one JSON object and nothing else: {{{form}}}")
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "\n\n".join(parts)}]


def scores(content: str, order: Sequence[str]) -> dict[str, float] | None:
    """Each model's score, or None where the reply does not have one valid number for every answer and no other."""
    begin, end = content.find("{"), content.rfind("}")
    if begin < 0 or end < begin:
        return None
    try:
        raw = json.loads(content[begin : end + 1])
    except ValueError:
        return None
    names = labels(len(order))
    if (
        not isinstance(raw, dict)
        or set(raw) != set(names)
        or not all(_valid(value) for value in raw.values())
    ):
        return None
    return {model: float(raw[name]) for name, model in zip(names, order, strict=True)}


def _valid(value: Any) -> bool:
    return type(value) in {int, float} and math.isfinite(value) and LOWEST <= value <= HIGHEST


def panel(judge: str, questions: Sequence[Question], responses: Mapping[str, Mapping[str, str]]) -> str:
    """The identity of a comparison: who judges, what is asked and how, which models with which answers. Only scores of
    one panel may be compared."""
    what = [VERSION, judge, [[q.id, q.instruction, q.context, q.reference] for q in questions],
            {model: [responses[model][q.id] for q in questions] for model in sorted(responses)}]  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
