"""Three lanes side by side on a fresh node (code, environment, data), after its preflight.

What a lane did is remembered on the node by content hash, so that a retry, and the next run there, do nothing twice. The
trainer may start when code and environment are there and with them the first training shard and the validation shards;
the rest of the data arrives beside the steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trainer
from orchestrator.data import needed, sources
from orchestrator.remote import transfer
from orchestrator.remote.connection import CommandFailed
from orchestrator.remote.node import Remote
from orchestrator.site import environment, findings, preflight
from orchestrator.site.collect import here
from orchestrator.site.group import Group, Member, NoPrivateNetwork, interface, kill, private_address
from orchestrator.site.preflight import PreflightError
from orchestrator.site.start import bare, directory, torchrun
from provisioning.base import ProviderError
from provisioning.objects import S3
from runs.record import NodeRecord, RunRecord
from runs.sections import RunSpec
from trainer import config, manifest, reading

DATA = "~/llmctl/data"
"""Shards by content hash, shared by the runs of a node."""
CODE = "~/llmctl/code"
"""Trainer packages by content hash; `trainer` in a run's directory is a link to one."""


_KEEP = """
[ -w "${1%/*}" ] || exit 0
for name in data environments; do
  mkdir -p "$1/$name" llmctl && { [ -e "llmctl/$name" ] || ln -s "$1/$name" "llmctl/$name"; }
done
"""
"""Shards and environments live in the cache, where it is mounted and nothing is on the node's own disk yet."""


class PrepareError(Exception):
    """A lane cannot be completed; `fatal`: not on any node."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


@dataclass(frozen=True)
class Plan:
    """What is sent to a node, worked out before one is rented."""

    home: Path
    data: sources.DataPlan
    config: config.TrainerConfig
    """Paths as the spec has them; `node_config` puts the node's in."""
    trainer_path: Path
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    objects: S3 | None = None
    """The buckets that the run reads or pushes to; None: none."""
    spec: RunSpec | None = None
    """Of a run that tunes or measures a model: its section is what the trainer reads."""
    cache: str | None = None
    """A folder on the node that outlives it."""

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, by the run's tokenizer."""
        return sources.decode(self.config.data.tokenizer, tokens)


@dataclass(frozen=True)
class Lane:
    """A lane that is complete."""

    hash: str
    seconds: float
    sent_bytes: int = 0
    detail: dict[str, Any] = field(default_factory=dict)


Done = Callable[[str, Lane], None]


def trainer_path(spec: dict[str, Any]) -> Path:
    """The package that is sent: the spec's own, or ours."""
    chosen = spec["trainer"]["path"]
    return Path(chosen) if chosen else Path(trainer.__file__).parent


