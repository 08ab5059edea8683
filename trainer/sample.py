"""Text from a trained model: tokens in, tokens out, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer import checkpoint, hf, hf_config, manifest
from trainer.config import ConfigError, TrainerConfig
from trainer.model import GPT, KeyValues


def load_model(checkpoint_dir: Path, device: str | torch.device = "cpu") -> tuple[GPT, TrainerConfig]:
    """The model in a checkpoint directory of ours, or in a Hugging Face GPT-2 or Llama folder, in float32 and ready for
    inference. Nothing in the directory is executed.

    Raises ConfigError where the directory is neither, or not whole.
    """
    path = Path(checkpoint_dir).resolve()
    try:
        weights, config = hf.load(path) if hf_config.is_hf(path) else _ours(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(str(checkpoint_dir), f"cannot be read: {error}") from error
    with torch.device("meta"):
        model = GPT(config.model)
    model.allocate(device)
    checkpoint.restore_weights(model, weights)
    return model.eval().requires_grad_(requires_grad=False), config


def _ours(path: Path) -> tuple[dict[str, Tensor], TrainerConfig]:
    problems = _weights_problems(path) if (path / manifest.NAME).exists() else []
    if problems:
        raise ConfigError(str(path), problems[0])
    return checkpoint.weights(path), checkpoint.load_config(path)


def _weights_problems(path: Path) -> list[str]:
    """What is wrong with the files that inference needs; a copy fetched without optimizer state is whole for it."""
    try:
        entries = {entry.name: entry for entry in manifest.read(path).files}
    except manifest.ManifestError as error:
        return [str(error)]
    for name in (checkpoint.WEIGHTS, checkpoint.CONFIG):
        entry = entries.get(name)
        if entry is None or not (path / name).exists():
            return [f"{path / name} is missing"]
        if manifest.sha256(path / name) != entry.sha256:
            return [f"{path / name} does not have the checksum of its manifest"]
    return []


def generate(
    model: GPT,
    prompt_tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Continue `prompt_tokens` by `max_tokens` tokens. Temperature 0 takes the likeliest token each time.

    Keys and values are cached; where the context is full, its later half is read again and generation goes on. Raises
    ValueError for an empty prompt or a token outside the vocabulary.
    """
    tokens = list(prompt_tokens)
    if not tokens:
        raise ValueError("the prompt has no tokens")
    if not all(0 <= token < model.config.vocab_size for token in tokens):
        raise ValueError(f"the prompt has a token outside the vocabulary of {model.config.vocab_size}")
    device = model.token_embedding.weight.device
    generator = torch.Generator(device="cpu").manual_seed(seed)
    context = model.config.context_length
    cache: list[KeyValues] = []
    pending = tokens[-context:]
    for _ in range(max_tokens):
        if not cache or cache[0].length + len(pending) > context:
            cache = [KeyValues() for _ in model.blocks]
            pending = tokens[-context:] if len(tokens) <= context else tokens[-max(1, context // 2) :]
        with torch.inference_mode():
            logits_v = model.logits(torch.tensor([pending], device=device), cache)[0, -1].cpu()
        token = pick(logits_v, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        tokens.append(token)
        pending = [token]
        yield token


def pick(
    logits_v: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    """One token from `logits_v`: among the `top_k` likeliest, and of these the fewest that together have probability
    `top_p` (the likeliest always stays)."""
    if temperature <= 0:
        return int(logits_v.argmax())
    values, indices = torch.sort(logits_v.double() / temperature, descending=True, stable=True)
    if top_k is not None:
        values, indices = values[:top_k], indices[:top_k]
    probabilities = values.softmax(0)
    if top_p is not None:
        kept = probabilities.cumsum(0) - probabilities < top_p
        kept[0] = True
        probabilities = probabilities * kept
    return int(indices[torch.multinomial(probabilities, 1, generator=generator)])
