"""`sample`, `evaluate`, `judge` and `export` as a person runs them: over a run with a trained checkpoint, and a GPT-2 of
transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.models import evaluation
from orchestrator.models.load import Drawing, complete, open_model
from tests import tiny_models
from tests.cli import Cli
from tests.unit.test_judge import completion, stub  # noqa: F401
from trainer.config import TestSet

RUN = "demo-0001"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(checkpoint, Hugging Face folder, shard)"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    yield (
        tiny_models.trained(folder / "run"),
        tiny_models.of_transformers(folder / "gpt2"),
        tiny_models.shard(folder),
    )
    torch.set_num_threads(threads)


@pytest.fixture
def cli(cli: Cli, made: Any) -> Cli:
    cli.env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    tiny_models.run_with(cli.home, made[0])
    return cli


def test_a_run_s_loss_goes_into_its_record_and_the_table(cli: Cli, made: Any, tmp_path: Path) -> None:
    """The loss that the command prints is that of the checkpoint, and `show`, `compare` and `report` have it."""
    ours, theirs, shard = made
    items = tmp_path / "hellaswag.jsonl"
    items.write_text(
        json.dumps({"ctx": "The cat sat", "endings": ["on the mat.", "zzzzqq qqqqzz"], "label": 0}) + "\n"
    )
    words = ("--data", str(shard), "--offset", "5", "--tokens", "640")
    document = cli.json("evaluate", "demo", *words, "--hellaswag", str(items))
    loss, choice = document["results"]
    expected = evaluation.evaluate_slice(open_model(ours), TestSet("", [str(shard)], 5, 640))
    assert loss["loss"] == pytest.approx(expected["loss"], abs=1e-5) and loss["loss"] < 2.5
    assert (loss["name"], loss["tokens"], loss["checkpoint_step"]) == (expected["name"], 640, 80)
    assert loss["bits_per_byte"] == pytest.approx(loss["loss"] / 0.6931471805599453, rel=1e-9)
    assert (choice["kind"], choice["items"], choice["accuracy"]) == ("hellaswag", 1, 1.0)
    evaluations = {item["name"]: item for item in cli.show(RUN)["summary"]["evaluations"]}
    assert evaluations[loss["name"]]["loss"] == loss["loss"] and evaluations[loss["name"]]["step"] == 80
    assert evaluations[choice["name"]]["accuracy"] == 1.0
    (row,) = cli.json("compare")
    assert (row["test_loss"], row["test_set"]) == (loss["loss"], loss["name"])
    told = cli.run("show", RUN).stdout
    assert f"test loss on {loss['name']}: {loss['loss']:.4f} at step 80" in told and "accuracy 100.0%" in told
    cli.run("report", "--to", "report.html")
    assert loss["name"] in (cli.home / "report.html").read_text()
    other = cli.run("evaluate", str(theirs), *words).stdout
    assert (
        other.startswith(f"{loss['name']}: 5.") and "bits per byte" in other
    )  # one name: the losses can be compared
    assert len(cli.show(RUN)["summary"]["evaluations"]) == 2


def test_text_is_the_model_s_own_and_is_printed_as_it_comes(cli: Cli, made: Any, tmp_path: Path) -> None:
    """And nothing is left in the temporary folder."""
    (tmp_path / "temporary").mkdir()
    cli.env["TMPDIR"] = str(tmp_path / "temporary")
    ready, how = open_model(made[0]), Drawing(temperature=0.0, tokens=12)
    prompts = ["The cat sat", "The dog"]
    told = cli.run("sample", RUN, *prompts, "--tokens", "12", "--temperature", "0").stdout
    assert told == "".join(f"{prompt}{complete(ready, prompt, how)}\n" for prompt in prompts)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_an_export_opens_in_transformers_with_equal_logits_and_a_card(
    cli: Cli, made: Any, tmp_path: Path
) -> None:
    import transformers

    document = cli.json("export", RUN, "--to", str(tmp_path / "hf"), "--format", "hf", "--license", "mit")
    assert (document["run"], document["step"], document["url"]) == (RUN, 80, None)
    tokens = torch.tensor([list(tiny_models.TEXT[:48])])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected = open_model(made[0]).model.logits(tokens)
        assert torch.allclose(theirs(tokens).logits, expected, atol=1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"| run | {RUN} |" in card and "| total | $2.52 |" in card and "| validation | 2.5000 |" in card
    assert card.startswith("---\nlicense: mit\n")


def test_the_judge_s_table_is_recorded_for_runs_and_an_unreadable_judge_is_not(
    cli: Cli,
    made: Any,
    stub: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Scores are those of the endpoint for exactly the texts that the models said; a second call asks nothing."""
    state, url = stub
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(
        "".join(json.dumps({"instruction": f"Task {i}", "output": "x"}) + "\n" for i in range(2))
    )
    words = ("judge", RUN, str(made[1]), "--judge", "stub-judge", "--base-url", url, "--questions", str(tasks),
             "--template", "llama2", "--tokens", "8", "--repeats", "2", "--input-usd", "2.5", "--output-usd", "10")  # fmt: skip
    busy = (429, {"Retry-After": "0"}, "")
    state.fault = lambda _question, before: completion("I would rather not say.") if before else busy
    refused = cli.run(*words, "--json", code=1)
    error = json.loads(refused.stdout)["error"]
    assert "stamina" not in refused.stderr  # a retry is nobody's business
    assert (
        error["code"] == "judge" and "none of the 12 answers" in error["message"]
    )  # 3 tries, 2 items, 2 repeats
    assert cli.show(RUN)["summary"]["evaluations"] == []

    (cli.home / "judge" / "answers.jsonl").unlink()
    said = [json.loads(line) for line in (cli.home / "judge" / "responses.jsonl").read_text().splitlines()]
    worth = {(row["response"] or "(empty)"): 80 if row["model"] == RUN else 30 for row in said}
    assert len({row["model"] for row in said}) == 2 and set(worth.values()) == {80, 30}

    def graded(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        state.seen.append(body)
        parts = body["messages"][1]["content"].split("\n\nReply with one JSON")[0].split("Answer ")[1:]
        found = dict(part.split(":\n", 1) for part in parts)
        return completion(json.dumps({label: worth[text.strip()] for label, text in found.items()}))

    state.reply = graded
    before = len(state.seen)
    table = cli.json(*words)
    assert {row["model"]: row["score"] for row in table["rows"]} == {RUN: 80.0, str(made[1]): 30.0}
    assert len(state.seen) - before == 4 and table["cost_usd"] == pytest.approx(4 * 350 / 1e6)
    assert table["recorded"] == [RUN]
    (item,) = cli.show(RUN)["summary"]["evaluations"]
    assert (item["score"], item["panel"], item["kind"]) == (80.0, table["panel"], "judge")
    assert item["name"] == f"judge stub-judge {table['panel']}" and item["judged_with"] == sorted(
        [RUN, str(made[1])]
    )
    told = cli.run(*words).stdout
    assert len(state.seen) - before == 4 and f"panel {table['panel']}" in told and "80.0" in told
    assert "80.0 (80.0 to 80.0), judged beside" in cli.run("show", RUN).stdout
