"""Several nodes as one: where they talk, whether they talk fast enough, shards from node to node, and what all of their
supervisors say together.

Nodes of one attempt talk over a private network and nothing is opened to the world: the rendezvous, the collectives and the
sharing of shards are bound to the private address of each node.
"""

from __future__ import annotations

import ipaddress
import json
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trainer
from orchestrator.life.world import TrainerView
from orchestrator.remote.connection import CommandFailed, CommandTimeout, RemoteError
from orchestrator.remote.node import Remote
from orchestrator.site.start import bare, directory, interface_env, rendezvous, torchrun
from runs.record import NodeRecord, RunRecord
from trainer.watchdog import REFUSALS

ODD_SECONDS = 20.0
"""How long the first node may train on, or wait, after another one's trainer has ended for good."""


class NoPrivateNetwork(Exception):
    """The nodes have no private network in common, or it does not carry what training needs."""


def private_address(node: NodeRecord) -> str:
    """The address at which the other nodes of its run reach a node. Raises NoPrivateNetwork."""
    address = node.private_ip
    if not address:
        raise NoPrivateNetwork(
            f"{node.key} has no private address, and nodes that train together talk over a private network alone; "
            "choose a region whose nodes have one, or nodes: 1"
        )
    try:
        public = ipaddress.ip_address(address).is_global
    except ValueError:
        raise NoPrivateNetwork(f"{node.key}: {address!r} is no address") from None
    if public:
        raise NoPrivateNetwork(
            f"{node.key} would be reached by the others at {address}, which is public: what the nodes of a run say to each "
            "other is not encrypted. Give its address on a private network, or choose nodes: 1"
        )
    return address


# ---------------------------------------------------------------- while they are prepared


@dataclass(frozen=True)
class Member:
    """One node that is ready for the test of the network."""

    remote: Remote
    address: str
    interface: str
    environment: Mapping[str, Any]


