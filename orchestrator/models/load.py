"""Models as the commands name them: a run, a checkpoint folder, a Hugging Face folder, or `hf://owner/name` on the Hub.

All of them open as the trainer's own GPT, with a tokenizer that is known to fit.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.data.errors import DataError, Offline
from orchestrator.errors import Invalid

if TYPE_CHECKING:
    from trainer.config import TrainerConfig
    from trainer.model import GPT
    from trainer.tokenize import Tokenizer

GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
"""SHA-256 of GPT-2's merges.txt, which OpenAI publishes as vocab.bpe."""
_HUB = re.compile(r"hf://(?:models/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/?")
_WANTED = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
           "tokenizer_config.json", "vocab.json", "merges.txt"]  # fmt: skip


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
    if device == "cpu":
        return
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise Invalid(f"torch has no device {device!r} on this machine", "--device cpu")


def locate(word: str | Path) -> Path:
    """The folder that a path or a name on the Hub means. Raises Invalid, DataError."""
    text = str(word)
    if text.startswith("hf://"):
        return from_hub(text)
    path = Path(text).expanduser()
    if not path.is_dir():
        raise Invalid(
            f"{text} is no folder",
            "name a run, a step-NNNNNN folder, a Hugging Face folder, or hf://owner/name",
        )
    if not (path / "config.json").exists():
        raise Invalid(
            f"{path} has no config.json, so it is no model",
            "name a step-NNNNNN folder or a Hugging Face folder",
        )
    return path.resolve()


def open_model(word: str | Path, *, device: str = "cpu", tokenizer: str | None = None) -> Opened:
    """The model, its configuration and the name of its tokenizer; `tokenizer` replaces the one that it names.

    Raises DataError, and Invalid where torch or the device is missing, the folder is no whole model, or the tokenizer has
    numbers that the model does not.
    """
    need_torch(device)
    path = locate(word)
    from trainer.config import ConfigError
    from trainer.sample import load_model

    try:
        model, config = load_model(path, device)
    except ConfigError as error:
        raise Invalid(f"{path}: {error}", "fetch it again, or name another model") from error
    name = tokenizer or tokenizer_of(path, config)
    fitting(name, config.model.vocab_size)
    return Opened(model, config, name)


def tokenizer_of(path: Path, config: TrainerConfig) -> str:
    """The tokenizer of the model in `path`: what its configuration names, or what lies beside a Hugging Face model."""
    from trainer import hf

    if not hf.is_hf(path):
        name = config.data.tokenizer
        return name if name in {"gpt2", "bytes"} or Path(name).is_absolute() else str((path / name).resolve())
    if (path / "tokenizer.json").exists():
        return _of_file(path / "tokenizer.json")
    if (path / "merges.txt").exists() and _sha256((path / "merges.txt").read_bytes()) == GPT2_MERGES:
        return "gpt2"
    known = {50257: "gpt2", 50304: "gpt2", 256: "bytes"}.get(config.model.vocab_size)
    if known is None:
        raise Invalid(f"{path} has no tokenizer, and {config.model.vocab_size} tokens are nobody's in particular",
                      "put its tokenizer.json beside it, or name one with --tokenizer")  # fmt: skip
    return known


def _of_file(path: Path) -> str:
    """`gpt2` or `bytes` where the file is that tokenizer, else the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        vocabulary, merges = raw["model"]["vocab"], raw["model"].get("merges") or []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Invalid(
            f"{path} is no tokenizer.json: {error}", "fetch it again, or name a tokenizer with --tokenizer"
        ) from error
    if not merges and vocabulary == byte_vocabulary():
        return "bytes"
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    text = "\n".join(["#version: 0.2", *lines]) + "\n"
    return "gpt2" if _sha256(text.encode()) == GPT2_MERGES else str(path.resolve())


def byte_vocabulary() -> dict[str, int]:
    """The 256 bytes as byte-level tokenizers write them: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {names[byte]: byte for byte in range(256)}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fitting(name: str, vocab_size: int) -> Tokenizer:
    """The tokenizer of that name. Raises Invalid where it cannot be had, or makes tokens that the model does not know."""
    from trainer import tokenize

    try:
        loaded = tokenize.load(name)
    except tokenize.TokenizerError as error:
        raise Invalid(str(error), "name another tokenizer with --tokenizer") from error
    if loaded.vocab_size > vocab_size:
        raise Invalid(f"the tokenizer {name} has {loaded.vocab_size} tokens, the model's vocabulary {vocab_size}: they do not belong together",
                      "name the tokenizer that the model was trained with")  # fmt: skip
    return loaded


def from_hub(name: str) -> Path:
    """The snapshot of a model on the Hugging Face Hub (`hf://owner/name[@revision]`), downloaded once.

    Raises DataError where there is none, Offline where nobody answers.
    """
    match = _HUB.fullmatch(name)
    if match is None:
        raise DataError(
            f"{name} names no model on the Hub", "Write hf://owner/name, as in hf://openai-community/gpt2"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise Invalid(
            "a model on the Hub needs huggingface_hub", "pip install 'llmctl[data]'", code="no-extra"
        ) from error
    try:
        return Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=_WANTED))
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise DataError(f"{name}: there is no such model, or you may not read it",
                        "Check the name; set HF_TOKEN for a private or gated one") from error  # fmt: skip
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise Offline(
            f"{name} cannot be fetched: {first}", "Check the network, or name a local folder"
        ) from error


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


def identity(path: Path) -> str:
    """What changes with a model's weights: the hash of its manifest, or of its weight files where it has none."""
    from trainer import manifest

    if (path / manifest.NAME).exists():
        return manifest.digest(path)
    return _sha256("".join(manifest.sha256(file) for file in sorted(path.glob("*.safetensors"))).encode())


def facts(opened: Opened) -> dict[str, Any]:
    """What a row about the model says of it."""
    from trainer import flops

    model = opened.config.model
    return {"parameters": flops.parameters(model), "context_length": model.context_length, "vocab_size": model.vocab_size,
            "tokenizer": opened.tokenizer}  # fmt: skip
