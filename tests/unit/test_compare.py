"""Loss against dollars: nothing mixed up, nothing made up."""

from __future__ import annotations

import json
import math
import random
import statistics
from typing import Any

import pytest

from runs.compare import (
    COLUMNS,
    Entry,
    Noise,
    as_good_as_best,
    entry,
    grouped,
    noise,
    pareto,
    published,
    rows,
    sort_rows,
    totals,
    within_noise,
)
from runs.difference import diff


def summary(name: str = "a", **changes: Any) -> dict[str, Any]:
    """A stored projection row of a finished run: 2 h billed at $10."""
    node = {
        "billing_from": None,
        "micro_usd": 20_000_000,
        "usd_per_hour": 10.0,
        "granularity_seconds": 60,
        "minimum_seconds": 0,
    }
    return {
        "run": f"{name}-abcd", "name": name, "state": "succeeded", "provider": "lambda", "instance_type": "gpu_8x_a100",
        "gpu": "A100-40GB", "gpus": 8, "parameters": 163_009_536, "tokens": 2_000_000_000, "global_batch_size": 104,
        "microbatch_size": 13, "train_loss": 3.6, "validation_loss": 3.7, "validation_set": "validation-1",
        "tokens_per_second": 400_000.0, "mfu": 0.4, "training_seconds": 5400.0, "billed_seconds": 7200.0,
        "training_micro_usd": 15_000_000, "overhead_fraction": 0.25, "started": "2026-11-01T00:00:00+00:00",
        "evaluations": [{"kind": "test_set", "name": "fineweb-gpjt", "loss": 3.65}, {"kind": "sample", "name": "sample 0"}],
        "nodes": [node], "versions": {"torch": "2.13.0"}, "seed": 42, "region": "us-east-1", **changes,
    }  # fmt: skip


def spec(**train: Any) -> dict[str, Any]:
    return {
        "name": "a",
        "data": {"train": ["x"], "tokenizer": "gpt2"},
        "train": {"seed": 1, "learning_rate": 4e-4, **train},
    }


def a_row(**values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(COLUMNS), "source": "run", "train_set": None, **values}


def test_a_row_has_the_public_keys_and_the_arithmetic_of_the_bill() -> None:
    (row,) = rows([entry(summary())])
    assert set(COLUMNS) <= set(row)
    assert (row["source"], row["test_loss"], row["test_set"]) == ("run", 3.65, "fineweb-gpjt")
    assert (row["training_hours"], row["billed_hours"]) == (1.5, 2.0)
    assert (row["training_usd"], row["cost_usd"]) == (15.0, 20.0)
    assert row["cost_usd"] == pytest.approx(row["billed_hours"] * 10)
    assert row["usd_per_billion_tokens"] == 10.0


def test_a_living_node_costs_what_it_costs_now() -> None:
    living = {
        "billing_from": 1000.0,
        "micro_usd": 0,
        "usd_per_hour": 3600.0,
        "granularity_seconds": 1,
        "minimum_seconds": 0,
    }
    assert entry(summary(nodes=[living]), now=1060.0).row["cost_usd"] == 60.0


@pytest.mark.parametrize(
    "broken",
    [{}, {"name": "x"}, {"nodes": [{}]}, {"nodes": 3}, {"evaluations": [3, {"kind": "test_set"}]}, {"evaluations": None},
     {"validation_loss": math.nan, "tokens_per_second": math.inf}, {"tokens": 0}, {"tokens": "many"}],
)  # fmt: skip
def test_a_broken_or_unfinished_record_is_shown_with_gaps(broken: dict[str, Any]) -> None:
    values = {**(summary() if broken and "name" not in broken else {}), **broken}
    items = rows([entry(values), entry(summary())])
    for key in ("cost_usd", "validation_loss", "name", "tokens"):
        assert len(sort_rows(items, key)) == 2
    json.dumps(items, allow_nan=False)
    assert items[0]["usd_per_billion_tokens"] != 0
    assert totals(items)["runs"] == 2


def test_hellaswag_and_the_judge_have_columns_and_their_sets() -> None:
    """As measured last; a score is ranked only beside those of its panel."""
    graded = [
        {"kind": "judge", "name": f"judge m {panel}", "score": score}
        for panel, score in (("old", 90.0), ("new", 40.0))
    ]
    choice = {"kind": "hellaswag", "name": "hellaswag-1", "accuracy": 0.3, "accuracy_normalised": 0.31}
    (row,) = rows([entry(summary(evaluations=[choice, *graded]))])
    assert (row["hellaswag"], row["hellaswag_set"]) == (0.31, "hellaswag-1")
    assert (row["judge_score"], row["judge_panel"]) == (40.0, "judge m new")
    items = [a_row(name=name, judge_score=score, judge_panel=panel) for name, score, panel in
             (("a", 9.0, "x"), ("b", 50.0, "y"), ("c", 20.0, "y"), ("d", 30.0, "y"))]  # fmt: skip
    assert [item["name"] for item in sort_rows(items, "judge_score", descending=True)] == ["b", "d", "c", "a"]
    same, other = (entry(summary(evaluations=[item])) for item in graded)
    notes = {item.key: item.note for item in diff(same, other)}
    assert notes["judge_score"] == "not comparable: measured on different sets"
    assert {item.row["judge_panel"] for item in published() if item.row["judge_score"]} == {
        "gilesthomas.com, part 30"
    }


