"""The model computes what it says: equal to transformers where that has the architecture, to first principles elsewhere."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from trainer import flops, hf, manifest
from trainer.checkpoint import CONFIG, WEIGHTS
from trainer.config import ConfigError, DataConfig, ModelConfig, TrainConfig, TrainerConfig
from trainer.model import GPT, KeyValues, fill, initial_weights, padded
from trainer.reading import to_dict
from trainer.sample import load_model

TINY = {"vocab_size": 101, "context_length": 24, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
LLAMA = {"norm": "rms", "activation": "swiglu", "position": "rope"}
SPEEDRUN = {
    "norm": "rms",
    "activation": "relu2",
    "position": "rope",
    "rotary_fraction": 0.5,
    "qk_norm": True,
    "logit_softcap": 15.0,
}


def build(seed: int = 0, **changes: object) -> GPT:
    """A model with biases and scales that are not trivially zero and one."""
    config = ModelConfig(**{**TINY, **changes})  # type: ignore[arg-type]
    with torch.device("meta"):
        model = GPT(config)
    model.allocate("cpu")
    fill(model, initial_weights(config, seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            if "embedding" in name or "head" in name:
                noise[config.vocab_size :] = 0
            parameter.add_(noise)
    return model.eval()


def tokens(rows: int = 2, length: int = 24, vocab: int = 101) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(7))


def checkpoint_of(model: GPT, folder: Path) -> Path:
    """A checkpoint directory with this model's weights."""
    from safetensors.torch import save_file

    folder.mkdir()
    rows = model.config.vocab_size
    named = {
        n: (p.detach()[:rows] if "token_embedding" in n or "head" in n else p.detach()).contiguous()
        for n, p in model.named_parameters()
    }
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    config = TrainerConfig(
        DataConfig(train=["-"]), model.config, TrainConfig(global_batch_size=1, steps=1, device="cpu")
    )
    (folder / CONFIG).write_text(json.dumps(to_dict(config)), encoding="utf-8")
    manifest.write(folder, 1)
    return folder


