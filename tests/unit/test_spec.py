"""run.yaml → RunSpec: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runs.spec import Problem, RunSpec, SpecError, from_dict, load, parse
from trainer.config import ConfigError, TestSet, TrainerConfig

LOCAL = """\
name: small
hardware: {provider: local, usd_per_hour: 1.2}
data: {train: [a.bin], validation: [b.bin]}
model: {emb_dim: 64, n_heads: 4, n_layers: 2, context_length: 32}
train: {tokens: 10_000, global_batch_size: 8, learning_rate: 4e-4}
"""
RENTED = """\
name: rented
hardware: {provider: lambda, gpu: A100-40GB:8}
budget: {max_usd: 45, max_hours: 6}
data: {train: [s3://bucket/*.bin]}
train: {tokens: 1e9, global_batch_size: 104}
"""


def problems(text: str, *overrides: str) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        parse(text, "run.yaml", overrides)
    assert caught.value.exit_code == 3
    return caught.value.problems


def only(text: str, *overrides: str) -> Problem:
    found = problems(text, *overrides)
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


def test_the_defaults_are_those_of_the_product() -> None:
    spec = parse(RENTED, "run.yaml")
    assert spec.hardware.model_dump() == {
        "provider": "lambda", "gpu": "A100-40GB:8", "instance_type": None, "regions": [], "nodes": 1,
        "max_usd_per_hour": None, "image": None, "filesystem": None, "host_key": "injected",
        "ssh_key_name": None, "identity_file": None,
    }  # fmt: skip
    assert spec.node.model_dump() == {
        "python": "auto", "env": {}, "secrets": ["HF_TOKEN"], "on_finish": "terminate", "max_restarts": 3,
        "replace": True, "boot_timeout": "30m", "self_terminate": False,
    }  # fmt: skip
    assert spec.to_dict()["wandb"] == {"mode": "disabled", "project": "llmctl", "from": "driver"}
    assert spec.to_dict()["checkpoint"]["every"] == "15m"
    assert (spec.train.microbatch_size, spec.train.betas, spec.model.vocab_size) == (
        "auto",
        (0.9, 0.95),
        50257,
    )


def test_numbers_and_text_are_those_of_yaml_1_2() -> None:
    spec = parse(
        LOCAL.replace("[a.bin]", "[no, '1:30', 0o17.bin]"), "run.yaml", ["train.min_learning_rate=4e-5"]
    )
    assert spec.train.learning_rate == 4e-4
    assert spec.train.min_learning_rate == 4e-5
    assert spec.data.train == ["no", "1:30", "0o17.bin"]


def test_whole_numbers_may_be_written_with_an_exponent() -> None:
    assert parse(RENTED, "run.yaml").train.tokens == 1_000_000_000
    assert only(LOCAL.replace("10_000", "2.5")).message == "must be a whole number, not 2.5"


def test_steps_are_whole_and_rounded_down() -> None:
    spec = parse(LOCAL, "run.yaml")
    assert (spec.steps, spec.tokens) == (10_000 // 256, 10_000 // 256 * 256)


def test_the_trainer_gets_its_own_sections() -> None:
    spec = parse(LOCAL, "run.yaml")
    config = spec.trainer_config(world=4)
    assert isinstance(config, TrainerConfig)
    assert (config.model, config.train) == (spec.model, spec.train)
    with pytest.raises(ConfigError, match="does not divide over 3 processes"):
        spec.trainer_config(world=3)


@pytest.mark.parametrize(
    ("change", "gpus", "processes"),
    [([], 8, 8), (["train.device=cpu"], 8, 1), (["train.processes_per_node=2", "hardware.nodes=2"], 8, 4)],
)
def test_processes_of_a_run(change: list[str], gpus: int, processes: int) -> None:
    assert parse(RENTED, "run.yaml", change).processes(gpus) == processes


def test_every_problem_of_a_file_is_reported_at_once_with_its_line() -> None:
    found = problems("""\
name: Big_Name
hardware:
  provider: lambda
  gpu: 8xA100
  regionz: [us-east-1]
budget: {max_usd: -3}
data: {train: ["http://host/x.bin", "hf://owner/name"]}
model: {emb_dim: 100, n_heads: 7}
train:
  tokens: .nan
  global_batch_size: "104"
  learning_rat: 1e-3
node: {env: {MY_API_KEY: abc}, on_finish: soon}
evaluate: {test_sets: [nowhere]}
""")
    assert [(problem.line, problem.key) for problem in found] == [
        (1, "name"), (4, "hardware.gpu"), (5, "hardware.regionz"), (6, "budget.max_hours"), (6, "budget.max_usd"),
        (7, "data.train[0]"), (7, "data.train[1]"), (8, "model.n_heads"), (10, "train.tokens"),
        (11, "train.global_batch_size"), (12, "train.learning_rat"), (13, "node.env.MY_API_KEY"), (13, "node.on_finish"),
        (14, "evaluate.test_sets[0]"),
    ]  # fmt: skip


def test_a_wrong_type_does_not_hide_what_the_trainer_would_refuse() -> None:
    found = problems(LOCAL + "notify: 3\n", "model.n_heads=7")
    assert {problem.key for problem in found} == {"notify", "model.n_heads"}


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("train.lerning_rate=1", "train.lerning_rate", "Did you mean learning_rate?"),
        ("learning_rate=1", "learning_rate", "Did you mean train.learning_rate?"),
        ("model.learning_rate=1", "model.learning_rate", "Did you mean train.learning_rate?"),
        ("hardware.usd-per-hour=1", "hardware.usd-per-hour", "Did you mean usd_per_hour?"),
        ("evaluate.test_sets=[{name: a, data: [b], ofset: 1}]", "evaluate.test_sets[0].ofset", "Did you mean offset?"),
        ("wandb.zzz=1", "wandb.zzz", "The nearest known key is mode; known here: mode, project, from"),
    ],
)  # fmt: skip
def test_an_unknown_key_gets_the_nearest_known_one(text: str, key: str, hint: str) -> None:
    problem = only(LOCAL, text)
    assert (problem.key, problem.message, problem.hint) == (key, "unknown key", hint)


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("train.global_batch_size='8'", "train.global_batch_size", "must be a whole number, not '8'"),
        ("train.compile=yes", "train.compile", "must be true or false, not 'yes'"),
        ("train.microbatch_size=eight", "train.microbatch_size", "must be a whole number or auto"),
        ("train.betas=[0.9]", "train.betas", "must be a list of 2 values, not 1"),
        ("train.betas=[0.9, 0.9, 0.9]", "train.betas", "must be a list of 2 values, not 3"),
        ("train.learning_rate=.inf", "train.learning_rate", "must be a positive number"),
        ("train.learning_rate=-1e-3", "train.learning_rate", "must be a positive number"),
        ("train.global_batch_size=0", "train.global_batch_size", "must be at least 1"),
        ("train.tokens=0", "train.tokens", "must be at least 1"),
        ("train.tokens=10", "train.tokens", "10 tokens are less than one step of 256"),
        ("train.tokens=null", "train.tokens", "give either tokens or steps"),
        ("train.steps=5", "train.tokens", "give either tokens or steps"),
        ("train.processes_per_node=3", "train.global_batch_size", "8 does not divide over 3 processes; 6 or 9 would"),
        ("train.precision=fp16", "train.precision", "must be one of bf16, fp32, not 'fp16'"),
        ("model.logit_softcap=.nan", "model.logit_softcap", "must be positive"),
        ("model=null", "model", "must be a mapping, not null"),
        ("data.train=x.bin", "data.train", "must be a list, not 'x.bin'"),
        ("data.train=[]", "data.train", "names no shard"),
        ("data.train=['']", "data.train[0]", "is empty"),
        ("data.train=['s3://bucket']", "data.train[0]", "names no object"),
        ("data.train=['builtin:python']", "data.train[0]", "there is no built-in 'python'"),
        ("data.train_tokens=[1]", "data.train_tokens", "is written by llmctl"),
        ("data.tokenizer=3", "data.tokenizer", "must be text, not 3"),
        ("hardware.usd_per_hour=-1", "hardware.usd_per_hour", "must be at least 0, not -1"),
        ("hardware.usd_per_hour=.nan", "hardware.usd_per_hour", "must be a finite number, not nan"),
        ("hardware.nodes=0", "hardware.nodes", "must be at least 1, not 0"),
        ("hardware.gpu=H100:0", "hardware.gpu", "is not a GPU request"),
        ("hardware.provider=lamda", "hardware.provider", "must be one of local, ssh, lambda, ec2, not 'lamda'"),
        ("hardware=3", "hardware", "must be a mapping, not 3"),
        ("budget.max_usd=0", "budget.max_usd", "must be above 0, not 0"),
        ("budget.max_usd=a lot", "budget.max_usd", "must be a number, not 'a lot'"),
        ("checkpoint.every=sometimes", "checkpoint.every", "is not a duration"),
        ("checkpoint.push=bucket/x", "checkpoint.push", "is no S3 prefix"),
        ("node.boot_timeout=30", "node.boot_timeout", "must be a duration such as 90s, 30m, 6h or 2d, not 30"),
        ("node.boot_timeout=0s", "node.boot_timeout", "must be longer than nothing"),
        ("node.on_finish=kep", "node.on_finish", "must be one of terminate, keep or a duration"),
        ("node.env.A=true", "node.env.A", "must be text, not true"),
        ("node.env.a-b=1", "node.env.a-b", "is no name of an environment variable"),
        ("node.secrets=[HF_TOKEN=hf_abc]", "node.secrets[0]", "is no name of an environment variable"),
        ("node.env.HF_TOKEN=x", "node.env.HF_TOKEN", "looks like a secret"),
        ("node.max_restarts=-1", "node.max_restarts", "must be at least 0, not -1"),
        ("evaluate.test_sets=[a, {name: a, data: [b]}]", "evaluate.test_sets[0]", "there is no built-in test set 'a'"),
        ("evaluate.test_sets=[{name: a, data: [b], offset: -1}]", "evaluate.test_sets[0].offset", "must be at least 0"),
        ("evaluate.test_sets=[5]", "evaluate.test_sets[0]", "must be a mapping or text, not 5"),
        ("evaluate.prompts=hello", "evaluate.prompts", "must be a list, not 'hello'"),
        ("wandb.from=laptop", "wandb.from", "must be one of driver, node, not 'laptop'"),
        ("name=Big", "name", "must be 1 to 32 of a-z, 0-9 and -, not 'Big'"),
        ("name=" + "a" * 33, "name", "must be 1 to 32"),
    ],
)  # fmt: skip
def test_one_clear_error(override: str, key: str, words: str) -> None:
    found = problems(LOCAL, override)
    assert found[0].key == key
    assert words in found[0].message
    assert found[0].file == f"--set {override.partition('=')[0]}" or found[0].file == "run.yaml"
    assert f"--set {key}: {key}:" not in str(found[0]), "its key is named once"
    assert len({problem.key for problem in found}) == len(found)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("budget.max_usd=null", "budget.max_usd"),
        ("budget.max_hours=null", "budget.max_hours"),
        ("hardware.gpu=null", "hardware.gpu"),
        ("hardware.instance_type=gpu_8x_a100", "hardware.instance_type"),
        ("hardware.ssh_key_name=mine", "hardware.ssh_key_name"),
        ("hardware.identity_file=/k", "hardware.identity_file"),
        ("hardware.gpu=[A100:8, H100:3]", "train.global_batch_size"),
        ("hardware.nodes=3", "train.global_batch_size"),
        ("hardware.usd_per_hour=1", "hardware.usd_per_hour"),
    ],
)
def test_what_a_rented_node_needs(override: str, key: str) -> None:
    assert only(RENTED, override).key == key


def test_a_rented_node_may_train_on_its_cpu() -> None:
    assert parse(RENTED, "run.yaml", ["train.device=cpu"]).train.device == "cpu"


def test_a_missing_key_is_named_with_an_example() -> None:
    found = problems("name: a\nhardware: {provider: ssh}\ndata: {}\ntrain: {tokens: 5000}\n")
    assert {problem.key: problem.line for problem in found} == {
        "hardware.host": 2, "data.train": 3, "train.global_batch_size": 4}  # fmt: skip
    assert all(problem.message == "is required" and problem.hint for problem in found)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", None, "the file is empty"),
        ("- a\n", 1, "holds a list"),
        ("a: [1\nb: 2\n", 2, "not YAML"),
        ("a:\n\t- b\n", 2, "not YAML"),
        ("a: 1\n---\nb: 2\n", 2, "a single document"),
        ("a: \x00\n", None, "not YAML"),
        ("a: &x {b: *x}\n", 1, "an alias that repeats itself"),
        ("a: !python/object:os.system x\n", 1, "has a tag"),
        ("a: !!int x\n", 1, "is no int"),
        ("[" * 5000, None, "nested too deeply"),
        ("name: a\nname: b\n", 2, "is given twice, first in line 1"),
        ("? [1]\n: 2\n", 1, "a key must be a word"),
    ],
)
def test_malformed_yaml(text: str, line: int | None, words: str) -> None:
    problem = problems(text)[0]
    assert problem.line == line
    assert words in problem.message


def test_aliases_cannot_make_a_small_file_large() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{after}: &{after} [{','.join(['*' + before] * 9)}]\n"
        for before, after in zip("abcdefg", "bcdefgh", strict=True)
    )
    assert "far too many values" in problems(bomb)[0].message


def test_overrides_reach_lists_sections_and_null_and_the_last_one_wins() -> None:
    spec = parse(
        LOCAL, "run.yaml",
        ["data.train.0=c.bin", "data.validation=[]", "node.env.OMP_NUM_THREADS=1", "checkpoint.every=null",
         "train.seed=1", "train.seed=2", "notify=", "train.tokens=null", "train.steps=7", "wandb.from=node", "wandb.from=driver"],
    )  # fmt: skip
    assert (spec.data.train, spec.data.validation) == (["c.bin"], [])
    assert spec.node.env == {"OMP_NUM_THREADS": "1"}
    assert (spec.checkpoint.every, spec.train.seed, spec.steps, spec.wandb.from_) == (None, 2, 7, "driver")
    assert spec.notify is None  # nothing at all is null


@pytest.mark.parametrize(
    "override",
    [
        "train.seed",
        "=3",
        "data.train.9=x",
        "data.train.x=1",
        "name.x=1",
        "train={seed: 1, seed: 2}",
        "train=[",
        "a.b.c",
    ],
)
def test_an_override_that_cannot_be_applied(override: str) -> None:
    problem = only(LOCAL, override)
    assert problem.file.startswith("--set")
    assert problem.line is None


def test_a_secret_in_an_override_is_not_echoed() -> None:
    text = str(problems(LOCAL, "node.env.MY_TOKEN=hunter2")[0])
    assert "hunter2" not in text
    assert "secrets: [MY_TOKEN]" in text


def test_relative_paths_belong_to_the_file_and_those_of_overrides_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "specs").mkdir()
    (tmp_path / "here").mkdir()
    file = tmp_path / "specs" / "run.yaml"
    file.write_text(
        LOCAL.replace(
            "[a.bin]", "[./shards/*.bin, ../x.bin, /abs.bin, ~/y.bin, builtin:python-stdlib, s3://b/*.bin]"
        )
        + "evaluate: {test_sets: [{name: t, data: [t.bin]}]}\ntrainer: {path: mine}\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    spec = load(file, ["data.validation=[v.bin]"])
    assert spec.data.train == [
        str(tmp_path / "specs/shards/*.bin"), str(tmp_path / "x.bin"), "/abs.bin", "/home/someone/y.bin",
        "builtin:python-stdlib", "s3://b/*.bin",
    ]  # fmt: skip
    assert spec.data.validation == [str(tmp_path / "here/v.bin")]
    assert spec.trainer.path == str(tmp_path / "specs/mine")
    assert isinstance(spec.evaluate.test_sets[0], TestSet)
    assert spec.evaluate.test_sets[0].data == [str(tmp_path / "specs/t.bin")]
    assert spec.data.tokenizer == "gpt2"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: caf\xe9\n")
    for path, words in (
        (tmp_path / "none.yaml", "there is no such file"),
        (latin, "is not UTF-8"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(SpecError) as caught:
            load(path)
        assert words in str(caught.value)


@pytest.mark.parametrize("text", [LOCAL, RENTED])
def test_a_spec_survives_its_own_json(text: str) -> None:
    spec = parse(text, "run.yaml")
    again = from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.to_dict() == spec.to_dict()


def test_durations_in_seconds() -> None:
    spec = parse(LOCAL, "run.yaml", ["node.boot_timeout=1h30m", "node.on_finish=2h"])
    assert (spec.node.boot_timeout_seconds, spec.node.keep_seconds) == (5400, 7200)
    assert parse(LOCAL, "run.yaml").node.keep_seconds == 0
    assert parse(LOCAL, "run.yaml", ["node.on_finish=keep"]).node.keep_seconds is None


@pytest.mark.parametrize("prompts", ["[]", "[hello]"])
def test_the_vocabulary_must_hold_what_llmctl_tokenises_itself(prompts: str) -> None:
    text = LOCAL.replace("emb_dim", "vocab_size: 100, emb_dim") + f"evaluate: {{prompts: {prompts}}}\n"
    if prompts == "[]":  # ready-made shards may hold a small vocabulary
        assert parse(text, "run.yaml").model.vocab_size == 100
    else:
        assert only(text).key == "model.vocab_size"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5000) | st.floats() | st.sampled_from(["", "auto", "30m", "x", "gpt2", "lambda"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "gpu", "x", "every", "env"]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
KEYS = [
    f"{section}.{key}"
    for section, keys in parse(RENTED, "").to_dict().items()
    if isinstance(keys, dict)
    for key in keys
]


# Wrong in one place, and in another that divides by it.
@example({"hardware.nodes": None, "train.microbatch_size": 0})
@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*KEYS, "name", "data", "train", "hardware", "node", "foo"]), ANYTHING, max_size=5
    )
)
def test_no_value_anywhere_gives_more_than_a_spec_error(changes: dict[str, object]) -> None:
    data = parse(RENTED, "").to_dict()
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        target = data[section] if section else data
        if isinstance(target, dict):
            target[last] = value
    try:
        spec = from_dict(data)
    except SpecError as error:
        assert error.problems
        assert all(problem.message for problem in error.problems)
    else:
        assert isinstance(spec, RunSpec)
        assert spec.steps >= 1
        assert math.isfinite(spec.budget.max_usd or 0)
