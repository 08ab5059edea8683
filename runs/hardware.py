"""The spec's `hardware` section: one model a provider, told apart by `provider`.

One more provider is one more class here and one more name in `Hardware`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Dollars = Annotated[float, Field(gt=0)]
Price = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Host = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9.:_%-]*$")]


class Section(BaseModel):
    """Base of the spec's sections: frozen, no unknown keys, no NaN, no type taken for another."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class _Hardware(Section):
    gpu: str | list[str] | None = None
    """GPUs of one node, `NAME-MEMORYGB:COUNT` (`A100-40GB:8`; memory and count optional); a list is an ordered fallback."""
    nodes: Count = 1
    """Nodes that train together."""

    @property
    def gpu_requests(self) -> list[str]:
        """The wanted GPUs in order of preference; empty: whatever there is."""
        return _listed(self.gpu)

    @property
    def rented(self) -> bool:
        """Whether someone else's meter runs while a node lives."""
        return False


class _Owned(_Hardware):
    usd_per_hour: Price = 0.0
    """What an hour of one node costs you: electricity and wear, or someone's rent."""


class LocalHardware(_Owned):
    """This machine, as a node like any other."""

    provider: Literal["local"]


class SshHardware(_Owned):
    """Machines of yours that answer SSH."""

    provider: Literal["ssh"]
    host: Host | Annotated[list[Host], Field(min_length=1)]
    """Name or address; of several machines a run takes as many as it has nodes, in this order, and the others replace lost ones."""
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    """Port of its SSH server."""
    user: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*\$?$")] | None = None
    """Who logs in; null: your own user name."""
    identity_file: str | None = None
    """Private key; null: the first of `~/.ssh/id_ed25519`, `id_ecdsa` and `id_rsa`, else the key that llmctl makes for itself."""


class _Rented(_Hardware):
    instance_type: str | list[str] | None = None
    """The provider's name of a machine, instead of `gpu`; a list is an ordered fallback."""
    regions: list[str] = []
    """Where to look; empty: anywhere."""
    max_usd_per_hour: Dollars | None = None
    """Dearest acceptable price of all nodes together."""
    image: str | None = None
    """The provider's name of an operating system image; null: one with CUDA and torch."""
    host_key: Literal["injected", "accept-new"] = "injected"
    """`injected`: the node's SSH host key is made here, and a mismatch ends the node; `accept-new`: for images that ignore user data."""

    @property
    def instance_types(self) -> list[str]:
        """The wanted machines in order of preference."""
        return _listed(self.instance_type)

    @property
    def rented(self) -> bool:
        """Whether someone else's meter runs while a node lives."""
        return True


class LambdaHardware(_Rented):
    """Lambda Cloud."""

    provider: Literal["lambda"]
    filesystem: str | None = None
    """A Lambda filesystem to attach; it also caches shards and environments."""
    ssh_key_name: str | None = None
    """A key registered at Lambda; null: llmctl makes and registers its own."""
    identity_file: str | None = None
    """The private half of `ssh_key_name`."""


class Ec2Hardware(_Rented):
    """AWS EC2."""

    provider: Literal["ec2"]
    market: Literal["on-demand", "spot"] = "on-demand"
    """Spot is cheaper and may be taken away."""
    subnet: str | None = None
    """Subnet to launch in; null: the default network."""
    security_group: str | None = None
    """Security group; null: one of llmctl's own that lets in SSH from this address only."""


Hardware = Annotated[
    LocalHardware | SshHardware | LambdaHardware | Ec2Hardware, Field(discriminator="provider")
]


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value
