"""The one table of GPUs: memory, dense bf16 peak, memory bandwidth, each with its source.

A GPU that is not here has no peak, and so no MFU: an unknown figure is better than a wrong one. Sparse peaks, which
data sheets print in larger type, are halved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU as its maker describes it."""

    key: str
    """`NAME-MEMORYGB`, as in a spec."""
    family: str
    """What a request without further detail means: `H100` is satisfied by the SXM, PCIe and NVL boards."""
    memory_gib: float
    """Nominal memory. What a process can allocate is a few percent less."""
    bf16_flops: float | None
    """Dense bf16 tensor-core peak with float32 accumulation, FLOP/s; None where the GPU has no bf16 tensor cores."""
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    source: str
    """Where the figures are published."""
    words: tuple[str, ...]
    """Words that the device's name must contain."""
    absent: tuple[str, ...] = ()
    """Words that it must not contain."""

    @property
    def name(self) -> str:
        """The key without the memory."""
        return self.key.rsplit("-", 1)[0]


_TABLE = (
    Gpu("V100-16GB", "V100", 16, None, 900e9, "NVIDIA V100 data sheet (SXM2)", ("v100",)),
    Gpu("V100-32GB", "V100", 32, None, 900e9, "NVIDIA V100 data sheet (SXM2)", ("v100",)),
    Gpu("T4-16GB", "T4", 16, None, 320e9, "NVIDIA T4 data sheet", ("t4",)),
    Gpu("RTX6000-24GB", "RTX6000", 24, None, 672e9, "NVIDIA Quadro RTX 6000 data sheet (Turing)",
        ("rtx", "6000"), ("ada", "pro", "blackwell")),
    Gpu("A10-24GB", "A10", 24, 125e12, 600e9, "NVIDIA A10 data sheet", ("a10",)),
    Gpu("A10G-24GB", "A10G", 24, 70e12, 600e9, "NVIDIA A10G data sheet (AWS G5)", ("a10g",)),
    Gpu("A30-24GB", "A30", 24, 165e12, 933e9, "NVIDIA A30 data sheet", ("a30",)),
    Gpu("A40-48GB", "A40", 48, 149.7e12, 696e9, "NVIDIA A40 data sheet", ("a40",)),
    Gpu("A6000-48GB", "A6000", 48, 154.8e12, 768e9, "NVIDIA RTX A6000 data sheet", ("a6000",)),
    Gpu("A100-40GB", "A100", 40, 312e12, 1.555e12, "NVIDIA A100 data sheet", ("a100",)),
    Gpu("A100-80GB", "A100", 80, 312e12, 2.039e12, "NVIDIA A100 data sheet (SXM4)", ("a100",), ("pcie",)),
    Gpu("A100PCIe-80GB", "A100", 80, 312e12, 1.935e12, "NVIDIA A100 data sheet (PCIe)", ("a100", "pcie")),
    Gpu("L4-24GB", "L4", 24, 121e12, 300e9, "NVIDIA L4 data sheet", ("l4",)),
    Gpu("L40-48GB", "L40", 48, 181.05e12, 864e9, "NVIDIA L40 data sheet", ("l40",)),
    Gpu("L40S-48GB", "L40S", 48, 362.05e12, 864e9, "NVIDIA L40S data sheet", ("l40s",)),
    Gpu("RTX3090-24GB", "RTX3090", 24, 71e12, 936e9, "NVIDIA Ampere GA102 whitepaper", ("rtx", "3090"), ("ti",)),
    Gpu("RTX4090-24GB", "RTX4090", 24, 165.2e12, 1008e9, "NVIDIA Ada whitepaper", ("rtx", "4090"), ("laptop", "d")),
    Gpu("RTX5090-32GB", "RTX5090", 32, 209.5e12, 1792e9, "NVIDIA RTX Blackwell whitepaper",
        ("rtx", "5090"), ("laptop", "d")),
    Gpu("RTX6000ADA-48GB", "RTX6000ADA", 48, 364.2e12, 960e9, "NVIDIA RTX 6000 Ada data sheet",
        ("rtx", "6000", "ada")),
    Gpu("H100-80GB", "H100", 80, 989e12, 3.35e12, "NVIDIA H100 data sheet (SXM5)", ("h100",), ("pcie", "nvl")),
    Gpu("H100PCIe-80GB", "H100", 80, 756e12, 2.0e12, "NVIDIA H100 data sheet (PCIe)", ("h100", "pcie")),
    Gpu("H100NVL-94GB", "H100", 94, 835e12, 3.9e12, "NVIDIA H100 NVL data sheet", ("h100", "nvl")),
    Gpu("GH200-96GB", "GH200", 96, 989e12, 4.0e12, "NVIDIA GH200 data sheet (HBM3)", ("gh200",)),
    Gpu("GH200-144GB", "GH200", 144, 989e12, 4.9e12, "NVIDIA GH200 data sheet (HBM3e)", ("gh200",)),
    Gpu("H200-141GB", "H200", 141, 989e12, 4.8e12, "NVIDIA H200 data sheet (SXM)", ("h200",), ("nvl",)),
    Gpu("H200NVL-141GB", "H200", 141, 835e12, 4.8e12, "NVIDIA H200 data sheet (NVL)", ("h200", "nvl")),
    Gpu("B200-180GB", "B200", 180, 2250e12, 8.0e12, "NVIDIA HGX B200 data sheet (dense)", ("b200",)),
)  # fmt: skip

