"""The program as scripts see it: JSON, exit codes, streams and the modules that it loads, over a seeded store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runs import events as e
from runs.lock import Lock, driver_lock
from runs.store import Store
from tests.cli import Cli, spec
from tests.seeds import Seed, at

HEAVY = {
    "torch",
    "fabric",
    "paramiko",
    "boto3",
    "botocore",
    "httpx2",
    "asyncssh",
    "wandb",
    "numpy",
    "plotext",
    "jinja2",
    "ruamel",
}
COMMANDS = ["init", "doctor", "offers", "plan", "launch", "resume", "status", "tail", "show", "stop", "extend", "fetch-checkpoint",
            "ssh", "rm", "reap", "compare", "report", "sample", "evaluate", "judge", "export", "data"]  # fmt: skip


def modules(cli: Cli, *words: str) -> set[str]:
    """Top-level modules that a command loads."""
    code = (
        "import sys\nfrom orchestrator.cli import main\ntry:\n main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.stderr.write('\\n'.join({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=cli.env, capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


# ---------------------------------------------------------------- starting up


def test_help_loads_nothing_heavy_and_names_every_command_and_exit_code(cli: Cli) -> None:
    assert modules(cli, "--help") & HEAVY == set()
    text = cli.run("--help").stdout
    assert all(name in text for name in COMMANDS)
    assert "103 run stopped" in " ".join(text.split()) and "8 an instance may still be billing" in " ".join(
        text.split()
    )
    assert "internal-" not in text


def test_status_json_needs_neither_parser_nor_models(cli: Cli) -> None:
    Seed(cli.home).finished()
    assert modules(cli, "status", "--json") & (HEAVY | {"pydantic", "rich", "typer", "platformdirs"}) == set()
    assert modules(cli, "status", "demo", "-o", "json") & {"pydantic", "rich", "typer"} == set()


@pytest.mark.parametrize(
    ("words", "env", "budget"),
    [
        (("--help",), {}, 400),
        (("status", "--json"), {}, 150),
        ((), {"_LLMCTL_COMPLETE": "complete_bash", "COMP_WORDS": "llmctl show d", "COMP_CWORD": "2"}, 150),
        ((), {"_LLMCTL_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "llmctl init --recipe "}, 150),
    ],
    ids=["help", "status", "completion of a run", "completion of a recipe"],
)
def test_a_budget_of_modules(cli: Cli, words: tuple[str, ...], env: dict[str, str], budget: int) -> None:
    """An empty Python has about 60. What is loaded before the first word is said is what starting up costs."""
    Seed(cli.home).finished()
    code = (
        "import sys\nfrom orchestrator.cli import main\ntry:\n main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.stderr.write('\\n'.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=cli.env | env, capture_output=True, text=True, check=True
    )
    loaded = done.stderr.split()
    assert done.stdout and len(loaded) <= budget
    assert words == ("--help",) or not {"typer", "pydantic", "rich"} & set(loaded)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(cli: Cli, command: str) -> None:
    text = cli.run(command, "--help").stdout
    assert "Usage: llmctl" in text
    assert command == "data" or "Examples" in text


def test_completion_reads_the_store_and_nothing_else(cli: Cli) -> None:
    Seed(cli.home).finished()
    Seed(cli.home, "other-0002").driven()
    env = {**cli.env, "_LLMCTL_COMPLETE": "complete_bash", "COMP_WORDS": "llmctl show d", "COMP_CWORD": "2"}
    llmctl = Path(sys.executable).parent / "llmctl"
    done = subprocess.run([llmctl], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["demo-0001"]
    env |= {"COMP_WORDS": "llmctl init --recipe 8xh", "COMP_CWORD": "3"}
    assert subprocess.run([llmctl], env=env, capture_output=True, text=True, check=False).stdout.split() == [
        "8xh100"
    ]


@pytest.mark.parametrize(
    "words", [("--help",), ("status",), ("status", "--json"), ("show", "demo"), ("show", "demo", "--json"), ("compare",),
              ("tail", "demo", "--no-follow"), ("plan", "--help"), ("show", "nope", "--json"), ("show", "nope")],
)  # fmt: skip
def test_a_reader_that_has_gone_is_no_error(cli: Cli, words: tuple[str, ...]) -> None:
    """`llmctl ... | head`: nothing is said, and the code is that of any program which SIGPIPE ends, or the command's own."""
    Seed(cli.home).finished()
    (cli.home / "runs" / "demo-0001").mkdir(parents=True, exist_ok=True)
    (cli.home / "runs" / "demo-0001" / "train.log").write_text("a line\n")
    for deaf in ({"stdout"}, {"stdout", "stderr"}):
        reader, writer = os.pipe()
        os.close(reader)
        process = cli.start(*words, **dict.fromkeys(deaf, writer))
        os.close(writer)
        said = process.communicate(timeout=60)[1] or ""
        if "nope" in words:
            assert process.returncode in {102, 141} and "Traceback" not in said
        else:
            assert (process.returncode, said) == (141, "")


