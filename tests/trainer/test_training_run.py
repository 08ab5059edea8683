"""A whole run in this process: what it reads, writes, keeps, refuses, and how it ends."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.conftest import MODEL, losses, poison, records, status
from trainer import cache, checkpoint, evaluate, loop, manifest
from trainer.batches import Reader
from trainer.config import CheckpointConfig
from trainer.reading import load
from trainer.session import can_compile
from trainer.shards import Order, probe, write_bin

MakeConfig = Callable[..., Path]


def train(config: Path, out: Path, *, resume: bool = False) -> int:
    return loop.run(config, out, resume=resume)


def test_a_run_from_end_to_end(
    make_config: MakeConfig, tmp_path: Path, token_shards: dict[str, Path]
) -> None:
    test_set = {
        "name": "slice",
        "data": [str(token_shards["held-out"])],
        "offset": 50,
        "tokens": 777,
        "bytes": 777,
    }
    out = tmp_path / "out"
    config = make_config(
        train={"steps": 30}, evaluate={"test_sets": [test_set], "prompt_tokens": [[100, 101, 102]]}
    )
    assert train(config, out) == 0
    steps = records(out, "step")
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert [line["tokens"] for line in steps] == [8 * 32 * n for n in range(1, 31)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert steps[0]["learning_rate"] == pytest.approx(1e-3)
    assert steps[0]["mfu"] is None
    assert all(a["time"] <= b["time"] for a, b in pairwise(steps))
    assert status(out)["state"] == "finished"
    assert status(out)["step"] == status(out)["steps"] == 30
    evaluations = json.loads((out / "evaluations.json").read_text())
    best = (out / "checkpoints" / "best").readlink().name
    found = evaluations["test_sets"][0]
    assert manifest.directory_name(found["checkpoint_step"]) == best
    assert found["tokens"] == 777
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert len(evaluations["samples"][0]["tokens"]) == evaluate.SAMPLE_TOKENS
    system = records(out, "system")[0]
    assert system["world_size"] == 1
    assert system["microbatch_size"] == 4
    assert system["torch"] == torch.__version__


def test_the_microbatch_changes_memory_and_not_the_loss(make_config: MakeConfig, tmp_path: Path) -> None:
    for size in (1, 4, 8):
        assert train(make_config(train={"microbatch_size": size}), tmp_path / str(size)) == 0
    reference = losses(tmp_path / "8")
    for size in (1, 4):
        assert losses(tmp_path / str(size)) == pytest.approx(reference, abs=2e-5)


def test_each_step_reads_what_its_number_says(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_shards: dict[str, Path]
) -> None:
    seen: list[Any] = []
    original = Reader.read

    def read(self: Reader, sequences: Any, into: Any) -> None:
        original(self, sequences, into)
        if self.paths[0] == token_shards["first"]:
            seen.extend(into.copy())

    monkeypatch.setattr(Reader, "read", read)
    assert (
        train(make_config(train={"steps": 5, "global_batch_size": 6, "microbatch_size": 3}), tmp_path / "out")
        == 0
    )
    tokens = {
        index: np.fromfile(token_shards[name], dtype="<u2", offset=1024)
        for index, name in enumerate(("first", "second"))
    }
    order = Order([len(part) for part in tokens.values()], 32)
    for number, row in enumerate(seen[:30]):
        shard, start = order.locate(number)
        assert np.array_equal(row, tokens[shard][start : start + 33])


def test_tokens_beyond_the_data_begin_it_again(make_config: MakeConfig, tmp_path: Path, text: bytes) -> None:
    write_bin(tmp_path / "small.bin", list(text[: 32 * 10 + 1]))
    config = make_config(
        data={"train": [str(tmp_path / "small.bin")], "validation": []},
        train={"steps": 40, "global_batch_size": 5, "microbatch_size": 5},
    )
    assert train(config, tmp_path / "out") == 0
    assert records(tmp_path / "out", "system")[0]["tokens_per_epoch"] == 320
    assert losses(tmp_path / "out")[40] < losses(tmp_path / "out")[2]


def test_checkpoints_are_whole_and_as_promised(make_config: MakeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train(make_config(train={"steps": 22}, checkpoint={"every_steps": 5}), out) == 0
    lines = records(out, "checkpoint")
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 12, 15, 16, 20, 22]
    validated = {line["step"]: line["validation_loss"] for line in records(out, "validation")}
    assert {line["step"]: line["validation_loss"] for line in lines if line["validation_loss"]} == validated
    assert [line["step"] for line in lines if line["best"]] == [4, 8, 12, 16, 20, 22]
    directory = out / "checkpoints"
    assert checkpoint.steps(directory) == [20, 22]
    latest = directory / "latest"
    assert manifest.verify(latest) == []
    assert lines[-1]["sha256"] == manifest.digest(latest)
    assert lines[-1]["bytes"] == sum(
        path.stat().st_size for path in latest.iterdir() if path.name != manifest.NAME
    )
    assert {path.name for path in latest.iterdir()} == {
        "model.safetensors",
        "training_state.pt",
        "config.json",
        "manifest.json",
    }
    names = set(checkpoint.weights(latest))
    assert "token_embedding.weight" in names
    assert not any(name.startswith("module.") or "_orig_mod" in name for name in names)
    assert checkpoint.load_state(latest)["step"] == 22


def test_the_best_checkpoint_stays(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation losses that rise after the second: its checkpoint outlives `keep`."""
    from trainer.evaluate import Loss

    values = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(loop, "mean_loss", lambda *args, **kwargs: Loss(next(values), 100))
    out = tmp_path / "out"
    assert train(make_config(train={"steps": 20}), out) == 0
    assert checkpoint.steps(out / "checkpoints") == [8, 16, 20]
    assert checkpoint.linked(out / "checkpoints", "best") == 8
    assert checkpoint.linked(out / "checkpoints", "latest") == 20
    assert [line["step"] for line in records(out, "checkpoint") if line["best"]] == [4, 8]


