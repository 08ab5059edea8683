"""What a plan says before anything is rented, and what it rests on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from runs import recipes, roofline
from runs.facts import Offer, Tariff
from runs.history import Past, alike, evaluated_tokens, past
from runs.predict import (
    Prediction,
    Transfer,
    fitting,
    memory_parts,
    microbatch,
    predict,
    rank,
    trades,
    verdict,
)
from runs.spec import RunSpec, parse
from trainer import flops
from trainer.config import ConfigError, ModelConfig, TrainConfig
from trainer.gpus import GPUS

GPT2 = recipes.text("8xa100-40gb")
QUICKSTART = recipes.text("quickstart")


def offer(kind: str, gpu: str | None, gpus: int, usd_per_hour: float, provider: str = "lambda") -> Offer:
    tariff = Tariff(
        micro_usd_per_hour=round(usd_per_hour * 1e6), granularity_seconds=60 if provider == "lambda" else 1
    )
    return Offer(provider=provider, instance_type=kind, region="r", gpu=gpu, gpus=gpus, tariff=tariff)


A100 = offer("gpu_8x_a100", "A100-40GB", 8, 15.92)
H100 = offer("gpu_8x_h100_sxm5", "H100-80GB", 8, 31.92)
ONE_H100 = offer("gpu_1x_h100_sxm5", "H100-80GB", 1, 4.29)
LOCAL = offer("local", None, 0, 1.20, provider="local")


def gpt2(*changes: str) -> RunSpec:
    return parse(GPT2, "run.yaml", changes)


def quickstart(*changes: str) -> RunSpec:
    return parse(QUICKSTART, "run.yaml", changes)


def evidence(spec: RunSpec, where: Offer, **changes: Any) -> Past:
    values = Past(
        provider=where.provider, instance_type=where.instance_type, gpu=where.gpu, gpus=where.gpus, nodes=1,
        model=spec.model, train=spec.train, world_size=spec.processes(where.gpus), microbatch_size=13,
        tokens_per_second=100_000.0, steps=spec.steps, training_seconds=spec.tokens / 100_000,
        phases={"booting": 30.0, "preparing": 40.0, "training": spec.tokens / 100_000, "evaluating": 50.0, "idle": 5.0,
                "collecting": 60.0, "releasing": 10.0},
    )  # fmt: skip
    return replace(values, **changes)


@pytest.mark.parametrize(
    ("gpu", "gpus", "optimizer", "published"),
    [("A100-80GB", 8, "adamw", 218e3), ("H100-80GB", 8, "adamw", 468e3), ("H100-80GB", 8, "muon", 448e3),
     ("A100-80GB", 8, "muon", 188e3), ("H200-141GB", 1, "muon", 490e3), ("H200-141GB", 8, "muon", 456e3)],
)  # fmt: skip
def test_the_roofline_agrees_with_what_was_published(
    gpu: str, gpus: int, optimizer: Any, published: float
) -> None:
    train = TrainConfig(global_batch_size=512, steps=10, optimizer=optimizer)
    speed = roofline.predict(ModelConfig(), train, GPUS[gpu], gpus, microbatch_size=64)
    assert speed is not None
    assert speed.tokens_per_second / gpus == pytest.approx(published, rel=roofline.ERROR)
    assert speed.step_seconds == pytest.approx(sum(speed.parts.values()))
    assert speed.mfu == pytest.approx(
        speed.tokens_per_second * flops.flops_per_token(ModelConfig()) / (GPUS[gpu].bf16_flops or 1) / gpus
    )


def a_speed(gpu: str = "A100-40GB", gpus: int = 8, nodes: int = 1, size: int = 13, **train: Any) -> float:
    config = TrainConfig(global_batch_size=208, steps=10, **train)
    speed = roofline.predict(ModelConfig(), config, GPUS[gpu], gpus, nodes, microbatch_size=size)
    assert speed is not None
    return speed.tokens_per_second


def test_the_roofline_knows_what_makes_things_slower() -> None:
    assert a_speed() < 8 * a_speed(gpus=1)
    assert a_speed(nodes=2) < 2 * a_speed()
    for slower in (
        {"compile": False},
        {"precision": "fp32"},
        {"activation_checkpointing": True},
        {"optimizer": "muon"},
        {"size": 1},
    ):
        assert a_speed(**slower) < a_speed()
    assert (
        roofline.predict(ModelConfig(), TrainConfig(global_batch_size=8, steps=1), GPUS["V100-16GB"], 8)
        is None
    )


def test_a_prediction_has_the_public_keys_and_sums_up() -> None:
    found = predict(gpt2(), A100)
    document = found.document()
    assert document.keys() >= {
        "parameters", "flops_per_token", "memory_gib", "fits", "microbatch_size", "tokens_per_second", "mfu",
        "training_hours", "overhead_hours", "cost_usd",
    }  # fmt: skip
    assert document["parameters"] == 163_009_536
    assert document["flops_formula"] == flops.FORMULA
    assert (found.basis, found.error) == ("roofline", roofline.ERROR)
    assert sum(found.phase_usd().values()) == pytest.approx(found.cost_usd)
    assert found.hours == pytest.approx((found.training_hours or 0) + (found.overhead_hours or 0))
    assert found.training_hours == pytest.approx(gpt2().tokens / (found.tokens_per_second or 1) / 3600)
    minutes = -(-sum(found.phases.values()) // 60)
    assert found.cost_usd == pytest.approx(minutes * 15.92 / 60, abs=1e-5)
    assert (found.low_usd or 0) < (found.cost_usd or 0) < (found.high_usd or 0)


def test_the_memory_parts_are_the_trainers_own_sum() -> None:
    for changes in (
        [],
        ["train.optimizer=muon"],
        ["train.sharding=fsdp"],
        ["train.activation_checkpointing=true"],
    ):
        spec = gpt2(*changes)
        parts = memory_parts(spec.model, spec.train, 13, 8)
        assert sum(parts.values()) == pytest.approx(flops.memory_gib(spec.model, spec.train, 13, 8))
        assert all(value > 0 for value in parts.values())


def test_the_microbatch_is_the_trainers_choice() -> None:
    trainer = pytest.importorskip("trainer.microbatch")
    assert (flops.ENOUGH_TOKENS, flops.USABLE) == ({"cuda": 131_072, "cpu": 16_384}, 0.92)
    for world, memory in ((8, 40.0), (1, 24.0), (8, 80.0), (1, None)):
        spec = gpt2()
        assert microbatch(spec, world, memory) == trainer.predicted(spec.trainer_config(), world, memory)
    assert microbatch(gpt2("train.microbatch_size=13"), 8, 1.0) == 13
    assert microbatch(gpt2(), 8, 1.0) is None


def test_what_does_not_fit_says_so_and_comes_last() -> None:
    large = gpt2("model.n_layers=48", "model.emb_dim=1600", "model.n_heads=25")
    small_gpu = offer("gpu_1x_a10", "A10-24GB", 1, 0.5)
    found = [predict(large, item) for item in (small_gpu, H100)]
    assert [item.fits for item in found] == [False, True]
    assert [item.offer for item in rank(found)] == [H100, small_gpu]


def test_one_gpu_is_slower_and_cheaper_than_eight() -> None:
    found = [predict(gpt2(), item) for item in (H100, ONE_H100)]
    assert rank(found)[0].offer == ONE_H100
    assert rank(found, "hours")[0].offer == H100


def test_offers_over_which_the_batch_does_not_divide_are_left_out() -> None:
    three = offer("three", "A100-40GB", 3, 5)
    assert fitting(gpt2(), [A100, three]) == [A100]
    with pytest.raises(ConfigError, match="does not divide over 3 processes"):
        predict(gpt2(), three)


def test_what_is_unknown_is_none_and_never_a_guess() -> None:
    cpu = predict(quickstart(), LOCAL)
    assert (cpu.basis, cpu.tokens_per_second, cpu.cost_usd, cpu.hours, cpu.error) == (
        "unknown",
        None,
        None,
        None,
        None,
    )
    assert "known only from a run" in cpu.notes[0]
    strange = predict(gpt2(), offer("x", "MI300X", 8, 20))
    assert (strange.tokens_per_second, strange.fits) == (None, None)
    assert "not in the GPU table" in " ".join(strange.notes)
    assert rank([cpu, predict(gpt2(), A100)])[-1] is cpu
    assert cpu.document()["phases"] == {}


def test_the_same_run_before_decides() -> None:
    spec = gpt2()
    found = predict(spec, A100, [evidence(spec, A100)])
    assert (found.basis, found.tokens_per_second) == ("history", 100_000.0)
    assert found.phases["booting"] == 30.0
    assert found.phases["collecting"] == 60.0
    assert found.training_hours == pytest.approx(spec.tokens / 100_000 / 3600)
    assert (found.error or 1) < roofline.ERROR


def test_another_length_and_learning_rate_is_still_the_same_run() -> None:
    spec = gpt2()
    longer = gpt2("train.tokens=6_520_381_440", "train.learning_rate=1e-3", "train.seed=7", "name=other")
    found = predict(longer, A100, [evidence(spec, A100)])
    assert found.basis == "history"
    assert found.training_hours == pytest.approx(2 * spec.tokens / 100_000 / 3600, rel=1e-3)
    assert alike(evidence(spec, A100), gpt2("train.compile=false"), A100) == "alike"
    assert alike(evidence(spec, A100), spec, H100) == "other"


def test_a_run_on_the_same_gpu_corrects_the_roofline() -> None:
    spec, other = gpt2(), gpt2("train.global_batch_size=208")
    plain = predict(other, A100)
    measured = a_speed() / 2  # half as fast as the roofline says, for whatever reason
    history = [
        evidence(
            spec,
            A100,
            train=replace(spec.train, global_batch_size=208),
            tokens_per_second=measured,
            model=ModelConfig(),
        )
    ]
    found = predict(other, A100, history)
    assert found.basis == "history"
    assert found.tokens_per_second == pytest.approx((plain.tokens_per_second or 0) / 2, rel=0.01)
    assert "roofline x 0.50" in found.notes[0]


def test_a_failed_run_tells_of_speed_and_not_of_phases() -> None:
    spec = gpt2()
    found = predict(spec, A100, [evidence(spec, A100, finished=False, phases={"booting": 1.0})])
    assert found.tokens_per_second == 100_000.0
    assert found.phases["collecting"] > 1


def test_a_local_cpu_run_with_history_is_predicted() -> None:
    spec = quickstart()
    seconds = spec.tokens / 15_000
    phases = {
        "booting": 2.0,
        "preparing": 12.0,
        "training": seconds,
        "evaluating": 9.0,
        "idle": 3.0,
        "collecting": 1.0,
        "releasing": 1.0,
    }
    before = evidence(
        spec,
        LOCAL,
        tokens_per_second=15_500.0,
        training_seconds=seconds,
        phases=phases,
        evaluated_tokens=evaluated_tokens(spec),
    )
    found = predict(quickstart("train.seed=1"), LOCAL, [before])
    assert found.hours == pytest.approx(sum(phases.values()) / 3600, rel=0.01)
    assert found.cost_usd == pytest.approx(sum(phases.values()) / 3600 * 1.20, rel=0.01)
    doubled = predict(quickstart("train.steps=600"), LOCAL, [before])
    assert doubled.phases["training"] == pytest.approx(2 * seconds)
    wider = predict(quickstart("model.emb_dim=256"), LOCAL, [before])
    assert wider.basis == "history"
    assert (wider.tokens_per_second or 0) < 15_500
    assert (wider.error or 0) > (found.error or 0)
    assert predict(quickstart("model.emb_dim=1024", "model.n_layers=12"), LOCAL, [before]).basis == "unknown"


# Seconds by phase of four runs of the quickstart on one machine with two cores, in their order: two beside other work, two
# alone; and the dollars that were billed for each at $1.20/h.
RECORDED = [
    ({"booting": 0.22, "preparing": 8.98, "training": 42.67, "evaluating": 6.74, "idle": 3.38, "collecting": 0.04,
      "releasing": 0.08}, 0.020703),
    ({"booting": 0.24, "preparing": 7.10, "training": 39.34, "evaluating": 4.68, "idle": 3.38, "collecting": 0.03,
      "releasing": 0.05}, 0.018273),
    ({"booting": 0.24, "preparing": 5.25, "training": 27.99, "evaluating": 3.00, "idle": 1.60, "collecting": 0.03,
      "releasing": 0.05}, 0.012719),
    ({"booting": 0.22, "preparing": 4.01, "training": 27.71, "evaluating": 3.45, "idle": 1.68, "collecting": 0.03,
      "releasing": 0.05}, 0.012381),
]  # fmt: skip


@pytest.mark.parametrize(("known", "next_one"), [(1, 1), (3, 3)])
def test_a_recorded_run_predicts_the_next_one_within_15_percent(known: int, next_one: int) -> None:
    spec = quickstart()
    history = [
        evidence(
            spec, LOCAL, phases=phases, training_seconds=phases["training"],
            tokens_per_second=spec.tokens / phases["training"], evaluated_tokens=evaluated_tokens(spec),
        )
        for phases, _ in RECORDED[:known]
    ]  # fmt: skip
    found = predict(quickstart("train.seed=43"), LOCAL, history)
    phases, billed_usd = RECORDED[next_one]
    assert found.hours == pytest.approx(sum(phases.values()) / 3600, rel=0.15)
    assert found.cost_usd == pytest.approx(billed_usd, rel=0.15)
    # Another batch of as many tokens is no longer the same run; its error bar holds what was measured.
    other = predict(
        quickstart("train.steps=150", "train.global_batch_size=32", "train.microbatch_size=16"),
        LOCAL,
        history,
    )
    assert (other.low_usd or 9) < billed_usd < (other.high_usd or 0)


def test_what_a_cheaper_and_a_faster_offer_would_change_is_said() -> None:
    eight, one = (predict(gpt2(), item) for item in (H100, ONE_H100))
    (cheaper,) = trades(eight, [one])
    assert (
        cheaper.startswith("cheapest that is free: gpu_1x_h100_sxm5, $")
        and "less" in cheaper
        and "as long" in cheaper
    )
    (faster,) = trades(one, [eight])
    assert "gpu_8x_h100_sxm5" in faster and "more" in faster and "as fast" in faster
    assert trades(eight, []) == trades(predict(quickstart(), LOCAL), [one]) == []


def test_data_on_this_machine_costs_idle_gpus() -> None:
    slow = Transfer(
        bytes=20_000_000_000, first_bytes=200_000_000, bytes_per_second=2.5e6
    )  # 20 GB at 20 Mbit/s
    found = predict(gpt2(), H100, transfer=slow)
    assert found.upload_usd == pytest.approx((8000 - found.phases["training"]) / 3600 * 31.92, rel=1e-3)
    assert found.upload_usd > 50
    hidden = predict(gpt2(), H100, transfer=replace(slow, bytes=1_000_000_000))
    assert hidden.upload_usd == pytest.approx(80 / 3600 * 31.92, rel=1e-3)
    assert predict(gpt2(), H100).upload_usd == 0


def test_the_budget_refuses_warns_or_is_silent() -> None:
    found: Prediction = predict(gpt2(), A100)
    cost = found.cost_usd or 0
    assert verdict(found, None, None).reasons == verdict(found, cost * 2, 100).reasons == []
    warned = verdict(found, cost * 0.9, None)
    assert (warned.refused, len(warned.reasons)) == (False, 1)
    assert f"over the budget of ${cost * 0.9:.2f}" in warned.reasons[0]
    assert verdict(found, cost * 0.5, None).refused
    assert verdict(found, None, (found.hours or 0) * 0.5).reasons[0].startswith("at best")
    assert verdict(predict(quickstart(), LOCAL), 0.01, 0.01).reasons == []


def stored(spec: RunSpec, **changes: Any) -> dict[str, Any]:
    return {
        "state": "succeeded", "provider": "local", "instance_type": "local", "gpu": None, "gpus": 0, "world_size": 2,
        "microbatch_size": 8, "tokens_per_second": 15_000.0, "step": spec.steps, "training_seconds": 60.0, "billed_seconds": 100.0,
        "phases": {"training": 0.02, "preparing": 0.01, "idle": 0.0033333}, **changes,
    }  # fmt: skip


def test_a_stored_run_becomes_evidence() -> None:
    spec = quickstart()
    found = past(stored(spec), spec.to_dict())
    assert found is not None
    assert alike(found, spec, LOCAL) == "same"
    assert found.phases["training"] == pytest.approx(60, rel=1e-3)
    assert found.evaluated_tokens == 3 * spec.train.validation_tokens + 131_072
    exact = past(stored(spec, seconds_by_phase={"training": 61.0}), spec.to_dict())
    assert exact is not None
    assert exact.phases == {"training": 61.0}


@pytest.mark.parametrize(
    "broken", [{"tokens_per_second": None}, {"step": 0}, {"training_seconds": 0.0}, {"instance_type": None}]
)
def test_a_run_without_steps_is_no_evidence(broken: dict[str, Any]) -> None:
    spec = quickstart()
    assert past(stored(spec, **broken), spec.to_dict()) is None
    assert past(stored(spec), {"name": "of an older version"}) is None
