"""What only a GPU can show. Skipped without one; each case is the sister of one on the CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import ROOT, losses, poison, records, run_trainer, status
from trainer import cache, checkpoint, flops, loop, loss, manifest
from trainer.loss import linear_cross_entropy
from trainer.reading import load
from trainer.session import can_compile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
MakeConfig = Callable[..., Path]
ON_GPU: dict[str, Any] = {"device": "cuda", "precision": "bf16", "compile": True}


@pytest.mark.slow
@pytest.mark.parametrize("instant", [("step", 7), ("weights-written", 2)], ids=["step", "weights-written"])
def test_killed_and_resumed_is_bit_identical_when_deterministic(
    make_config: MakeConfig, tmp_path: Path, instant: tuple[str, int]
) -> None:
    config = str(make_config(train={**ON_GPU, "deterministic": True}))
    for out in ("whole", "killed"):
        done = run_trainer(
            "train",
            "--config",
            config,
            "--out",
            str(tmp_path / out),
            killed=instant if out == "killed" else None,
        )
        assert done.returncode == (-signal.SIGKILL if out == "killed" else 0), done.stderr
    done = run_trainer("train", "--config", config, "--out", str(tmp_path / "killed"), "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in ("model.safetensors", "training_state.pt"):
        ours, theirs = (tmp_path / out / "checkpoints/latest" / name for out in ("killed", "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_losses_are_those_of_the_cpu(make_config: MakeConfig, tmp_path: Path) -> None:
    """In float32, to the rounding of TF32; in bf16, to its own."""
    found = {}
    for name, changes in {
        "cpu": {},
        "fp32": {"device": "cuda"},
        "bf16": {"device": "cuda", "precision": "bf16"},
    }.items():
        assert loop.run(make_config(train=changes), tmp_path / name, resume=False) == 0
        found[name] = list(losses(tmp_path / name).values())
    assert found["fp32"] == pytest.approx(found["cpu"], abs=3e-3)
    assert found["bf16"] == pytest.approx(found["cpu"], abs=3e-2)


def test_a_step_waits_for_nothing_on_the_host(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever would make the processor wait for the GPU within a step raises."""
    original = loop._one_step

    def one_step(run: Any, batches: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(run, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "_one_step", one_step)
    for optimizer in ("adamw", "muon"):
        config = make_config(train={"device": "cuda", "precision": "bf16", "optimizer": optimizer})
        assert loop.run(config, tmp_path / optimizer, resume=False) == 0, status(tmp_path / optimizer)


def test_a_step_that_is_not_finite_is_skipped(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {5})
    out = tmp_path / "out"
    config = make_config(train={"device": "cuda", "precision": "bf16", "optimizer": "muon"})
    assert loop.run(config, out, resume=False) == 0
    assert [line["step"] for line in records(out, "step") if line.get("skipped")] == [5]
    assert all(bool(torch.isfinite(w).all()) for w in checkpoint.weights(out / "checkpoints/latest").values())


@pytest.mark.parametrize("softcap", [None, 15.0])
def test_the_loss_holds_one_chunk_of_logits(softcap: float | None) -> None:
    """Loss and both gradients are those of the plain way, in a fraction of its memory."""
    rows, width, vocabulary = 4 * flops.head_chunk("cuda"), 128, 50_257
    generator = torch.Generator("cuda").manual_seed(1)
    hidden = torch.randn(rows, width, device="cuda", generator=generator, dtype=torch.bfloat16)
    weight = torch.randn(flops.padded_vocab(vocabulary), width, device="cuda", generator=generator) * 0.1
    targets = torch.randint(vocabulary, (rows,), device="cuda", generator=generator)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss.use_compiled(can_compile(hidden.device))
    try:
        for _ in range(2):  # the first time compiles
            hidden.grad = weight.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ours = linear_cross_entropy(
                hidden, weight, targets, vocab_size=vocabulary, softcap=softcap, denominator=float(rows)
            )
            ours.backward()
            held = torch.cuda.max_memory_allocated() - before
    finally:
        loss.use_compiled(wanted=False)
    assert held < 2.5 * flops.head_chunk("cuda") * weight.shape[0] * 2
    assert hidden.grad is not None
    assert weight.grad is not None
    found = ours.detach().clone(), hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    logits = loss.softcap_((hidden @ weight[:vocabulary].bfloat16().t()).float(), softcap)
    plain = torch.nn.functional.cross_entropy(logits, targets)
    plain.backward()  # type: ignore[no-untyped-call]
    for one, other, tolerance in zip(
        found, (plain, hidden.grad, weight.grad), (1e-3, 2e-2, 2e-2), strict=True
    ):
        difference = (one.float() - other.float()).norm() / other.float().norm()
        assert float(difference) < tolerance


@pytest.mark.slow
def test_a_microbatch_is_chosen_verified_and_remembered(make_config: MakeConfig, tmp_path: Path) -> None:
    changes = {**ON_GPU, "compile": False, "global_batch_size": 32, "microbatch_size": "auto"}
    config = make_config(train=changes)
    assert loop.run(config, tmp_path / "out", resume=False) == 0
    settings = load(config)
    size = records(tmp_path / "out", "system")[0]["microbatch_size"]
    assert size == 32
    assert cache.recall(cache.key(settings, torch.device("cuda", 0), 1), "microbatch_size") == size
    assert loop.run(make_config(train={"device": "cuda", "global_batch_size": 32}), tmp_path / "four", resume=False) == 0  # fmt: skip
    assert list(losses(tmp_path / "out").values()) == pytest.approx(
        list(losses(tmp_path / "four").values()), abs=2e-2
    )


@pytest.mark.slow
def test_out_of_memory_names_what_would_fit(make_config: MakeConfig, tmp_path: Path) -> None:
    """In a process of its own that may have half a gigabyte."""
    config = make_config(
        model={"emb_dim": 256, "context_length": 1024, "n_heads": 4},
        train={**ON_GPU, "compile": False, "global_batch_size": 64, "microbatch_size": 64},
    )
    program = (
        "import sys, torch; from trainer.__main__ import main; "
        "torch.cuda.set_per_process_memory_fraction(0.5 * 2**30 / torch.cuda.get_device_properties(0).total_memory); "
        f"sys.exit(main(['train', '--config', {str(config)!r}, '--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode != 0
    assert status(tmp_path / "out")["state"] == "failed"
    assert "microbatch_size 32 would fit" in status(tmp_path / "out")["message"]


@pytest.mark.slow
def test_compiled_code_is_kept_for_the_next_process(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(train=ON_GPU)
    done = run_trainer("train", "--config", str(config), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    entry = cache.key(load(config), torch.device("cuda", 0), 1)
    assert (cache.directory() / f"{entry}.compiled").stat().st_size > 0
    assert cache.load_compiled(entry)


def test_bench_knows_the_gpu_and_its_peak(make_config: MakeConfig) -> None:
    done = run_trainer("bench", "--config", str(make_config(train=ON_GPU)), "--steps", "3", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["device"] == torch.cuda.get_device_name(0)
    assert (document["mfu"] is None) == (document["peak_flops"] is None)
    assert document["peak_memory_gib"] > 0


def test_preflight_uses_every_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torch.cuda.device_count()}",
               "-m", "trainer", "preflight", "--device", "cuda"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["device"] == "cuda"


def test_checkpoints_are_whole_and_sampled_on_the_gpu(make_config: MakeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = make_config(
        train={"device": "cuda", "precision": "bf16"}, evaluate={"prompt_tokens": [[100, 101]]}
    )
    assert loop.run(config, out, resume=False) == 0
    directory = out / "checkpoints"
    assert all(
        manifest.verify(directory / manifest.directory_name(step)) == []
        for step in checkpoint.steps(directory)
    )
    greedy = ["sample", "--checkpoint", str(directory / "latest"), "--prompt-tokens", "100,101", "--tokens", "8",
              "--temperature", "0"]  # fmt: skip
    here, there = (json.loads(run_trainer(*greedy, "--device", device).stdout) for device in ("cpu", "cuda"))
    assert here == there