# ---------------------------------------------------------------- nothing there


def test_looking_at_nothing_creates_nothing(cli: Cli) -> None:
    assert cli.json("status") == []
    assert not (cli.home / "llmctl.db").exists()
    assert cli.json("compare") == []


@pytest.mark.parametrize(
    "words",
    [("show",), ("tail",), ("stop",), ("fetch-checkpoint",), ("ssh",), ("show", "nope"), ("rm", "nope")],
)
def test_no_such_run_is_102_in_both_forms(cli: Cli, words: tuple[str, ...]) -> None:
    done = cli.run(*words, code=102)
    assert done.stdout == "" and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    if words[0] != "ssh":
        assert cli.json(*words, code=102)["error"]["code"] == "no-such-run"


def test_usage_errors_are_2_and_json_when_json_is_asked_for(cli: Cli) -> None:
    assert "Did you mean 'launch'" in cli.run("lunch", code=2).stderr
    assert cli.json("show", "--nonsense", code=2)["error"]["code"] == "usage"
    assert cli.run("compare", "--sort", "cost", code=2).stderr.count("cost_usd") == 1


def test_a_prefix_that_is_not_unique(cli: Cli) -> None:
    Seed(cli.home, "alpha-0001").finished()
    Seed(cli.home, "alphabet-0002").finished()
    assert cli.show("alpha")["run"] == "alpha-0001", "a name comes before a prefix"
    assert "several runs" in cli.run("show", "alph", code=2).stderr
    assert cli.show("alphab")["run"] == "alphabet-0002"


# ---------------------------------------------------------------- looking


def test_results_on_stdout_and_warnings_on_stderr(cli: Cli) -> None:
    Seed(cli.home).rented().trained(step=40)
    done = cli.run("status")
    assert "demo-0001" in done.stdout and "40/100" in done.stdout
    assert "1 node billing, $36.00/h" in done.stderr and "has no driver" in done.stderr
    assert "billing" not in done.stdout.replace("1 node billing", "")
    rows = json.loads(cli.run("status", "--json").stdout)
    assert rows[0]["driver"] is False
    lock = Lock(driver_lock(cli.home / "runs" / "demo-0001"))
    assert lock.acquire()
    try:
        assert cli.row("demo-0001")["driver"] is True
        assert "has no driver" not in cli.run("status").stderr
    finally:
        lock.release()


@pytest.mark.parametrize("columns", ["60", "200"])
def test_tables_keep_to_the_page(cli: Cli, columns: str) -> None:
    Seed(cli.home, "a-rather-long-name-for-a-run-0001").finished().logged()
    Seed(cli.home, "demo-0002").rented().trained(step=40)
    cli.env["COLUMNS"] = columns
    for words in (("status",), ("compare",), ("compare", "--published"), ("compare", "--plot")):
        text = cli.run(*words).stdout
        table = text.split("\n\n")[0].splitlines()  # prose below it is wrapped by the terminal
        assert max(len(line.rstrip()) for line in table) <= int(columns), words
        assert "\x1b" not in text


def test_an_end_that_nobody_confirmed_is_shouted_under_every_command(cli: Cli) -> None:
    seed = (
        Seed(cli.home)
        .rented()
        .trained()
        .tell(e.TerminateIntended(at=at(260), reason="x"))
        .ended("failed", "x")
    )
    for words in (("compare",), ("show",), ("status", "--json")):
        assert "MAY STILL BE BILLING" in cli.run(*words).stderr
    seed.tell(e.NodeGone(at=at(300), evidence="not found"))
    assert cli.run("compare").stderr == ""


def test_show_tells_the_whole_story(cli: Cli) -> None:
    Seed(cli.home).finished()
    text = cli.run("show").stdout
    for word in (
        "TIMELINE",
        "training",
        "$2.00",
        "$2.52",
        "overhead 20.6%",
        "100 best",
        "EVENTS",
        "succeeded: finished",
    ):
        assert word in text, word


def test_tail_prints_each_line_once_and_the_last_n(cli: Cli) -> None:
    Seed(cli.home).finished().logged(lines=500)
    assert cli.run("tail", "--no-follow").stdout.splitlines() == [f"line {index}" for index in range(500)]
    assert cli.run("tail", "demo", "--lines", "3").stdout.splitlines() == ["line 497", "line 498", "line 499"]
    assert [
        json.loads(line)["step"] for line in cli.run("tail", "--json", "-n", "2").stdout.splitlines()
    ] == [99, 100]


