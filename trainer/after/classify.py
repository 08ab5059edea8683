"""Classification with a new head: `python -m trainer.after.classify --config config.json --out DIR [--resume]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.after import bases, batch, examples, script
from trainer.after.examples import Labelled
from trainer.after.heads import Classifier
from trainer.after.settings import ClassifyConfig, load, trainer_config
from trainer.after.work import Work
from trainer.config import ConfigError, TrainerConfig, Tuned
from trainer.model import GPT


def build(path: Path) -> Work[Labelled]:
    """Everything the session needs, from a config.json. Raises ConfigError, ExampleError."""
    settings = load(ClassifyConfig, path)
    start = script.open_base(settings)
    start.limits.classes = len(settings.classes)
    held = script.read_all(settings, start.limits, examples.labelled)
    adapters = script.adapt(start.gpt, settings)
    if adapters is None:
        _freeze(start.gpt, settings.trainable)
    tuned = Tuned("classification", settings.data.template, settings.classes)
    return Work(
        config=trainer_config(settings, start.model, len(held.train), tuned), settings=settings.train,
        module=Classifier(start.gpt, len(settings.classes), settings.train.seed), columns=Classifier.columns,
        train=held.train, validation=held.validation, test=held.test, weigh=lambda _item: 1,
        length=lambda item: len(item.tokens), collate=batch.labelled, adapters=adapters, announce=script.facts(settings, start, adapters),
    )  # fmt: skip


def _freeze(gpt: GPT, trainable: str) -> None:
    """Leave only what is wanted to be trained; the language model's head has no part in it."""
    gpt.requires_grad_(requires_grad=trainable == "all")
    if trainable == "last_block":
        for part in (gpt.blocks[-1], gpt.final_norm):
            part.requires_grad_(requires_grad=True)


def load_classifier(path: Path) -> tuple[Classifier, TrainerConfig]:
    """The classifier in a checkpoint that this script wrote, ready for use; its labels are `config.tuned.classes`.

    Raises ConfigError where the checkpoint is none.
    """
    base = bases.load(path)
    if base.config is None or base.config.tuned is None or base.config.tuned.kind != "classification":
        raise ConfigError("base", f"{path} is no classifier; trainer.after.classify makes one")
    weights = dict(base.weights)
    head = {name: weights.pop(f"classifier.{name}") for name in ("weight", "bias")}
    if not base.model.tie_weights:
        weights["head.weight"] = torch.zeros(base.model.vocab_size, base.model.emb_dim)
    module = Classifier(bases.assemble(base.model, weights), len(base.config.tuned.classes), 0)
    module.classifier.load_state_dict(head)
    return module.eval().requires_grad_(requires_grad=False), base.config


def classify(module: Classifier, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Each text's probabilities, (b, c). Raises ValueError for an empty text or one beyond the context."""
    longest = module.gpt.config.context_length
    if wrong := [len(text) for text in texts if not 1 <= len(text) <= longest]:
        raise ValueError(f"a text has {wrong[0]} tokens; the model takes 1 to {longest}")
    tokens_bt, last_b, _ = batch.labelled([Labelled(tuple(text), 0) for text in texts])
    with torch.inference_mode():
        return module.scores(tokens_bt, last_b).softmax(1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    return script.main("trainer.after.classify", build, argv)


if __name__ == "__main__":
    sys.exit(main())
