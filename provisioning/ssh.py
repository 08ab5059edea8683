"""Provider `ssh`: a machine of your own. Acquiring it is a claim on this side, so that two runs do not share it unawares.

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
import time
from collections.abc import Sequence
from pathlib import Path

from provisioning import keys
from provisioning.base import Check, Home, InvalidHardware, LaunchRequest, NoCapacity, Refused, Traits, utc
from provisioning.local import price
from runs.facts import Fact, Inventory, Marker, NodeFacts, Offer, Tariff


class _Claim(Fact):
    """The claim's file."""

    marker: Marker
    owner: str
    host: str
    port: int
    user: str
    micro_usd_per_hour: int


def open(home: Home, hardware: dict[str, object]) -> Ssh:  # noqa: A001 - the registry's word: ssh.open
    """The provider for the section's host. An empty section (status, reap) sees every claim and can launch nothing."""
    host = str(hardware.get("host") or "")
    port = hardware.get("port", 22)
    if not isinstance(port, int) or not 0 < port < 65536:
        raise InvalidHardware(f"port is {port!r}", hint="a number from 1 to 65535")
    identity = hardware.get("identity_file")
    return Ssh(
        home,
        host=host,
        port=port,
        user=str(hardware.get("user") or getpass.getuser()),
        identity_file=Path(str(identity)).expanduser() if identity else None,
        micro_usd_per_hour=price(hardware),
    )


class Ssh:
    """One machine behind SSH. Implements `base.Provider`."""

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
        host: str,
        port: int,
        user: str,
        identity_file: Path | None,
        micro_usd_per_hour: int,
    ) -> None:
        self._home = home
        self._nodes = home.path / "nodes"
        self._host, self._port, self._user = host, port, user
        self._identity_file = identity_file
        self._price = micro_usd_per_hour

    def offers(self, hardware: dict[str, object]) -> list[Offer]:
        """The one machine; unavailable while another run has it. Its GPUs are believed to be those of the section: the
        preflight looks."""
        if not self._host:
            return []
        wanted = hardware.get("gpu")
        first = wanted[0] if isinstance(wanted, list) and wanted else wanted
        gpu, _, count = str(first).partition(":") if first else ("", "", "0")
        offer = Offer(
            provider=self.name,
            instance_type=self._host,
            region="ssh",
            gpu=gpu or None,
            gpus=int(count or 1) if gpu else 0,
            tariff=Tariff(micro_usd_per_hour=self._price),
            available=_read(self._path) is None,
            description=f"{self._user}@{self._host}:{self._port}",
        )
        return [offer]

    def launch(self, request: LaunchRequest) -> str:
        """Claim the machine; the id is the marker's key. Raises NoCapacity while another node claims it."""
        if not self._host:
            raise InvalidHardware(
                "hardware.host is missing", hint="name the machine: hardware: {provider: ssh, host: …}"
            )
        if self._identity_file is not None:
            _usable(self._identity_file)
        marker = request.marker
        claim = _Claim(
            marker=marker,
            owner=request.owner,
            host=self._host,
            port=self._port,
            user=self._user,
            micro_usd_per_hour=self._price,
        )
        try:
            self._nodes.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._link_known_hosts(marker.key)
            if not _create(self._path, claim.model_dump_json()):
                holder = _read(self._path)
                if holder is None or holder.marker.key != marker.key:
                    by = holder.marker.key if holder else "a run that ended just now"
                    raise NoCapacity(
                        f"{self._host} is in use by {by}",
                        code="claimed",
                        hint="wait for that run, or stop it: `llmctl status` shows it",
                    )
        except OSError as error:
            raise Refused(f"the claim on {self._host} could not be written: {error}", code="claim") from error
        return marker.key

    def redacted(self, request: LaunchRequest) -> dict[str, object]:
        """What `launch` would note."""
        return {"name": request.marker.name, "host": self._host, "port": self._port, "user": self._user}

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
        if not self._host:
            return [Check("ssh", True, "no host configured")]
        try:
            file = self._identity_file or keys.client_key(self._home.path)
            key = Check("ssh key", True, f"{file}: {keys.public_key(file)}")
        except keys.KeyFileError as error:
            key = Check("ssh key", False, str(error), error.hint)
        claim = _read(self._path)
        return [
            key,
            Check("ssh host", True, f"{self._host}: {f'in use by {claim.marker.key}' if claim else 'free'}"),
        ]

    def leftovers(self) -> Sequence[str]:
        """Nothing else here costs money."""
        return []

    @property
    def _path(self) -> Path:
        return self._nodes / f"{_slug(f'ssh-{self._host}-{self._port}-{self._user}')}.json"

    def _link_known_hosts(self, key: str) -> None:
        """Make the node's known_hosts the one of its host, so that a pin outlives the run."""
        target = keys.known_hosts(self._home.path, _slug(f"ssh-{self._host}-{self._port}"))
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
