"""From instance types to offers."""

from __future__ import annotations

from typing import Any

import pytest

from provisioning.base import InvalidHardware
from provisioning.lambda_offers import offers, readable
from tests.lambda_server.catalogue import CAPACITY, TYPES, region


def types(**capacity: list[str]) -> dict[str, Any]:
    places = CAPACITY | capacity
    return {
        name: {
            "instance_type": item,
            "regions_with_capacity_available": [region(place) for place in places[name]],
        }
        for name, item in TYPES.items()
    }


ITEMS = readable(types())


def found(**hardware: object) -> list[tuple[str, str, bool]]:
    return [(offer.instance_type, offer.region, offer.available) for offer in offers(ITEMS, hardware)]


def test_gpu_requests_go_by_specs_and_description() -> None:
    assert found(gpu="H100:8") == [
        ("gpu_8x_h100_sxm5", "us-east-1", True),
        ("gpu_8x_h100_sxm5", "us-south-2", True),
    ]
    assert found(gpu="H100:1") == [("gpu_1x_h100_pcie", "us-west-1", True)]
    assert {name for name, _, _ in found(gpu="A100:8")} == {"gpu_8x_a100", "gpu_8x_a100_80gb_sxm4"}
    assert {name for name, _, _ in found(gpu="A100-40GB:8")} == {"gpu_8x_a100"}
    assert {name for name, _, _ in found(gpu="A100-80GB:8")} == {"gpu_8x_a100_80gb_sxm4"}


def test_a_type_whose_name_lies_is_judged_by_its_specs() -> None:
    lying = types()
    lying["gpu_8x_h100_sxm5"]["instance_type"] = TYPES["gpu_8x_h100_sxm5"] | {
        "specs": TYPES["gpu_8x_h100_sxm5"]["specs"] | {"gpus": 4}
    }
    items = readable(lying)
    assert [offer.gpus for offer in offers(items, {"gpu": "H100:4"})] == [4, 4]
    with pytest.raises(InvalidHardware):
        offers(items, {"gpu": "H100:8"})


def test_a_gpu_that_the_table_does_not_know_can_be_asked_for() -> None:
    assert found(gpu="X900:4") == found(gpu="X900-200GB:4") == [("gpu_4x_x900", "us-east-1", True)]
    (offer,) = offers(ITEMS, {"gpu": "X900:4"})
    assert offer.gpu == "X900 (200 GB SXM9)"
    with pytest.raises(InvalidHardware):
        found(gpu="X900-100GB:4")


def test_a_list_is_an_ordered_fallback_and_one_request_goes_by_price() -> None:
    wanted = found(gpu=["A100-80GB:8", "A100:8"])
    assert [name for name, _, _ in wanted] == ["gpu_8x_a100_80gb_sxm4", "gpu_8x_a100", "gpu_8x_a100"]
    assert [name for name, _, _ in found(instance_type=["gpu_1x_a10", "cpu_4x_general"])] == [
        *["gpu_1x_a10"] * 2,
        *["cpu_4x_general"] * 3,
    ]


def test_regions_are_taken_in_the_specs_order_and_say_where_it_is_sold_out() -> None:
    assert found(gpu="H100:8", regions=["us-west-1", "us-south-2"]) == [
        ("gpu_8x_h100_sxm5", "us-west-1", False),
        ("gpu_8x_h100_sxm5", "us-south-2", True),
    ]
    assert found(gpu="B200:8") == [("gpu_8x_b200_sxm6", "", False)]


def test_the_price_cap_is_over_all_nodes() -> None:
    assert found(gpu="H100:8", max_usd_per_hour=31.92)
    assert found(gpu="H100:8", max_usd_per_hour=31.91) == []
    assert found(gpu="H100:8", max_usd_per_hour=31.92, nodes=2) == []
    assert found(gpu="H100:8", max_usd_per_hour=63.84, nodes=2)


def test_the_price_is_the_answers_and_counted_in_started_minutes() -> None:
    tariff = offers(ITEMS, {"gpu": "B200:8"})[0].tariff
    assert (tariff.micro_usd_per_hour, tariff.granularity_seconds, tariff.estimated) == (
        53_520_000,
        60,
        False,
    )


def test_an_empty_section_is_everything() -> None:
    assert {name for name, _, _ in found()} == set(TYPES)


def test_what_cannot_be_priced_is_not_offered_and_hurts_nobody_else() -> None:
    broken = types() | {
        "gpu_new": {"instance_type": {"name": "gpu_new", "specs": {"gpus": 1}}},
        "odd": 7,
        "none": None,
    }
    assert set(readable(broken)) == set(TYPES)
    assert readable([]) == readable(None) == readable("x") == {}


@pytest.mark.parametrize(
    ("hardware", "message", "hint"),
    [
        ({"instance_type": "gpu_8x_h100"}, "no instance type gpu_8x_h100", "gpu_8x_h100_sxm5"),
        ({"gpu": "H100:3"}, "no instance type with H100:3", "H100-80GB:8"),
        ({"gpu": "H100 x 8"}, "not a GPU request", ""),
        ({"gpu": "RTX3090:1"}, "no instance type with", "A10-24GB:1"),
    ],
)
def test_what_can_never_be_served_says_what_there_is(
    hardware: dict[str, object], message: str, hint: str
) -> None:
    with pytest.raises(InvalidHardware, match=message) as caught:
        offers(ITEMS, hardware)
    assert hint in caught.value.hint
