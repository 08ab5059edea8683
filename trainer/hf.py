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

from trainer import checkpoint, flops, hf_config
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


def load(path: Path) -> tuple[dict[str, Tensor], TrainerConfig]:
    """Named weights and configuration of a Hugging Face GPT-2 or Llama folder. Raises ConfigError."""
    model = hf_config.read(path)
    convert = _from_llama if hf_config.kind(path) == "llama" else _from_gpt2
    try:
        weights = dict(convert(_tensors(path), model))
    except KeyError as error:
        raise ConfigError(str(path), f"lacks {error}") from error
    except SafetensorError as error:
        raise ConfigError(str(path), f"holds weights that cannot be read: {error}") from error
    train = TrainConfig(global_batch_size=1, steps=1, device="cpu", precision="fp32")
    return weights, TrainerConfig(DataConfig(train=["-"]), model, train)


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