class Group:
    """The nodes of one attempt while they are prepared. Each node's lanes have threads of their own; here they meet."""

    def __init__(self, token: str, run: RunRecord, first: Remote) -> None:
        """`first`: the first node, where rank 0 will be and whose shards the others take."""
        assert run.attempt is not None
        self.token, self.keys = token, run.attempt.keys
        self._run, self._device = run.run, str(run.spec["train"]["device"])
        self._processes = max(1, run.attempt.world_size // len(self.keys))
        self._changed = threading.Condition()
        self._members: dict[str, Member] = {}
        self._outcome: dict[str, Any] | Exception | None = None
        self._passed = False
        self._lanes: set[str] = set()
        self._first = first
        self._sharing = threading.Lock()
        self._url: str | None = None
        self._over = threading.Event()
        """Nobody needs the first node's shards any more."""
        self._closed = False
        node = next(item for item in run.attempt_nodes() if item.key == self.keys[0])
        self._share_at = node.private_ip

    def close(self) -> None:
        """The attempt is over: nobody waits any more."""
        self._over.set()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def know(self, lanes: Sequence[str]) -> None:
        """Take in the lanes (`KEY/NAME`) that are done, by this driver or an earlier one."""
        with self._changed:
            self._lanes |= set(lanes)
            if all(f"{key}/data" in self._lanes for key in self.keys):
                self._over.set()
            self._passed = self._passed or any(name.endswith("/network") for name in lanes)
            self._changed.notify_all()

    # ------------------------------------------------------------ the network

    def meet(self, key: str, member: Member) -> dict[str, Any]:
        """Wait for the other nodes, test the network between all of them once, and return what was found, `{}` where that was
        known already. Raises NoPrivateNetwork on each node, RemoteError, TimeoutError after the attempt's end."""
        with self._changed:
            if self._passed:
                return {}
            self._members[key] = member
            if len(self._members) < len(self.keys):
                self._changed.wait_for(lambda: self._closed or self._passed or key not in self._members)
                if self._closed:
                    raise TimeoutError("the attempt is over")
                outcome = self._outcome
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome or {}
            members = [self._members[name] for name in self.keys]
        outcome = None
        try:
            outcome = self._test(members)
            return outcome
        except (NoPrivateNetwork, RemoteError) as error:
            outcome = error
            raise
        finally:
            with self._changed:
                self._outcome, self._passed = outcome, isinstance(outcome, dict)
                self._members.clear()
                self._changed.notify_all()

    def _test(self, members: Sequence[Member]) -> dict[str, Any]:
        """`trainer preflight` over all nodes: they find each other, and the all-reduce is above the floor."""
        token = f"{self.token}-{time.monotonic_ns()}"
        addresses = [member.address for member in members]

        def one(rank: int) -> tuple[int, str, str]:
            member = members[rank]
            meeting = rendezvous(token, addresses, rank)
            argv = [*torchrun(member.environment["python"], meeting, self._processes),
                    "-m", "trainer", "preflight", "--device", self._device]  # fmt: skip
            env = {
                "OMP_NUM_THREADS": "1",
                **member.environment.get("env", {}),
                **interface_env(member.interface),
            }
            script = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", bare(directory(self._run)), *argv]
            try:
                result = member.remote.run(script, timeout=240, check=False, env=env)
            except CommandTimeout:
                return 124, "", "preflight: it took more than 240 s"
            return result.exit_code, result.text, result.stderr.decode(errors="replace")

        with ThreadPoolExecutor(len(members)) as pool:
            results = list(pool.map(one, range(len(members))))
        if all(code == 0 for code, _, _ in results):
            found: dict[str, Any] = json.loads(results[0][1].splitlines()[-1])
            return found
        told = [line for _, _, text in results for line in text.splitlines() if line.startswith("preflight:")]
        where = ", ".join(f"{member.address} ({member.interface})" for member in members)
        raise NoPrivateNetwork(
            told[0].removeprefix("preflight: ") + f" between {where}"
            if told
            else f"the nodes {where} do not reach each other: is there a firewall between them? {_last(results)}"
        )

    # ------------------------------------------------------------ shards

    def shared(self, name: str) -> str | None:
        """Wait until the first node has what the lane `name` brings, and return where it shares its shards; None where it
        cannot. Raises TimeoutError after the attempt's end."""
        wanted = f"{self.keys[0]}/{name}"
        with self._changed:
            self._changed.wait_for(lambda: self._closed or wanted in self._lanes)
            if self._closed:
                raise TimeoutError("the attempt is over")
        with self._sharing:
            if self._url is None and self._share_at:
                self._url = _share(self._first, self._share_at, self._over)
            return self._url

    def forget_share(self) -> None:
        """It did not serve: the next one to ask starts another."""
        with self._sharing:
            self._url = None


def _last(results: Sequence[tuple[int, str, str]]) -> str:
    lines = [text.strip().splitlines()[-1] for code, _, text in results if code and text.strip()]
    return lines[0][:300] if lines else ""


def _share(remote: Remote, address: str, over: threading.Event) -> str | None:
    """Share the shards of a node at its private address until `over`, or until the connection ends; the URL below which they
    are. None: it does not work."""
    told: queue.Queue[str | None] = queue.Queue()

    def work() -> None:
        argv = ["python3", "llmctl/network.py", "share", "--address", address, "--directory", "llmctl/data"]
        heard = b""
        try:
            remote.write(
                "~/llmctl/network.py", Path(trainer.__file__).with_name("network.py").read_bytes(), 0o644
            )
            with remote.session(argv) as session:
                session.send(b"")
                while not over.is_set() and (piece := session.receive(0.5)) is not None:
                    heard += piece[0]
                    if piece[0] and heard.endswith(b"\n"):
                        told.put(str(json.loads(heard)["url"]))
        except (RemoteError, ValueError, KeyError):
            pass
        told.put(None)

    threading.Thread(target=work, name="share", daemon=True).start()
    try:
        return told.get(timeout=30)
    except queue.Empty:
        return None


def interface(remote: Remote, address: str) -> str:
    """The name of the node's network interface with that address. Raises NoPrivateNetwork, RemoteError."""
    remote.write("~/llmctl/network.py", Path(trainer.__file__).with_name("network.py").read_bytes(), 0o644)
    try:
        found = json.loads(
            remote.run(["python3", "llmctl/network.py", "interface", "--address", address]).text
        )
    except CommandFailed as error:
        raise NoPrivateNetwork(f"the network interfaces could not be listed: {error}") from error
    if not found["interface"]:
        raise NoPrivateNetwork(
            f"no network interface of the node has the address {address}, which its provider names"
        )
    return str(found["interface"])


# ---------------------------------------------------------------- while they train


def view(first: TrainerView | None, others: Sequence[TrainerView | None]) -> TrainerView | None:
    """The run's trainer in one word: the first node's, but `dead` where another node's supervisor is not there."""
    if first is None or first.state in {"absent", "dead", "ended"}:
        return first
    missing = any(other is not None and other.state in {"absent", "dead"} for other in others)
    return replace(first, state="dead") if missing else first


def verdict(
    first: Mapping[str, Any], others: Sequence[Mapping[str, Any]], *, asked: bool, odd_seconds: float
) -> tuple[str, str] | None:
    """Why the attempt's trainer has ended, and the words for it; None while it goes on.

    `first`, `others`: what the supervisors wrote under the attempt's token, {} before that. `asked`: the run was told to stop.
    `odd_seconds`: for how long they have not all been in the same state.
    """
    ended = [other for other in others if other.get("state") == "ended"]
    if first.get("state") == "ended":
        reason = str(first.get("reason") or "failed")
        waiting = len(ended) < len(others) and odd_seconds < ODD_SECONDS
        if reason == "finished" and waiting:  # for the last words in the others' logs: they end with it
            return None
        if (
            reason == "stopped" and not asked
        ):  # another node had a reason: its interruption notice, its deadline
            told = [other for other in ended if other.get("reason") in {"interrupted", "deadline"}]
            if told:
                return _words(told[0])
            if waiting:
                return None
        return _words(first)
    refused = [
        other for other in ended if other.get("exit_code") in REFUSALS and other.get("reason") == "failed"
    ]
    if refused:
        return _words(refused[0])
    gone = [other for other in ended if other.get("reason") in {"failed", "lost"}]
    if gone and odd_seconds >= ODD_SECONDS:
        return "lost", f"one of the nodes gave up: {gone[0].get('detail') or gone[0].get('reason')}"
    return None


def odd(first: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some of the supervisors have ended and others have not."""
    states = {item.get("state") == "ended" for item in (first, *others)}
    return len(states) > 1


def _words(record: Mapping[str, Any]) -> tuple[str, str]:
    return str(record.get("reason") or "failed"), str(record.get("detail") or "")


def kill(remotes: Sequence[Remote], run: str) -> None:
    """End every process of the run on those nodes; one that does not answer is left to its own watchdog."""

    def one(remote: Remote) -> None:
        command = f"cd {bare(directory(run))} && [ -d trainer ] && exec python3 -m trainer supervise kill"
        try:
            remote.run(command, timeout=60, check=False)
        except RemoteError:
            return

    if remotes:
        with ThreadPoolExecutor(len(remotes)) as pool:
            list(pool.map(one, remotes))
