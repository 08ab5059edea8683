"""From EC2's instance types, zones and prices to offers, in the order in which a spec wants them. Pure.

An offer's region is a zone (`us-east-1a`): capacity is a matter of zones, so one that is sold out is followed by the next.
Its price is that of the instance and of its volume together.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from provisioning.base import InvalidHardware, number, texts
from runs.facts import Offer, Tariff
from runs.rows import MICRO
from trainer import gpus

MINIMUM_SECONDS = 60
"""EC2 bills Linux by the second, a minute at the least (aws.amazon.com/ec2/pricing/on-demand)."""
IMAGE_GIB = 100
"""Room for the image and what is installed on it; a larger image makes a larger volume."""
HOURS_A_MONTH = 730
FAMILIES = ("p3*.*", "p4*.*", "p5*.*", "p6*.*", "g4dn.*", "g5.*", "g6.*", "g6e.*")
"""What is looked at when the spec names no type."""
_ZONE = re.compile(r"(?P<region>[a-z]{2}(?:-[a-z]+)+-\d)[a-z]?")


@dataclass(frozen=True)
class Kind:
    """An instance type."""

    name: str
    gpu: str | None
    """Key of the GPU table, AWS's own name where the table has no such GPU; None without GPUs."""
    gpus: int
    vcpus: int
    memory_gib: float
    storage_gib: float
    """Of its own disks; the volume comes on top."""


@dataclass(frozen=True)
class Priced:
    """What an hour of an instance costs in a zone, the volume not included."""

    micro_usd: int
    estimated: bool = False


def region_of(zone: str) -> str:
    """`us-east-1` of `us-east-1a`; a region is its own."""
    match = _ZONE.fullmatch(zone)
    return match["region"] if match else zone


def kind(raw: Mapping[str, Any]) -> Kind | None:
    """An entry of DescribeInstanceTypes; None for what cannot run the trainer: another processor, another maker's or a part of a GPU."""
    if "x86_64" not in raw.get("ProcessorInfo", {}).get("SupportedArchitectures", []) or raw.get("BareMetal"):
        return None
    cards = raw.get("GpuInfo", {}).get("Gpus", [])
    accelerated = any(
        name in raw for name in ("InferenceAcceleratorInfo", "NeuronInfo", "FpgaInfo", "MediaAcceleratorInfo")
    )
    if accelerated or any(
        card.get("Manufacturer") != "NVIDIA" or card.get("GpuPartitionSize", 1) < 1 for card in cards
    ):
        return None
    gpu, count = None, 0
    if cards:
        card = cards[0]
        size = card.get("MemoryInfo", {}).get("SizeInMiB", 0) / 1024
        known = gpus.lookup(str(card["Name"]), size or None)
        gpu, count = (
            (known.key if known else f"{card['Name']} ({size:.0f} GB)"),
            sum(item["Count"] for item in cards),
        )
    return Kind(str(raw["InstanceType"]), gpu, count, int(raw["VCpuInfo"]["DefaultVCpus"]),
                raw["MemoryInfo"]["SizeInMiB"] / 1024, float(raw.get("InstanceStorageInfo", {}).get("TotalSizeInGB", 0)))  # fmt: skip


def volume_gib(hardware: Mapping[str, object]) -> int:
    """Size of the volume: the image, and what the run needs (`disk_gib`, worked out from the spec)."""
    need = hardware.get("disk_gib")
    return IMAGE_GIB + (int(need) + 1 if isinstance(need, (int, float)) else 50)


def volume_price(gib: int, usd_per_gib_month: float) -> int:
    """Micro-dollars an hour of a gp3 volume at its base performance."""
    return round(gib * usd_per_gib_month * MICRO / HOURS_A_MONTH)


def wanted(kinds: Mapping[str, Kind], hardware: Mapping[str, object]) -> list[list[Kind]]:
    """The types that fit, as groups in the order of the spec's list. Raises InvalidHardware where none ever could."""
    names, requests = texts(hardware, "instance_type"), texts(hardware, "gpu")
    if not names and not requests:
        return [[item for item in kinds.values() if item.gpus]]
    groups = [[kinds[name]] for name in names if name in kinds]
    for request in requests:
        try:
            groups.append([item for item in kinds.values() if _is(request, item)])
        except ValueError as error:
            raise InvalidHardware(f"hardware.gpu: {error}", code="gpu") from error
    if any(groups):
        return [group for group in groups if group]
    if requests:
        counts = sorted({f"{item.gpu}:{item.gpus}" for item in kinds.values() if item.gpu})
        raise InvalidHardware(
            f"EC2 has no instance type with {', '.join(requests)} in the regions asked", code="gpu",
            hint=f"it has {', '.join(counts)}",
        )  # fmt: skip
    near = difflib.get_close_matches(names[0], kinds, n=3, cutoff=0.5)
    raise InvalidHardware(
        f"EC2 has no instance type {', '.join(names)} in the regions asked", code="instance_type",
        hint=f"the nearest are {', '.join(near)}" if near else "`llmctl offers --all` lists those with GPUs",
    )  # fmt: skip