def test_tail_lets_no_escape_sequence_through(cli: Cli) -> None:
    seed = Seed(cli.home).finished()
    (seed.directory / "train.log").write_bytes(b"\x1b[2Jclean \xff\x1b]0;owned\x07text\n")
    done = cli.run("tail", "--no-follow")
    assert "\x1b" not in done.stdout and done.stdout.strip() == "clean \N{REPLACEMENT CHARACTER}text"


def test_compare_puts_loss_beside_dollars_in_every_form(cli: Cli) -> None:
    Seed(cli.home).finished().logged()
    Seed(cli.home, "other-0002", usd_per_hour=3.6).finished()
    Seed(cli.home, "none-0003").driven()
    rows = cli.json("compare", "--sort", "cost_usd")
    assert [(row["run"], row["cost_usd"]) for row in rows] == [
        ("none-0003", 0.0),
        ("other-0002", 0.252),
        ("demo-0001", 2.52),
    ]
    assert [row["validation_loss"] for row in rows] == [None, 2.7, 2.7]
    assert cli.run("compare", "--format", "csv").stdout.splitlines()[0].startswith("run,name,source,state")
    assert cli.run("compare", "--format", "md").stdout.startswith("| run |")
    assert cli.run("compare", "--format", "html").stdout.startswith("<table>")
    assert "loss over" in cli.run("compare", "--plot").stdout
    text = cli.run("compare", "--published").stdout
    # Two test sets, and a validation: each loss says on what, in a table of any width, and each source is named.
    assert "3.2722 c" in text and "3.6740 b" in text and "a validation-" in text and "c fineweb-llmc" in text
    assert "source: gilesthomas.com" in text and "0.070 *" in text
    published = cli.json("compare", "--published")
    assert {row["source"] for row in published} == {"run", "published"}
    (line,) = [row for row in cli.json("compare", "demo", "other", "--diff") if row["key"] == "cost_usd"]
    assert (line["demo-0001"], line["other-0002"]) == (2.52, 0.252)
    assert [row["runs"] for row in cli.json("compare", "--group-by", "state")] == [2, 1]


def test_report_is_one_file(cli: Cli) -> None:
    Seed(cli.home).finished().logged()
    told = cli.json("report", "--to", "report.html")
    page = (cli.home / "report.html").read_text()
    assert told == {"path": "report.html", "runs": 1, "bytes": len(page.encode())}


# ---------------------------------------------------------------- ending


