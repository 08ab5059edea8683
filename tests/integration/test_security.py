"""What must never leave its place: secrets; and what must never get in: code in a checkpoint, paths from a node, shell in a name."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from orchestrator.remote.connection import RemoteError
from orchestrator.remote.transfer import TransferError
from orchestrator.site import collect
from runs.record import CheckpointRecord
from tests.cli import Cli, spec
from tests.nodes import Node, node  # noqa: F401
from tests.plain_trainer import plain_trainer
from trainer import manifest, processes

SECRET = "hf_" + "s3cr3tS3CR3T" * 2
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def cli(cli: Cli) -> Cli:
    """A CLI whose caller has a token."""
    cli.env["HF_TOKEN"] = SECRET
    return cli


def environment_of(process: psutil.Process) -> str:
    """The value of HF_TOKEN in a living process, "" where it has none or is gone."""
    try:
        return process.environ().get("HF_TOKEN", "")
    except (psutil.Error, OSError):
        return ""


@pytest.mark.slow
def test_a_secret_reaches_the_trainer_and_nothing_else(cli: Cli) -> None:
    """Not in any command line, not in the environment of what watches on the node, and not in any file
    once it trains."""
    (cli.home / "run.yaml").write_text(
        spec(train__steps=2000, node={"secrets": ["HF_TOKEN"]}, trainer={"path": plain_trainer(cli.home)})
    )
    cli.run("launch", "run.yaml", "--detach")
    run = cli.only()
    (folder,) = cli.wait(lambda: list(cli.home.glob(f"node-home/*/llmctl/runs/{run}")))
    cli.wait(lambda: processes.marked(folder))
    trainer = set(processes.marked(folder))
    running = cli.processes()
    assert trainer <= {process.pid for process in running}
    for process in running:
        assert all(SECRET not in word for word in process.cmdline())
        on_node = bool(process.environ().get("LLMCTL_NODE_DIRECTORY"))
        if process.pid in trainer:
            assert environment_of(process) == SECRET
        elif on_node or "local_node" in " ".join(process.cmdline()):
            assert environment_of(process) == "", process.cmdline()
    assert files_with_the_secret(cli.home) == [], "the supervisor has taken it from the node's disk"
    cli.run("stop", run)
    assert files_with_the_secret(cli.home) == []
    shown = cli.run("show", run, "--json").stdout + cli.driver_log() + (folder / "train.log").read_text()
    assert SECRET not in shown


@pytest.mark.slow
def test_wandb_s_key_reaches_the_reporter_on_the_node_and_nothing_else(cli: Cli) -> None:
    """Not the trainer, no command line, no file, also not one of wandb's own. There is no network: its steps come home offline."""
    pytest.importorskip("wandb")
    cli.env |= {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    wandb = {"mode": "online", "from": "node"}
    (cli.home / "run.yaml").write_text(
        spec(train__steps=1_000_000, wandb=wandb, trainer={"path": plain_trainer(cli.home)})
    )
    cli.run("launch", "run.yaml", "--detach")
    run = cli.only()
    (folder,) = cli.wait(lambda: list(cli.home.glob(f"node-home/*/llmctl/runs/{run}")))
    cli.wait(lambda: list(folder.glob("report/wandb/offline-run-*/run-*.wandb")))
    trainer = [psutil.Process(pid) for pid in processes.marked(folder)]
    (reporter,) = cli.running("../../report.py")
    assert reporter.environ()["WANDB_API_KEY"] == SECRET
    assert trainer and cli.running("supervise")
    for process in (*trainer, *cli.running("supervise")):
        assert "WANDB_API_KEY" not in process.environ()
    for process in cli.processes():
        with suppress(psutil.NoSuchProcess):
            assert all(SECRET not in word for word in process.cmdline())
    cli.run("stop", run)
    assert cli.left() == []
    assert files_with_the_secret(cli.home) == []
    assert list((cli.home / "runs" / run).glob("wandb/offline-run-*/run-*.wandb"))
    failed = [event for event in cli.show(run)["events"] if event["kind"] == "JobFailed"]
    assert failed and all("wandb is not reachable" in event["reason"] for event in failed), failed


def files_with_the_secret(root: Path) -> list[Path]:
    """Every file below `root` that holds it: the database, logs, crash reports and all."""
    found = []
    for path in root.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
                found.append(path)
        except FileNotFoundError:
            continue
    return found


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.proof}",)


def test_a_checkpoint_from_elsewhere_runs_no_code(tmp_path: Path) -> None:
    """training_state.pt is data. The bomb is a live one: plain unpickling sets it off."""
    torch = pytest.importorskip("torch")
    from trainer import checkpoint

    place, proof = tmp_path / "step-000010", tmp_path / "boom"
    place.mkdir()
    torch.save({"step": 10, "optimizer": Bomb(proof)}, place / "training_state.pt")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        checkpoint.load_state(place)
    assert not proof.exists()
    torch.load(place / "training_state.pt", weights_only=False)
    assert proof.exists()


