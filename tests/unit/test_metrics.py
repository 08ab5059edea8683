"""metrics.jsonl: each step once, and each second in the phase that had it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runs.metrics import Interval, Mirror, State, fold_lines
from runs.series import series

BEGIN = 1_790_000_000.0


def line(kind: str, step: int, time: float, **more: Any) -> bytes:
    return json.dumps(
        {"kind": kind, "step": step, "tokens": step * 100, "time": BEGIN + time, **more}
    ).encode()


def a_step(step: int, time: float, seconds: float = 1.0, **more: Any) -> bytes:
    return line("step", step, time, **{"loss": 10.0 - step, "step_seconds": seconds, "tokens_per_second": 100 / seconds, **more})  # fmt: skip


def system(time: float, **more: Any) -> bytes:
    return line("system", 0, time, **{"world_size": 2, "torch": "2.13.0", "tokens_per_epoch": 1000, **more})


def fold(*lines: bytes, offset: float = 0.0) -> State:
    return fold_lines(State(), lines, offset)


def phases(state: State) -> list[tuple[str, float, float]]:
    return [
        (item.phase, round(item.start - BEGIN, 3), round(item.end - BEGIN, 3)) for item in state.intervals
    ]


def test_the_summary_of_a_run() -> None:
    steps = [a_step(n, n, seconds=9.0 if n == 1 else 1.0, memory_gib=n / 10, mfu=0.4) for n in range(1, 151)]
    summary = fold(
        system(-9), *steps, line("checkpoint", 150, 151, sha256="ab", validation_loss=3.5, best=True)
    ).summary()
    assert (summary["step"], summary["tokens"], summary["highest_step"]) == (150, 15_000, 150)
    assert summary["epochs"] == 15
    assert summary["loss"] == -140
    assert summary["train_loss"] == pytest.approx(10 - sum(range(51, 151)) / 100)
    assert (summary["step_seconds"], summary["tokens_per_second"], summary["mfu"]) == (1.0, 100.0, 0.4)
    assert summary["memory_gib"] == 15.0
    assert (summary["validation_loss"], summary["best_step"]) == (3.5, 150)
    assert (summary["world_size"], summary["versions"]) == (2, {"torch": "2.13.0"})


def test_nothing_is_nothing_and_never_zero() -> None:
    summary = State().summary()
    assert [
        summary[key]
        for key in ("loss", "train_loss", "validation_loss", "tokens_per_second", "mfu", "epochs")
    ] == [None] * 6
    only_nan = fold(a_step(1, 1, loss=None), line("validation", 1, 2, validation_loss=None)).summary()
    assert (only_nan["loss"], only_nan["train_loss"], only_nan["validation_loss"]) == (None, None, None)


def test_the_validation_loss_is_that_of_a_saved_checkpoint() -> None:
    state = fold(
        a_step(1, 1), line("validation", 1, 2, validation_loss=2.0),
        line("checkpoint", 1, 3, validation_loss=4.0), line("checkpoint", 2, 4, validation_loss=3.0),
        line("checkpoint", 3, 5, validation_loss=3.5), line("checkpoint", 4, 6, validation_loss=None),
    )  # fmt: skip
    assert state.summary()["validation_loss"] == 3.0
    assert state.summary()["best_step"] == 2
    assert state.validations == {1: 2.0}


def test_steps_that_are_made_again_count_once_and_the_later_writing_wins() -> None:
    state = fold(*[a_step(n, n) for n in range(1, 9)], line("checkpoint", 4, 8.1, validation_loss=1.0),
                 line("checkpoint", 8, 8.2, validation_loss=0.5))  # fmt: skip
    fold_lines(state, [line("resume", 4, 20)])
    assert state.summary()["tokens"] == 400
    assert state.summary()["validation_loss"] == 1.0
    fold_lines(state, [a_step(n, 20 + n, loss=5.0) for n in range(5, 7)])
    summary = state.summary()
    assert (summary["step"], summary["highest_step"], summary["restarts"]) == (6, 8, 1)
    assert summary["train_loss"] == pytest.approx((9 + 8 + 7 + 6 + 5 + 5) / 6)


def test_time_is_divided_into_phases() -> None:
    lines = [
        system(10),
        a_step(1, 25, seconds=5),
    ]  # 9 of these 5 + 10 seconds of start and compiling are not training
    lines += [a_step(n, 24 + n) for n in range(2, 11)]  # until 34
    lines += [line("validation", 10, 37, seconds=2.5, validation_loss=3.0)]
    lines += [a_step(n, 27 + n) for n in range(11, 21)]  # until 47
    lines += [system(60), line("resume", 15, 60)]
    lines += [a_step(16, 65, seconds=3)] + [a_step(n, 49 + n) for n in range(17, 26)]
    lines += [line("system", 25, 80, peak_memory_gib=2.0)]
    assert phases(fold(*lines)) == [
        ("preparing", 10, 24), ("training", 24, 34), ("evaluating", 34.5, 37), ("training", 37, 47),
        ("preparing", 60, 64), ("redone", 64, 69), ("training", 69, 74), ("evaluating", 74, 80),
    ]  # fmt: skip


def test_the_nodes_clock_is_set_right() -> None:
    state = fold(*[a_step(n, n) for n in range(1, 8)], offset=-100)
    assert phases(state) == [("training", -100, -93)]
    assert state.time == BEGIN - 93


def test_a_run_too_short_for_a_median_is_settled_by_its_checkpoint() -> None:
    state = fold(system(0), a_step(1, 10, seconds=4))
    assert state.intervals == []
    fold_lines(state, [line("checkpoint", 1, 11)])
    assert phases(state) == [("preparing", 0, 6), ("training", 6, 10)]


def test_a_long_gap_stays_a_gap_and_a_short_one_is_closed() -> None:
    lines = [a_step(n, n + (0.1 if n > 5 else 0)) for n in range(1, 9)] + [a_step(9, 20), a_step(10, 21)]
    assert phases(fold(*lines)) == [("training", 0, 8.1), ("training", 19, 21)]


@pytest.mark.parametrize(
    "foreign",
    [b"", b"{", b"3", b"[]", b"null", b'{"kind": "step"}', b'{"kind": "step", "step": "1", "time": 1}', b"\xff\xfe",
     b'{"kind": "dance", "step": 1, "time": 1}', b'{"kind": "step", "step": 1, "time": NaN}'],
)  # fmt: skip
def test_a_foreign_line_changes_nothing(foreign: bytes) -> None:
    steps = [a_step(n, n) for n in range(1, 9)]
    state = fold(*steps[:4], foreign, *steps[4:])
    assert state.bad_lines == bool(foreign)
    assert state.summary() == fold(*steps).summary()
    assert state.intervals == fold(*steps).intervals


def test_a_torn_line_does_not_take_the_next_with_it(tmp_path: Path) -> None:
    torn = a_step(5, 5)[:31] + line("resume", 4, 6)
    state = fold(*[a_step(n, n) for n in range(1, 5)], torn, a_step(5, 7))
    assert (state.step, state.restarts) == (5, 1)
    mirror = Mirror(tmp_path / "metrics.jsonl")
    mirror.write([a_step(4, 4), torn, a_step(5, 7)])
    kept = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(item["kind"], item["step"]) for item in kept] == [("step", 4), ("resume", 4), ("step", 5)]


def a_history(rng: random.Random) -> list[bytes]:
    """A run with kills at random steps, validations, late checkpoint lines and torn lines."""
    lines, step, clock = [system(0)], 0, 0.0
    saved = 0
    for _ in range(rng.randint(1, 4)):
        for _ in range(rng.randint(0, 12)):
            step += 1
            clock += 1
            lines.append(a_step(step, clock, loss=rng.random()))
            if step % 4 == 0:
                lines.append(line("validation", step, clock + 0.5, seconds=0.5, validation_loss=rng.random()))
                clock += 1
                saved = step
            if step == saved + 1 and saved:
                lines.append(line("checkpoint", saved, clock, validation_loss=rng.random()))
        if rng.random() < 0.5:
            lines.append(a_step(step + 1, clock)[: rng.randint(1, 60)])
        step, clock = saved, clock + 20
        lines += [system(clock), line("resume", step, clock)]
    return lines


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9))
def test_however_the_lines_arrive_the_fold_is_the_same(seed: int) -> None:
    rng = random.Random(seed)
    lines = a_history(rng)
    whole, pieces, at = fold(*lines), State(), 0
    given_out: list[Interval] = []
    while at < len(lines):
        size = rng.randint(1, 5)
        fold_lines(pieces, lines[at : at + size])
        at += size
        assert (
            pieces.intervals[: max(0, len(given_out) - 1)] == given_out[:-1]
        )  # only the last one may still grow
        given_out = list(pieces.intervals)
    assert pieces == whole
    assert all(a.end <= b.start for a, b in zip(whole.intervals, whole.intervals[1:], strict=False))
    assert all(item.start < item.end for item in whole.intervals)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9))
def test_the_mirror_has_each_step_once_in_order(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    lines = a_history(rng)
    path = tmp_path_factory.mktemp("mirror") / "metrics.jsonl"
    path.write_text("what an earlier driver left\n")
    mirror, at = Mirror(path), 0
    while at < len(lines):
        size = rng.randint(1, 5)
        mirror.write(lines[at : at + size])
        at += size
    kept = [json.loads(text) for text in path.read_text().splitlines()]
    steps = [item for item in kept if item["kind"] == "step"]
    assert [item["step"] for item in steps] == list(range(1, len(steps) + 1))
    state = fold(*lines)
    assert len(steps) == state.step
    last = {}
    for text in lines:
        try:
            item = json.loads(text)
        except ValueError:
            continue
        last[item["kind"], item["step"]] = item
    assert all(item == last["step", item["step"]] for item in steps)
    for kind, known in (("validation", state.validations), ("checkpoint", state.checkpoints)):
        assert [item["step"] for item in kept if item["kind"] == kind] == list(known)


def test_a_series_has_few_points_and_the_right_shape(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(
        a_step(n, n, loss=100 / n if n % 7 else None) + (b"\n" + line("validation", n, n, validation_loss=n) if n % 5000 == 0 else b"")
        for n in range(1, 20_001)
    ) + b"\n")  # fmt: skip
    loss = series(path, "loss", points=50)
    assert 45 <= len(loss.values) <= 50
    assert loss.steps == sorted(loss.steps)
    assert loss.steps[-1] > 19_000
    for step, tokens, value in list(zip(loss.steps, loss.tokens, loss.values, strict=True))[1:]:
        assert tokens == step * 100
        assert value == pytest.approx(100 / step, rel=0.05)
    assert series(path, "validation_loss").values == [5000, 10_000, 15_000, 20_000]


def test_a_short_series_is_complete_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(system(0) + b"\n" + b"\n".join(a_step(n, n) for n in range(1, 11)))
    assert series(path, "loss").values == [10.0 - n for n in range(1, 11)]
    assert series(path, "mfu").values == []
    assert series(tmp_path / "none").steps == []