def test_no_runs_at_all() -> None:
    assert (rows([]), sort_rows([], "cost_usd"), pareto([]), grouped([], "gpu")) == ([], [], [], [])
    assert totals([]) == {
        "runs": 0,
        "cost_usd": None,
        "training_usd": None,
        "billed_hours": None,
        "training_hours": None,
        "tokens": None,
    }


def test_missing_values_come_last_in_either_direction() -> None:
    items = [
        a_row(name="b", cost_usd=2),
        a_row(name="none"),
        a_row(name="a", cost_usd=1),
        a_row(name="nan", cost_usd=math.nan),
    ]
    assert [item["name"] for item in sort_rows(items, "cost_usd")] == ["a", "b", "none", "nan"]
    assert [item["name"] for item in sort_rows(items, "cost_usd", descending=True)] == [
        "b",
        "a",
        "none",
        "nan",
    ]
    assert [item["name"] for item in sort_rows(items, "name")] == ["a", "b", "nan", "none"]
    with pytest.raises(KeyError, match="there is no column loss"):
        sort_rows(items, "loss")


@pytest.mark.parametrize(
    ("loss", "of"),
    [("validation_loss", "validation_set"), ("test_loss", "test_set"), ("train_loss", "train_set")],
)
def test_losses_on_different_sets_are_never_ranked_together(loss: str, of: str) -> None:
    items = [a_row(name=str(n), **{loss: value, of: name}) for n, (value, name) in enumerate(
        [(3.0, "hard"), (1.0, "easy"), (2.0, "hard"), (1.5, "easy"), (2.5, "hard"), (None, None)])]  # fmt: skip
    assert [item["name"] for item in sort_rows(items, loss)] == ["2", "4", "0", "1", "3", "5"]
    assert [item["name"] for item in sort_rows(items, loss, descending=True)] == [
        "0",
        "4",
        "2",
        "3",
        "1",
        "5",
    ]
    assert as_good_as_best(items, loss, {}) == [1, 2]


def test_the_published_rows_keep_their_own_scales() -> None:
    items = rows(published())
    assert {item["source"] for item in items} == {"published"}
    assert {item["test_set"] for item in items} == {"fineweb-gpjt", "fineweb-llmc"}
    small = next(item for item in published() if "small" in item.row["name"])
    assert small.test_losses == {"fineweb-gpjt": 3.500, "fineweb-llmc": 3.4250}
    on_llmc = rows(published(), "fineweb-llmc")
    assert {item["test_set"] for item in on_llmc} == {"fineweb-llmc", None}
    a100 = next(item for item in items if item["name"] == "FineWeb, 8x A100 40 GB")
    assert (a100["cost_usd"], a100["test_loss"]) == (47.35, 3.674)
    assert a100["billed_hours"] == pytest.approx(47.35 / 10.32)
    assert all(item["cost_usd"] is None or item["cost_usd"] > 0 for item in items)
    assert totals(items)["cost_usd"] is None


def test_a_row_takes_the_test_set_that_most_runs_share() -> None:
    both = entry(
        summary(
            evaluations=[{"kind": "test_set", "name": name, "loss": 1.0} for name in ("mine", "fineweb-gpjt")]
        )
    )
    assert rows([both, entry(summary())])[0]["test_set"] == "fineweb-gpjt"
    assert rows([both], "mine")[0]["test_set"] == "mine"
    assert rows([entry(summary())], "mine")[0]["test_loss"] is None


def test_the_pareto_front_is_what_nobody_beats() -> None:
    rng = random.Random(5)
    items = [
        a_row(
            cost_usd=rng.randint(1, 20),
            validation_loss=rng.randint(1, 20) / 4,
            validation_set=rng.choice("ab"),
        )
        for _ in range(60)
    ]
    items.append(a_row(cost_usd=0.5))
    measured = a_row(cost_usd=0.1, validation_loss=0.1, validation_set="a", tokens=0)
    assert len(items) not in pareto([*items, measured])  # it trained nothing: that is not what the loss cost
    front = set(pareto(items))
    for index, item in enumerate(items[:-1]):
        rivals = [
            other
            for other in items[:-1]
            if other["validation_set"] == item["validation_set"] and other is not item
        ]
        beaten = any(
            other["cost_usd"] <= item["cost_usd"] and other["validation_loss"] <= item["validation_loss"]
            and (other["cost_usd"], other["validation_loss"]) != (item["cost_usd"], item["validation_loss"])
            for other in rivals
        )  # fmt: skip
        assert not (index in front and beaten)
        if not beaten:
            twins = {n for n, other in enumerate(items) if (other["cost_usd"], other["validation_loss"], other["validation_set"])
                     == (item["cost_usd"], item["validation_loss"], item["validation_set"])}  # fmt: skip
            assert twins & front
    assert len(items) - 1 not in front


