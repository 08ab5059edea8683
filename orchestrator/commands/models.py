"""What a trained model can do on this machine: sample, evaluate, judge, export."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.common import (
    Form,
    Json,
    Output,
    add,
    answer,
    interactive,
    machine,
    open_store,
    tell,
)
from orchestrator.completion import complete_run

PANEL = "Models"
WHAT = "A run, the folder of a checkpoint or of a Hugging Face model, or hf://owner/name."
Model = Annotated[
    str,
    typer.Argument(metavar="RUN|PATH", help=WHAT, autocompletion=complete_run, show_default=False),
]
Models = Annotated[
    list[str],
    typer.Argument(metavar="RUN|PATH...", help=WHAT, autocompletion=complete_run, show_default=False),
]
Which = Annotated[str, typer.Option("--which", metavar="best|latest|STEP", help="Which checkpoint of a run.")]
Device = Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where to compute.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", metavar="NAME", help="gpt2, bytes or a tokenizer.json, where the model names none."
    ),
]
Template = Annotated[
    str | None,
    typer.Option("--template", metavar="alpaca|llama2", help="Chat format; default: the checkpoint's own."),
]


class Kind(StrEnum):
    """What `export --format` takes."""

    HF = "hf"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add(
        app,
        PANEL,
        "sample",
        sample,
        "llmctl sample RUN 'def main():'",
        "llmctl sample RUN Once --compare OTHER",
        "llmctl sample RUN --chat",
    )
    add(
        app,
        PANEL,
        "evaluate",
        evaluate,
        "llmctl evaluate RUN",
        "llmctl evaluate hf://openai-community/gpt2 --test-set fineweb-gpjt",
        "llmctl evaluate ./step-000600 --data test.bin",
    )
    add(
        app,
        PANEL,
        "judge",
        judge,
        "llmctl judge RUN OTHER ./gpt2 --judge gpt-4.1-mini --questions test.jsonl",
    )
    add(app, PANEL, "export", export, "llmctl export RUN --to ./model --push me/model")


def sample(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT...",
            help="What the model continues, or answers; default: the spec's first prompt.",
            show_default=False,
        ),
    ] = None,
    *,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Among the K likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Among the likeliest that make up P.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="At most so many.")] = 128,
    compare: Annotated[
        list[str] | None, typer.Option("--compare", metavar="RUN|PATH", help="The same from another model.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer instead of continuing; without a PROMPT, line by line.")
    ] = False,
    template: Template = None,
    system: Annotated[str | None, typer.Option("--system", help="System text, with --chat.")] = None,
    tokenizer: Tokenizer = None,
    which: Which = "best",
    device: Device = "cpu",
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Continue prompts with models that are here, or talk to one. Needs torch on this machine."""
    from orchestrator.models import sampling
    from orchestrator.models.load import Drawing
    from orchestrator.render import models as render_models

    quiet = machine(as_json, output)
    ask = sampling.Ask(
        models=(model, *(compare or [])), prompts=tuple(prompts or ()),
        how=Drawing(temperature, top_k, top_p, seed, tokens),
        talk=sampling.Talk(template, system) if chat else None, tokenizer=tokenizer, which=which, device=device,
    )  # fmt: skip
    if sampling.open_ended(ask, quiet=quiet):
        cue = (lambda: tell("One line is one request; Ctrl-D ends.")) if interactive() else (lambda: None)
        sampling.converse(open_store(), ask, sys.stdin, render_models.piece, cue)
        return
    alone = len(ask.models) == 1
    samples = sampling.sample(
        open_store(), ask, render_models.piece if alone and not quiet else sampling.silent
    )
    answer(
        sampling.document(samples),
        as_json=quiet,
        human=lambda: None if alone else render_models.side_by_side(samples),
    )


