"""What is known of GPUs, what fits them, and what is remembered between runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from trainer import cache, flops, gpus, microbatch
from trainer.__main__ import main
from trainer.config import ConfigError, DataConfig, ModelConfig, TrainConfig, TrainerConfig
from trainer.distributed import World
from trainer.reading import load

HERE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def config(**train: object) -> TrainerConfig:
    settings = {"global_batch_size": 96, "steps": 10, **train}
    return TrainerConfig(DataConfig(train=["-"]), ModelConfig(), TrainConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "memory", "key"), [
    ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
    ("NVIDIA A100-SXM4-80GB", 79.1, "A100-80GB"),
    ("NVIDIA A100 80GB PCIe", 79.2, "A100PCIe-80GB"),
    ("NVIDIA H100 80GB HBM3", 79.1, "H100-80GB"),
    ("NVIDIA H100 PCIe", 79.1, "H100PCIe-80GB"),
    ("NVIDIA H200", 139.8, "H200-141GB"),
    ("NVIDIA B200", 178.4, "B200-180GB"),
    ("NVIDIA GH200 480GB", 94.5, "GH200-96GB"),
    ("NVIDIA GeForce RTX 3090", 23.6, "RTX3090-24GB"),
    ("NVIDIA RTX A6000", 47.4, "A6000-48GB"),
    ("Quadro RTX 6000", 23.6, "RTX6000-24GB"),
    ("NVIDIA RTX 6000 Ada Generation", 47.4, "RTX6000ADA-48GB"),
    ("Tesla V100-SXM2-16GB", 15.8, "V100-16GB"),
    ("H100 (80 GB SXM5)", None, "H100-80GB"),
    ("A100 (40 GB PCIe)", None, "A100-40GB"),
    ("B200 (180 GB SXM6)", None, "B200-180GB"),
    ("NVIDIA A100", None, None),
    ("NVIDIA H100 80GB HBM3", 40.0, None),
    ("NVIDIA X900", 80.0, None),
    ("NVIDIA GeForce RTX 3090 Ti", 23.6, None),
])  # fmt: skip
def test_a_gpu_is_known_or_unknown_and_never_mistaken(
    name: str, memory: float | None, key: str | None
) -> None:
    found = gpus.lookup(name, memory)
    assert (found.key if found else None) == key


def test_the_table_is_plausible() -> None:
    for key, gpu in gpus.GPUS.items():
        assert gpu.key == key
        assert gpus.lookup(key) == gpu
        assert gpu.source
        assert gpu.bf16_flops is None or 50e12 < gpu.bf16_flops < 3e15
        assert 200e9 < gpu.bandwidth < 10e12


def test_requests() -> None:
    assert gpus.parse_request("H100:8") == ("H100", None, 8)
    assert gpus.parse_request("A100-40GB:8") == ("A100", 40, 8)
    assert gpus.parse_request("B200") == ("B200", None, 1)
    for wrong in ("", "H100:", "H100:0", "H100:x", "8xH100", "A100-40TB"):
        if wrong != "8xH100":
            with pytest.raises(ValueError, match="GPU request"):
                gpus.parse_request(wrong)
    assert gpus.matches("A100:8", "A100-40GB", 8)
    assert gpus.matches("h100:1", "H100PCIe-80GB", 1)
    assert not gpus.matches("A100-80GB:8", "A100-40GB", 8)
    assert not gpus.matches("A100:8", "A100-40GB", 1)
    assert not gpus.matches("A10:1", "A100-40GB", 1)


def test_the_orchestrator_s_half_needs_neither_torch_nor_numpy() -> None:
    code = ("import sys, trainer.gpus, trainer.flops, trainer.slices, trainer.shards, trainer.manifest, trainer.config, trainer.reading, trainer.schedule, "
            "trainer.progress, trainer.__main__; sys.exit(int('torch' in sys.modules or 'numpy' in sys.modules))")  # fmt: skip
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode
        == 0
    )


def test_an_8b_model_is_expressible_and_does_not_fit_one_gpu() -> None:
    llama = ModelConfig(
        vocab_size=128256, context_length=8192, emb_dim=4096, n_heads=32, n_layers=32, n_kv_heads=8, ffn_dim=14336,
        norm="rms", activation="swiglu", position="rope", rope_theta=500_000.0,
    )  # fmt: skip
    train = TrainConfig(global_batch_size=8, steps=1, sharding="fsdp", activation_checkpointing=True)
    assert flops.memory_gib(llama, train, 1, 1) > 110
    assert flops.memory_gib(llama, train, 1, 8) < 60
    with pytest.raises(ConfigError, match="one sequence needs about"):
        microbatch.predicted(TrainerConfig(DataConfig(train=["-"]), llama, train), 1, 80.0)


SPEEDRUN = ModelConfig(
    n_heads=6,
    norm="rms",
    activation="relu2",
    position="rope",
    rotary_fraction=0.5,
    qk_norm=True,
    logit_softcap=15,
)


@pytest.mark.parametrize(("model", "optimizer", "microbatch_size", "reserved_gib"), [
    (ModelConfig(), "adamw", 12, 7.24), (ModelConfig(), "adamw", 32, 12.98), (ModelConfig(), "adamw", 64, 22.83),
    (ModelConfig(), "adamw", 96, 30.65), (ModelConfig(), "adamw", 128, 40.46), (SPEEDRUN, "muon", 12, 7.55),
    (SPEEDRUN, "muon", 64, 25.81), (SPEEDRUN, "muon", 128, 47.63),
])  # fmt: skip
def test_the_predicted_memory_is_what_an_h200_measured(
    model: ModelConfig, optimizer: Literal["adamw", "muon"], microbatch_size: int, reserved_gib: float
) -> None:
    """docs/performance.md; to what torch reserved, the CUDA context's 0.77 GiB come."""
    train = TrainConfig(global_batch_size=microbatch_size, steps=1, optimizer=optimizer)
    assert flops.memory_gib(model, train, microbatch_size) == pytest.approx(reserved_gib + 0.77, rel=0.1)