def test_nothing_is_unpickled_anywhere() -> None:
    """Every torch.load says weights_only=True; pickle and its kin are not imported."""
    loads = 0
    for package in ("orchestrator", "provisioning", "runs", "trainer"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for item in ast.walk(ast.parse(path.read_text())):
                if isinstance(item, ast.Import | ast.ImportFrom):
                    names = {alias.name for alias in item.names} | {getattr(item, "module", None) or ""}
                    assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, path
                if isinstance(item, ast.Call) and ast.unparse(item.func) == "torch.load":
                    given = {word.arg: ast.unparse(word.value) for word in item.keywords}
                    assert given.get("weights_only") == "True", path
                    loads += 1
    assert loads


def offered(node: Node, names: list[str]) -> tuple[CheckpointRecord, Path]:  # noqa: F811
    """A checkpoint on the node whose manifest names such files."""
    place = node.home / "llmctl" / "runs" / "r" / "checkpoints" / "step-000010"
    place.mkdir(parents=True)
    body = b"from the node"
    entries = []
    for name in names:
        if (place / name).resolve().parent == place.resolve():
            (place / name).write_bytes(body)
        entries.append({"name": name, "sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)})
    (place / "manifest.json").write_text(json.dumps({"step": 10, "files": entries}))
    item = CheckpointRecord(
        step=10, sha256=manifest.digest(place), bytes=len(body), seen_at=datetime.now(UTC), attempt=1
    )
    return item, place


@pytest.mark.parametrize(
    "name", ["../../escaped", "/tmp/escaped-from-the-node", "sub/../../escaped", "..", ""]
)
def test_names_in_a_manifest_stay_within_its_folder(node: Node, tmp_path: Path, name: str) -> None:  # noqa: F811
    """A manifest that leads elsewhere is refused as a whole, with a reason."""
    item, _ = offered(node, [name])
    (node.home / "llmctl" / "runs" / "escaped").write_bytes(b"from the node")
    here = tmp_path / "here" / "checkpoints"
    before = sorted(path for path in tmp_path.rglob("escaped*"))
    with node.remote() as remote, pytest.raises(collect.VerificationError, match="manifest"):
        collect.pull(remote, "~/llmctl/runs/r", item, here)
    assert sorted(path for path in tmp_path.rglob("escaped*")) == before
    assert not Path("/tmp/escaped-from-the-node").exists()
    assert list(here.glob("step-*")) == []


def test_a_link_on_the_node_brings_no_link_here(node: Node, tmp_path: Path) -> None:  # noqa: F811
    """What arrives is a regular file or nothing: a link would make a later write go elsewhere."""
    item, place = offered(node, ["model.safetensors", "config.json", "training_state.pt"])
    (place / "training_state.pt").unlink()
    victim = tmp_path / "victim"
    victim.write_bytes(b"from the node")
    (place / "training_state.pt").symlink_to(victim)
    here = tmp_path / "here" / "checkpoints"
    with node.remote() as remote, suppress(collect.VerificationError, RemoteError, TransferError):
        collect.pull(remote, "~/llmctl/runs/r", item, here)
    assert [path for path in here.rglob("*") if path.is_symlink()] == []
    assert victim.read_bytes() == b"from the node"


@pytest.mark.parametrize("name", ["x; touch pwned", "$(touch pwned)", "a/../../b", "UPPER", "a\nb", "`id`"])
def test_a_run_name_is_never_shell(cli: Cli, name: str) -> None:
    """It is refused before anything happens."""
    (cli.home / "run.yaml").write_text(spec(name=name))
    failed = cli.run("launch", "run.yaml", code=3)
    assert "name" in failed.stderr
    assert not list(cli.home.rglob("pwned"))


@pytest.mark.slow
def test_values_for_the_trainer_are_never_shell(cli: Cli) -> None:
    """A plain value with everything in it that a shell would obey arrives as it is. Nor is a name that looks like an option one."""
    value = "$(touch pwned) `touch pwned`; touch pwned 'x' \"y\" \\ $HOME *"
    (cli.home / "run.yaml").write_text(
        spec(
            name="-rf",
            train__steps=2000,
            node={"env": {"PLAIN": value}},
            trainer={"path": plain_trainer(cli.home)},
        )
    )
    cli.run("launch", "run.yaml", "--detach")
    run = cli.only()
    (folder,) = cli.wait(lambda: list(cli.home.glob(f"node-home/*/llmctl/runs/{run}")))
    pid = cli.wait(lambda: processes.marked(folder))[0]
    assert psutil.Process(pid).environ()["PLAIN"] == value
    cli.run("stop", "--now", "--", run)
    assert not list(cli.home.rglob("pwned"))
