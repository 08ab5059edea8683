"""Tuning as runs: what they write, what they keep, how they resume, and that the loss does not depend on the processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import forks
from tests.trainer.conftest import records, status
from trainer import checkpoint, manifest
from trainer.after import bases, classify, dpo, epochs, examples, finetune, lora, settings
from trainer.after.epochs import rows_of_step
from trainer.checkpoint import Snapshot
from trainer.config import DataConfig, ModelConfig, TrainConfig, TrainerConfig
from trainer.model import initial_weights
from trainer.sample import load_model

MODEL = ModelConfig(
    vocab_size=256, context_length=48, emb_dim=32, n_heads=2, n_layers=2, tie_weights=True, qkv_bias=True
)
QUESTIONS = [("red", "rouge"), ("blue", "bleu"), ("green", "vert"), ("black", "noir"), ("white", "blanc"), ("one", "un"),
             ("two", "deux"), ("cat", "chat"), ("dog", "chien"), ("bread", "pain"), ("milk", "lait"), ("water", "eau")]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model that has seen nothing."""
    folder = tmp_path_factory.mktemp("base")
    config = TrainerConfig(
        DataConfig(["-"], tokenizer="bytes"), MODEL, TrainConfig(1, steps=1, device="cpu", precision="fp32")
    )
    checkpoint.write(folder, Snapshot(1, dict(initial_weights(MODEL, 7)), {}, {}), config)
    return folder / "step-000001"


def lines(path: Path, items: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def translations(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"prompt": list(f"{a} = ".encode()), "response": [*b.encode(), 0]} for a, b in pairs]


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a tuning run's config.json; `train` replaces defaults, other keyword arguments are top-level."""

    def make(kind: str, train: dict[str, Any] | None = None, **top: Any) -> Path:
        rows = {
            "instruction": translations(QUESTIONS),
            "classification": [{"tokens": list((f"{a}!" if i % 2 else f"{b}?").encode()), "label": i % 2} for i, (a, b) in enumerate(QUESTIONS)],
            "preference": [{"prompt": list(f"{a} = ".encode()), "chosen": [*b.encode(), 0], "rejected": [*b.upper().encode(), 0]}
                           for a, b in QUESTIONS],
        }[kind]  # fmt: skip
        document = {
            "base": str(base),
            "data": {"train": [lines(tmp_path / f"{kind}-train.jsonl", rows[:9])], "validation": [lines(tmp_path / f"{kind}-val.jsonl", rows[6:])],
                     "test": [lines(tmp_path / f"{kind}-test.jsonl", rows[9:])], "tokenizer": "bytes", "template": "alpaca"},
            "train": {"epochs": 3, "global_batch_size": 4, "microbatch_size": 2, "learning_rate": 3e-3, "precision": "fp32",
                      "device": "cpu", "log_every": 1, **(train or {})},
            **top,
        }  # fmt: skip
        path = tmp_path / f"{kind}-{len(list(tmp_path.glob('*.json')))}.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        return path

    return make


def tune(module: Any, config: Path, out: Path, *more: str) -> int:
    code: int = module.main(["--config", str(config), "--out", str(out), *more])
    return code


def response_loss(model: Any, rows: list[dict[str, Any]], *, mask: bool = True) -> float:
    """The mean over all tokens that count, one example at a time."""
    total, count = 0.0, 0
    for row in rows:
        whole = torch.tensor([[*row["prompt"], *row["response"]]])
        losses = torch.nn.functional.cross_entropy(
            model.logits(whole[:, :-1])[0], whole[0, 1:], reduction="none"
        )
        kept = losses[len(row["prompt"]) - 1 :] if mask else losses
        total, count = total + float(kept.sum()), count + len(kept)
    return total / count


