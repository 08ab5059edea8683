"""How the nodes of a run are reached: keys, pinned host keys, and the launch request that carries them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.remote.connection import Address
from provisioning import keys
from provisioning.base import Home, LaunchRequest, Traits
from runs.facts import Marker, Offer
from runs.record import NodeRecord


@dataclass(frozen=True)
class Access:
    """How a run's nodes are reached: keys and host keys, by the spec and the provider's traits."""

    home: Home
    hardware: dict[str, Any]
    traits: Traits

    @property
    def identity_file(self) -> Path:
        """The private key that logs in: the spec's, on the user's own machine the user's, else this home's."""
        chosen = self.hardware.get("identity_file")
        if chosen:
            return Path(chosen).expanduser()
        usual = [Path.home() / ".ssh" / name for name in ("id_ed25519", "id_ecdsa", "id_rsa")]
        own = next((path for path in usual if path.exists()), None) if self.traits.own_login else None
        return own or keys.client_key(self.home.path)

    @property
    def injected(self) -> bool:
        """The node's host key is made here."""
        return bool(self.hardware.get("host_key", self.traits.host_key) == "injected")

    def address(self, node: NodeRecord) -> Address:
        """Where a node answers, and what proves that it is the node."""
        assert node.ip is not None
        return Address(
            host=node.ip,
            port=node.port,
            user=node.user,
            identity_file=self.identity_file,
            known_hosts=keys.known_hosts(self.home.path, node.key),
            key=node.key,
            accept_new=not self.injected,
        )

    def request(self, marker: Marker, offer: Offer) -> LaunchRequest:
        """The launch request of one node. Its host key is pinned before the node exists."""
        pair = keys.host_key(self.home.path, marker.key) if self.injected else None
        if pair is not None:
            keys.pin(keys.known_hosts(self.home.path, marker.key), pair.public)
        return LaunchRequest(
            marker=marker,
            offer=offer,
            owner=self.home.owner,
            public_key=keys.public_key(self.identity_file),
            host_private_key=pair.private if pair else None,
            host_public_key=pair.public if pair else None,
            options=dict(self.hardware),
        )
