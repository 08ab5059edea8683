"""GPT-2 as Hugging Face's transformers stores it, and as we do: the same numbers under other names.

There the maps of attention and feed-forward are `Conv1D`, (in, out), with query, key and value in one; here each is a
`Linear`, (out, in). A model of ours is GPT-2-shaped when it has LayerNorm, tanh-GELU, learned positions and one key and value
per query head. Without query, key and value biases it gets zeros there, which change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer import flops
from trainer.config import ConfigError, ModelConfig

CONFIG = "config.json"
_BLOCK = {
    "ln_1.weight": "attention_norm.weight", "ln_1.bias": "attention_norm.bias",
    "ln_2.weight": "feed_forward_norm.weight", "ln_2.bias": "feed_forward_norm.bias",
    "attn.c_proj.weight": "attention.output.weight", "attn.c_proj.bias": "attention.output.bias",
    "mlp.c_fc.weight": "feed_forward.up.weight", "mlp.c_fc.bias": "feed_forward.up.bias",
    "mlp.c_proj.weight": "feed_forward.down.weight", "mlp.c_proj.bias": "feed_forward.down.bias",
}  # fmt: skip
_OUTER = {
    "wte.weight": "token_embedding.weight", "wpe.weight": "position_embedding.weight",
    "ln_f.weight": "final_norm.weight", "ln_f.bias": "final_norm.bias",
}  # fmt: skip
_QKV = ("query", "key", "value")
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "vocab_size": 50257, "n_positions": 1024,
    "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "tie_word_embeddings": True,
}  # fmt: skip


def is_folder(path: Path) -> bool:
    """Whether `path` is a Hugging Face folder: its config.json has a model type."""
    try:
        raw = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and "model_type" in raw


def model_config(path: Path) -> ModelConfig:
    """Our configuration of the model in a Hugging Face folder. Raises ConfigError where it is not GPT-2-shaped."""
    where = path / CONFIG
    try:
        raw = json.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(where), error.strerror or str(error)) from error
    except ValueError as error:
        raise ConfigError(str(where), f"is not JSON: {error}") from error
    found = {**_DEFAULTS, **raw}
    for key, allowed in _EXPECTED.items():
        if found.get(key) not in allowed:
            raise ConfigError(str(where), f"{key} is {found.get(key)!r}; only models with {allowed[0]!r} have GPT-2's shape")
    return ModelConfig(
        vocab_size=found["vocab_size"], context_length=found["n_positions"], emb_dim=found["n_embd"],
        n_heads=found["n_head"], n_layers=found["n_layer"], ffn_dim=found["n_inner"], qkv_bias=True,
        tie_weights=bool(found["tie_word_embeddings"]),
    )  # fmt: skip


def weights(path: Path, model: ModelConfig) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder by our names, float32. Raises ConfigError for what is missing or unknown."""
    named: dict[str, Tensor] = {}
    for key, tensor in _stored(path):
        name = key.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, which old versions stored
            continue
        if name == "lm_head.weight":
            if not model.tie_weights:
                named["head.weight"] = tensor.float()
        elif name in _OUTER:
            named[_OUTER[name]] = tensor.float()
        else:
            named.update(_of_block(path, name, tensor.float()))
    return named


def _of_block(path: Path, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    first, index, rest = (name.split(".", 2) + ["", ""])[:3]
    if first != "h" or not index.isdigit():
        raise ConfigError(str(path), f"has a weight {name!r}, which GPT-2 does not")
    if rest in {"attn.c_attn.weight", "attn.c_attn.bias"}:
        kind = rest.rpartition(".")[2]
        for part, value in zip(_QKV, tensor.chunk(3, dim=-1), strict=True):
            yield f"blocks.{index}.attention.{part}.{kind}", value.t().contiguous() if kind == "weight" else value.contiguous()
    elif rest in _BLOCK:
        turned = tensor.t().contiguous() if tensor.ndim == 2 else tensor
        yield f"blocks.{index}.{_BLOCK[rest]}", turned
    else:
        raise ConfigError(str(path), f"has a weight {name!r}, which GPT-2 does not")


def _stored(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the folder's weight files, whichever of the usual ones it has. Nothing in them is executed."""
    for pattern, read in (("model*.safetensors", _safetensors), ("pytorch_model*.bin", _pickled)):
        files = sorted(path.glob(pattern))
        if files:
            for file in files:
                yield from read(file)
            return
    raise ConfigError(str(path), "has neither model.safetensors nor pytorch_model.bin")


def _safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(str(file), f"cannot be read: {error}; fetch it again") from error


def _pickled(file: Path) -> Iterator[tuple[str, Tensor]]:
    import pickle

    try:
        yield from torch.load(file, map_location="cpu", weights_only=True).items()
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(str(file), f"cannot be read: {error}; fetch it again") from error


def obstacles(model: ModelConfig) -> list[str]:
    """The fields of `model` that GPT-2 has no counterpart for; empty: it can be exported."""
    unlike = {
        "norm": model.norm != "layer", "activation": model.activation != "gelu", "position": model.position != "learned",
        "n_kv_heads": model.n_kv_heads not in {None, model.n_heads}, "qk_norm": model.qk_norm,
        "logit_softcap": model.logit_softcap is not None,
    }  # fmt: skip
    return [f"{key}: {getattr(model, key)}" for key, differs in unlike.items() if differs]


def to_config(model: ModelConfig, end_token: int | None) -> dict[str, Any]:
    """config.json for transformers."""
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "vocab_size": model.vocab_size, "n_positions": model.context_length, "n_ctx": model.context_length,
        "n_embd": model.emb_dim, "n_layer": model.n_layers, "n_head": model.n_heads,
        "n_inner": model.ffn_dim, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": model.tie_weights,
        "attn_pdrop": model.drop_rate, "embd_pdrop": model.drop_rate, "resid_pdrop": model.drop_rate,
        "bos_token_id": end_token, "eos_token_id": end_token, "initializer_range": 0.02, "scale_attn_weights": True,
        "use_cache": True, "dtype": "float32",
    }  # fmt: skip


def to_weights(named: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our weights by transformers' names. Raises ConfigError for a model that is not GPT-2-shaped."""
    if found := obstacles(model):
        raise ConfigError("model", f"{', '.join(found)}: transformers' GPT-2 has no such thing; only GPT-2-shaped models can be exported")
    result = {f"transformer.{theirs}": named[ours].contiguous() for theirs, ours in _OUTER.items()}
    if not model.tie_weights:
        result["lm_head.weight"] = named["head.weight"].contiguous()
    zeros = torch.zeros(3 * model.emb_dim)
    for index in range(model.n_layers):
        theirs, ours = f"transformer.h.{index}", f"blocks.{index}"
        joined = [named[f"{ours}.attention.{part}.weight"] for part in _QKV]
        result[f"{theirs}.attn.c_attn.weight"] = torch.cat(joined).t().contiguous()
        biases = [named[f"{ours}.attention.{part}.bias"] for part in _QKV] if model.qkv_bias else [zeros]
        result[f"{theirs}.attn.c_attn.bias"] = torch.cat(biases)
        for name, mine in _BLOCK.items():
            tensor = named[f"{ours}.{mine}"]
            result[f"{theirs}.{name}"] = (tensor.t() if tensor.ndim == 2 else tensor).contiguous()
    assert sum(tensor.numel() for tensor in result.values()) == flops.parameters(model) + (
        0 if model.qkv_bias else zeros.numel() * model.n_layers
    )
    return result
