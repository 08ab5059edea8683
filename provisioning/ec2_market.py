"""What EC2 sells, where and at what price: instance types, zones, the price list, spot prices, and the dated table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from provisioning.aws import DENIED, Aws
from provisioning.base import CredentialsError, Unavailable, texts
from provisioning.ec2_offers import FAMILIES, Kind, Priced, kind, on_demand, region_of
from runs.rows import MICRO

PRICE_LIST_REGION = "us-east-1"
"""Of the few regions whose endpoint answers for all."""
PRICE_AGE_SECONDS = 86_400
SIDE_BY_SIDE = 12
T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`work` on each of `items` in threads, in their order; the first error is raised."""
    things = list(items)
    if len(things) < 2:
        return [work(item) for item in things]
    with ThreadPoolExecutor(min(SIDE_BY_SIDE, len(things)), thread_name_prefix="aws") as pool:
        return list(pool.map(work, things))


def in_regions(look: Callable[[str], R], regions: Sequence[str], *, asked: bool) -> list[R]:
    """What `look` finds in each region. Organisations forbid regions that they do not use: unless these were asked for, one in which
    these credentials may not look has nothing of theirs, as long as they may look somewhere."""
    refusals: list[CredentialsError] = []

    def tried(region: str) -> list[R]:
        try:
            return [look(region)]
        except CredentialsError as error:
            if asked or error.code not in DENIED:
                raise
            refusals.append(error)
            return []

    found = [item for part in side_by_side(tried, regions) for item in part]
    if refusals and not found:
        raise refusals[0]
    return found


@cache
def table() -> dict[str, Any]:
    """ec2_prices.yaml: as_of, regions, usd_per_hour, gp3_usd_per_gib_month."""
    from ruamel.yaml import YAML

    text = Path(__file__).with_name("ec2_prices.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return found


def places(
    aws: Aws, regions: Sequence[str], hardware: dict[str, object]
) -> tuple[dict[str, Kind], dict[str, list[str]]]:
    """(types, zones of each) in `regions`, among those that the spec names or all with GPUs. Raises ProviderError."""
    patterns = texts(hardware, "instance_type")
    if texts(hardware, "gpu") or not patterns:
        patterns = [*patterns, *FAMILIES]

    def look(region: str) -> tuple[list[Kind], list[tuple[str, str]]]:
        there = [(str(item["InstanceType"]), str(item["Location"])) for page in aws.pages(
            "ec2", "describe_instance_type_offerings", region, LocationType="availability-zone",
            Filters=[{"Name": "instance-type", "Values": patterns}]) for item in page["InstanceTypeOfferings"]]  # fmt: skip
        if not there:
            return [], []
        raw = [item for page in aws.pages("ec2", "describe_instance_types", region,
               Filters=[{"Name": "instance-type", "Values": patterns}]) for item in page["InstanceTypes"]]  # fmt: skip
        return [made for item in raw if (made := kind(item)) is not None], there

    kinds: dict[str, Kind] = {}
    zones: dict[str, list[str]] = {}
    wanted_zones = {name for name in texts(hardware, "regions") if name != region_of(name)}
    for found, there in in_regions(look, regions, asked=bool(texts(hardware, "regions"))):
        kinds.update({item.name: item for item in found})
        names = {item.name for item in found}
        for name, zone in sorted(there):
            asked = not wanted_zones or zone in wanted_zones or region_of(zone) in texts(hardware, "regions")
            if name in names and asked and region_of(zone) != zone:
                zones.setdefault(name, []).append(zone)
    return kinds, zones


def on_demand_prices(
    aws: Aws, zones: dict[str, list[str]], cache_file: Path
) -> dict[tuple[str, str], Priced]:
    """Prices by (type, zone) from the price list, at most a day old; from the dated table where it may not be asked."""
    known = _read(cache_file)
    fresh = {name: entry for name, entry in known.items() if time.time() - entry["at"] < PRICE_AGE_SECONDS}
    missing = sorted(set(zones) - set(fresh))
    estimated = False
    try:
        for name, regions in zip(
            missing, side_by_side(lambda name: _price_list(aws, name), missing), strict=True
        ):
            fresh[name] = {"at": time.time(), "regions": regions}
    except (CredentialsError, Unavailable):
        estimated = True
    else:
        if missing:
            _write(cache_file, fresh)
    prices: dict[tuple[str, str], Priced] = {}
    for name, places_of in zones.items():
        for zone in places_of:
            price = fresh.get(name, {}).get("regions", {}).get(region_of(zone))
            if price is not None:
                prices[name, zone] = Priced(int(price))
            elif estimated and region_of(zone) in table()["regions"] and name in table()["usd_per_hour"]:
                prices[name, zone] = Priced(round(table()["usd_per_hour"][name] * MICRO), estimated=True)
    return prices


def _price_list(aws: Aws, name: str) -> dict[str, int]:
    terms = {
        "instanceType": name,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
    }
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in terms.items()]
    pages = aws.pages("pricing", "get_products", PRICE_LIST_REGION, ServiceCode="AmazonEC2", Filters=filters)
    return on_demand(json.loads(text) for page in pages for text in page["PriceList"])