def test_the_predicted_microbatch_divides_and_fits() -> None:
    assert microbatch.candidates(config(), 8) == [12, 6, 4, 3, 2, 1]
    sizes = [microbatch.predicted(config(), 1, memory) for memory in (8.0, 16.0, 40.0, 80.0)]
    assert sizes == sorted(sizes)
    assert all(96 % size == 0 for size in sizes)
    assert sizes[0] < sizes[-1]


def failing(at_least: int) -> tuple[Callable[[int], None], list[int]]:
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size >= at_least:
            raise torch.OutOfMemoryError("no")

    return attempt, tried


def test_a_microbatch_is_verified_and_steps_down_at_most_once() -> None:
    attempt, tried = failing(at_least=100)
    assert microbatch.verified(48, config(), HERE, attempt) == 48
    attempt, tried = failing(at_least=48)
    assert microbatch.verified(48, config(), HERE, attempt) == 32
    assert tried == [48, 32]
    assert cache.recall(cache.key(config(), HERE.device, 1), "microbatch_size") == 32
    attempt, tried = failing(at_least=1)
    with pytest.raises(torch.OutOfMemoryError, match="microbatch_size 16 would fit"):
        microbatch.verified(48, config(device="cpu"), HERE, attempt)
    assert tried == [48, 16]  # on a CPU longer ones are no candidates


def test_a_recorded_choice_is_used_again() -> None:
    one = config(device="cpu")
    assert microbatch.choose(one, HERE, recorded=None) == 16
    cache.remember(cache.key(one, HERE.device, 1), "microbatch_size", 8)
    assert microbatch.choose(one, HERE, recorded=None) == 8
    assert microbatch.choose(one, HERE, recorded=4) == 4
    assert microbatch.choose(config(device="cpu", microbatch_size=2), HERE, recorded=4) == 2


def test_the_cache_s_key_is_model_and_machine_not_schedule() -> None:
    assert cache.key(config(), HERE.device, 1) == cache.key(
        config(learning_rate=1.0, steps=99), HERE.device, 1
    )
    assert cache.key(config(), HERE.device, 1) != cache.key(config(precision="fp32"), HERE.device, 1)
    assert cache.key(config(), HERE.device, 1) != cache.key(config(), HERE.device, 2)


def test_bench_prints_one_document(
    make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--config", str(make_config()), "--steps", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {
        "parameters",
        "tokens_per_second",
        "mfu",
        "step_seconds",
        "peak_memory_gib",
        "device",
        "compile",
    } <= set(document)
    assert document["mfu"] is None
    assert document["tokens_per_second"] == pytest.approx(8 * 32 / document["step_seconds"])
    assert document["parameters"] == flops.parameters(load(make_config()).model)


def test_a_sweep_maps_batch_and_length(
    make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "bench",
                "--config",
                str(make_config(train={"microbatch_size": "auto"})),
                "--steps",
                "1",
                "--json",
                "--sweep",
            ]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["sweep"]
    assert [(row["context_length"], row["microbatch_size"]) for row in rows] == [
        (c, m) for c in (32, 16, 8) for m in (1, 2, 4, 8)
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_bench_refuses_what_training_refuses(
    make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--config", str(make_config(train={"microbatch_size": 3})), "--steps", "1"]) == 3
    assert "train.microbatch_size" in capsys.readouterr().err


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fly"]) == 2
    assert "none of train" in capsys.readouterr().err
