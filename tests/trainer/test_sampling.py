"""Sampling picks what it is told to, repeats itself by seed, and goes on past the context."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.trainer.test_gpt import build, checkpoint_of
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.sample import generate, load_model, pick

LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -50.0])


def drawn(**options: object) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    return Counter(pick(LOGITS, generator=generator, **settings) for _ in range(2000))  # type: ignore[arg-type]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(drawn(temperature=0)) == {1}


def test_frequencies_follow_the_softmax() -> None:
    expected = LOGITS.softmax(0)
    counts = drawn()
    for token in range(4):
        assert counts[token] / 2000 == pytest.approx(expected[token].item(), abs=0.04)


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert set(drawn(top_k=2)) == {1, 2}
    assert set(drawn(top_p=0.7)) == {1, 2}
    assert set(drawn(top_p=1e-6)) == {1}


def test_a_seed_repeats_and_another_does_not() -> None:
    model = build()
    runs = [list(generate(model, [1, 2, 3], max_tokens=30, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_greedy_tokens_are_those_of_the_whole_sequence_while_it_fits() -> None:
    model = build()
    produced = list(generate(model, [5, 6], max_tokens=20, temperature=0))
    sequence = [5, 6, *produced]
    with torch.no_grad():
        logits = model.logits(torch.tensor([sequence]))[0]
    assert logits.argmax(-1)[1:-1].tolist() == produced


def test_generation_goes_on_when_the_context_is_full() -> None:
    model = build()
    produced = list(generate(model, list(range(40)), max_tokens=60, temperature=0))
    assert len(produced) == 60
    assert all(0 <= token < 101 for token in produced)


def test_a_prompt_that_cannot_be_continued_is_refused() -> None:
    for prompt in ([], [101]):
        with pytest.raises(ValueError, match="prompt"):
            next(generate(build(), prompt, max_tokens=1))


def test_a_checkpoint_with_a_changed_byte_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_of(build(), tmp_path / "c")
    load_model(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match="checksum"):
        load_model(folder)


def test_the_command_prints_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint_of(build(), tmp_path / "c")
    assert (
        main(
            [
                "sample",
                "--checkpoint",
                str(folder),
                "--prompt-tokens",
                "1,2",
                "--tokens",
                "3",
                "--temperature",
                "0",
            ]
        )
        == 0
    )
    expected = list(generate(load_model(folder)[0], [1, 2], max_tokens=3, temperature=0))
    assert capsys.readouterr().out.strip() == f'{{"tokens": {expected}}}'


def test_a_model_is_read_and_trained_without_the_compiler(tmp_path: Path) -> None:
    """Which takes as long to load as all the rest of torch; what is not compiled does not wait for it."""
    folder = checkpoint_of(build(), tmp_path / "c")
    code = (
        "import sys, torch; from trainer.config import TrainConfig; from trainer.optim import Optimizer\n"
        f"from trainer.sample import load_model; model = load_model({str(folder)!r})[0].train().requires_grad_()\n"
        "model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]), 2.0).backward()\n"
        "train = TrainConfig(global_batch_size=1, steps=1, learning_rate=0.1, optimizer='muon')\n"
        "norm, skipped = Optimizer(model, train).step(1.0)\n"
        "print(float(norm) > 0, float(skipped), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True 0.0 False\n"