GPUS: Mapping[str, Gpu] = {gpu.key: gpu for gpu in _TABLE}
"""Every known GPU by key."""

_REQUEST = re.compile(
    r"(?P<name>[A-Za-z0-9]+)(?:-(?P<memory>\d+)\s*G(?:i?B)?)?(?::(?P<count>\d+))?", re.IGNORECASE
)
_MEMORY = re.compile(r"(\d+)\s*gi?b", re.IGNORECASE)


def lookup(device_name: str, memory_gib: float | None = None) -> Gpu | None:
    """The GPU that a driver or a provider calls `device_name` (`NVIDIA A100-SXM4-40GB`, `H100 (80 GB SXM5)`), or None.

    `memory_gib`, as the driver reports it, decides between sizes; without it a size in the name does. What fits no
    row, or more than one, is unknown.
    """
    exact = GPUS.get(device_name)
    if exact is not None:
        return exact
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    words |= {left + right for left, right in re.findall(r"(rtx)\s*(\d{4})", device_name.lower())}
    found = [gpu for gpu in _TABLE if _named(gpu, words)]
    if memory_gib is None and len(found) > 1:
        match = _MEMORY.search(device_name)
        memory_gib = float(match[1]) if match else None
    if memory_gib is not None:
        # ECC and the driver take up to 9 percent of the nominal memory (A10: 22.0 of 24 GiB).
        found = [gpu for gpu in found if 0.88 <= memory_gib / gpu.memory_gib <= 1.04]
    return found[0] if len(found) == 1 else None


def _named(gpu: Gpu, words: set[str]) -> bool:
    compact = {"".join(gpu.words)}
    return (words.issuperset(gpu.words) or not words.isdisjoint(compact)) and words.isdisjoint(gpu.absent)


def parse_request(text: str) -> tuple[str, int | None, int]:
    """(name, memory in GB or None, count) of `H100`, `H100:8` or `A100-40GB:8`. Raises ValueError on anything else."""
    match = _REQUEST.fullmatch(text.strip())
    if match is None or match["count"] == "0":
        raise ValueError(
            f"{text!r} is not a GPU request; write NAME, NAME:COUNT or NAME-MEMORYGB:COUNT, such as A100-40GB:8"
        )
    return match["name"], int(match["memory"]) if match["memory"] else None, int(match["count"] or 1)


def matches(request: str, key: str, count: int) -> bool:
    """Whether `count` GPUs of table key `key` are what `request` asks for. A name means the board or its whole family."""
    name, memory, wanted = parse_request(request)
    gpu = GPUS.get(key)
    names = {gpu.name.lower(), gpu.family.lower()} if gpu else {key.rsplit("-", 1)[0].lower()}
    size = _MEMORY.search(key)
    held = int(size[1]) if size else None
    return name.lower() in names and wanted == count and memory in (None, held)