@pytest.mark.parametrize("changes", [
    {}, {"qkv_bias": True}, {"tie_weights": True, "qkv_bias": True}, {"ffn_dim": 48},
    LLAMA, {**LLAMA, "n_kv_heads": 2, "rope_theta": 500.0, "tie_weights": True},
], ids=["gpt2", "biases", "tied", "narrow", "llama", "llama-grouped"])  # fmt: skip
def test_exported_logits_equal_those_of_transformers(tmp_path: Path, changes: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    model = build(**changes)
    hf.export(checkpoint_of(model, tmp_path / "ours"), tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        ours_btv, theirs_btv = model.logits(tokens()), theirs(tokens()).logits
    assert ours_btv.std() > 0.1
    torch.testing.assert_close(ours_btv, theirs_btv, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_imported_logits_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=101, n_positions=24, n_embd=32, n_head=4, n_layer=2, initializer_range=0.2
        )
        theirs = transformers.GPT2LMHeadModel(config).eval()
    else:
        config = transformers.LlamaConfig(
            vocab_size=101, max_position_embeddings=24, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=80, rms_norm_eps=1e-5, initializer_range=0.2,
        )  # fmt: skip
        theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, config_read = load_model(tmp_path / "theirs")
    assert config_read.model.n_layers == 2
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens()), theirs(tokens()).logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("key", ["qk_norm", "logit_softcap", "activation"])
def test_what_transformers_cannot_express_is_refused_by_name(key: str) -> None:
    changes = {"qk_norm": True, "logit_softcap": 15.0, "activation": "relu2"}
    with pytest.raises(ConfigError, match="cannot be exported"):
        hf.family(ModelConfig(**{key: changes[key]}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{}, LLAMA, SPEEDRUN, {**SPEEDRUN, "n_kv_heads": 1}],
    ids=["gpt2", "llama", "speedrun", "grouped"],
)
def test_cached_decoding_equals_the_whole_sequence(changes: dict[str, object]) -> None:
    model = build(**changes)
    row = tokens(1)
    cache = [KeyValues() for _ in model.blocks]
    with torch.no_grad():
        whole = model.logits(row)
        steps = [model.logits(row[:, :5], cache)] + [
            model.logits(row[:, i : i + 1], cache) for i in range(5, row.shape[1])
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_the_number_of_parameters_is_the_formula_s() -> None:
    options = {
        "qkv_bias": [False, True], "tie_weights": [False, True], "norm": ["layer", "rms"],
        "activation": ["gelu", "swiglu"], "position": ["learned", "rope"], "n_kv_heads": [None, 2], "ffn_dim": [None, 40],
    }  # fmt: skip
    for values in itertools.product(*options.values()):
        config = ModelConfig(**{**TINY, **dict(zip(options, values, strict=True))})  # type: ignore[arg-type]
        held = sum(tensor.numel() for _, tensor in initial_weights(config, 0))
        assert held == flops.parameters(config), asdict(config)


def test_published_sizes() -> None:
    assert flops.parameters(ModelConfig()) == 163_009_536  # Raschka's untied GPT-2 without QKV bias
    assert (
        flops.parameters(ModelConfig(qkv_bias=True, tie_weights=True)) == 124_439_808
    )  # OpenAI's GPT-2 small
    llama = ModelConfig(
        vocab_size=128256,
        context_length=8192,
        emb_dim=4096,
        n_heads=32,
        n_layers=32,
        n_kv_heads=8,
        ffn_dim=14336,
        **LLAMA,
    )  # type: ignore[arg-type]
    assert flops.parameters(llama) == 8_030_261_248  # Llama 3 8B
    assert flops.flops_per_token(ModelConfig()) == pytest.approx(854.7e6, rel=1e-3)


def test_padding_rows_are_no_part_of_the_loss() -> None:
    model = build()
    assert model.head.weight.shape[0] == 128
    row = tokens()
    loss = model(row[:, :-1], row[:, 1:], float(row[:, 1:].numel()))
    plain = F.cross_entropy(model.logits(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten())
    torch.testing.assert_close(loss, plain)
    loss.backward()
    for weight in (model.head.weight, model.token_embedding.weight):
        assert weight.grad is not None
        assert not weight.grad[101:].any()


def test_first_weights_depend_on_seed_and_name_alone() -> None:
    small, large = (
        dict(initial_weights(ModelConfig(**TINY), 5)),
        dict(initial_weights(ModelConfig(**{**TINY, "n_layers": 3}), 5)),
    )  # type: ignore[arg-type]
    other = dict(initial_weights(ModelConfig(**TINY), 6))  # type: ignore[arg-type]
    for name in ("token_embedding.weight", "blocks.1.attention.query.weight"):
        assert torch.equal(small[name], large[name])
        assert not torch.equal(small[name], other[name])


def test_initialisations() -> None:
    wide = {**TINY, "emb_dim": 256, "n_layers": 8}
    named = dict(initial_weights(ModelConfig(**wide), 0))  # type: ignore[arg-type]
    assert named["blocks.0.feed_forward.up.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert named["blocks.0.feed_forward.down.weight"].std() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    zero = dict(initial_weights(ModelConfig(**{**wide, "init": "zero_proj"}), 0))  # type: ignore[arg-type]
    assert not zero["blocks.0.attention.output.weight"].any()
    assert not zero["blocks.0.feed_forward.down.weight"].any()
    seeds = dict(initial_weights(ModelConfig(**{**wide, "init": "torch"}), 0))  # type: ignore[arg-type]
    assert seeds["token_embedding.weight"].std() == pytest.approx(1.0, rel=0.05)
    assert seeds["blocks.0.feed_forward.down.weight"].abs().max() <= 1 / math.sqrt(1024)
    assert seeds["blocks.0.feed_forward.down.weight"].std() == pytest.approx(
        torch.nn.Linear(1024, 256).weight.std().item(), rel=0.05
    )


def test_the_cap_bounds_logits() -> None:
    model = build(logit_softcap=2.0)
    with torch.no_grad():
        model.head.weight *= 50
        logits = model.logits(tokens())
    assert logits.abs().max() <= 2.0
    assert logits.abs().max() > 1.9


def test_rotary_attention_knows_distances_only() -> None:
    model = build(position="rope", n_layers=1, context_length=24)
    attention, generator = model.blocks[0].attention, torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 32, generator=generator)
    from trainer.model import rotary_angles

    near = attention(x, rotary_angles(model.config, 0, 6, x.device), None)
    far = attention(x, rotary_angles(model.config, 13, 6, x.device), None)
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)


def test_recomputing_activations_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        model = build().train()
        model.recompute = recompute
        row = tokens()
        model(row[:, :-1], row[:, 1:], 1.0).backward()
        gradients.append([p.grad for p in model.parameters()])
    for left, right in zip(*gradients, strict=True):
        assert left is not None
        assert right is not None
        torch.testing.assert_close(left, right)


def test_a_missing_or_misshapen_weight_is_refused() -> None:
    model = build()
    named = dict(initial_weights(model.config, 0))
    with pytest.raises(ValueError, match=r"head\.weight has shape"):
        fill(
            model,
            iter(
                [
                    *((n, t) for n, t in named.items() if n != "head.weight"),
                    ("head.weight", torch.zeros(101, 7)),
                ]
            ),
        )
    named.pop("final_norm.bias")
    with pytest.raises(KeyError, match=r"final_norm\.bias"):
        fill(model, iter(named.items()))
    assert padded("head.weight", torch.ones(101, 32), model.config).shape == (128, 32)