def package_hash(path: Path) -> str:
    """The content of a trainer package."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if "__pycache__" in file.parts or not file.is_file():
            continue
        digest.update(f"{file.relative_to(path)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def prepare(
    remote: Remote,
    run: RunRecord,
    node: NodeRecord,
    plan: Plan,
    done: Done,
    *,
    group: Group | None = None,
    found: Path,
) -> None:
    """All lanes of one node. `done(name, lane)` is called as each completes, `ready` among them as soon as training can
    start; returns when all data is there. `group`: the nodes of the attempt, where there are several. `found`: what an
    earlier run found out (`findings`). Raises PreflightError, PrepareError, RemoteError, TransferError, TimeoutError."""
    if plan.cache is not None:
        remote.run(["sh", "-c", _KEEP, "sh", plan.cache])
    preflight.check(remote, run, node, plan.data, bare(DATA))
    first = group is None or node.key == group.keys[0]
    if run.attempt is not None and run.attempt.number > 1 and run.attempt.token is None:
        kill([remote], run.run)  # what an earlier attempt left on a machine of the user's own
    remote.run(["mkdir", "-p", *(bare(path) for path in (f"{directory(run.run)}/checkpoints", DATA))])
    progress = _Progress(done, plan_hash(plan))
    lanes: dict[str, Callable[[], None]] = {
        "code": lambda: _code(remote, run, plan, progress.complete),
        "environment": lambda: _environment(remote, run, progress.complete),
        "data": lambda: _data(remote, plan, progress.complete, None if first else group),
    }
    if found.is_dir():
        lanes["findings"] = lambda: _findings(remote, run, found, progress.complete)
    if group is not None:
        lanes["network"] = lambda: _network(remote, node, group, progress)
    if first and run.attempt is not None and run.attempt.from_step:  # rank 0 reads it, and tells the others
        lanes["checkpoint"] = lambda: _checkpoint(remote, run, progress.complete)
    if run.spec["train"]["device"] == "cuda":
        lanes["gpus"] = lambda: _gpus(remote, run, progress)
    progress.waiting = {*lanes, "first shards"} - {"data"}
    with ThreadPoolExecutor(len(lanes), thread_name_prefix="lane") as pool:
        futures = [pool.submit(progress.guard, lane) for lane in lanes.values()]
    for future in futures:
        future.result()


class _Progress:
    """Which lanes are complete; says `ready` once, when training can start."""

    def __init__(self, done: Done, data_hash: str) -> None:
        self.waiting: set[str] = set()
        self.lanes: dict[str, Lane] = {}
        self._done, self._hash, self._started = done, data_hash, time.monotonic()
        self._changed = threading.Condition()
        self._broken = False

    def complete(self, name: str, lane: Lane) -> None:
        """A lane is done."""
        with self._changed:
            self.lanes[name] = lane
            last = name in self.waiting and len(self.waiting) == 1
            self.waiting.discard(name)
            self._changed.notify_all()
        self._done(name, lane)
        if last:
            self._done("ready", Lane(self._hash, time.monotonic() - self._started))

    def guard(self, lane: Callable[[], None]) -> None:
        """Run a lane; when it fails, those that wait for it are let go."""
        try:
            lane()
        except BaseException:
            with self._changed:
                self._broken = True
                self._changed.notify_all()
            raise

    def wait_for(self, *names: str) -> bool:
        """Until those lanes are complete; False when one of the others failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._broken or all(name in self.lanes for name in names))
            return not self._broken


# ---------------------------------------------------------------- lanes


def _code(remote: Remote, run: RunRecord, plan: Plan, complete: Done) -> None:
    """The trainer package, by content hash and shared by the runs of a node, and config.json."""
    started, name = time.monotonic(), package_hash(plan.trainer_path)
    sent = transfer.push_tree(remote, plan.trainer_path, f"{CODE}/{name}")
    remote.run(["sh", "-c", _LINK, "sh", f"../../code/{name}", bare(f"{directory(run.run)}/trainer")])
    body = json.dumps(node_config(plan, run), indent=1).encode()
    remote.write(f"{directory(run.run)}/config.json", body, 0o644)
    key = hashlib.sha256(name.encode() + body).hexdigest()[:16]
    complete("code", Lane(key, time.monotonic() - started, sent.bytes_sent, {"method": sent.method}))


_LINK = '[ -L "$2" ] || rm -rf -- "$2"; ln -sfn -- "$1" "$2"'


def _findings(remote: Remote, run: RunRecord, found: Path, complete: Done) -> None:
    """Compiled code and a microbatch size of an earlier run. Without them the trainer starts later, and nothing else."""
    started = time.monotonic()
    try:
        sent = transfer.push_tree(remote, found, findings.place(run))
    except transfer.TransferError:
        sent = transfer.Transfer(0, 0, 0.0, "unchanged")
    complete(
        "findings", Lane(found.name, time.monotonic() - started, sent.bytes_sent, {"method": sent.method})
    )


