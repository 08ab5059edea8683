"""What the model commands make of their arguments: which model a word means, conversations, and refusals that name a way out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import cli
from orchestrator.data.templates import Turn, template
from orchestrator.errors import Invalid, NoSuchRun, Usage
from orchestrator.models import judging, measuring, sampling
from orchestrator.models import names as modelling
from orchestrator.models.evaluation import slice_name
from orchestrator.models.judge import Endpoint
from orchestrator.models.load import Drawing
from orchestrator.render.models import side_by_side
from tests import tiny_models
from trainer import checkpoint, manifest
from trainer.checkpoint import Snapshot
from trainer.config import ConfigError, Tuned

GREEDY = Drawing(temperature=0.0, tokens=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    yield (
        tiny_models.trained(folder / "run", 2),
        tiny_models.of_transformers(folder / "gpt2"),
        tiny_models.shard(folder),
    )
    torch.set_num_threads(threads)


@pytest.fixture
def seed(tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LLMCTL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tiny_models.run_with(
        tmp_path / "home", made[0], evaluate={"prompts": ["The"], "test_sets": [{"name": "held", "data": [str(made[2])], "tokens": 64}]}
    )  # fmt: skip


def ended(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    """Exit code and JSON document of a command line."""
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, "--json"])
    code = caught.value.code
    assert isinstance(code, int)
    return code, json.loads(capsys.readouterr().out)


def test_a_word_is_a_run_or_a_folder(seed: Any, made: Any, tmp_path: Path) -> None:
    ours, theirs, _ = made
    run = modelling.find(seed.store, "demo")
    assert (run.path, run.run, run.step, run.tokenizer, run.label) == (
        ours,
        "demo-0001",
        2,
        "bytes",
        "demo-0001 at step 2",
    )
    path = modelling.find(seed.store, str(ours))
    assert (path.path, path.run, path.step) == (ours, None, 2)
    folder = modelling.find(seed.store, str(theirs))
    assert (folder.path, folder.step, folder.label) == (theirs, None, str(theirs))
    (tmp_path / "demo").mkdir()  # a folder that happens to have the run's name hides nothing
    assert modelling.find(seed.store, "demo").run == "demo-0001"
    (tmp_path / "empty").mkdir()
    with pytest.raises(Invalid, match="neither a run nor the folder of a model"):
        modelling.find(seed.store, "empty")
    with pytest.raises(NoSuchRun):
        modelling.find(seed.store, "nobody")
    with pytest.raises(Usage, match="not all"):
        modelling.find(seed.store, "demo", "all")
    with pytest.raises(Usage, match="named twice"):
        modelling.find_all(seed.store, ["demo", str(ours)])


@pytest.mark.parametrize(
    "case",
    [
        (("sample", "demo", ""), 3, "the prompt is empty"),
        (("sample", "demo", "x" * 65), 3, "the prompt has 65 tokens, the model was trained on at most 64"),
        (("sample", "demo", "x", "--device", "cuda:9"), 3, "torch has no device"),
        (("sample", "demo", "x", "--chat"), 2, "was not tuned on a chat format"),
        (("sample", "demo", " ", "--chat", "--template", "llama2"), 3, "the prompt is empty"),
        (("sample", "demo", "--chat"), 2, "a conversation is with one model"),
        (("sample", "demo", "x", "--tokenizer", "TRAINED"), 3, "they do not belong together"),
        (("sample", "nobody", "x"), 102, "no run is called 'nobody'"),
        (("sample", "CLASSIFIER", "x"), 3, "is a classifier, no language model"),
        (("evaluate", "CLASSIFIER", "--data", "SHARD", "--tokens", "64"), 3, "is a classifier, no language model"),
        (("evaluate", "demo", "--data", "missing.bin"), 3, "missing.bin"),
        (("evaluate", "demo", "--test-set", "nowhere"), 3, "there is no built-in test set 'nowhere'"),
        (("evaluate", "demo", "--context", "65"), 3, "a context of 65 tokens, but the model was trained on at most 64"),
        (("evaluate", "demo", "--data", "SHARD", "--tokens", "999999"), 3, "not 999999"),
        (("evaluate", "THEIRS"), 2, "names no test set"),
        (("judge", "demo", "--judge", "m", "--questions", "BROKEN"), 3, "line 2"),
        (("judge", "demo", "demo-0001", "--judge", "m"), 2, "named twice"),
        (("judge", "demo", "--judge", "m", "--questions", "LONG", "--template", "llama2"), 3, "line 2: the prompt has 88 tokens, and demo"),
        (("judge", "demo", "--judge", "m"), 2, "was not tuned on a chat format"),
        (("export", "THEIRS", "--to", "x"), 3, "is in that form already"),
        (("export", "demo", "--to", "x", "--push", "name"), 3, "'name' is no repository"),
        (("export", "demo", "--to", "x", "--push", "me/name"), 3, "there is no token"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    seed: Any, made: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, *, case: Any
) -> None:
    words, code, message = case
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "output": "b"}\n{"instruction"\n')
    long = tmp_path / "long.jsonl"
    long.write_text(
        "".join(json.dumps({"instruction": "a" * size, "output": "b"}) + "\n" for size in (8, 70))
    )
    places = {"LONG": long, "THEIRS": made[1], "SHARD": made[2], "BROKEN": broken, "TRAINED": _tokenizer(tmp_path),
              "CLASSIFIER": _classifier(made[0], tmp_path)}  # fmt: skip
    got, document = ended(capsys, *(str(places.get(word, word)) for word in words))
    assert (got, set(document)) == (code, {"error"}) and message in document["error"]["message"]
    assert document["error"]["hint"]
    assert seed.store.record("demo-0001").evaluations == () and not (tmp_path / "x").exists()


def test_a_built_in_question_that_is_too_long_for_one_model_is_asked_of_none(seed: Any, made: Any) -> None:
    ask = judging.Ask("builtin:instructions", None, Endpoint("http://x/v1", "m"), 1, 8, "llama2", 0, "cpu")
    asked = judging.questions(ask)
    short = judging.that_fit(modelling.find_all(seed.store, ["demo", str(made[1])]), asked, ask)
    assert 0 < len(short) < len(asked)
    sizes = {
        one.id: len(template("llama2").render([Turn(one.instruction, one.context)], None).encode())
        for one in asked
    }
    assert [one.id for one in short] == [
        one.id for one in asked if sizes[one.id] <= 64
    ]  # a token a byte, in both


def _classifier(language_model: Path, folder: Path) -> Path:
    config = replace(
        checkpoint.load_config(language_model), tuned=Tuned("classification", classes=["a", "b"])
    )
    head = {"classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(2)}
    checkpoint.write(folder, Snapshot(1, {**checkpoint.weights(language_model), **head}, {}, {}), config)
    return folder / manifest.directory_name(1)


def _tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    path = folder / "tokenizer.json"
    Tokenizer(BPE(vocab={f"token{i}": i for i in range(300)}, merges=[])).save(str(path))
    return path


def test_the_spec_s_test_sets_and_prompt_are_the_default(seed: Any, made: Any, capsys: Any) -> None:
    code, document = ended(capsys, "evaluate", "demo")
    (item,) = document["results"]
    name = slice_name([made[2]], 0, 64, "held")
    assert (code, item["name"], item["tokens"], document["recorded"]) == (0, name, 64, True)
    assert ended(capsys, "evaluate", "demo", "--test-set", "held")[1]["results"] == [item]
    (kept,) = seed.store.record("demo-0001").evaluations  # measured twice, recorded once
    assert (kept["name"], kept["loss"], kept["step"], kept["kind"]) == (name, item["loss"], 2, "test_set")
    shorter = ended(capsys, "evaluate", "demo", "--context", "32")[1]["results"][0]
    assert shorter["name"] == f"{name} (context 32)"
    # The short name will do where it means one set.
    (row,) = ended(capsys, "compare", "--test-set", "held")[1]
    assert (row["test_loss"], row["test_set"]) == (item["loss"], name)
    code, document = ended(capsys, "compare", "--test-set", "nowhere")
    assert code == 2 and name in document["error"]["hint"]
    other = name.replace(name[5:17], "0" * 12)
    measuring.keep(seed.store, modelling.find(seed.store, "demo"), [{**item, "name": other}])
    code, document = ended(capsys, "compare", "--test-set", "held")
    assert code == 2 and "2 test sets are called 'held'" in document["error"]["message"]
    code, sample = ended(capsys, "sample", "demo", "--tokens", "3")
    assert (code, sample["prompt"], sample["run"], sample["max_tokens"]) == (0, "The", "demo-0001", 3)


def test_a_malformed_file_leaves_no_trace_in_the_record(
    seed: Any, made: Any, tmp_path: Path, capsys: Any
) -> None:
    """The loss before it was measured, and is not kept either."""
    items = tmp_path / "hellaswag.jsonl"
    items.write_text('{"ctx": "a", "endings": ["b", "c"], "label": 1}\n{"ctx": "a"\n')
    words = ("evaluate", "demo", "--test-set", "held", "--hellaswag", str(items))
    code, document = ended(capsys, *words)
    assert code == 3 and "line 2" in document["error"]["message"] and document["error"]["hint"]
    assert seed.store.record("demo-0001").evaluations == ()
    items.write_text('{"ctx": "a", "endings": ["b", "c"], "label": 1}\n')
    assert ended(capsys, *words)[0] == 0
    assert [item["kind"] for item in seed.store.record("demo-0001").evaluations] == ["test_set", "hellaswag"]


def test_several_models_continue_the_same_prompt(seed: Any, made: Any, capsys: Any) -> None:
    code, samples = ended(capsys, "sample", "demo", "The cat", "--compare", str(made[1]), "--tokens", "8")
    assert code == 0 and [item["run"] for item in samples] == ["demo-0001", None]
    assert {item["prompt"] for item in samples} == {"The cat"} and samples[0]["text"] != samples[1]["text"]


def test_an_export_does_not_write_over_anything(seed: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    code, document = ended(capsys, "export", "demo", "--to", "there")
    assert code == 3 and "is there already" in document["error"]["message"]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["file"]


def test_weights_that_are_no_numbers_are_not_recorded(
    seed: Any, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = modelling.opened(modelling.find(seed.store, "demo"))
    ready.model.final_norm.weight.fill_(float("nan"))
    monkeypatch.setattr(measuring, "opened", lambda *_: ready)
    with pytest.raises(Invalid, match=r"on held-\w+@0\+64 is nan"):
        measuring.measure(seed.store, modelling.find(seed.store, "demo"), measuring.Ask())
    assert seed.store.record("demo-0001").evaluations == ()


def test_a_conversation_remembers_what_fits(seed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.models import chat

    prompts: list[str] = []
    real = chat.respond

    def listening(ready: Any, turns: Any, how: Any, **more: Any) -> Any:
        prompts.append(chat.template("llama2").render(turns, None))
        return real(ready, turns, how, **more)

    monkeypatch.setattr(chat, "respond", listening)
    ask = sampling.Ask(("demo",), (), GREEDY, sampling.Talk("llama2"))
    heard: list[str] = []
    count = sampling.converse(
        seed.store, ask, ["a\n", "\n", "b\n", "c\n"], heard.append, lambda: heard.append("cue")
    )
    assert count == 3 and heard[0] == "cue" and "".join(heard).count("\n") >= 3
    assert prompts[0] == "<s>[INST] a [/INST]" and prompts[1].startswith("<s>[INST] a [/INST]")
    assert prompts[1].endswith("[INST] b [/INST]") and "] a [" not in prompts[2]
    assert all(len(prompt) <= 64 for prompt in prompts)
    with pytest.raises(Usage, match="there was no request"):
        sampling.converse(seed.store, ask, ["\n"], heard.append, lambda: None)
    with pytest.raises(Invalid, match="trained on at most 64"):
        sampling.converse(seed.store, ask, ["x" * 65], heard.append, lambda: None)


def test_a_narrow_page_shows_models_below_each_other(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        [{"run": name, "path": "", "step": 1, "prompt": "P", "text": f"{name} \x1b[2Jsays " * 8}]
        for name in ("one", "two")
    ]
    monkeypatch.setenv("COLUMNS", "100")
    side_by_side(texts)
    wide = capsys.readouterr().out
    assert wide.splitlines()[1].split() == ["one", "(step", "1)", "two", "(step", "1)"] and "\x1b" not in wide
    assert all(len(line) <= 100 for line in wide.splitlines())
    monkeypatch.setenv("COLUMNS", "50")
    side_by_side(texts)
    narrow = capsys.readouterr().out.splitlines()
    assert narrow[1] == "one (step 1):" and narrow[3] == "two (step 1):"


@pytest.mark.parametrize(
    ("key", "value"), [("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False), ("add_cross_attention", True)]
)  # fmt: skip
def test_attention_that_is_computed_otherwise_is_refused_on_both_ways_in(
    made: Any, tmp_path: Path, key: str, value: bool
) -> None:
    from trainer.after import bases
    from trainer.sample import load_model

    config = {**json.loads((made[1] / "config.json").read_text()), key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((made[1] / "model.safetensors").read_bytes())
    for load in (load_model, bases.load):
        with pytest.raises(ConfigError, match=f"{key} is {value}"):
            load(tmp_path)


def test_weights_that_are_cut_off_are_refused_with_a_way_out(
    made: Any, tmp_path: Path, seed: Any, capsys: Any
) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_bytes((made[1] / "config.json").read_bytes())
    (tmp_path / "cut" / "model.safetensors").write_bytes((made[1] / "model.safetensors").read_bytes()[:-100])
    code, document = ended(capsys, "sample", str(tmp_path / "cut"), "x")
    assert code == 3 and "cannot be read" in document["error"]["message"] and document["error"]["hint"]
