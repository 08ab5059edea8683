"""Sweeps, as far as they are pure: what a file expands to, and how the money is split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from orchestrator.following import sweeping
from runs import recipes, schema, sweep
from runs.rows import label, seed_of
from runs.store import Store
from runs.yamlfile import SpecError
from tests import tiny_models
from tests.cli import spec

BASE = {"name": "rates", "spec": "run.yaml", "budget": {"max_usd": 5}}


def points(folder: Path, **more: object) -> list[sweep.Point]:
    (folder / "run.yaml").write_text(spec(), encoding="utf-8")
    (folder / "sweep.yaml").write_text(json.dumps({**BASE, **more}), encoding="utf-8")
    return sweep.expand(sweep.load(folder / "sweep.yaml"), folder)


def test_every_combination_is_a_run_once(tmp_path: Path) -> None:
    grid = {"train.learning_rate": [1e-3, 2e-3, 1e-3], "train.weight_decay": [0.0, 0.1]}
    found = points(tmp_path, grid=grid, runs=[{"model.n_layers": 1}, {}], seeds=3)
    assert len(found) == 2 * 2 * 2 * 3
    assert {point.spec.train.seed for point in found} == {42, 43, 44}
    assert found[0].spec.model.n_layers == 1 and found[0].spec.train.learning_rate == 1e-3
    assert label(found[0].overrides) == "n_layers=1 learning_rate=0.001 weight_decay=0.0"
    assert len(points(tmp_path)) == 1


def test_a_sweep_over_tune_has_seeds_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(recipes.text("finetune"), encoding="utf-8")
    more = {"grid": {"tune.lora.rank": [2, 4]}, "seeds": 2}
    (tmp_path / "sweep.yaml").write_text(json.dumps(BASE | more), encoding="utf-8")
    found = sweep.expand(sweep.load(tmp_path / "sweep.yaml"), tmp_path)
    assert [(label(point.overrides), seed_of(point.overrides)) for point in found] == [
        ("rank=2", 42), ("rank=2", 43), ("rank=4", 42), ("rank=4", 43),
    ]  # fmt: skip
    assert [point.spec.train.seed for point in found] == [42, 43, 42, 43]


def test_a_tuning_run_is_known_again_by_its_base(tmp_path: Path) -> None:
    """What stands in a record has what follows from the base; the plan of a sweep has it too. Another base is another run."""
    tiny_models.run_with(tmp_path / "home", tiny_models.trained(tmp_path / "one", 1))
    (tmp_path / "run.yaml").write_text(recipes.text("finetune"), encoding="utf-8")
    values = BASE | {
        "runs": [{"tune.base": "demo", "tune.data.max_length": 64}],
        "grid": {"tune.lora.rank": [2, 4]},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(values), encoding="utf-8")
    store = Store(tmp_path / "home")

    def prints() -> list[str]:
        points = sweeping.plan(store, tmp_path / "sweep.yaml", None).points
        assert [point.fingerprint for point in points] == [
            sweep.fingerprint(point.spec.to_dict()) for point in points
        ]
        assert all(point.spec.tune.known.run.startswith("demo-") for point in points)
        return [point.fingerprint for point in points]

    first = prints()
    assert len(set(first)) == 2 and prints() == first
    tiny_models.run_with(tmp_path / "home", tiny_models.trained(tmp_path / "two", 2), "demo-0002")
    assert not set(prints()) & set(first)


def test_a_run_is_known_again_whatever_it_may_spend_and_whatever_becomes_of_its_node(tmp_path: Path) -> None:
    (point,) = points(tmp_path)
    values = point.spec.to_dict()
    values["name"], values["budget"]["max_usd"], values["node"]["on_finish"] = "other", 1.0, "5m"
    assert sweep.fingerprint(values) == point.fingerprint
    values["train"]["learning_rate"] = 2e-3
    assert sweep.fingerprint(values) != point.fingerprint


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"grids": {}}, "Did you mean grid?"),
        ({"grid": {"hardware.gpu": ["A100"]}}, "cannot differ between runs"),
        ({"runs": [{"node.on_finish": "keep"}]}, "cannot differ between runs"),
        ({"grid": {"train.learning_rte": [1]}}, "unknown key"),
        ({"budget": {}}, "budget.max_usd"),
        ({"nodes": 0}, "nodes"),
        ({"spec": "other.yaml"}, "there is no such file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, more: dict[str, object], told: str) -> None:
    with pytest.raises(SpecError) as caught:
        points(tmp_path, **more)
    assert told in str(caught.value)


@given(
    budget=st.integers(1, 10**9),
    margin=st.integers(0, 10**6),
    predicted=st.lists(st.none() | st.integers(0, 10**8), min_size=1, max_size=8),
    part=st.floats(0, 1),
)
def test_the_budget_is_never_exceeded(
    budget: int, margin: int, predicted: list[int | None], part: float
) -> None:
    """Whatever each run makes of what it was allowed (and its margin), and whether the next waits for it or not."""
    promised = 0
    while predicted:
        limit = sweep.allowance(budget - promised, margin, predicted)
        if limit is None:
            break
        assert limit >= (predicted[0] or 1)
        spent = round((limit + margin) * part)
        assert promised + limit + margin <= budget
        promised += spent if part < 0.5 else limit + margin
        predicted = predicted[1:]


def test_the_cheapest_run_is_made_where_the_money_does_not_reach_for_all() -> None:
    assert sweep.allowance(1000, 100, [300, 500, 900]) == 900
    assert sweep.allowance(3000, 100, [300, 500, 900], cap=350) == 350
    assert sweep.allowance(350, 100, [300, 500]) is None


def test_the_schema_is_the_model() -> None:
    published = json.loads((schema.DOCS / "sweep.schema.json").read_text(encoding="utf-8"))
    validator = Draft202012Validator(published)
    validator.validate({**BASE, "grid": {"train.seed": [1, 2]}, "seeds": [1, 2], "keep": "10m"})
    assert not validator.is_valid({**BASE, "grids": {}})
    assert not validator.is_valid({**BASE, "nodes": 0})
