"""The optimizer equals its textbook parts; a step that is not finite changes nothing; the schedule is what it says."""

from __future__ import annotations

import copy

import pytest
import torch

from trainer import checkpoint, schedule
from trainer.config import ModelConfig, TrainConfig
from trainer.distributed import World
from trainer.model import GPT, fill, initial_weights
from trainer.optim import Muon, Optimizer, orthogonalise

MODEL = ModelConfig(vocab_size=64, context_length=16, emb_dim=32, n_heads=2, n_layers=2)


def train_config(**changes: object) -> TrainConfig:
    return TrainConfig(
        **{"global_batch_size": 1, "steps": 10, "learning_rate": 1e-2, "device": "cpu", **changes}
    )  # type: ignore[arg-type]


def build() -> GPT:
    with torch.device("meta"):
        model = GPT(MODEL)
    fill(model.allocate("cpu"), initial_weights(MODEL, 0))
    return model


def set_gradients(model: GPT, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


@pytest.mark.parametrize(("clip", "decay"), [(0.0, 0.1), (1.0, 0.1), (1e6, 0.1), (1.0, 0.0)])
def test_adamw_with_clipping_equals_the_plain_way(clip: float, decay: float) -> None:
    model = build()
    theirs = copy.deepcopy(model)
    ours = Optimizer(model, train_config(grad_clip=clip, weight_decay=decay))
    decayed = [p for p in theirs.parameters() if p.ndim == 2]
    plain = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": decay}, {"params": [p for p in theirs.parameters() if p.ndim != 2], "weight_decay": 0.0}],
        lr=5e-3, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for seed in range(3):
        set_gradients(model, seed)
        set_gradients(theirs, seed)
        norm, skipped = ours.step(0.5)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or float("inf"))
        plain.step()
        torch.testing.assert_close(norm, expected)
        assert skipped.item() == 0
    for left, right in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str, poison: float) -> None:
    model = build()
    ours = Optimizer(model, train_config(optimizer=optimizer))
    set_gradients(model, 0)
    ours.step(1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    states = copy.deepcopy(ours.state())
    set_gradients(model, 1)
    gradient = model.blocks[0].attention.query.weight.grad
    assert gradient is not None
    gradient[0, 0] = poison
    _, skipped = ours.step(1.0)
    assert skipped.item() == 1
    assert all(torch.equal(before, p) for before, p in zip(weights, model.parameters(), strict=True))
    for name, state in ours.state().items():
        for key, value in state.items():
            assert torch.equal(value, states[name][key]), (name, key)


def test_every_parameter_has_one_optimizer() -> None:
    model = build()
    ours = Optimizer(model, train_config(optimizer="muon"))
    assert ours.muon is not None
    by_muon = {id(p) for p in ours.muon.parameters}
    by_adamw = {id(p) for _, group in ours.adamw for p in group}
    assert not by_muon & by_adamw
    assert by_muon | by_adamw == {id(p) for p in model.parameters()}
    assert id(model.token_embedding.weight) in by_adamw
    assert id(model.head.weight) in by_adamw
    assert {tuple(p.shape) for p in ours.muon.parameters} == {(32, 32), (128, 32), (32, 128)}


def test_muon_equals_torch_s_to_the_rounding_of_bf16() -> None:
    shapes = [(32, 32), (32, 32), (64, 32), (32, 64)]
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine, reference = Muon(ours, 0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    mine.reset()
    start = [p.detach().clone() for p in ours]
    for _ in range(3):
        for left, right in zip(ours, theirs, strict=True):
            left.grad = torch.randn(left.shape, generator=generator)
            right.grad = left.grad.clone()
        mine.update(0.02, torch.ones(()), torch.zeros(()))
        reference.step()
    for left, right, before in zip(ours, theirs, start, strict=True):
        moved = (right - before).norm()
        assert moved > 0.1
        assert (left - right).norm() / moved < 0.02


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 48, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_warm_up_then_cosine() -> None:
    train = train_config(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=10, schedule="cosine")
    assert schedule.factor(1, 110, train) == pytest.approx(0.1)
    assert schedule.factor(10, 110, train) == pytest.approx(1.0)
    assert schedule.factor(60, 110, train) == pytest.approx(0.55)
    assert schedule.factor(110, 110, train) == pytest.approx(0.1)


def test_stable_then_linear() -> None:
    train = train_config(
        learning_rate=1e-2, min_learning_rate=0.0, warmup_steps=5, schedule="wsd", cooldown_fraction=0.4
    )
    assert [schedule.factor(step, 100, train) for step in (5, 60)] == [1.0, 1.0]
    assert schedule.factor(80, 100, train) == pytest.approx(0.5)
    assert schedule.factor(100, 100, train) == 0.0


def test_constant_stays() -> None:
    train = train_config(schedule="constant", warmup_steps=0)
    assert {schedule.factor(step, 100, train) for step in range(1, 101)} == {1.0}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_host_memory_is_reserved_for_what_a_checkpoint_takes(optimizer: str) -> None:
    class Recorded(checkpoint.HostCopies):
        def take(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
            taken[name] = tensor.shape
            return super().take(name, tensor)

    taken: dict[str, torch.Size] = {}
    model, here = build(), World(0, 1, 0, 1, torch.device("cpu"))
    ours = Optimizer(model, train_config(optimizer=optimizer))
    checkpoint.snapshot(model, ours, copies=Recorded(here.device), here=here, step=1, facts={})
    assert taken == {name: tensor.shape for name, tensor in checkpoint.held(model, ours).items()}
    assert len(taken) > len(list(model.named_parameters()))
