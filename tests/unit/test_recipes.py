"""The recipes are valid specs, and the published ones say what was published."""

from __future__ import annotations

import pytest

from runs import recipes
from runs.spec import RunSpec, parse
from trainer import flops


def recipe(name: str) -> RunSpec:
    return parse(recipes.text(name), f"{name}.yaml")


def test_the_one_to_begin_with_comes_first() -> None:
    assert recipes.names()[0] == recipes.DEFAULT == "quickstart"
    assert len(recipes.names()) == len(set(recipes.names()))


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_a_commented_spec(name: str) -> None:
    assert recipe(name).steps > 0
    assert recipes.text(name).startswith("# ")
    assert recipes.text(name).count("#") > 10
    assert len(recipes.summary(name)) > 20
    assert max(map(len, recipes.text(name).splitlines())) <= 130


@pytest.mark.parametrize(
    ("name", "global_batch_size", "gpus"),
    [
        ("1xrtx3090", 6, 1),
        ("8xa100-40gb", 104, 8),
        ("8xa100-80gb", 224, 8),
        ("8xh100", 216, 8),
        ("8xb200", 512, 8),
    ],
)
def test_the_published_runs(name: str, global_batch_size: int, gpus: int) -> None:
    spec = recipe(name)
    assert spec.train.global_batch_size == global_batch_size
    assert spec.train.tokens == 3_260_190_720
    assert (spec.model.drop_rate, spec.train.learning_rate, spec.train.weight_decay) == (0.1, 4e-4, 0.1)
    assert (spec.train.schedule, spec.train.grad_clip, spec.model.init) == ("constant", 0, "torch")
    assert flops.parameters(spec.model) == 163_009_536
    assert spec.processes(gpus) == gpus
    spec.trainer_config(world=gpus)


def test_quickstart_needs_neither_gpu_nor_network() -> None:
    spec = recipe("quickstart")
    assert (spec.hardware.provider, spec.train.device, spec.train.processes_per_node) == ("local", "cpu", 2)
    assert set(spec.data.train) == set(spec.data.validation) == {"builtin:python-stdlib"}
    assert (spec.train.precision, spec.train.compile, spec.data.tokenizer) == ("fp32", False, "bytes")


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(recipes.UnknownRecipe, match="quickstart") as caught:
        recipes.text("../spec")
    assert caught.value.exit_code == 2
