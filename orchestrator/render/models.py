"""What `sample`, `evaluate`, `judge` and `export` print for people."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator.figures import dollars, number, percent, sane, size
from orchestrator.render import text as render
from orchestrator.render.text import Column

NARROWEST = 32
"""Columns of text under which models are shown one below the other."""
GAP = 3


def piece(text: str) -> None:
    """A piece of text as it is made, without anything that would drive the terminal."""
    sys.stdout.write(sane(text))
    sys.stdout.flush()


def side_by_side(samples: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Each prompt with every model's text: `samples` has a list for each model, with the same prompts in the same order."""
    wide = (min(render.width(), 200) - GAP * (len(samples) - 1)) // len(samples)
    for texts in zip(*samples, strict=True):
        render.heading(sane(str(texts[0]["prompt"])))
        titles = [str(item["run"] or item["path"]) + _step(item["step"]) for item in texts]
        if wide < NARROWEST:
            for title, item in zip(titles, texts, strict=True):
                render.line(f"{title}:")
                render.line(item["text"].strip("\n"))
        else:
            blocks = [
                [*_wrapped(title, wide), "-" * wide, *_wrapped(item["text"], wide)]
                for title, item in zip(titles, texts, strict=True)
            ]
            for index in range(max(map(len, blocks))):
                cells = [block[index] if index < len(block) else "" for block in blocks]
                render.line((" " * GAP).join(cell.ljust(wide) for cell in cells).rstrip())
        render.line()


def _wrapped(text: str, wide: int) -> list[str]:
    clean = sane(text).strip("\n").expandtabs(4)
    return [
        part
        for line in clean.split("\n")
        for part in textwrap.wrap(line, wide, replace_whitespace=False, drop_whitespace=False) or [""]
    ]


def _step(step: int | None) -> str:
    return f" (step {step})" if step is not None else ""


def progress() -> Callable[[str, int, int], None]:
    """A line on stderr that tells how far a long job is; on a terminal it is written over, elsewhere every tenth is said."""
    over = sys.stderr.isatty()
    told: dict[str, int] = {}

    def say(what: str, done: int, total: int) -> None:
        tenth = done * 10 // max(1, total)
        if told.get(what) == (done if over else tenth):
            return
        told[what] = done if over else tenth
        text = f"{what}: {done} of {total}"
        sys.stderr.write(f"\r{text}" + ("\n" if done == total else "") if over else f"{text}\n")
        sys.stderr.flush()

    return say


def losses(document: Mapping[str, Any]) -> None:
    """One line a result."""
    for item in document["results"]:
        if item["kind"] == "hellaswag":
            render.line(f"{item['name']}: {hellaswag(item)}")
        else:
            bits = (
                f", {number(item['bits_per_byte'])} bits per byte"
                if item["bits_per_byte"] is not None
                else ""
            )
            render.line(f"{item['name']}: {number(item['loss'])} nats per token, perplexity {number(item['perplexity'], 2)}{bits}, "
                        f"over {item['tokens']:,} tokens")  # fmt: skip


def hellaswag(item: Mapping[str, Any]) -> str:
    """Accuracies in a clause."""
    what = "item" if item["items"] == 1 else "items"
    return (f"accuracy {percent(item['accuracy'])}, length-normalised {percent(item['accuracy_normalised'])} "
            f"(standard error {percent(item['standard_error'])}) over {item['items']:,} {what}")  # fmt: skip


def judged(table: Mapping[str, Any]) -> None:
    """The judge's table, and what it cost."""
    columns = (
        Column("MODEL", lambda row: row["model"], right=False, keep=9),
        Column("SCORE", lambda row: number(row["score"], 1), keep=9),
        Column("95% FROM", lambda row: number(row["low"], 1)),
        Column("TO", lambda row: number(row["high"], 1)),
        Column("ITEMS", lambda row: str(row["items"])),
    )
    render.table(columns, table["rows"])
    cost = f", {dollars(table['cost_usd'])}" if table["cost_usd"] is not None else ""
    render.line(
        f"judged by {table['judge']}, {table['repeats']} times an item; panel {table['panel']}: compare within it only"
    )
    render.line(f"{table['answers']} answers, {table['unparsed']} of them not readable; "
                f"{table['prompt_tokens']:,} tokens in, {table['completion_tokens']:,} out{cost}")  # fmt: skip
    if table["unjudged"]:
        render.line(
            f"{len(table['unjudged'])} of {table['questions']} items have no score: {', '.join(table['unjudged'])}",
            style="yellow",
        )


def exported(document: Mapping[str, Any]) -> None:
    """Where it is."""
    render.line(f"{document['path']} ({size(document['bytes'])})")
    if document["url"]:
        render.line(document["url"])
