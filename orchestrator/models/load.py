"""Models opened on this machine: each as the trainer's own GPT, with a tokenizer that is known to fit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.data.bases import fitting, locate, tokenizer_of
from orchestrator.errors import Invalid
from runs.store import default_home

if TYPE_CHECKING:
    from trainer.config import TrainerConfig
    from trainer.model import GPT
    from trainer.tokenize import Tokenizer


class Opened(NamedTuple):
    """A model that is ready for inference."""

    model: GPT
    config: TrainerConfig
    tokenizer: str
    """`gpt2`, `bytes` or the path of a tokenizer.json."""


@dataclass(frozen=True)
class Drawing:
    """How text is drawn."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    tokens: int = 128


def need_torch(device: str = "cpu") -> None:
    """Raise Invalid where torch is not installed, naming the extra, or has no such device."""
    from importlib.util import find_spec

    missing = [name for name in ("torch", "numpy", "safetensors") if find_spec(name) is None]
    if missing:
        raise Invalid(
            f"this needs {', '.join(missing)} on this machine",
            "pip install 'llmctl[trainer]'",
            code="no-extra",
        )
    # Importing torch's compiler makes a folder, which would else be one in /tmp.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_home() / "cache" / "inductor"))
    if device == "cpu":
        return
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise Invalid(f"torch has no device {device!r} on this machine", "--device cpu")


def open_model(word: str | Path, *, device: str = "cpu", tokenizer: str | None = None) -> Opened:
    """The model, its configuration and the name of its tokenizer; `tokenizer` replaces the one that it names.

    Raises DataError, and Invalid where torch or the device is missing, the folder is no whole model or a classifier, or the
    tokenizer has numbers that the model does not.
    """
    need_torch(device)
    path = locate(word)
    from trainer import checkpoint, hf_config
    from trainer.config import ConfigError
    from trainer.sample import load_model

    try:
        tuned = None if hf_config.is_hf(path) else checkpoint.load_config(path).tuned
        if tuned is not None and tuned.kind == "classification":
            raise Invalid(
                f"{path} is a classifier, no language model", "name the model that it was made from"
            )
        model, config = load_model(path, device)
    except ConfigError as error:
        raise Invalid(f"{path}: {error}", "fetch it again, or name another model") from error
    name = tokenizer or tokenizer_of(path, config)
    fitting(name, config.model.vocab_size)
    return Opened(model, config, name)


def prompt_tokens(opened: Opened, prompt: str) -> list[int]:
    """A prompt's tokens. Raises Invalid where it is empty or longer than the context."""
    if not prompt:
        raise Invalid("the prompt is empty", "give at least one word for the model to go on from")
    tokens = fitting(opened.tokenizer, opened.config.model.vocab_size).encode(prompt)
    longest = opened.config.model.context_length
    if len(tokens) > longest:
        raise Invalid(
            f"the prompt has {len(tokens)} tokens, the model was trained on at most {longest}", "shorten it"
        )
    return tokens


def stream(opened: Opened, prompt: str, how: Drawing, *, stop: Sequence[str] = ()) -> Iterator[str]:
    """What the model makes of a prompt, piece by piece; it ends at the tokenizer's separator, at one of the texts in `stop`,
    or after `how.tokens`. Raises Invalid."""
    from trainer.sample import generate

    tokenizer = fitting(opened.tokenizer, opened.config.model.vocab_size)
    tokens = generate(opened.model, prompt_tokens(opened, prompt), max_tokens=how.tokens, temperature=how.temperature,
                      top_k=how.top_k, top_p=how.top_p, seed=how.seed)  # fmt: skip
    yield from until(pieces(tokenizer, tokens), stop)


def complete(opened: Opened, prompt: str, how: Drawing, *, stop: Sequence[str] = ()) -> str:
    """All of `stream`."""
    return "".join(stream(opened, prompt, how, stop=stop))


def pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text as soon as it is certain: a character of several tokens comes whole. Ends before the separator."""
    held: list[int] = []
    for token in tokens:
        if token == tokenizer.separator:
            break
        held.append(token)
        text = tokenizer.decode(held)
        if not text.endswith("\ufffd") or len(held) > 8:  # no character is longer; these bytes are none
            held = []
            yield text
    if held:
        yield tokenizer.decode(held)


def until(texts: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The texts up to the first of `stop`, which may begin in one piece and end in another."""
    held = ""
    longest = max((len(item) for item in stop), default=0)
    for text in texts:
        held += text
        if found := [at for item in stop if (at := held.find(item)) >= 0]:
            yield held[: min(found)]
            return
        certain = len(held) - max(0, longest - 1)
        if certain > 0:
            yield held[:certain]
            held = held[certain:]
    if held:
        yield held


def facts(opened: Opened) -> dict[str, Any]:
    """What a row about the model says of it."""
    from trainer import flops

    model = opened.config.model
    return {"parameters": flops.parameters(model), "context_length": model.context_length, "vocab_size": model.vocab_size,
            "tokenizer": opened.tokenizer}  # fmt: skip
