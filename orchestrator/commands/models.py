"""What a trained model can do on this machine: sample, evaluate."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.commands.common import (
    Form,
    Json,
    Output,
    add,
    answer,
    complete_run,
    machine,
    open_store,
    tell,
)

PANEL = "Models"
Model = Annotated[
    str,
    typer.Argument(metavar="RUN|PATH", help="A run, or the folder of a checkpoint.", autocompletion=complete_run,
                   show_default=False),
]  # fmt: skip
Which = Annotated[str, typer.Option("--which", metavar="best|latest|STEP", help="Which checkpoint of a run.")]
Device = Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where to compute.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add(
        app,
        PANEL,
        "sample",
        sample,
        "llmctl sample RUN 'def main():'",
        "llmctl sample RUN Once --compare OTHER",
    )
    add(
        app,
        PANEL,
        "evaluate",
        evaluate,
        "llmctl evaluate RUN",
        "llmctl evaluate ./step-000600 --data test.bin",
    )


def sample(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What the model continues; default: the spec's first prompt.", show_default=False
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
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many.")] = 128,
    compare: Annotated[
        list[str] | None, typer.Option("--compare", metavar="RUN|PATH", help="The same from another model.")
    ] = None,
    which: Which = "best",
    device: Device = "cpu",
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Continue a prompt with a model that is here. Needs torch on this machine."""
    from orchestrator import modelling

    how = modelling.How(temperature, top_k, top_p, seed, tokens, device)
    found = [modelling.find(open_store(), word, which) for word in [model, *(compare or [])]]
    samples = [modelling.sample(item, prompt, how) for item in found]
    document = samples[0] if len(samples) == 1 else samples
    answer(document, as_json=machine(as_json, output), human=lambda: modelling.say_samples(samples))


def evaluate(
    model: Model,
    *,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="SHARD", help="Shards, instead of the spec's test sets."),
    ] = None,
    test_set: Annotated[
        str | None, typer.Option("--test-set", metavar="NAME", help="A built-in test set.")
    ] = None,
    offset: Annotated[int, typer.Option("--offset", min=0, help="First token (with --data).")] = 0,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens that are predicted (with --data).")
    ] = 1_000_000,
    which: Which = "best",
    device: Device = "cpu",
    as_json: Json = False,
    output: Output = Form.TEXT,
) -> None:
    """Measure the loss of a model that is here on a named test set. Needs torch on this machine."""
    from orchestrator import modelling

    store = open_store()
    found = modelling.find(store, model, which)
    sets = modelling.test_sets(found, data=data or [], name=test_set, offset=offset, tokens=tokens)
    if not machine(as_json, output):
        tell(f"{found.label}: {len(sets)} test set{'s' if len(sets) != 1 else ''}")
    results = modelling.evaluate(store.home, found, sets, device=device)
    document = {"run": found.run, "path": str(found.path), "step": found.step, "results": results}
    answer(document, as_json=machine(as_json, output), human=lambda: modelling.say_losses(results))