def test_noise_comes_from_repeated_seeds_or_is_given_or_published() -> None:
    losses = {1: 3.70, 2: 3.72, 3: 3.74}
    repeated = [
        entry(summary(f"s{seed}", validation_loss=loss), spec(seed=seed) | {"name": f"s{seed}"})
        for seed, loss in losses.items()
    ]
    other = [entry(summary("o", validation_loss=4.5), spec(learning_rate=1e-3))]
    found = noise(repeated + other, "validation_loss", "validation-1")
    assert found is not None
    assert (found.source, found.sigma) == ("seeds", pytest.approx(statistics.stdev(losses.values())))
    assert noise(repeated, "validation_loss", "validation-1", given=0.5) == Noise(0.5, "given")
    assert noise(other, "validation_loss", "validation-1") is None
    assert noise(repeated, "validation_loss", "validation-2") is None
    assert noise(other, "test_loss", "fineweb-gpjt") == Noise(0.0155, "published")
    marked = as_good_as_best(rows(repeated + other), "validation_loss", {"validation-1": found})
    assert marked == [0, 1, 2]


def test_within_noise_is_19_of_20() -> None:
    rng = random.Random(1)
    outside = sum(not within_noise(rng.gauss(0, 0.1), rng.gauss(0, 0.1), 0.1) for _ in range(20_000))
    assert outside / 20_000 == pytest.approx(0.05, abs=0.006)
    assert not within_noise(1.0, 1.1, 0.0)


def test_groups_have_mean_and_spread() -> None:
    items = [entry(summary(f"r{n}", validation_loss=3 + n, validation_set="v"), spec(learning_rate=rate, seed=n))
             for n, rate in enumerate([1e-3, 1e-3, 4e-4])]  # fmt: skip
    by_rate = {item["train.learning_rate"]: item for item in grouped(items, "train.learning_rate")}
    assert by_rate[1e-3]["runs"] == 2
    assert (by_rate[1e-3]["validation_loss"], by_rate[1e-3]["validation_set"]) == (3.5, "v")
    assert by_rate[1e-3]["validation_loss_sd"] == pytest.approx(math.sqrt(0.5))
    assert by_rate[4e-4]["validation_loss_sd"] is None
    assert {item["gpu"]: item["runs"] for item in grouped(items, "gpu")} == {"A100-40GB": 3}
    assert grouped(items, "no.such.key")[0]["runs"] == 3


def test_a_group_over_different_sets_has_no_mean_loss() -> None:
    items = [entry(summary(validation_set=name)) for name in "ab"]
    row = grouped(items, "gpu")[0]
    assert row["validation_loss"] is None
    assert row["cost_usd"] == 20.0


def test_the_difference_of_two_runs() -> None:
    left = entry(summary(), spec(learning_rate=4e-4))
    right = entry(
        summary("b", validation_loss=3.69, gpu="H100-80GB", versions={"torch": "2.12.0"}, tokens_per_second=800_000.0,
                evaluations=[{"kind": "test_set", "name": "other", "loss": 1.0}]),
        spec(learning_rate=1e-3, seed=1),
    )  # fmt: skip
    found = {
        (item.part, item.key): item
        for item in diff(left, right, sigmas={"validation_loss": 0.0155, "test_loss": 0.0155})
    }
    assert (found["spec", "train.learning_rate"].left, found["spec", "train.learning_rate"].right) == (
        4e-4,
        1e-3,
    )
    assert ("spec", "train.seed") not in found
    assert found["hardware", "gpu"].right == "H100-80GB"
    assert found["versions", "torch"].right == "2.12.0"
    assert found["result", "tokens_per_second"].note == "+100.0%"
    assert found["result", "validation_loss"].note == "-0.0100 (within noise)"
    assert found["result", "test_loss"].note == "not comparable: measured on different sets"
    elsewhere = {
        item.key: item for item in diff(left, entry(summary(validation_loss=1.0, validation_set="v2")))
    }
    assert elsewhere["validation_loss"].note == "not comparable: measured on different sets"
    assert diff(left, left) == []


def test_ten_thousand_rows_are_compared_in_one_pass() -> None:
    items: list[Entry] = [entry(summary(f"r{n}", validation_loss=n % 97 / 10)) for n in range(10_000)]
    ordered = sort_rows(rows(items), "validation_loss")
    assert len(ordered) == 10_000
    assert ordered[0]["validation_loss"] == 0.0
