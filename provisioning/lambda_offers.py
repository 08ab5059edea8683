"""From Lambda's instance types to offers, in the order in which a spec wants them. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from pydantic import ValidationError

from provisioning.base import InvalidHardware, number, texts
from provisioning.lambda_models import InstanceType, TypeItem
from runs.facts import Offer, Tariff
from runs.rows import MICRO
from trainer import gpus

BILLED_SECONDS = 60
"""Lambda bills each started minute (docs.lambda.ai/public-cloud/billing)."""


def readable(data: object) -> dict[str, TypeItem]:
    """The entries of `GET /instance-types` that can be read and have a price; what cannot be priced is not offered."""
    items: dict[str, TypeItem] = {}
    for name, raw in data.items() if isinstance(data, dict) else ():
        try:
            item = TypeItem.model_validate(raw)
        except ValidationError:
            continue
        if item.instance_type.micro_usd_per_hour is not None:
            items[str(name)] = item
    return items


def offers(items: Mapping[str, TypeItem], hardware: Mapping[str, object]) -> list[Offer]:
    """Offers that fit the hardware section, preferred ones first: `instance_type` and `gpu` in the order of their list,
    one request's types by price, a type's regions in the order of `regions` or of the answer. Sold-out types appear with
    available=False. Raises InvalidHardware where nothing that Lambda has could ever fit."""
    regions = texts(hardware, "regions")
    nodes = number(hardware, "nodes") or 1
    cap = number(hardware, "max_usd_per_hour")
    found: list[Offer] = []
    for name in _wanted(items, hardware):
        item = items[name]
        offer = _offer(name, item.instance_type)
        if cap is not None and offer.tariff.micro_usd_per_hour * nodes > cap * MICRO:
            continue
        free = [region.name for region in item.regions_with_capacity_available if region.name]
        places = regions or free or [""]
        found += [offer.model_copy(update={"region": place, "available": place in free}) for place in places]
    return found


def gpu_key(instance_type: InstanceType) -> str | None:
    """Key of the GPU table, or Lambda's own description where the table has no such GPU; None without GPUs."""
    if not instance_type.specs.gpus:
        return None
    known = gpus.lookup(instance_type.gpu_description)
    return known.key if known else instance_type.gpu_description


def _offer(name: str, instance_type: InstanceType) -> Offer:
    price = instance_type.micro_usd_per_hour
    assert price is not None, "readable() keeps no type without a price"
    specs = instance_type.specs
    return Offer(
        provider="lambda",
        instance_type=name,
        region="",
        gpu=gpu_key(instance_type),
        gpus=specs.gpus,
        tariff=Tariff(micro_usd_per_hour=price, granularity_seconds=BILLED_SECONDS),
        vcpus=specs.vcpus,
        memory_gib=specs.memory_gib,
        storage_gib=specs.storage_gib,
        description=instance_type.description,
    )


def _wanted(items: Mapping[str, TypeItem], hardware: Mapping[str, object]) -> list[str]:
    names, requests = texts(hardware, "instance_type"), texts(hardware, "gpu")
    by_price = sorted(items, key=lambda name: (items[name].instance_type.micro_usd_per_hour, name))
    if not names and not requests:
        return by_price
    wanted = [name for name in names if name in items]
    for request in requests:
        try:
            wanted += [name for name in by_price if _is(request, items[name].instance_type)]
        except ValueError as error:
            raise InvalidHardware(f"hardware.gpu: {error}", code="gpu") from error
    if wanted:
        return list(dict.fromkeys(wanted))
    if requests:
        counts = sorted(
            {
                f"{key}:{item.instance_type.specs.gpus}"
                for item in items.values()
                if (key := gpu_key(item.instance_type))
            }
        )
        raise InvalidHardware(
            f"Lambda has no instance type with {', '.join(requests)}",
            code="gpu",
            hint=f"it has {', '.join(counts)}",
        )
    near = difflib.get_close_matches(names[0], items, n=3, cutoff=0.5) or by_price
    raise InvalidHardware(
        f"Lambda has no instance type {', '.join(names)}",
        code="instance_type",
        hint=f"the nearest are {', '.join(near)}",
    )


def _is(request: str, instance_type: InstanceType) -> bool:
    """Whether the type has the GPUs asked for. Count and model come from the specs and the description of the GPU; the
    type's name says nothing reliable."""
    key = gpu_key(instance_type)
    gpus.parse_request(request)
    if key is None:
        return False
    if key not in gpus.GPUS:
        # A GPU newer than our table can still be asked for by its name: "X900 (200 GB SXM9)" is X900-200GB.
        match = re.match(r"\s*([\w ]+?)\s*(?:\((\d+)\s*GB.*)?$", key)
        key = (match[1].replace(" ", "") + (f"-{match[2]}GB" if match[2] else "")) if match else key
    return gpus.matches(request, key, instance_type.specs.gpus)