def test_what_is_to_be_fetched_stays_while_there_is_room(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `fetch: all`, `keep` lets go of what is safe elsewhere; of the rest, the oldest first, only for want of room."""
    folder = tmp_path / "out" / "checkpoints"
    assert train(make_config(train={"steps": 20}, checkpoint={"fetch": "all"}), tmp_path / "out") == 0
    assert checkpoint.steps(folder) == [4, 8, 12, 16, 20]
    rules = CheckpointConfig(keep=2, fetch="all")
    (folder / manifest.FETCHED).write_text(manifest.digest(folder / manifest.directory_name(8)))
    checkpoint.retain(folder, rules)
    assert checkpoint.steps(folder) == [4, 12, 16, 20]
    size = manifest.read(folder / "latest").bytes
    full = iter([(0, 0, checkpoint.ROOM * size - 1), (0, 0, checkpoint.ROOM * size)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(*next(full)))
    checkpoint.retain(folder, rules)
    assert checkpoint.steps(folder) == [12, 16, 20]
    checkpoint.retain(folder, CheckpointConfig(keep=2))
    assert checkpoint.steps(folder) == [16, 20]


def test_a_resumed_run_is_the_uninterrupted_one(make_config: MakeConfig, tmp_path: Path) -> None:
    model = {"drop_rate": 0.1}
    assert train(make_config(train={"steps": 20}, model=model), tmp_path / "whole") == 0
    half = tmp_path / "half"
    assert train(make_config(train={"steps": 20}, model=model), half) == 0
    for path in sorted((half / "checkpoints").glob("step-*"))[1:]:
        (path / "model.safetensors").write_bytes(b"torn")
    first = checkpoint.newest_whole(half / "checkpoints", lambda text: None)
    assert first is not None
    assert first.name == "step-000016"
    assert train(make_config(train={"steps": 20}, model=model), half, resume=True) == 0
    assert records(half, "resume") == [{
        "kind": "resume", "step": 16, "time": records(half, "resume")[0]["time"], "world_size": 1, "microbatch_size": 4, "from_world_size": 1,
    }]  # fmt: skip
    assert losses(half) == losses(tmp_path / "whole")
    for name in ("model.safetensors", "training_state.pt"):
        assert (half / "checkpoints/latest" / name).read_bytes() == (
            tmp_path / "whole/checkpoints/latest" / name
        ).read_bytes()


def test_with_no_checkpoint_a_resumed_run_begins(make_config: MakeConfig, tmp_path: Path) -> None:
    assert train(make_config(), tmp_path / "out", resume=True) == 0
    assert len(records(tmp_path / "out", "step")) == 12


def test_an_existing_run_is_not_overwritten(make_config: MakeConfig, tmp_path: Path) -> None:
    assert train(make_config(), tmp_path / "out") == 0
    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    assert train(make_config(), tmp_path / "out") == 3
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before
    assert "--resume" in status(tmp_path / "out")["message"]


def test_a_torn_last_line_is_ended(make_config: MakeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train(make_config(), out) == 0
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    assert train(make_config(train={"steps": 14}), out, resume=True) == 0
    broken = [line for line in (out / "metrics.jsonl").read_text().splitlines() if not line.endswith("}")]
    assert broken == ['{"kind": "st']
    assert sorted(losses(out)) == list(range(1, 15))


def test_a_step_that_is_not_finite_is_skipped_and_shown(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {5, 6})
    out = tmp_path / "out"
    assert train(make_config(), out) == 0
    lines = {line["step"]: line for line in records(out, "step")}
    assert [step for step, line in lines.items() if line.get("skipped")] == [5, 6]
    assert lines[5]["loss"] is None
    assert lines[5]["grad_norm"] is None
    assert lines[12]["loss"] < lines[4]["loss"]
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_too_many_of_them_end_the_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(6, 100)))
    out = tmp_path / "out"
    assert train(make_config(train={"steps": 40}, data={"validation": []}), out) == 4
    assert status(out)["reason"] == "non_finite"
    assert max(losses(out)) == 5 + loop.SKIPPED_IN_A_ROW
    latest = out / "checkpoints/latest"
    assert manifest.verify(latest) == []
    assert all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint.weights(latest).values())


def test_bad_input_is_refused_in_one_sentence(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.bin").write_bytes(b"abc")
    cases: list[tuple[dict[str, dict[str, Any]], str, str]] = [
        ({"train": {"microbatch_size": 3}}, "config", "train.microbatch_size"),
        ({"model": {"context_length": 100_000}}, "config", "model.context_length"),
        ({"data": {"train": [str(tmp_path / "cut.bin")]}}, "data", "cut.bin at byte 2"),
        ({"data": {"train": [str(tmp_path / "missing.bin")]}}, "data", "missing.bin"),
        ({"data": {"validation": [str(tmp_path / "cut.bin")]}}, "data", "cut.bin"),
        ({"model": {"vocab_size": 100}}, "data", "token"),
        ({"train": {"learning_rate": -1}}, "config", "train.learning_rate"),
        ({"evaluate": {"test_sets": ["fineweb-gpjt"]}}, "config", "fineweb-gpjt"),
    ]
    for index, (changes, reason, word) in enumerate(cases):
        out = tmp_path / f"out-{index}"
        assert train(make_config(**changes), out) == 3, changes
        assert status(out)["state"] == "failed"
        assert status(out)["reason"] == reason
        assert word in status(out)["message"]
        assert word in capfd.readouterr().err


def test_another_model_s_checkpoint_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    assert train(make_config(), tmp_path / "out") == 0
    assert train(make_config(model={"n_layers": 3}), tmp_path / "out", resume=True) == 3
    assert "model.n_layers" in status(tmp_path / "out")["message"]


def test_a_device_that_is_not_here_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert train(make_config(train={"device": "cuda"}), tmp_path / "out") == 3
    assert "train.device" in status(tmp_path / "out")["message"]


def test_a_stop_ends_with_a_checkpoint_and_can_be_resumed(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original = loop._one_step

    def one_step(run: Any, batches: Any) -> None:
        original(run, batches)
        if run.step == 6:
            (out / "stop").touch()
            assert run.status.stop.wait(10)

    monkeypatch.setattr(loop, "_one_step", one_step)
    assert train(make_config(), out) == 0
    assert status(out)["state"] == "stopped"
    stopped_at = checkpoint.linked(out / "checkpoints", "latest")
    assert stopped_at in {7, 8}  # acted on one step late
    assert not (out / "stop").exists()
    monkeypatch.undo()
    assert train(make_config(), out, resume=True) == 0
    assert status(out)["state"] == "finished"
    assert train(make_config(), tmp_path / "whole") == 0
    assert losses(out) == losses(tmp_path / "whole")


def test_training_begins_with_the_first_shard_and_waits_for_the_next(
    make_config: MakeConfig, tmp_path: Path, token_shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    late, out = tmp_path / "late.bin", tmp_path / "out"
    write_bin(tmp_path / "early.bin", list(range(200)) * 4)  # 24 sequences: three steps
    config = make_config(
        data={
            "train": [str(tmp_path / "early.bin"), str(late)],
            "train_tokens": [800, probe(token_shards["second"]).tokens],
        }
    )
    said: list[dict[str, Any]] = []
    waited = threading.Event()
    original = loop.Run.tell

    def tell(self: loop.Run, **fields: Any) -> None:
        original(self, **fields)
        said.append({**fields, "at": self.step})
        if fields.get("state") == "waiting_for_data":
            waited.set()

    monkeypatch.setattr(loop.Run, "tell", tell)

    def arrive() -> None:
        assert waited.wait(30)
        (tmp_path / "late.tmp").write_bytes(token_shards["second"].read_bytes())
        (tmp_path / "late.tmp").rename(late)

    thread = threading.Thread(target=arrive)
    thread.start()
    assert train(config, out) == 0
    thread.join()
    waiting = [item for item in said if item.get("state") == "waiting_for_data"]
    assert waiting[0]["at"] == 3
    assert str(late) in waiting[0]["message"]
    assert sorted(losses(out)) == list(range(1, 13))


def test_the_chosen_microbatch_fits_the_share(make_config: MakeConfig, tmp_path: Path) -> None:
    assert train(make_config(train={"microbatch_size": "auto"}), tmp_path / "out") == 0
    assert records(tmp_path / "out", "system")[0]["microbatch_size"] == 8


def test_muon_and_all_switches_train(make_config: MakeConfig, tmp_path: Path) -> None:
    model = {"norm": "rms", "activation": "relu2", "position": "rope", "rotary_fraction": 0.5, "qk_norm": True,
             "logit_softcap": 15.0, "init": "zero_proj"}  # fmt: skip
    config = make_config(model=model, train={"optimizer": "muon", "schedule": "wsd", "steps": 30})
    assert train(config, tmp_path / "out") == 0
    found = losses(tmp_path / "out")
    assert found[30] < found[1] - 1
    assert (
        train(
            make_config(model=model, train={"optimizer": "muon", "schedule": "wsd", "steps": 30}),
            tmp_path / "again",
        )
        == 0
    )
    assert losses(tmp_path / "again") == found
    assert MODEL["n_heads"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.harness)])
def test_compiled_blocks_change_no_loss(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Graphs are captured and differentiated in any case; what takes a C++ compiler half a minute is part of `make faults`."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = make_config(train={"steps": 6, "compile": True})
    assert train(make_config(train={"steps": 6}), tmp_path / "eager") == 0
    assert train(compiled, tmp_path / "compiled") == 0
    here = can_compile(torch.device("cpu"))
    assert records(tmp_path / "compiled", "system")[0]["compile"] is here
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) is here
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-4)
    if backend == "inductor" and here:
        entry = cache.key(load(compiled), torch.device("cpu"), 1)
        assert cache.load_compiled(entry), "the next run starts with this one's code"
