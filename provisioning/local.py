"""Provider `local`: this machine as a node like any other, one detached server each (`local_node`).

LLMCTL_HOME/nodes/KEY/request.json   what was asked for: marker, owner, price (written before anything starts)
LLMCTL_HOME/nodes/KEY/…              the node's own files
LLMCTL_HOME/node-home/0, 1, …        homes of nodes; a node takes the first that no living node holds, and leaves it
                                     as a cache for the next
"""

from __future__ import annotations

import fcntl
import getpass
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from provisioning import keys, local_node
from provisioning.base import Check, Home, InvalidHardware, LaunchRequest, ProviderError, Refused, Traits, utc
from runs.facts import Fact, Inventory, Marker, NodeFacts, Offer, Tariff
from runs.rows import MICRO
from trainer import gpus

SHOWN_SECONDS = 86_400.0
"""An ended node stays in the inventory for a day, as at other providers."""


class _Request(Fact):
    """request.json."""

    marker: Marker
    owner: str
    micro_usd_per_hour: int
    host: str = "127.0.0.1"


def open(home: Home, hardware: dict[str, object]) -> Local:  # noqa: A001 - the registry's word: local.open
    """The provider, priced by the hardware section's `usd_per_hour`."""
    return Local(home, micro_usd_per_hour=price(hardware))


def price(hardware: dict[str, object]) -> int:
    """Micro-dollars an hour of the section's `usd_per_hour`; 0 without one. Raises InvalidHardware."""
    value = hardware.get("usd_per_hour") or 0
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise InvalidHardware(
            f"usd_per_hour is {value!r}: a price is a number from 0", hint="for example 0.35"
        )
    return round(value * MICRO)