def test_fetching_what_is_here_moves_no_byte_and_a_copy_is_whole(cli: Cli) -> None:
    seed = Seed(cli.home).finished()
    told = cli.json("fetch-checkpoint")
    assert set(told) == {"run", "step", "path", "sha256", "bytes", "verified"}
    assert (told["step"], told["verified"], told["path"]) == (
        100,
        True,
        str(seed.directory / "checkpoints" / "step-000100"),
    )
    assert [item["step"] for item in cli.json("fetch-checkpoint", "--which", "all")] == [50, 100]
    copy = cli.json("fetch-checkpoint", "--which", "50", "--to", "out", "--weights-only")
    assert sorted(path.name for path in Path(cli.home, copy["path"]).iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert cli.json("fetch-checkpoint", "--which", "7", code=7)["error"]["hint"].startswith("it has: 50, 100")


def test_weights_that_came_alone_are_what_there_is_once_the_node_is_gone(cli: Cli) -> None:
    """As after every success with `fetch: best`."""
    seed = Seed(cli.home).finished()
    newest = seed.directory / "checkpoints" / "step-000100"
    (newest / "training_state.pt").unlink()
    done = cli.run("fetch-checkpoint")
    assert done.stdout == f"{newest}\n" and "the weights alone" in done.stderr


def test_a_checkpoint_that_rotted_and_whose_node_is_gone_is_7(cli: Cli) -> None:
    seed = Seed(cli.home).finished()
    (seed.directory / "checkpoints" / "step-000100" / "model.safetensors").write_text("rotten")
    error = cli.json("fetch-checkpoint", code=7)["error"]
    assert error["code"] == "unverified" and "model.safetensors" in error["message"]


def test_rm_refuses_while_anything_bills_and_keeps_the_charges(cli: Cli) -> None:
    seed = Seed(cli.home).rented()
    assert "may be billing" in cli.run("rm", "demo", "-y", code=2).stderr
    seed.trained().released().ended()
    assert cli.run("rm", "demo", code=2).stderr.count("-y") == 1
    assert cli.json("rm", "demo", "-y") == {"removed": "demo-0001"}
    assert cli.json("status") == [] and not seed.directory.exists()
    assert Store(cli.home).node(seed.key) is not None


def test_stop_of_a_run_that_is_over_changes_nothing(cli: Cli) -> None:
    Seed(cli.home).finished()
    assert cli.json("stop")["state"] == "succeeded"


def test_resume_refuses_a_success_and_a_used_up_budget(cli: Cli) -> None:
    Seed(cli.home).finished()
    assert cli.json("resume", "demo", code=2)["error"]["run"] == "demo-0001"
    spent = (
        Seed(cli.home, "spent-0002", usd_per_hour=3600.0)
        .rented()
        .trained()
        .released()
        .ended("stopped", "budget")
    )
    assert cli.json("resume", "spent", code=5)["error"]["code"] == "over-budget"
    assert spent.record.resumes == 0


def test_extend_only_raises_and_only_what_lives(cli: Cli) -> None:
    Seed(cli.home).finished()
    assert "is over" in cli.run("extend", "demo", "--max-usd", "99", code=2).stderr
    Seed(cli.home, "alive-0002").driven()
    assert "only raised" in cli.run("extend", "alive", "--max-usd", "9", code=2).stderr
    assert "say what to raise" in cli.run("extend", "alive", code=2).stderr


# ---------------------------------------------------------------- beginning


def test_init_writes_a_recipe_once(cli: Cli) -> None:
    assert cli.json("init", "my.yaml", "--recipe", "8xh100") == {"path": "my.yaml", "recipe": "8xh100"}
    assert cli.run("init", "my.yaml", code=2).stderr.count("exists already") == 1
    assert cli.run("init", "other.yaml", "--recipe", "nope", code=2).stderr.count("quickstart") == 1
    assert not (cli.home / "other.yaml").exists()


def test_a_bad_spec_is_3_with_file_line_key_and_nearest_and_leaves_nothing(cli: Cli) -> None:
    (cli.home / "bad.yaml").write_text(
        "name: bad\nhardware: {provider: local}\ndata: {train: [x.bin]}\ntrain:\n  step: 5\n  global_batch_size: 8\n"
    )
    for command in ("plan", "launch"):
        text = cli.run(command, "bad.yaml", code=3).stderr
        assert "bad.yaml:5" in text and "train.step" in text and "steps" in text
    assert cli.json("plan", "missing.yaml", code=3)["error"]["message"].count("missing.yaml") >= 1
    assert cli.json("status") == []


def test_missing_and_torn_shards_are_3_before_a_run_exists(cli: Cli) -> None:
    (cli.home / "torn.bin").write_bytes(b"\x00" * 10)
    for shard in ("nowhere.bin", "torn.bin"):
        (cli.home / "run.yaml").write_text(spec(data={"train": [shard], "tokenizer": "bytes"}))
        assert cli.json("launch", "run.yaml", code=3)["error"]["code"] in {"data", "invalid"}
    assert cli.json("status") == []


def test_a_key_that_cannot_log_in_is_3_before_a_run_exists(cli: Cli) -> None:
    (cli.home / "garbage").write_text("no key")
    for key, said in (("/nope", "No such file"), ("garbage", "is not a private key")):
        hardware = {"provider": "ssh", "host": "127.0.0.1", "user": "me", "identity_file": key}
        (cli.home / "run.yaml").write_text(spec(hardware=hardware))
        assert said in cli.json("launch", "run.yaml", code=3)["error"]["message"]
    assert cli.json("status") == []


def test_a_home_that_cannot_be_written_is_one_clear_error(cli: Cli) -> None:
    (cli.home / "run.yaml").write_text(spec())
    (cli.home / "file").write_text("")
    cli.env["LLMCTL_HOME"] = str(cli.home / "file" / "home")
    done = cli.run("launch", "run.yaml", code=None)
    assert done.returncode == 3 and "LLMCTL_HOME" in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_where(cli: Cli) -> None:
    assert "Traceback" in cli.run("show", "nope", "--debug", code=1).stderr


def test_sample_says_which_extra_is_missing(cli: Cli) -> None:
    Seed(cli.home).finished()
    # A Python path whose torch cannot be found, as on a laptop without the extra.
    hide = cli.home / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\nu.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
    )
    cli.env["PYTHONPATH"] = os.pathsep.join([str(hide), cli.env.get("PYTHONPATH", "")])
    assert cli.json("sample", "demo", "hello", code=3)["error"]["hint"] == "pip install 'llmctl[trainer]'"


def test_reap_asks_before_it_ends_anything(cli: Cli) -> None:
    assert cli.json("reap") | {"errors": {}} == {
        "found": [],
        "terminated": [],
        "unconfirmed": [],
        "leftovers": [],
        "errors": {},
    }


@pytest.mark.skipif(shutil.which("ssh") is None, reason="OpenSSH's client is not installed")
def test_ssh_without_a_living_node(cli: Cli) -> None:
    Seed(cli.home).finished()
    assert "no node that could answer" in cli.run("ssh", "demo", code=2).stderr