def offers(
    kinds: Mapping[str, Kind],
    zones: Mapping[str, Sequence[str]],
    prices: Mapping[tuple[str, str], Priced],
    hardware: Mapping[str, object],
    *,
    volume: Mapping[str, float],
    home_region: str,
) -> list[Offer]:
    """Offers that fit the hardware section, preferred ones first. `zones`: where each type can be had; `prices` by (type, zone);
    `volume`: dollars a GiB-month by region. What has no price is not offered. Equal prices: the configured region first."""
    market, nodes, cap = (
        str(hardware.get("market") or "on-demand"),
        number(hardware, "nodes") or 1,
        number(hardware, "max_usd_per_hour"),
    )
    size, asked = volume_gib(hardware), texts(hardware, "regions")
    found: list[Offer] = []
    for group in wanted(kinds, hardware):
        made = []
        for item in group:
            for zone in zones.get(item.name, ()):
                price = prices.get((item.name, zone))
                if price is None:
                    continue
                storage = volume_price(size, volume.get(region_of(zone), volume["default"]))
                if cap is not None and (price.micro_usd + storage) * nodes > cap * MICRO:
                    continue
                made.append(_offer(item, zone, price, storage=storage, size=size, market=market))
        made.sort(key=lambda offer: (_place(offer.region, asked), offer.tariff.micro_usd_per_hour,
                                     region_of(offer.region) != home_region, offer.instance_type, offer.region))  # fmt: skip
        found += made
    return list({(offer.instance_type, offer.region): offer for offer in found}.values())


def _offer(item: Kind, zone: str, price: Priced, *, storage: int, size: int, market: str) -> Offer:
    gpu = f"{item.gpus}x {item.gpu}" if item.gpu else f"{item.vcpus} vCPU"
    return Offer(
        provider="ec2",
        instance_type=item.name,
        region=zone,
        gpu=item.gpu,
        gpus=item.gpus,
        tariff=Tariff(
            micro_usd_per_hour=price.micro_usd + storage, granularity_seconds=1, minimum_seconds=MINIMUM_SECONDS,
            estimated=price.estimated,
        ),
        vcpus=item.vcpus,
        memory_gib=item.memory_gib,
        storage_gib=item.storage_gib + size,
        description=f"{gpu}, {market}",
        options={"market": market, "volume_gib": str(size), "volume_micro_usd": str(storage)},
    )  # fmt: skip


def _place(zone: str, asked: Sequence[str]) -> int:
    """The position of a zone in the spec's list of regions and zones."""
    for index, name in enumerate(asked):
        if name in (zone, region_of(zone)):
            return index
    return len(asked)


def _is(request: str, item: Kind) -> bool:
    gpus.parse_request(request)
    if item.gpu is None:
        return False
    if item.gpu in gpus.GPUS:
        return gpus.matches(request, item.gpu, item.gpus)
    # A GPU newer than the table can still be asked for by AWS's name for it.
    name, _, size = item.gpu.partition(" (")
    return gpus.matches(request, f"{name.replace(' ', '')}-{size.partition(' ')[0]}GB", item.gpus)


def on_demand(products: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Micro-dollars an hour by region, from the price list's products of one type (Linux, shared tenancy)."""
    found: dict[str, int] = {}
    for product in products:
        attributes = product.get("product", {}).get("attributes", {})
        region = attributes.get("regionCode")
        if not region or attributes.get("marketoption", "OnDemand") != "OnDemand":
            continue
        for term in product.get("terms", {}).get("OnDemand", {}).values():
            for dimension in term.get("priceDimensions", {}).values():
                price = round(float(dimension.get("pricePerUnit", {}).get("USD", 0)) * MICRO)
                if price > 0 and dimension.get("unit", "Hrs") == "Hrs":
                    found[region] = min(price, found.get(region, price))
    return found
