"""LoRA: merged equals unmerged, unmerging restores every bit, and the gradient is that of the factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.after import bases, lora
from trainer.after.lora import Adapters
from trainer.after.settings import LoraConfig
from trainer.config import ConfigError, ModelConfig
from trainer.model import GPT, initial_weights

MODEL = ModelConfig(vocab_size=64, context_length=16, emb_dim=32, n_heads=4, n_layers=2, activation="swiglu")
EVERYTHING = LoraConfig(rank=3, alpha=6, targets=list(lora.TARGETS))
TOKENS = torch.arange(12).reshape(1, 12) * 5 % 64


def model() -> GPT:
    return bases.assemble(MODEL, dict(initial_weights(MODEL, 3))).eval()


def shake(adapters: Adapters) -> None:
    """Adapters as they are after some training."""
    generator = torch.Generator().manual_seed(1)
    for tensor in adapters.tensors().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)


def test_adapters_change_nothing_until_trained() -> None:
    gpt = model()
    before = gpt.logits(TOKENS)
    Adapters(gpt, EVERYTHING, seed=1)
    assert torch.equal(gpt.logits(TOKENS), before)


def test_merged_equals_unmerged_and_unmerging_is_exact() -> None:
    gpt = model()
    before = {name: tensor.clone() for name, tensor in lora.plain_weights(gpt)}
    base_logits = gpt.logits(TOKENS)
    adapters = Adapters(gpt, EVERYTHING, seed=1)
    shake(adapters)
    unmerged = gpt.logits(TOKENS)
    assert not torch.allclose(unmerged, base_logits, atol=1e-2)
    adapters.merge()
    assert adapters.merged and torch.equal(gpt.logits(TOKENS), unmerged)
    assert set(dict(gpt.named_parameters())) == set(before)  # a plain model again
    for _ in range(3):
        adapters.unmerge()
        assert not adapters.merged and torch.equal(gpt.logits(TOKENS), unmerged)
        for name, linear in gpt.named_modules():
            if hasattr(linear, "parametrizations"):
                assert torch.equal(linear.parametrizations["weight"].original, before[f"{name}.weight"])
        adapters.merge()
    adapters.unmerge()
    for tensor in adapters.tensors().values():
        tensor.zero_()
    assert torch.equal(gpt.logits(TOKENS), base_logits)


def test_the_weight_is_the_low_rank_sum_and_only_the_factors_have_gradients() -> None:
    gpt = model()
    weight = gpt.blocks[0].attention.query.weight.detach().clone()
    adapters = Adapters(gpt, LoraConfig(rank=2, alpha=10, targets=["query"]), seed=1)
    shake(adapters)
    a, b = (adapters.tensors()[f"blocks.0.attention.query.{part}"] for part in "ab")
    assert a.shape == (2, 32) and b.shape == (32, 2)
    assert torch.allclose(gpt.blocks[0].attention.query.weight, weight + 5 * b @ a)
    gpt(TOKENS[:, :-1], TOKENS[:, 1:], 11.0).backward()
    with_gradient = {name for name, p in gpt.named_parameters() if p.grad is not None}
    assert with_gradient == {
        f"blocks.{i}.attention.query.parametrizations.weight.0.{part}" for i in range(2) for part in "ab"
    }


def test_adapters_travel_as_a_file_of_their_own(tmp_path: Path) -> None:
    first, second = model(), model()
    one, two = Adapters(first, EVERYTHING, seed=1), Adapters(second, EVERYTHING, seed=2)
    shake(one)
    one.save(tmp_path / "adapter.safetensors")
    two.load(tmp_path / "adapter.safetensors")
    assert torch.equal(first.logits(TOKENS), second.logits(TOKENS))
    third = Adapters(model(), LoraConfig(rank=2, targets=["query"]), seed=1)
    with pytest.raises(ConfigError, match="other maps or another rank"):
        third.load(tmp_path / "adapter.safetensors")


def test_a_target_that_the_model_lacks_is_named() -> None:
    plain = ModelConfig(vocab_size=64, context_length=16, emb_dim=32, n_heads=4, n_layers=1)
    with pytest.raises(ConfigError, match="only activation: swiglu has a gate"):
        Adapters(bases.assemble(plain, dict(initial_weights(plain, 1))), LoraConfig(targets=["gate"]), seed=1)