def evaluate(
    model: Model,
    *,
    test_set: Annotated[
        list[str] | None,
        typer.Option("--test-set", metavar="NAME", help="A built-in test set, or one of the run's spec."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="SHARD", help="Shards, instead of the spec's test sets."),
    ] = None,
    offset: Annotated[int, typer.Option("--offset", min=0, help="First token (with --data).")] = 0,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens that are predicted (with --data).")
    ] = 1_000_000,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens a sequence; default: the model's context.")
    ] = None,
    hellaswag: Annotated[
        str | None,
        typer.Option(
            "--hellaswag", metavar="FILE|hub", help="HellaSwag, from JSON lines or parquet, or the Hub."
        ),
    ] = None,
    items: Annotated[int | None, typer.Option("--items", min=1, help="Only so many of HellaSwag.")] = None,
    tokenizer: Tokenizer = None,
    which: Which = "best",
    device: Device = "cpu",
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Measure the loss of a model on named test sets, and HellaSwag. A run's results go into its record."""
    from orchestrator.models import measuring
    from orchestrator.models import names as modelling
    from orchestrator.render import models as render_models

    store = open_store()
    ask = measuring.Ask(
        data=tuple(data or ()), test_sets=tuple(test_set or ()), offset=offset, tokens=tokens, context=context,
        hellaswag=hellaswag, items=items, device=device, tokenizer=tokenizer,
    )  # fmt: skip
    document = measuring.measure(store, modelling.find(store, model, which), ask)
    answer(document, as_json=machine(as_json, output), human=lambda: render_models.losses(document))


def judge(
    models: Models,
    *,
    name: Annotated[
        str,
        typer.Option("--judge", metavar="MODEL", envvar="LLMCTL_JUDGE_MODEL", help="The model that judges."),
    ],
    base_url: Annotated[
        str, typer.Option("--base-url", envvar="OPENAI_BASE_URL", help="An OpenAI-compatible endpoint.")
    ] = "https://api.openai.com/v1",
    key_variable: Annotated[
        str, typer.Option("--key-variable", metavar="NAME", help="Environment variable with its key.")
    ] = "OPENAI_API_KEY",
    questions: Annotated[
        str, typer.Option("--questions", metavar="FILE", help="Alpaca-style JSON lines, or a built-in set.")
    ] = "builtin:instructions",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="How often each item is judged.")] = 5,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at once.")] = 4,
    input_usd: Annotated[
        float | None, typer.Option("--input-usd", min=0.0, help="Dollars per million tokens asked.")
    ] = None,
    output_usd: Annotated[
        float | None, typer.Option("--output-usd", min=0.0, help="Dollars per million tokens answered.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="The judge's; default: the endpoint's own.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Longest answer of a model.")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="Of the order in which answers are shown.")] = 0,
    template: Template = None,
    which: Which = "best",
    device: Device = "cpu",
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Let all models answer, and a language model grade the answers side by side. Costs money at the endpoint."""
    from orchestrator.models import judging
    from orchestrator.models import names as modelling
    from orchestrator.models.judge import Endpoint
    from orchestrator.render import models as render_models

    endpoint = Endpoint(
        base_url, name, key_variable, usd_per_million_input=input_usd, usd_per_million_output=output_usd,
        temperature=temperature, concurrency=concurrency,
    )  # fmt: skip
    ask = judging.Ask(questions, limit, endpoint, repeats, tokens, template, seed, device)
    store = open_store()
    asked = judging.questions(ask)
    found = modelling.find_all(store, models, which)
    fitting = judging.that_fit(found, asked, ask)
    if not machine(as_json, output):
        left_out = f" ({len(asked) - len(fitting)} do not fit a context)" if len(fitting) < len(asked) else ""
        tell(f"{len(found)} models, {len(fitting)} questions{left_out}, {repeats} times each at {base_url}")
    try:
        document = judging.run(store, found, fitting, ask, render_models.progress())
    except KeyboardInterrupt:
        tell("\ninterrupted; the same command goes on from here, and asks nothing twice")
        raise
    answer(document, as_json=machine(as_json, output), human=lambda: render_models.judged(document))


def export(
    model: Model,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A folder that is new or empty.")],
    form: Annotated[Kind, typer.Option("--format", help="hf: what transformers loads.")] = Kind.HF,
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload it to the Hub; needs HF_TOKEN.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Named in the model card.")
    ] = None,
    tokenizer: Tokenizer = None,
    which: Which = "best",
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Write a checkpoint as a folder that transformers loads: weights, configuration, tokenizer, model card."""
    from orchestrator.models import names as modelling
    from orchestrator.render import models as render_models

    del form
    store = open_store()
    document = modelling.export(
        store,
        modelling.find(store, model, which),
        to,
        push=push,
        public=public,
        licence=licence,
        tokenizer=tokenizer,
    )
    answer(document, as_json=machine(as_json, output), human=lambda: render_models.exported(document))