class Local:
    """Nodes on this machine. Implements `base.Provider`."""

    name = "local"
    traits = Traits(
        looks=1,
        look_seconds=0,
        rented=False,
        boot_poll_seconds=0.1,
        terminate_poll_seconds=0.1,
        capacity_poll_seconds=5,
        lease_on_node=True,
    )

    def __init__(self, home: Home, *, micro_usd_per_hour: int = 0) -> None:
        self._home = home
        self._nodes = home.path / "nodes"
        self._price = micro_usd_per_hour

    def offers(self, hardware: dict[str, object]) -> list[Offer]:
        """The one offer: this machine, if it has the GPUs asked for."""
        key, count = installed_gpus()
        wanted = hardware.get("gpu") or []
        requests = (
            [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, list | tuple) else []
        )
        if requests and not any(key is not None and _fits(str(request), key, count) for request in requests):
            return []
        offer = Offer(
            provider=self.name,
            instance_type="local",
            region="local",
            gpu=key,
            gpus=count,
            tariff=Tariff(micro_usd_per_hour=self._price),
            vcpus=os.cpu_count() or 1,
            memory_gib=_memory_gib(),
            storage_gib=round(shutil.disk_usage(_existing(self._home.path)).total / 2**30, 1),
            description="this machine",
        )
        return [offer]

    def launch(self, request: LaunchRequest) -> str:
        """Start the node and return its id, the marker's key; a second call for a key returns the same id."""
        key = request.marker.key
        directory = self._nodes / key
        note = _Request(marker=request.marker, owner=request.owner, micro_usd_per_hour=self._price)
        try:
            if local_node.read(directory) is not None:
                return key
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            _replace(directory / "request.json", note.model_dump_json())
            with self._free_home() as (home, held):
                local_node.spawn(
                    directory,
                    name=key,
                    user=getpass.getuser(),
                    authorized_key=request.public_key,
                    host_private_key=request.host_private_key,
                    home=home,
                    lease_end=request.marker.lease_end.timestamp(),
                    hold=[held],
                )
        except (OSError, subprocess.CalledProcessError) as error:
            raise Refused(
                f"the local node {key} could not be started: {_why(error, directory)}",
                code="local",
                hint=f"see {directory / 'server.log'}; `llmctl doctor` checks this machine",
            ) from error
        return key

    def redacted(self, request: LaunchRequest) -> dict[str, object]:
        """What `launch` would do."""
        lease = request.marker.lease_end.isoformat()
        return {
            "name": request.marker.name,
            "user": getpass.getuser(),
            "address": "127.0.0.1",
            "lease_end": lease,
        }

    def inventory(self) -> Inventory:
        """Every node of this LLMCTL_HOME, and the ended ones of the last day."""
        at = time.time()
        found = [self._facts(path.parent) for path in sorted(self._nodes.glob("*/request.json"))]
        return Inventory(at=utc(at), nodes=[node for node in found if node is not None])

    def find(self, node_id: str) -> NodeFacts | None:
        """One node by its key."""
        return self._facts(self._directory(node_id))

    def terminate(self, node_id: str) -> None:
        """End the node's server and every process on it; they are gone when this returns."""
        try:
            local_node.end(self._directory(node_id))
        except local_node.NodeEndError as error:
            raise ProviderError(str(error), code=error.code, hint=error.hint) from error

    def extend(self, node_id: str, marker: Marker) -> None:
        """Move the lease that the node's server watches."""
        directory = self._directory(node_id)
        note = _note(directory)
        if note is not None:
            _replace(directory / "request.json", note.model_copy(update={"marker": marker}).model_dump_json())
            local_node.extend(directory, marker.lease_end.timestamp())

    def check(self) -> Sequence[Check]:
        """Whether nodes can be started here."""
        path = _existing(self._home.path)
        writable = os.access(path, os.W_OK)
        key, count = installed_gpus()
        return [
            Check(
                "local home",
                writable,
                f"{self._home.path}",
                "" if writable else "set LLMCTL_HOME to a writable folder",
            ),
            Check("local python", True, f"nodes run {sys.executable}"),
            Check("local gpus", True, f"{count} × {key}" if key else "none: nodes train on the CPU"),
        ]

    def leftovers(self) -> Sequence[str]:
        """Nothing else here costs money."""
        return []

    def _directory(self, node_id: str) -> Path:
        if "/" in node_id or node_id in {"", ".", ".."}:
            raise InvalidHardware(f"{node_id!r} is not the id of a local node")
        return self._nodes / node_id

    def _facts(self, directory: Path) -> NodeFacts | None:
        note, state = _note(directory), local_node.read(directory)
        if note is None or state is None:
            return None
        ended = state.ended or state.spawned
        if state.status == "terminated" and time.time() - ended > SHOWN_SECONDS:
            return None
        return NodeFacts(
            id=directory.name,
            name=note.marker.name,
            status=state.status,
            provider=self.name,
            ip=state.host if state.port else None,
            port=state.port or 22,
            user=state.user,
            private_ip=state.host if state.port else None,
            region="local",
            instance_type="local",
            micro_usd_per_hour=note.micro_usd_per_hour,
            key=note.marker.key,
            owner=note.owner,
            lease_end=note.marker.lease_end,
        )

    @contextmanager
    def _free_home(self) -> Iterator[tuple[Path, int]]:
        """The first home that no living node holds, and the descriptor of its lock, to be passed on to the node."""
        root = self._home.path / "node-home"
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        index = 0
        while True:
            descriptor = os.open(root / f"{index}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                index += 1
                continue
            try:
                yield root / str(index), descriptor
            finally:
                os.close(descriptor)
            return


def _why(error: Exception, directory: Path) -> str:
    """What kept a node's server from starting: its own last word, where it had one."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    said = (directory / "server.log").read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
    return f"its server ended with exit code {error.returncode}: {last}"


def installed_gpus() -> tuple[str | None, int]:
    """(key of the GPU table or the driver's own name, how many) as nvidia-smi tells; (None, 0) without it."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, 0
    return parse_gpus(answer)


def parse_gpus(answer: str) -> tuple[str | None, int]:
    """The same from nvidia-smi's lines `NAME, MIB`; of unlike GPUs the most numerous kind counts."""
    kinds: list[str] = []
    for line in answer.splitlines():
        name, _, memory = line.rpartition(",")
        mib = memory.strip()
        known = gpus.lookup(name.strip(), float(mib) / 1024 if mib.isdigit() else None)
        kinds += [known.key if known else name.strip()] if name.strip() else []
    key = max(kinds, key=kinds.count, default=None)
    return key, kinds.count(key) if key else 0


def _fits(request: str, key: str, count: int) -> bool:
    """Whether this machine serves the request: it may have more GPUs than are asked for."""
    name, memory, wanted = gpus.parse_request(request)
    bare = name if memory is None else f"{name}-{memory}GB"
    return wanted <= count and gpus.matches(f"{bare}:{count}", key, count)


def _note(directory: Path) -> _Request | None:
    try:
        return _Request.model_validate_json((directory / "request.json").read_bytes())
    except FileNotFoundError:
        return None


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    keys.write_private(temporary, text)
    temporary.replace(path)


def _existing(path: Path) -> Path:
    """`path` or its nearest parent that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
