"""The config.json of a transformers GPT-2 or Llama model in our terms. Standard library only: no weights are opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, ModelConfig


def is_hf(path: Path) -> bool:
    """Whether `path` is a folder as transformers writes it."""
    try:
        return "model_type" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def kind(path: Path) -> str:
    """The `model_type` of a folder as transformers writes it. Raises OSError, ValueError, KeyError where it is none."""
    return str(json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"])


def read(path: Path) -> ModelConfig:
    """The model of a Hugging Face folder. Raises ConfigError where it computes something that our model does not."""
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    refuse_variants(path, raw)
    made = {"gpt2": _from_gpt2_config, "llama": _from_llama_config}.get(raw["model_type"])
    if made is None:
        raise ConfigError(str(path), f"holds a {raw['model_type']} model; gpt2 and llama can be read")
    try:
        return made(raw)
    except KeyError as error:
        raise ConfigError(str(path), f"lacks {error}") from error


def refuse_variants(path: Path, raw: Mapping[str, Any]) -> None:
    """Raises ConfigError where a configuration computes attention in another way than GPT-2: its weights would load, and
    mean something else."""
    for key, plain in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if raw.get(key, plain) != plain:
            raise ConfigError(
                str(path), f"{key} is {raw[key]}; only models with {plain} compute what GPT-2 does"
            )


def _from_gpt2_config(raw: Mapping[str, Any]) -> ModelConfig:
    if raw.get("activation_function", "gelu_new") not in {"gelu_new", "gelu_pytorch_tanh"}:
        raise ConfigError("activation_function", f"{raw['activation_function']} is not GPT-2's tanh GELU")
    if raw.get("layer_norm_epsilon", 1e-5) != 1e-5:
        raise ConfigError("layer_norm_epsilon", "must be 1e-5")
    return ModelConfig(
        vocab_size=raw.get("vocab_size", 50257), context_length=raw.get("n_positions", 1024), emb_dim=raw.get("n_embd", 768),
        n_heads=raw.get("n_head", 12), n_layers=raw.get("n_layer", 12), ffn_dim=raw.get("n_inner"), qkv_bias=True,
        tie_weights=raw.get("tie_word_embeddings", True),
    )  # fmt: skip


def _from_llama_config(raw: Mapping[str, Any]) -> ModelConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for key, value, wanted in (
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("rms_norm_eps", raw.get("rms_norm_eps", 1e-6), 1e-5),
        ("attention_bias", raw.get("attention_bias", False), False),
        ("mlp_bias", raw.get("mlp_bias", False), False),
    ):
        if value != wanted:
            raise ConfigError(key, f"is {value}; only {wanted} can be read")
    return ModelConfig(
        vocab_size=raw["vocab_size"], context_length=raw["max_position_embeddings"], emb_dim=raw["hidden_size"],
        n_heads=raw["num_attention_heads"], n_layers=raw["num_hidden_layers"], n_kv_heads=raw.get("num_key_value_heads"),
        ffn_dim=raw["intermediate_size"], norm="rms", activation="swiglu", position="rope",
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)), tie_weights=raw.get("tie_word_embeddings", False),
    )  # fmt: skip