def test_instruction_tuning_improves_the_validation_loss_and_keeps_the_best_epoch(
    make: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert tune(finetune, make("instruction", {"epochs": 40, "patience": 2, "learning_rate": 6e-3}), out) == 0
    seen = {line["step"]: line["validation_loss"] for line in records(out, "validation")}
    assert seen[0] == pytest.approx(math.log(256), abs=0.1)
    best = min((loss, step) for step, loss in seen.items() if step)
    assert best[0] < 0.6 * seen[0]
    assert checkpoint.linked(out / "checkpoints", "best") == best[1]
    assert status(out)["state"] == "finished"
    # It ended at the second epoch in a row without a lower loss, and not before.
    assert max(seen) == best[1] + 2 * 3 < 40 * 3
    assert [line["step"] for line in records(out, "checkpoint") if line["best"]][-1] == best[1]
    result = json.loads((out / "evaluations.json").read_text())["test_sets"][0]
    assert result["checkpoint_step"] == best[1] and result["name"].startswith("instruction-test-")
    model, config = load_model(out / "checkpoints" / "best")
    assert result["loss"] == pytest.approx(response_loss(model, translations(QUESTIONS[9:])), abs=1e-5)
    assert config.tuned is not None and (config.tuned.kind, config.tuned.template) == (
        "instruction",
        "alpaca",
    )
    assert model.config == replace(MODEL, drop_rate=0.0)


def test_the_loss_counts_the_response_only_unless_told_otherwise(
    make: Any, base: Path, tmp_path: Path
) -> None:
    def by_hand(*, mask: bool) -> float:
        return response_loss(load_model(base)[0], translations(QUESTIONS[6:]), mask=mask)

    for mask in (True, False):
        out = tmp_path / f"mask-{mask}"
        assert tune(finetune, make("instruction", {"epochs": 1}, mask_prompt=mask), out) == 0
        first = records(out, "validation")[0]["validation_loss"]
        assert first == pytest.approx(by_hand(mask=mask), abs=1e-5)
    assert by_hand(mask=True) != pytest.approx(by_hand(mask=False), abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "module"), [("instruction", finetune), ("classification", classify), ("preference", dpo)]
)
@pytest.mark.parametrize("adapters", [None, {"rank": 4, "alpha": 8, "targets": ["query", "value", "up"]}])
def test_an_interrupted_run_carries_on_exactly(
    make: Any, tmp_path: Path, kind: str, module: Any, adapters: Any
) -> None:
    top = {"lora": adapters, **({"classes": ["a", "b"]} if kind == "classification" else {})}
    train = {"epochs": 2, "drop_rate": 0.1, "patience": 9, "learning_rate": 3e-3}
    config = make(kind, train, **top, checkpoint={"every_steps": 1, "every": None, "keep": 100})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert tune(module, config, whole) == 0
    assert tune(module, config, broken) == 0
    for step in (6, 5, 4):  # as if it had been killed in the second epoch
        for path in (broken / "checkpoints" / manifest.directory_name(step)).iterdir():
            path.unlink()
    (broken / "checkpoints" / "best").unlink()
    assert tune(module, config, broken, "--resume") == 0
    assert [line["step"] for line in records(broken, "resume")] == [3]
    for name in ("model.safetensors", "config.json"):
        ours, theirs = (out / "checkpoints" / "step-000006" / name for out in (whole, broken))
        assert ours.read_bytes() == theirs.read_bytes()
    states = [checkpoint.load_state(out / "checkpoints" / "step-000006") for out in (whole, broken)]
    for key, entries in states[0]["optimizer"].items():
        assert all(torch.equal(tensor, states[1]["optimizer"][key][name]) for name, tensor in entries.items())
    assert bool(states[0]["adapters"]) == (adapters is not None)


