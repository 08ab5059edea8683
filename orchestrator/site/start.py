"""The start of the trainer on each node of an attempt: job.json, the secrets, the supervisor."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator.life import terms
from orchestrator.remote.node import Remote
from orchestrator.site import findings
from runs import tuning
from runs.record import RunRecord
from trainer.watchdog import SCRATCH

SECRETS_FILE = "secrets.env"
"""In the run's directory on a node, 0600, until the supervisor has read it."""


RANK_PREFIX = "[rank ${rank}] "
_TORCHRUN = (
    "import gc; gc.disable(); from torch.distributed.run import main; gc.freeze(); gc.enable(); main()"
)
"""torchrun begins and ends a fifth sooner where what it loads is not searched for garbage."""
GATHER_SECONDS = 60
"""A torchrun that has not met all others for this long ends, and is started again."""


def port(token: str) -> int:
    """The rendezvous port of a token: below those that systems give away, and rarely that of another run beside it."""
    return 20_000 + zlib.crc32(token.encode()) % 10_000


def rendezvous(token: str, addresses: Sequence[str], rank: int) -> list[str]:
    """torchrun's arguments for node `rank` of several.

    The static rendezvous: c10d's gives out ranks in the order of the addresses as texts, so that rank 0, which writes
    checkpoints and metrics, would not be on the node where the driver looks for them.
    """
    return ["--nnodes", str(len(addresses)), "--node-rank", str(rank), "--rdzv-backend", "static", "--rdzv-id", token,
            "--master-addr", addresses[0], "--master-port", str(port(token)), "--local-addr", addresses[rank],
            "--rdzv-conf", f"timeout={GATHER_SECONDS}"]  # fmt: skip


def interface_env(interface: str) -> dict[str, str]:
    """What makes NCCL and gloo use that network interface."""
    return {"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface}


def torchrun(python: str, meeting: Sequence[str], processes: int) -> list[str]:
    """The command that starts so many processes of the module that follows it, in a run's directory."""
    return [
        python,
        "-c",
        _TORCHRUN,
        *meeting,
        "--log-dir",
        SCRATCH,
        "--nproc-per-node",
        str(processes),
    ]


def directory(run: str) -> str:
    """A run's directory on its nodes."""
    return f"~/llmctl/runs/{run}"


def bare(path: str) -> str:
    """A path below the home directory as an argument."""
    return path.removeprefix("~/")


@dataclass(frozen=True)
class Start:
    """One node's part in starting the trainer."""

    token: str
    deadline: datetime | None
    rank: int
    environment: Mapping[str, Any]
    cpus: int = 1
    addresses: Sequence[str] = ("",)
    """Of all nodes, on their private network; the first has the rendezvous."""
    interface: str = ""
    """The node's interface in that network."""


def start(remote: Remote, run: RunRecord, secrets: Mapping[str, str], how: Start) -> None:
    """Write job.json and start the supervisor; harmless where it runs under the same token."""
    place = directory(run.run)
    secrets_file = None
    if secrets:
        secrets_file = SECRETS_FILE
        body = "".join(f"{name}={value}\n" for name, value in secrets.items())
        remote.write(f"{place}/{secrets_file}", body.encode(), 0o600)
    remote.write(f"{place}/job.json", json.dumps(job(run, how, secrets_file), indent=1).encode(), 0o644)
    remote.run(["rm", "-f", *(bare(f"{place}/{name}") for name in ("stop", "stop-request.json"))])
    if how.deadline is not None:  # for a supervisor that runs already: `extend` moved its deadline
        remote.write(f"{place}/deadline", f"{how.deadline.timestamp():.0f}\n".encode(), 0o644)
    argv = [how.environment["python"], "-m", "trainer", "supervise", "start"]
    remote.detach(argv, cwd=place, log="supervisor.log")


def forget_secrets(remote: Remote, run: RunRecord) -> None:
    """Remove what no supervisor took, because it never lived or its token had ended already."""
    remote.run(["rm", "-f", bare(f"{directory(run.run)}/{SECRETS_FILE}")])


def job(run: RunRecord, how: Start, secrets_file: str | None) -> dict[str, Any]:
    """`job.json`: what the supervisor runs, and until when."""
    assert run.attempt is not None
    nodes = len(how.addresses)
    processes = max(1, run.attempt.world_size // nodes)
    meeting, env = ["--standalone"], {}
    if nodes > 1:
        # Each line of each rank comes with its number: of one node alone, only rank 0 has anything to say.
        meeting = [*rendezvous(how.token, how.addresses, how.rank), "--tee", "3"]
        env = {**interface_env(how.interface), "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": RANK_PREFIX}
    argv = [*torchrun(how.environment["python"], meeting, processes), "--max-restarts", "0",
            "-m", *tuning.entry(run.spec), "--config", "config.json", "--out", "."]  # fmt: skip
    threads = max(1, how.cpus // processes) if run.spec["train"]["device"] == "cpu" else 1
    env = {
        **env,
        "LLMCTL_TRAINER_CACHE": f"../../found/{findings.key(run)}",  # from runs/RUN
        "OMP_NUM_THREADS": str(threads),
        **how.environment.get("env", {}),
        **run.spec["node"]["env"],
    }
    return {
        "token": how.token,
        "argv": argv,
        "env": {name: str(value) for name, value in env.items()},
        "secrets_file": secrets_file,
        "max_restarts": run.spec["node"]["max_restarts"],
        "deadline": how.deadline.timestamp() if how.deadline else None,
        "grace_seconds": terms.grace_seconds(run),
        "nodes": nodes,
        "watch_interruption": how.environment.get("spot", False),
    }
