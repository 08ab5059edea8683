"""How fast a model should train on a GPU: a roofline, a communication model, and no promises.

The time of a step on one GPU is the sum of: matrix products at a share of the dense bf16 peak, the activations' traffic at
the memory's bandwidth, the optimizer's traffic, and what of the all-reduce the backward pass does not hide. The shares
were set so that published steady-state figures for GPT-2 small (context 1,024, bf16, compiled) come out within ERROR:

    8 x A100-80GB  218,000 tokens/s a GPU   karpathy/llm.c, AdamW
    8 x H100       468,000                  karpathy/llm.c, AdamW
    8 x H100       448,000                  KellerJordan/modded-nanogpt, optimization track, Muon
    8 x A100-80GB  188,000                  the same, Muon
    1 x H200       490,000                  the same, Muon
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer import flops
from trainer.config import ModelConfig, TrainConfig
from trainer.gpus import Gpu

ERROR = 0.25
"""Relative error to expect of the roofline alone."""

_BLOCK_BYTES = 217
"""Activation traffic of a token, forward and backward, per layer and unit of width, in bf16: 2.0 MB for 12 layers x 768."""
_LOGIT_BYTES = 10
"""The same per entry of the vocabulary: 0.5 MB for 50,304."""
_OPTIMIZER_BYTES = 28
"""Traffic of a fused AdamW step per parameter: weight, gradient and two moments read, all but the gradient written."""
_EAGER = 0.6
"""Speed without torch.compile: published ratios are 0.54 to 0.85."""
_LAUNCH_TOKENS = 1024
"""A microbatch of so many tokens runs at half speed: kernels are too short to fill the GPU."""
_MUON_SHARE = 0.35
"""Share of the peak that the Newton-Schulz iterations reach."""
_NEWTON_SCHULZ_STEPS = 5

_LINKS = {"A100": 230e9, "H100": 360e9, "H200": 360e9, "B200": 700e9, "V100": 120e9}
"""All-reduce bus bandwidth within a node with NVLink, bytes/s, as nccl-tests shows it: about 0.78 of one direction's peak."""
_PCIE = 20e9
"""The same over PCIe 4.0."""
_NETWORK = 10e9
"""Between nodes with a 100 Gbit/s network."""


@dataclass(frozen=True)
class Speed:
    """Predicted steady state of a whole run."""

    tokens_per_second: float
    step_seconds: float
    mfu: float
    parts: dict[str, float]
    """Seconds of a step: products, memory, optimizer, communication."""


def efficiency(peak: float) -> float:
    """Share of the dense bf16 peak that the products of a small GPT reach: the faster the GPU, the harder."""
    return 0.85 if peak <= 400e12 else 0.72 if peak <= 1.2e15 else 0.65


def predict(
    model: ModelConfig, train: TrainConfig, gpu: Gpu, gpus: int, nodes: int = 1, *, microbatch_size: int = 1
) -> Speed | None:
    """The speed on `nodes` nodes of `gpus` GPUs each; None for a GPU without bf16 tensor cores, which has no peak here."""
    if gpu.bf16_flops is None:
        return None
    world = gpus * nodes
    tokens = train.global_batch_size * model.context_length / world
    half = (
        1.0 if train.precision == "bf16" else 0.5
    )  # float32 is computed as TF32: half the rate, twice the bytes
    peak = gpu.bf16_flops * half
    fill = microbatch_size * model.context_length
    busy = fill / (fill + _LAUNCH_TOKENS) * (1.0 if train.compile else _EAGER)
    work = flops.flops_per_token(model) * (4 / 3 if train.activation_checkpointing else 1)
    products = tokens * work / (peak * efficiency(gpu.bf16_flops)) / busy
    traffic = _BLOCK_BYTES * model.n_layers * model.emb_dim + _LOGIT_BYTES * model.vocab_size
    memory = tokens * traffic / half / gpu.bandwidth / busy
    optimizer = flops.parameters(model) * _OPTIMIZER_BYTES / gpu.bandwidth
    if train.optimizer == "muon":
        optimizer += _newton_schulz(model) / (gpu.bf16_flops * _MUON_SHARE)
    if train.sharding == "fsdp":
        optimizer /= world
    communication = _exposed(model, train, gpu, gpus, nodes, backward=(products + memory) * 2 / 3)
    seconds = products + memory + optimizer + communication
    speed = train.global_batch_size * model.context_length / seconds
    return Speed(
        tokens_per_second=speed,
        step_seconds=seconds,
        mfu=speed * flops.flops_per_token(model) / (gpu.bf16_flops * world),
        parts={
            "products": products,
            "memory": memory,
            "optimizer": optimizer,
            "communication": communication,
        },
    )


def _newton_schulz(model: ModelConfig) -> float:
    """FLOPs of one Muon step: for each matrix m x n (m <= n) five times X·Xᵀ, its square, and a product with X."""
    width, hidden = model.emb_dim, flops.feed_forward_width(model)
    heads = [(width, width)] * 2 + [(min(width, flops.kv_width(model)), width)] * 2
    branches = 3 if model.activation == "swiglu" else 2
    shapes = heads + [(min(width, hidden), max(width, hidden))] * branches
    each = sum(4 * m * m * n + 2 * m**3 for m, n in shapes)
    return float(_NEWTON_SCHULZ_STEPS * each * model.n_layers)


def _exposed(
    model: ModelConfig, train: TrainConfig, gpu: Gpu, gpus: int, nodes: int, *, backward: float
) -> float:
    """Seconds of the gradients' all-reduce that the backward pass does not hide; at least its last bucket's."""
    world = gpus * nodes
    if world == 1:
        return 0.0
    link = _LINKS.get(gpu.family, _PCIE) if "PCIe" not in gpu.key else _PCIE
    link = min(link, _NETWORK * gpus) if nodes > 1 else link
    gradient = flops.parameters(model) * 4 * 2 * (world - 1) / world
    if train.sharding == "fsdp":
        gradient *= 1.5  # weights are gathered twice, gradients scattered once
    seconds = gradient / link
    return max(seconds - 0.8 * backward, 0.1 * seconds)