def _environment(remote: Remote, run: RunRecord, complete: Done) -> None:
    """An interpreter with torch, numpy and safetensors."""
    started = time.monotonic()
    found = environment.ensure(remote, run.spec["node"]["python"], cuda=run.spec["train"]["device"] == "cuda")
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    complete("environment", Lane(key, time.monotonic() - started, 0, found))


def _gpus(remote: Remote, run: RunRecord, progress: _Progress) -> None:
    """Every process sees its GPU, and they talk to each other fast enough (`trainer.preflight`)."""
    started = time.monotonic()
    if not progress.wait_for("code", "environment"):
        return
    found = progress.lanes["environment"].detail
    assert run.attempt is not None
    processes = max(1, run.attempt.world_size // len(run.attempt.keys))
    argv = [*torchrun(found["python"], ["--standalone"], processes), "-m", "trainer", "preflight"]
    command = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", bare(directory(run.run)), *argv]
    result = remote.run(command, timeout=300, check=False, env=found["env"])
    if result.exit_code != 0:
        told = [
            line
            for line in result.stderr.decode(errors="replace").splitlines()
            if line.startswith("preflight:")
        ]
        raise PreflightError(told[0] if told else f"the all-reduce test ended with {result.exit_code}")
    detail = json.loads(result.text.splitlines()[-1])
    progress.complete("gpus", Lane(str(detail["torch"]), time.monotonic() - started, 0, detail))


def _network(remote: Remote, node: NodeRecord, group: Group, progress: _Progress) -> None:
    """The nodes find each other on their private network, and it is fast enough."""
    started = time.monotonic()
    if not progress.wait_for("code", "environment"):
        return
    try:
        address = private_address(node)
        name = interface(remote, address)
        member = Member(remote, address, name, progress.lanes["environment"].detail)
        found = group.meet(node.key, member)
    except NoPrivateNetwork as error:
        raise PreflightError(str(error)) from error
    detail = {"address": address, "interface": name, **found}
    progress.complete("network", Lane(f"{address}%{name}", time.monotonic() - started, 0, detail))


def _data(remote: Remote, plan: Plan, complete: Done, group: Group | None = None) -> None:
    """The first training shard and everything held out, then the rest; nothing that is there already. With a `group`: what
    leaves this machine goes to its first node alone, and from there to this one."""
    started, sent = time.monotonic(), 0
    shards = plan.data.shards
    first = [item for item in shards if item.node_name in plan.data.first]
    rest = [item for item in shards if item.node_name not in plan.data.first]
    for name, wanted in (("first shards", first), ("data", rest)):
        here_now = {f"{DATA}/{item.node_name}": item.path for item in wanted if item.path is not None}
        passed = group is not None and bool(here_now) and _pass_on(remote, name, wanted, group)
        moved = transfer.push(remote, here_now, immutable=True)  # whatever was passed on is there already
        sent += moved.bytes_sent
        _pull_on_node(remote, [item for item in wanted if item.url is not None], plan.secrets, plan.objects)
        method = "node to node" if passed and not moved.bytes_sent else moved.method
        complete(name, Lane(plan_hash(plan), time.monotonic() - started, sent, {"method": method}))


def _pass_on(remote: Remote, name: str, wanted: Sequence[sources.Shard], group: Group) -> bool:
    """Fetch shards from the first node; False where that did not work, and they must come from here."""
    url = group.shared(name)
    if url is None:
        return False
    files = [
        {"url": f"{url}{item.node_name}", "path": f"{bare(DATA)}/{item.node_name}", "bytes": item.bytes,
         "sha256": item.sha256}
        for item in wanted if item.path is not None
    ]  # fmt: skip
    try:
        _run_pull(remote, files, {"NO_PROXY": "*", "no_proxy": "*"})
    except PrepareError:
        group.forget_share()
        return False
    return True


def _pull_on_node(
    remote: Remote, shards: Sequence[sources.Shard], secrets: Mapping[str, str], objects: S3 | None
) -> None:
    """Let the node fetch what has a URL, with many ranges in parallel; a token that it needs is in that process's
    environment alone."""
    if not shards:
        return
    try:
        # Signed now, not when the run was planned: a try that is made again has addresses that are good again.
        wanted = [sources.pull_item(item, f"{bare(DATA)}/{item.node_name}", objects) for item in shards]
    except ProviderError as error:
        raise PrepareError(f"the data's addresses could not be signed: {error}") from error
    _run_pull(remote, wanted, secrets)


def _run_pull(remote: Remote, wanted: Sequence[Mapping[str, Any]], env: Mapping[str, str]) -> None:
    """`trainer/pull.py` on the node. Raises PrepareError."""
    body = json.dumps({"files": wanted}).encode()
    name = f"llmctl/pull-{hashlib.sha256(body).hexdigest()[:12]}.json"
    remote.write(f"~/{name}", body, 0o600)
    script = Path(trainer.__file__).with_name("pull.py").read_bytes()
    remote.write("~/llmctl/pull.py", script, 0o644)
    try:
        remote.run(["python3", "llmctl/pull.py", "--manifest", name], timeout=6 * 3600, env=env)
    except CommandFailed as error:
        raise PrepareError(f"the node could not fetch its data: {error}") from error
    finally:
        remote.run(["rm", "-f", name])


def _checkpoint(remote: Remote, run: RunRecord, complete: Done) -> None:
    """The newest whole checkpoint of an earlier attempt, as `checkpoints/latest` of this node."""
    started = time.monotonic()
    assert run.attempt is not None
    item = run.checkpoints[run.attempt.from_step]
    local = here(Path(item.path or ""))
    if local is None:
        raise PrepareError(f"the checkpoint of step {item.step} is not at {item.path} any more", fatal=True)
    name = manifest.directory_name(item.step)
    target = f"{directory(run.run)}/checkpoints"
    sent = transfer.push_tree(remote, local.path, f"{target}/{name}")
    remote.run(["ln", "-sfn", name, bare(f"{target}/latest")])
    complete(
        "checkpoint",
        Lane(local.sha256[:16], time.monotonic() - started, sent.bytes_sent, {"method": sent.method}),
    )


# ---------------------------------------------------------------- what the trainer reads


def plan_hash(plan: Plan) -> str:
    """The content of a run's data."""
    return hashlib.sha256("\n".join(item.node_name for item in plan.data.shards).encode()).hexdigest()[:16]


def node_config(plan: Plan, run: RunRecord) -> dict[str, Any]:
    """`config.json`: the spec's sections with the node's paths, prompts as tokens."""
    values = reading.to_dict(plan.config)
    up = "../../data"  # from runs/RUN to data
    values["data"]["train"] = [f"{up}/{item.node_name}" for item in plan.data.train]
    values["data"]["validation"] = [f"{up}/{item.node_name}" for item in plan.data.validation]
    counts = [item.tokens for item in plan.data.train]
    values["data"]["train_tokens"] = counts if all(counts) else None
    values["evaluate"]["test_sets"] = [
        {**reading.to_dict(item.test_set), "data": [f"{up}/{shard.node_name}" for shard in item.shards]}
        for item in plan.data.test_sets
    ]
    values["evaluate"]["prompt_tokens"] = plan.data.prompt_tokens
    if plan.spec is not None and plan.spec.tune is not None:
        section = needed.node_section(plan.spec, plan.data, up)
        return {**section, "checkpoint": values["checkpoint"], "evaluate": values["evaluate"]}
    chosen = run.attempt.microbatch_size if run.attempt else None
    if chosen is not None:
        values["train"]["microbatch_size"] = chosen
    return values


def secret_values(names: Sequence[str]) -> dict[str, str]:
    """The named values of the caller's environment that are set."""
    return {name: os.environ[name] for name in names if os.environ.get(name)}
