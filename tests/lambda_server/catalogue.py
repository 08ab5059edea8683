"""Instance types, prices (2026) and places of the server."""

from __future__ import annotations

from typing import Any

REGIONS = {
    "us-west-1": "California, USA",
    "us-east-1": "Virginia, USA",
    "us-south-2": "North Texas, USA",
    "europe-central-1": "Germany",
}


def _type(name: str, gpu: str, gpus: int, cents: int, specs: tuple[int, int, int]) -> dict[str, Any]:
    vcpus, memory_gib, storage_gib = specs
    return {
        "name": name,
        "description": f"{gpus}x {gpu}" if gpus else f"{vcpus}x vCPU",
        "gpu_description": gpu,
        "price_cents_per_hour": cents,
        "specs": {"vcpus": vcpus, "memory_gib": memory_gib, "storage_gib": storage_gib, "gpus": gpus},
    }


_TYPES = [
    (_type("gpu_8x_b200_sxm6", "B200 (180 GB SXM6)", 8, 5352, (208, 2900, 22528)), []),
    (
        _type("gpu_8x_h100_sxm5", "H100 (80 GB SXM5)", 8, 3192, (208, 1800, 22528)),
        ["us-east-1", "us-south-2"],
    ),
    (_type("gpu_1x_h100_pcie", "H100 (80 GB PCIe)", 1, 329, (26, 200, 1024)), ["us-west-1"]),
    (_type("gpu_8x_a100_80gb_sxm4", "A100 (80 GB SXM4)", 8, 2232, (240, 1800, 20480)), ["us-west-1"]),
    (
        _type("gpu_8x_a100", "A100 (40 GB SXM4)", 8, 1592, (124, 1800, 6144)),
        ["us-west-1", "europe-central-1"],
    ),
    (_type("gpu_1x_gh200", "GH200 (96 GB)", 1, 229, (64, 432, 4096)), []),
    (_type("gpu_1x_a10", "A10 (24 GB PCIe)", 1, 129, (30, 200, 1400)), ["us-west-1", "us-east-1"]),
    (_type("gpu_4x_x900", "X900 (200 GB SXM9)", 4, 9900, (64, 900, 4096)), ["us-east-1"]),
    (_type("cpu_4x_general", "N/A", 0, 20, (4, 16, 100)), ["us-west-1", "us-east-1", "us-south-2"]),
]

TYPES: dict[str, dict[str, Any]] = {item["name"]: item for item, _ in _TYPES}
CAPACITY: dict[str, list[str]] = {item["name"]: regions for item, regions in _TYPES}


def region(name: str) -> dict[str, str]:
    """A Region object."""
    return {"name": name, "description": REGIONS.get(name, name)}
