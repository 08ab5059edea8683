"""Models as folders: a checkpoint of ours, a folder as transformers writes it, or `hf://owner/name` on the Hub; with the
tokenizer that belongs to each. Nothing here opens weights, so nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.data.errors import DataError, Offline
from orchestrator.errors import Invalid
from trainer import hf_config, manifest, reading
from trainer.config import ConfigError, DataConfig, ModelConfig, TrainConfig, TrainerConfig

if TYPE_CHECKING:
    from trainer.tokenize import Tokenizer

GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
"""SHA-256 of GPT-2's merges.txt, which OpenAI publishes as vocab.bpe."""
_HUB = re.compile(r"hf://(?:models/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/?")
_WANTED = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
           "tokenizer_config.json", "vocab.json", "merges.txt"]  # fmt: skip


@dataclass(frozen=True)
class Base:
    """What is known of a model without opening its weights."""

    path: Path
    config: TrainerConfig
    tokenizer: str
    sha256: str
    files: tuple[str, ...]
    """Names of the files that the trainer needs to open it."""

    @property
    def model(self) -> ModelConfig:
        """The model's configuration."""
        return self.config.model


def look(word: str | Path, tokenizer: str | None = None) -> Base:
    """The model that a path or a name on the Hub means; `tokenizer` replaces its own. Raises Invalid, DataError."""
    path = locate(word)
    try:
        if hf_config.is_hf(path):
            train = TrainConfig(global_batch_size=1, steps=1)
            told = TrainerConfig(DataConfig(train=["-"]), hf_config.read(path), train)
            files = ["config.json", *sorted(file.name for file in path.glob("*.safetensors"))]
        else:
            told = reading.load(path / "config.json")
            files = [
                "config.json",
                "model.safetensors",
                *([manifest.NAME] if (path / manifest.NAME).exists() else []),
            ]
    except ConfigError as error:
        raise Invalid(f"{path}: {error}", "fetch it again, or name another model") from error
    if missing := [name for name in files if not (path / name).is_file()]:
        raise Invalid(f"{path} has no {missing[0]}, so it is no whole model", "fetch it again")
    if len(files) == 1:
        raise Invalid(f"{path} has no .safetensors file", "save the model with safe serialization")
    name = tokenizer or tokenizer_of(path, told)
    fitting(name, told.model.vocab_size)
    return Base(path, told, name, identity(path), tuple(files))


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


def tokenizer_of(path: Path, config: TrainerConfig) -> str:
    """The tokenizer of the model in `path`: what its configuration names, or what lies beside a Hugging Face model."""
    if not hf_config.is_hf(path):
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


def identity(path: Path) -> str:
    """What changes with a model's weights: the hash of its manifest, or of its weight files where it has none."""
    if (path / manifest.NAME).exists():
        return manifest.digest(path)
    return _sha256("".join(manifest.sha256(file) for file in sorted(path.glob("*.safetensors"))).encode())
