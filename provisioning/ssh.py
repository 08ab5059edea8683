"""Provider `ssh`: machines of your own. Acquiring one is a claim on this side, so that two runs do not share it unawares.

    LLMCTL_HOME/nodes/ssh-HOST-PORT-USER.json   the claim: which node it is now; made by link(2), so one claimant wins
    LLMCTL_HOME/ssh/known_hosts/ssh-HOST-PORT   its host key, pinned at the first connection and kept between runs; a
                                                node's own known_hosts is a link to it

Nothing is started or ended on the machine: the driver ends a run's processes before it lets go.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from provisioning import keys
from provisioning.base import (
    Check,
    Home,
    InvalidHardware,
    LaunchRequest,
    NoCapacity,
    Refused,
    Traits,
    number,
    texts,
    utc,
)
from provisioning.local import price
from runs.facts import Fact, Inventory, Marker, NodeFacts, Offer, Tariff

ANSWER_SECONDS = 3.0
"""How long a machine may take to accept a connection before another one of the list is taken."""


class _Claim(Fact):
    """The claim's file."""

    marker: Marker
    owner: str
    host: str
    port: int
    user: str
    micro_usd_per_hour: int
    private_ip: str | None = None
    """Where the other nodes of its run reach it."""


def open(home: Home, hardware: dict[str, object]) -> Ssh:  # noqa: A001 - the registry's word: ssh.open
    """The provider for the section's hosts. An empty section (status, reap) sees every claim and can launch nothing."""
    port = hardware.get("port", 22)
    if not isinstance(port, int) or not 0 < port < 65536:
        raise InvalidHardware(f"port is {port!r}", hint="a number from 1 to 65535")
    identity = hardware.get("identity_file")
    return Ssh(
        home,
        hosts=texts(hardware, "host"),
        port=port,
        user=str(hardware.get("user") or getpass.getuser()),
        identity_file=Path(str(identity)).expanduser() if identity else None,
        micro_usd_per_hour=price(hardware),
    )


