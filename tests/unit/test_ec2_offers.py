"""Offers of EC2: types, zones, prices and their order. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from provisioning import ec2_market, ec2_offers
from provisioning.base import InvalidHardware
from provisioning.ec2_offers import Kind, Priced

T0 = datetime(2026, 1, 1, tzinfo=UTC)
KINDS = {
    "g5.xlarge": Kind("g5.xlarge", "A10G-24GB", 1, 4, 16, 250),
    "g5.2xlarge": Kind("g5.2xlarge", "A10G-24GB", 1, 8, 32, 450),
    "p4d.24xlarge": Kind("p4d.24xlarge", "A100-40GB", 8, 96, 1152, 8000),
    "p5.48xlarge": Kind("p5.48xlarge", "H100-80GB", 8, 192, 2048, 30400),
    "p9.48xlarge": Kind("p9.48xlarge", "Z900 (300 GB)", 8, 192, 2048, 30400),
}
ZONES = {name: ["us-east-1a", "us-east-1b", "us-west-2a"] for name in KINDS}
DOLLARS = {
    "g5.xlarge": 1.006,
    "g5.2xlarge": 1.212,
    "p4d.24xlarge": 21.957642,
    "p5.48xlarge": 55.04,
    "p9.48xlarge": 90.0,
}
PRICES = {(name, zone): Priced(round(DOLLARS[name] * 1e6)) for name, zones in ZONES.items() for zone in zones}


def offers(
    hardware: dict[str, object], prices: dict[tuple[str, str], Priced] | None = None, home: str = "us-west-2"
):
    found = PRICES if prices is None else prices
    return ec2_offers.offers(
        KINDS, ZONES, found, hardware, volume={"default": 0.1, "us-east-1": 0.073}, home_region=home
    )


def test_one_type_in_each_zone_the_configured_region_first() -> None:
    found = offers({"gpu": "A10G:1"})
    assert [(offer.instance_type, offer.region) for offer in found[:3]] == [
        ("g5.xlarge", "us-east-1a"), ("g5.xlarge", "us-east-1b"), ("g5.xlarge", "us-west-2a")
    ]  # fmt: skip
    assert found[0].tariff.micro_usd_per_hour == 1_006_000 + 15_000, (
        "150 GiB at 7.3 cents a month are 1.5 cents an hour"
    )
    assert (found[0].tariff.granularity_seconds, found[0].tariff.minimum_seconds) == (1, 60)
    equal = {key: Priced(1_000_000) for key in PRICES}
    same = ec2_offers.offers(
        KINDS, ZONES, equal, {"gpu": "H100:8"}, volume={"default": 0.1}, home_region="us-west-2"
    )
    assert same[0].region == "us-west-2a"


def test_the_volume_is_sized_and_priced_from_the_spec() -> None:
    small, large = offers({"gpu": "H100:8", "disk_gib": 20})[0], offers({"gpu": "H100:8", "disk_gib": 750})[0]
    assert (small.options["volume_gib"], large.options["volume_gib"]) == ("121", "851")
    assert large.tariff.micro_usd_per_hour - small.tariff.micro_usd_per_hour == pytest.approx(
        730 * 0.073 / 730 * 1e6, abs=2
    )


def test_lists_are_ordered_fallbacks_and_regions_come_in_their_order() -> None:
    found = offers({"gpu": ["H100:8", "A100-40GB:8"], "regions": ["us-west-2", "us-east-1b"]})
    assert [(offer.instance_type, offer.region) for offer in found][:2] == [
        ("p5.48xlarge", "us-west-2a"),
        ("p5.48xlarge", "us-east-1b"),
    ]
    assert [offer.instance_type for offer in found] == ["p5.48xlarge"] * 3 + ["p4d.24xlarge"] * 3
    assert {offer.instance_type for offer in offers({"instance_type": ["g5.2xlarge", "p5.48xlarge"]})} == {
        "g5.2xlarge",
        "p5.48xlarge",
    }


def test_the_cap_counts_all_nodes_and_the_volume() -> None:
    assert offers({"gpu": "A10G:1", "max_usd_per_hour": 1.0065}) == []
    assert {offer.instance_type for offer in offers({"gpu": "A10G:1", "max_usd_per_hour": 1.03})} == {
        "g5.xlarge"
    }
    assert offers({"gpu": "A10G:1", "max_usd_per_hour": 1.03, "nodes": 2}) == []


def test_what_has_no_price_is_not_offered() -> None:
    only = {("g5.xlarge", "us-west-2a"): Priced(900_000, estimated=True)}
    (offer,) = offers({"gpu": "A10G:1"}, only)
    assert offer.tariff.estimated and offer.region == "us-west-2a"


def test_a_gpu_that_the_table_does_not_know_goes_by_its_name() -> None:
    assert offers({"gpu": "Z900-300GB:8"})[0].gpu == "Z900 (300 GB)"


@pytest.mark.parametrize(
    "hardware",
    [{"gpu": "H100:3"}, {"gpu": "NOSUCH:1"}, {"instance_type": "p5.47xlarge"}, {"gpu": "8 of them"}],
)
def test_what_can_never_be_had_is_invalid(hardware: dict[str, object]) -> None:
    with pytest.raises(InvalidHardware) as error:
        offers(hardware)
    assert error.value.code in {"gpu", "instance_type"}
    if "instance_type" in hardware:
        assert "p5.48xlarge" in error.value.hint


def raw(name: str = "g5.xlarge", maker: str = "NVIDIA", **changes: object) -> dict[str, object]:
    card = {"Name": "A10G", "Count": 1, "Manufacturer": maker, "MemoryInfo": {"SizeInMiB": 22888}}
    return {"InstanceType": name, "VCpuInfo": {"DefaultVCpus": 4}, "MemoryInfo": {"SizeInMiB": 16384},
            "ProcessorInfo": {"SupportedArchitectures": ["x86_64"]}, "GpuInfo": {"Gpus": [card]}, **changes}  # fmt: skip


def test_types_that_cannot_train_are_left_out() -> None:
    good = ec2_offers.kind(raw())
    assert good is not None and good.gpu == "A10G-24GB"
    assert ec2_offers.kind(raw(maker="AMD")) is None
    assert ec2_offers.kind(raw(ProcessorInfo={"SupportedArchitectures": ["arm64"]})) is None
    part = {
        "Gpus": [
            {
                "Name": "L4",
                "Count": 1,
                "Manufacturer": "NVIDIA",
                "GpuPartitionSize": 0.125,
                "MemoryInfo": {"SizeInMiB": 2861},
            }
        ]
    }
    assert ec2_offers.kind(raw(GpuInfo=part)) is None
    assert ec2_offers.kind(raw(NeuronInfo={})) is None


def test_the_price_list_is_read_by_region() -> None:
    def product(region: str, usd: str, **attributes: str) -> dict[str, object]:
        terms = {"OnDemand": {"A": {"priceDimensions": {"B": {"unit": "Hrs", "pricePerUnit": {"USD": usd}}}}}}
        return {"product": {"attributes": {"regionCode": region, **attributes}}, "terms": terms}

    found = ec2_offers.on_demand([
        product("us-east-1", "55.0400000000"), product("eu-west-1", "0.0000000000"),
        product("us-west-2", "1.0", marketoption="CapacityBlock"),
    ])  # fmt: skip
    assert found == {"us-east-1": 55_040_000}


def history(*prices: tuple[float, float]) -> list[dict[str, object]]:
    """(hours after T0, dollars)."""
    return [
        {
            "Timestamp": T0 + timedelta(hours=at),
            "SpotPrice": str(usd),
            "InstanceType": "x",
            "AvailabilityZone": "z",
        }
        for at, usd in prices
    ]


def test_the_spot_mean_is_what_the_hours_cost() -> None:
    end = T0 + timedelta(hours=4)
    assert ec2_market.mean_price(history((-5, 1.0)), T0, end) == 1_000_000
    assert (
        ec2_market.mean_price(history((-5, 9.0), (-1, 1.0), (1, 2.0), (3, 5.0), (7, 50.0)), T0, end)
        == 2_500_000
    )
    assert ec2_market.mean_price(history((2, 3.0)), T0, end) == 3_000_000
    assert ec2_market.mean_price([], T0, end) is None
    assert ec2_market.mean_price(history((-5, 1.0), (-1, 4.0)), T0, T0) == 4_000_000


def test_the_dated_table_says_when_it_was_true() -> None:
    table = ec2_market.table()
    assert str(table["as_of"]).startswith("20") and table["usd_per_hour"]["p5.48xlarge"] == 55.04
    assert table["gp3_usd_per_gib_month"]["default"] >= table["gp3_usd_per_gib_month"]["us-east-1"]