def spot_prices(aws: Aws, zones: dict[str, list[str]]) -> dict[tuple[str, str], Priced]:
    """The spot prices of this moment by (type, zone)."""
    regions = sorted({region_of(zone) for there in zones.values() for zone in there})

    def look(region: str) -> Iterator[tuple[tuple[str, str], Priced]]:
        names = sorted(
            name for name, there in zones.items() if any(region_of(zone) == region for zone in there)
        )
        now = datetime.now(UTC)
        latest = latest_prices(_history(aws, region, names, now, now))
        return ((key, Priced(price)) for key, price in latest.items())

    return {key: price for found in side_by_side(look, regions) for key, price in found}


def latest_prices(history: Iterable[dict[str, Any]]) -> dict[tuple[str, str], int]:
    """Micro-dollars by (type, zone), the newest of each. Pure."""
    found = {}
    for item in sorted(history, key=lambda item: item["Timestamp"]):
        found[str(item["InstanceType"]), str(item["AvailabilityZone"])] = round(
            float(item["SpotPrice"]) * MICRO
        )
    return found


def spot_mean(aws: Aws, name: str, zone: str, start: datetime, end: datetime) -> int | None:
    """The mean spot price between two moments, weighted by time: what the hours in between cost an hour. None: not known."""
    return mean_price(_history(aws, region_of(zone), [name], start, end, zone=zone), start, end)


def mean_price(history: Iterable[dict[str, Any]], start: datetime, end: datetime) -> int | None:
    """Micro-dollars an hour over [start, end] of prices that each hold from their Timestamp to the next one's. Pure."""
    steps = sorted(
        (max(item["Timestamp"], start), item["Timestamp"], float(item["SpotPrice"])) for item in history
    )
    steps = [step for step in steps if step[1] <= end]
    if not steps:
        return None
    if end <= start:
        return round(steps[-1][2] * MICRO)
    # A price that began after `start` with nothing before it stands for the beginning as well.
    points = [(at, price) for at, _, price in steps]
    points[0] = (start, points[0][1])
    area: float = sum(
        price * (right - left).total_seconds()
        for (left, price), (right, _) in pairwise([*points, (end, 0.0)])
    )
    return round(area / (end - start).total_seconds() * MICRO)


def _history(
    aws: Aws, region: str, names: list[str], start: datetime, end: datetime, *, zone: str | None = None
) -> list[dict[str, Any]]:
    where = {"AvailabilityZone": zone} if zone else {}
    pages = aws.pages("ec2", "describe_spot_price_history", region, InstanceTypes=names, ProductDescriptions=["Linux/UNIX"],
                      StartTime=start, EndTime=end, **where)  # fmt: skip
    return [item for page in pages for item in page["SpotPriceHistory"]]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    """Kept for the next process; a disk that is full only costs the question again."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(path)