def test_lora_trains_few_parameters_and_its_checkpoint_is_a_whole_model(
    make: Any, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = make(
        "instruction",
        {"epochs": 8, "learning_rate": 2e-2},
        lora={"rank": 2, "alpha": 4, "targets": ["query", "value"]},
    )
    assert tune(finetune, config, out) == 0
    facts = records(out, "system")[0]
    assert facts["trainable_parameters"] == 2 * 2 * 2 * (32 + 32)  # layers × targets × rank × (in + out)
    seen = [line["validation_loss"] for line in records(out, "validation")]
    assert min(seen) < seen[0] - 0.02
    before, after = bases.load(base).weights, bases.load(out / "checkpoints" / "latest").weights
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"blocks.{i}.attention.{part}.weight" for i in range(2) for part in ("query", "value")}
    gpt = bases.assemble(MODEL, before)
    adapters = lora.Adapters(gpt, settings.LoraConfig(rank=2, alpha=4, targets=["query", "value"]), seed=0)
    adapters.load(out / "checkpoints" / "best" / "adapter.safetensors")
    best = bases.load(out / "checkpoints" / "best").weights
    assert all(torch.equal(tensor[: len(best[name])], best[name]) for name, tensor in lora.plain_weights(gpt))


def test_weights_that_are_not_numbers_end_the_run(make: Any, base: Path, tmp_path: Path) -> None:
    weights = {name: tensor * float("nan") for name, tensor in bases.load(base).weights.items()}
    checkpoint.write(tmp_path, Snapshot(1, weights, {}, {}), bases.load(base).config)
    config = make("instruction", {"epochs": 9, "patience": 99}, base=str(tmp_path / "step-000001"))
    assert tune(finetune, config, tmp_path / "out") == 4
    told = status(tmp_path / "out")
    assert told["reason"] == "non_finite" and "10 steps in a row, up to step 10" in told["message"]
    assert [line["loss"] for line in records(tmp_path / "out", "step")] == [None] * 10


