"""Checkpoints in the form that `transformers` loads, and back: GPT-2, and Llama for rotary RMSNorm models.

Weights are moved, transposed and joined, never rounded, so logits agree to float32 rounding. What neither architecture
can express (squared ReLU, normalised queries, capped logits, …) is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer import checkpoint, flops
from trainer.config import ConfigError, DataConfig, ModelConfig, TrainConfig, TrainerConfig

_NORMS = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}
_MAPS = {"attention.output": "attn.c_proj", "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}
_LLAMA = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}


def family(model: ModelConfig) -> str:
    """`gpt2` or `llama`: the transformers architecture that computes the same. Raises ConfigError where none does."""
    for name, plain in (("qk_norm", False), ("logit_softcap", None)):
        if getattr(model, name) != plain:
            raise ConfigError(
                f"model.{name}",
                "is known to neither GPT-2 nor Llama in transformers; this model cannot be exported",
            )
    if (
        model.norm == "layer"
        and model.activation == "gelu"
        and model.position == "learned"
        and model.n_kv_heads in (None, model.n_heads)
    ):
        return "gpt2"
    if (
        model.norm == "rms"
        and model.activation == "swiglu"
        and model.position == "rope"
        and model.rotary_fraction == 1
    ):
        return "llama"
    raise ConfigError("model", f"norm {model.norm}, activation {model.activation} and position {model.position} together are neither "
                               "GPT-2 (layer, gelu, learned) nor Llama (rms, swiglu, rope); this model cannot be exported")  # fmt: skip


def export(checkpoint_dir: Path, to: Path) -> str:
    """Write config.json and model.safetensors for transformers into `to`; the family written. Raises ConfigError."""
    source = Path(checkpoint_dir).resolve()
    model = checkpoint.load_config(source).model
    kind = family(model)
    weights = checkpoint.weights(source)
    if kind == "gpt2":
        named, config = dict(_to_gpt2(weights, model)), _gpt2_config(model)
    else:
        named, config = dict(_to_llama(weights, model)), _llama_config(model)
    to.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in named.items()},
        to / "model.safetensors",
        metadata={"format": "pt"},
    )
    (to / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return kind


def is_hf(path: Path) -> bool:
    """Whether `path` is a folder as transformers writes it."""
    try:
        return "model_type" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def load(path: Path) -> tuple[dict[str, Tensor], TrainerConfig]:
    """Named weights and configuration of a Hugging Face GPT-2 or Llama folder. Raises ConfigError."""
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kind = raw["model_type"]
    refuse_variants(path, raw)
    try:
        if kind == "gpt2":
            model = _from_gpt2_config(raw)
            weights = dict(_from_gpt2(_tensors(path), model))
        elif kind == "llama":
            model = _from_llama_config(raw)
            weights = dict(_from_llama(_tensors(path), model))
        else:
            raise ConfigError(str(path), f"holds a {kind} model; gpt2 and llama can be read")
    except KeyError as error:
        raise ConfigError(str(path), f"lacks {error}") from error
    except SafetensorError as error:
        raise ConfigError(str(path), f"holds weights that cannot be read: {error}") from error
    train = TrainConfig(global_batch_size=1, steps=1, device="cpu", precision="fp32")
    return weights, TrainerConfig(DataConfig(train=["-"]), model, train)


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


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder, float32, without the prefix that only some writers use."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigError(str(path), "has no .safetensors file; save the model with safe serialization")
    named = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                named[name.removeprefix("transformer.")] = opened.get_tensor(name).float()
    return named


def _to_gpt2(weights: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    yield "transformer.wte.weight", weights["token_embedding.weight"]
    yield "transformer.wpe.weight", weights["position_embedding.weight"]
    if not model.tie_weights:
        yield "lm_head.weight", weights["head.weight"]
    for kind in ("weight", "bias"):
        yield f"transformer.ln_f.{kind}", weights[f"final_norm.{kind}"]
    for i in range(model.n_layers):
        ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
        parts = [ours + f"attention.{part}" for part in ("query", "key", "value")]
        # transformers' Conv1D holds (in, out), the transpose of a linear map's weight.
        yield theirs + "attn.c_attn.weight", torch.cat([weights[f"{part}.weight"] for part in parts]).t()
        bias = (
            [weights[f"{part}.bias"] for part in parts]
            if model.qkv_bias
            else [torch.zeros(3 * model.emb_dim)]
        )
        yield theirs + "attn.c_attn.bias", torch.cat(bias)
        for name, other in _MAPS.items():
            yield f"{theirs}{other}.weight", weights[f"{ours}{name}.weight"].t()
            yield f"{theirs}{other}.bias", weights[f"{ours}{name}.bias"]
        for name, other in _NORMS.items():
            for kind in ("weight", "bias"):
                yield f"{theirs}{other}.{kind}", weights[f"{ours}{name}.{kind}"]


def _from_gpt2(named: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    yield "token_embedding.weight", named["wte.weight"]
    yield "position_embedding.weight", named["wpe.weight"]
    if not model.tie_weights:
        yield "head.weight", named["lm_head.weight"]
    for kind in ("weight", "bias"):
        yield f"final_norm.{kind}", named[f"ln_f.{kind}"]
    for i in range(model.n_layers):
        ours, theirs = f"blocks.{i}.", f"h.{i}."
        weight, bias = named[theirs + "attn.c_attn.weight"].t(), named[theirs + "attn.c_attn.bias"]
        for part, w, b in zip(("query", "key", "value"), weight.chunk(3), bias.chunk(3), strict=True):
            yield f"{ours}attention.{part}.weight", w
            yield f"{ours}attention.{part}.bias", b
        for name, other in _MAPS.items():
            yield f"{ours}{name}.weight", named[f"{theirs}{other}.weight"].t()
            yield f"{ours}{name}.bias", named[f"{theirs}{other}.bias"]
        for name, other in _NORMS.items():
            for kind in ("weight", "bias"):
                yield f"{ours}{name}.{kind}", named[f"{theirs}{other}.{kind}"]


def _gpt2_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": model.vocab_size,
        "n_positions": model.context_length, "n_ctx": model.context_length, "n_embd": model.emb_dim,
        "n_layer": model.n_layers, "n_head": model.n_heads, "n_inner": flops.feed_forward_width(model),
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": model.tie_weights,
        "embd_pdrop": model.drop_rate, "attn_pdrop": model.drop_rate, "resid_pdrop": model.drop_rate,
        "bos_token_id": 50256 if model.vocab_size == 50257 else None,
        "eos_token_id": 50256 if model.vocab_size == 50257 else None, "dtype": "float32",
    }  # fmt: skip


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


def _to_llama(weights: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", weights["token_embedding.weight"]
    yield "model.norm.weight", weights["final_norm.weight"]
    if not model.tie_weights:
        yield "lm_head.weight", weights["head.weight"]
    for name, tensor in weights.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            yield f"model.layers.{index}.{_LLAMA[part]}.{kind}", tensor
    if model.qkv_bias:  # Llama has biases on all four attention maps or on none
        for i in range(model.n_layers):
            yield f"model.layers.{i}.self_attn.o_proj.bias", torch.zeros(model.emb_dim)


def _from_llama(named: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    yield "token_embedding.weight", named["model.embed_tokens.weight"]
    yield "final_norm.weight", named["model.norm.weight"]
    if not model.tie_weights:
        yield "head.weight", named["lm_head.weight"]
    for i in range(model.n_layers):
        for part, other in _LLAMA.items():
            yield f"blocks.{i}.{part}.weight", named[f"model.layers.{i}.{other}.weight"]


def _llama_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_length, "hidden_size": model.emb_dim, "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads, "num_key_value_heads": model.n_kv_heads or model.n_heads,
        "intermediate_size": flops.feed_forward_width(model), "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": model.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": model.qkv_bias, "mlp_bias": False, "tie_word_embeddings": model.tie_weights,
        "bos_token_id": None, "eos_token_id": None, "dtype": "float32",
    }  # fmt: skip


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