class Ssh:
    """Machines behind SSH. Implements `base.Provider`."""

    name = "ssh"
    traits = Traits(
        looks=1,
        look_seconds=0,
        rented=False,
        boot_poll_seconds=1,
        terminate_poll_seconds=0.1,
        capacity_poll_seconds=15,
        host_key="accept-new",
        own_login=True,
    )

    def __init__(
        self,
        home: Home,
        *,
        hosts: Sequence[str],
        port: int,
        user: str,
        identity_file: Path | None,
        micro_usd_per_hour: int,
    ) -> None:
        self._home = home
        self._nodes = home.path / "nodes"
        self._hosts, self._port, self._user = tuple(hosts), port, user
        self._identity_file = identity_file
        self._price = micro_usd_per_hour

    def offers(self, hardware: dict[str, object]) -> list[Offer]:
        """The machines as one offer; unavailable while other runs leave fewer than the section's `nodes`. Their GPUs are
        believed to be those of the section: the preflight looks."""
        if not self._hosts:
            return []
        wanted = hardware.get("gpu")
        first = wanted[0] if isinstance(wanted, list) and wanted else wanted
        gpu, _, count = str(first).partition(":") if first else ("", "", "0")
        free = [host for host in self._hosts if _read(self._path(host)) is None]
        named = ", ".join(f"{self._user}@{host}:{self._port}" for host in self._hosts)
        offer = Offer(
            provider=self.name,
            instance_type=self._hosts[0] if len(self._hosts) == 1 else f"{len(self._hosts)} machines",
            region="ssh",
            gpu=gpu or None,
            gpus=int(count or 1) if gpu else 0,
            tariff=Tariff(micro_usd_per_hour=self._price),
            available=len(free) >= (number(hardware, "nodes") or 1),
            description=named,
        )
        return [offer]

    def launch(self, request: LaunchRequest) -> str:
        """Claim the first machine that is free and answers; the id is the marker's key. Raises NoCapacity where none is."""
        if not self._hosts:
            raise InvalidHardware(
                "hardware.host is missing", hint="name the machine: hardware: {provider: ssh, host: …}"
            )
        if self._identity_file is not None:
            _usable(self._identity_file)
        problems = []
        for host in self._hosts:
            holder = self._claim(host, request)
            if holder is None:
                return request.marker.key
            problems.append(f"{host} {holder}")
        raise NoCapacity(
            "; ".join(problems),
            code="claimed",
            hint="wait for that run, or stop it: `llmctl status` shows it",
        )

    def _claim(self, host: str, request: LaunchRequest) -> str | None:
        """Claim that machine; the reason where that cannot be."""
        path, marker = self._path(host), request.marker
        claim = _Claim(
            marker=marker,
            owner=request.owner,
            host=host,
            port=self._port,
            user=self._user,
            micro_usd_per_hour=self._price,
            private_ip=_address(host) if (number(request.options, "nodes") or 1) > 1 else None,
        )
        # With others to choose from, one that is switched off is passed over: the node that replaces a lost one must not be it.
        if len(self._hosts) > 1 and _read(path) is None and not _answers(host, self._port):
            return "does not answer"
        try:
            self._nodes.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not _create(path, claim.model_dump_json()):
                holder = _read(path)
                if holder is None or holder.marker.key != marker.key:
                    return f"is in use by {holder.marker.key if holder else 'a run that ended just now'}"
            self._link_known_hosts(host, marker.key)
        except OSError as error:
            raise Refused(f"the claim on {host} could not be written: {error}", code="claim") from error
        return None

    def redacted(self, request: LaunchRequest) -> dict[str, object]:
        """What `launch` would note."""
        return {
            "name": request.marker.name,
            "host": list(self._hosts),
            "port": self._port,
            "user": self._user,
        }

    def inventory(self) -> Inventory:
        """Every claim of this LLMCTL_HOME, on whatever host."""
        at = time.time()
        claims = [_read(path) for path in sorted(self._nodes.glob("ssh-*.json"))]
        return Inventory(at=utc(at), nodes=[self._facts(claim) for claim in claims if claim is not None])

    def find(self, node_id: str) -> NodeFacts | None:
        """The claim of that node."""
        return self.inventory().find(node_id)

    def terminate(self, node_id: str) -> None:
        """Let go of the machine that the node claims."""
        for path in self._nodes.glob("ssh-*.json"):
            claim = _read(path)
            if claim is not None and claim.marker.key == node_id:
                keys.known_hosts(self._home.path, node_id).unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    def extend(self, node_id: str, marker: Marker) -> None:
        """Rewrite the lease in the claim."""
        for path in self._nodes.glob("ssh-*.json"):
            claim = _read(path)
            if claim is not None and claim.marker.key == node_id:
                temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
                keys.write_private(temporary, claim.model_copy(update={"marker": marker}).model_dump_json())
                temporary.replace(path)

    def check(self) -> Sequence[Check]:
        """Whether the key can be used and whose claim is on the host."""
        if not self._hosts:
            return [Check("ssh", True, "no host configured")]
        try:
            file = self._identity_file or keys.client_key(self._home.path)
            key = Check("ssh key", True, f"{file}: {keys.public_key(file)}")
        except keys.KeyFileError as error:
            key = Check("ssh key", False, str(error), error.hint)
        return [key, *(self._check(host) for host in self._hosts)]

    def _check(self, host: str) -> Check:
        claim = _read(self._path(host))
        return Check("ssh host", True, f"{host}: {f'in use by {claim.marker.key}' if claim else 'free'}")

    def leftovers(self) -> Sequence[str]:
        """Nothing else here costs money."""
        return []

    def _path(self, host: str) -> Path:
        return self._nodes / f"{_slug(f'ssh-{host}-{self._port}-{self._user}')}.json"

    def _link_known_hosts(self, host: str, key: str) -> None:
        """Make the node's known_hosts the one of its host, so that a pin outlives the run."""
        target = keys.known_hosts(self._home.path, _slug(f"ssh-{host}-{self._port}"))
        link = keys.known_hosts(self._home.path, key)
        link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not link.is_symlink():
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)

    def _facts(self, claim: _Claim) -> NodeFacts:
        return NodeFacts(
            id=claim.marker.key,
            name=claim.marker.name,
            status="active",
            provider=self.name,
            ip=claim.host,
            port=claim.port,
            user=claim.user,
            private_ip=claim.private_ip,
            region="ssh",
            instance_type=claim.host,
            micro_usd_per_hour=claim.micro_usd_per_hour,
            key=claim.marker.key,
            owner=claim.owner,
            lease_end=claim.marker.lease_end,
        )


def _usable(identity_file: Path) -> None:
    try:
        keys.public_key(identity_file)
    except keys.KeyFileError as error:
        raise InvalidHardware(str(error), code=error.code, hint=error.hint) from error


def _address(host: str) -> str | None:
    """The IPv4 address of a host, where it can be had."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "_", text)


def _read(path: Path) -> _Claim | None:
    try:
        return _Claim.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None


def _create(path: Path, text: str) -> bool:
    """Make the file whole with `text`, unless it exists; True if this call made it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    keys.write_private(temporary, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True