def test_a_classifier_learns_its_classes_and_opens_again(make: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = make(
        "classification",
        {"epochs": 30, "patience": 30, "learning_rate": 1e-2},
        classes=["french", "english"],
        trainable="all",
    )
    assert tune(classify, config, out) == 0
    validations = records(out, "validation")
    assert validations[0]["validation_loss"] == pytest.approx(math.log(2), abs=0.2)
    assert max(line["validation_accuracy"] for line in validations) >= 0.8
    assert records(out, "step")[-1]["accuracy"] == 1.0
    module, saved = classify.load_classifier(out / "checkpoints" / "best")
    assert saved.tuned is not None and saved.tuned.classes == ["french", "english"]
    held = [(list((f"{a}!" if i % 2 else f"{b}?").encode()), i % 2) for i, (a, b) in enumerate(QUESTIONS)][6:]
    chosen = classify.classify(module, [tokens for tokens, _ in held]).argmax(1).tolist()
    best = min(validations[1:], key=lambda line: line["validation_loss"])
    assert sum(a == b for a, (_, b) in zip(chosen, held, strict=True)) / len(held) == pytest.approx(
        best["validation_accuracy"]
    )
    together = classify.classify(module, [tokens for tokens, _ in held])  # of different lengths
    for row, (tokens, _) in zip(together, held, strict=True):
        assert torch.allclose(row, classify.classify(module, [tokens])[0], atol=1e-6)
    with pytest.raises(ValueError, match="has 0 tokens"):
        classify.classify(module, [[]])


def test_only_the_last_block_and_the_head_move_by_default(make: Any, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tune(classify, make("classification", {"epochs": 1}, classes=["a", "b"]), out) == 0
    before, after = bases.load(base).weights, checkpoint.weights(out / "checkpoints" / "latest")
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert {name for name in before if name not in same} == {
        name for name in before if name.startswith(("blocks.1.", "final_norm."))
    }
    assert set(after) - set(before) == {"classifier.weight", "classifier.bias"}


def test_preference_tuning_starts_at_ln_2_and_prefers_the_chosen(
    make: Any, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert (
        tune(dpo, make("preference", {"epochs": 4, "patience": 9, "learning_rate": 2e-3}, beta=0.5), out) == 0
    )
    first, *_, last = records(out, "validation")
    assert first["validation_loss"] == pytest.approx(math.log(2), abs=1e-5) and first[
        "validation_margin"
    ] == pytest.approx(0, abs=1e-4)
    assert last["validation_loss"] < 0.5 * math.log(2) and last["validation_accuracy"] == 1.0
    before, after = (
        load_model(path)[0] for path in (base, out / "checkpoints" / "best")
    )  # a language model as before

    def log_prob(model: Any, question: str, answer: str) -> float:
        whole = torch.tensor([[*f"{question} = ".encode(), *answer.encode(), 0]])
        losses = torch.nn.functional.cross_entropy(
            model.logits(whole[:, :-1])[0], whole[0, 1:], reduction="none"
        )
        return -float(losses[len(f"{question} = ") - 1 :].sum())

    gains = [
        [log_prob(after, a, answer) - log_prob(before, a, answer) for answer in (b, b.upper())]
        for a, b in QUESTIONS[6:]
    ]
    assert all(chosen > rejected for chosen, rejected in gains)
    margin = 0.5 * sum(chosen - rejected for chosen, rejected in gains) / len(gains)
    best = min(records(out, "validation")[1:], key=lambda line: line["validation_loss"])
    assert margin == pytest.approx(best["validation_margin"], rel=1e-3)


def test_the_loss_is_the_same_on_two_processes(make: Any, tmp_path: Path) -> None:
    scripts = {"finetune": finetune, "dpo": dpo}
    configs = {
        name: make(kind, {"epochs": 2, "microbatch_size": 1, "patience": 9})
        for name, kind in (("finetune", "instruction"), ("dpo", "preference"))
    }
    for name, module in scripts.items():
        assert tune(module, configs[name], tmp_path / f"{name}-1") == 0
        words = ["--config", str(configs[name]), "--out", str(tmp_path / f"{name}-2")]
        done = forks.run(f"trainer.after.{name}", words, tmp_path / f"{name}.log", ranks=2)
        assert done.returncode == 0, done.stderr[-2000:]
    for name in scripts:
        for what, key in (("step", "loss"), ("validation", "validation_loss")):
            one, two = (
                [(line["step"], line[key]) for line in records(tmp_path / f"{name}-{n}", what)]
                for n in (1, 2)
            )
            assert [step for step, _ in one] == [step for step, _ in two]
            assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two], abs=1e-4)


def test_the_supervisor_runs_it_and_the_program_reads_what_it_wrote(make: Any, tmp_path: Path) -> None:
    from runs.metrics import State, fold_lines

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(make("instruction", {"epochs": 2, "patience": 9}).read_text())
    argv = [sys.executable, "-m", "trainer.after.finetune", "--config", "config.json", "--out", "."]
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    (run / "job.json").write_text(json.dumps({"token": "t1", "argv": argv, "env": env, "max_restarts": 0}))
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "supervise", "start", "--run", str(run)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + (run / "train.log").read_text()
    told = json.loads((run / "supervisor.json").read_text())
    assert (told["state"], told["reason"], told["step"]) == ("ended", "finished", 6)
    state = fold_lines(State(), (run / "metrics.jsonl").read_bytes().splitlines())
    best = min((line["validation_loss"], line["step"]) for line in records(run, "checkpoint"))
    assert state.bad_lines == 0 and state.best() == best[::-1]
    assert state.summary()["step"] == 6 and state.summary()["parameters"] == sum(
        t.numel() for t in bases.load(run / "checkpoints" / "latest").weights.values()
    )
    assert {item.phase for item in state.intervals} >= {"training", "evaluating"}


def test_an_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    first, second = (
        [row for step in steps for row in rows_of_step(step, 10, 4, 1)]
        for steps in (range(1, 4), range(4, 7))
    )
    for epoch in (first, second):
        assert sorted(row for row in epoch if row is not None) == list(range(10)) and epoch[-2:] == [
            None,
            None,
        ]
    assert first != second and first[:4] == rows_of_step(1, 10, 4, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: is not JSON"),
        ("[1]", "line 3: is no mapping"),
        ('{"prompt": [1]}', "line 3: response must be a list of token numbers"),
        ('{"prompt": [], "response": [1]}', "line 3: prompt must be a list of token numbers, and not empty"),
        (
            '{"prompt": [1], "response": [256]}',
            "line 3: response has token 256, the model's vocabulary has 256",
        ),
        ('{"prompt": [1, true], "response": [1]}', "line 3: prompt must be"),
        (json.dumps({"prompt": [1] * 60, "response": [2]}), "line 3: the prompt's 60 tokens leave no room"),
    ],
)
def test_a_bad_example_is_named_with_its_line(make: Any, tmp_path: Path, line: str, message: str) -> None:
    config = make("instruction")
    train = tmp_path / "instruction-train.jsonl"
    good = train.read_text().splitlines()
    train.write_text("\n".join([*good[:2], line, *good[2:]]))
    assert tune(finetune, config, tmp_path / "out") == 3
    told = status(tmp_path / "out")
    assert told["state"] == "failed" and told["reason"] == "data" and f"{train}, {message}" in told["message"]
    assert not list((tmp_path / "out").glob("checkpoints/step-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "/nowhere"}, "base: /nowhere is no directory"),
        ({"lora": {"rank": 4, "targets": ["nothing"]}}, "lora.targets: 'nothing' is none of query"),
        ({"lora": {"rank": 0}}, "lora.rank: must be at least 1"),
        ({"lorra": {}}, "lorra: is not a field of FinetuneConfig"),
        (
            {"train": {"device": "cpu", "global_batch_size": 4, "microbatch_size": 3}},
            "train.microbatch_size: 3 does not divide",
        ),
    ],
)
def test_a_bad_configuration_names_its_field(
    make: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = make("instruction")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert tune(finetune, path, tmp_path / "out") == 3
    assert status(tmp_path / "out")["message"].startswith(message)


def test_a_context_longer_than_trained_is_refused(make: Any, tmp_path: Path) -> None:
    path = make("instruction")
    document = json.loads(path.read_text())
    document["data"]["max_length"] = 64
    path.write_text(json.dumps(document))
    assert tune(finetune, path, tmp_path / "out") == 3
    assert (
        status(tmp_path / "out")["message"]
        == "data.max_length: 64 tokens, but the base model's context is 48"
    )


def test_a_stop_is_checkpointed_and_carried_on_from(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out, report = make("instruction", {"epochs": 2, "patience": 9}), tmp_path / "out", epochs._report

    def asked_to_stop(session: Any, record: dict[str, Any]) -> None:
        report(session, record)
        if record["step"] == 2:
            (out / "stop").touch()  # what the supervisor leaves
            assert session.status.stop.wait(30)  # the heartbeat finds it

    monkeypatch.setattr(epochs, "_report", asked_to_stop)
    assert tune(finetune, config, out) == 0
    told = status(out)
    assert (told["state"], told["step"], told["checkpoint_step"]) == ("stopped", 2, 2)
    assert checkpoint.linked(out / "checkpoints", "latest") == 2 and not (out / "stop").exists()
    assert tune(finetune, config, tmp_path / "out") == 3  # without --resume nothing is overwritten
    monkeypatch.undo()
    assert tune(finetune, config, out, "--resume") == 0
    assert (status(out)["state"], status(out)["step"]) == ("finished", 6)
    assert [line["step"] for line in records(out, "step")] == [1, 2, 3, 4, 5, 6]


def test_examples_that_are_too_long_lose_their_end() -> None:
    limits = examples.Limits(vocab_size=10, max_length=4)
    item = examples.answered({"prompt": [1, 2], "response": [3, 4, 5, 6, 7]}, limits)
    assert item.response == (3, 4, 5) and limits.cut == 1
