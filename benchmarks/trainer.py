"""What each change in the trainer is worth on this machine: the ladders of docs/performance.md.

    python benchmarks/trainer.py ladder [--device cuda] [--rounds 5] [--last N]   every rung, or the last ones, against the one below
    python benchmarks/trainer.py ratio  [--device cuda] [--rounds 9]              the trainer against a plain compiled GPT-2

Two processes hold one variant each and take turns, a few steps at a time, so that whatever else the machine does hits
both; medians over all turns count. Vocabulary 50,257, untied, synthetic tokens. CPU: 6 layers x 384, context 256, batch 8,
float32 unless a rung says otherwise. GPU: 12 layers x 768, context 1,024, batch 16 until attention is no longer written out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # this script's folder has a `trainer` of its own: the script
VOCAB = 50_257
SIZES = {
    "cpu": {"width": 384, "layers": 6, "heads": 6, "context": 256, "batch": 8, "steps": 2},
    "cuda": {"width": 768, "layers": 12, "heads": 12, "context": 1024, "batch": 16, "steps": 5},
}
"""Of the model, of a step, and the steps of a turn."""
STARTS = {"cpu": [0, 3, 6], "cuda": [0, 3, 6, 8]}
"""Rungs from which a new set of processes is started. Most of the time goes into compiling, so a few start together: as many as the
memory of an H200 holds."""
PRECISIONS = {"cpu": [("fp32", "fp32"), ("fp32", "bf16")], "cuda": [("fp32", "bf16"), ("bf16", "bf16")]}
"""Pairs of the plain model's and ours."""
PLAIN = {"model": "plain", "attention": "written out", "compile": False, "vocab": VOCAB, "precision": "fp32"}
OURS = {"model": "ours", "loss": "chunked", "optimizer": "fused"}
COMPILED = {**PLAIN, "attention": "sdpa", "compile": True, "vocab": 50_304}
SHARED_RUNGS = [
    (
        "this trainer's model, blocks compiled in place, loss over all logits",
        {"model": "ours", "loss": "plain"},
    ),
    ("chunked cross-entropy with its gradient in forward", {"loss": "chunked"}),
    ("fused AdamW that clips in the same pass", {"optimizer": "fused"}),
]
RUNGS = {
    "cpu": [
        ("plain PyTorch: attention written out, AdamW, clipping", PLAIN),
        ("scaled_dot_product_attention", {"attention": "sdpa"}),
        ("torch.compile of the whole model", {"compile": True}),
        ("vocabulary padded to 50,304", {"vocab": 50_304}),
        *SHARED_RUNGS,
        ("allocator keeps its memory", {"allocator": "keeps"}),
        ("bf16 compute, float32 weights", {"precision": "bf16"}),
    ],
    "cuda": [
        (
            "plain PyTorch: float32, attention written out, AdamW, clipping, the loss read each step",
            {**PLAIN, "host": "waits", "batches": "read at need"},
        ),
        ("TF32 for float32 products", {"tf32": True}),
        ("bf16 compute (autocast), float32 weights", {"precision": "bf16"}),
        ("scaled_dot_product_attention", {"attention": "sdpa"}),
        ("32 sequences at a time instead of 16", {"batch": 32}),
        ("torch.compile of the whole model", {"compile": True}),
        ("vocabulary padded to 50,304", {"vocab": 50_304}),
        *SHARED_RUNGS,
        ("no wait for the GPU within a step", {"host": "runs ahead"}),
        ("batches read ahead into pinned memory", {"batches": "read ahead"}),
        ("garbage collector frozen", {"collector": "frozen"}),
        ("64 sequences at a time instead of 32", {"batch": 64}),
    ],
}
RATIO = {
    "cpu": (COMPILED, {**OURS, "allocator": "keeps"}),
    "cuda": (
        {**COMPILED, "tf32": True, "host": "waits", "batches": "read at need"},
        {**OURS, "tf32": True, "batches": "read ahead", "collector": "frozen"},
    ),
}


def plain_model(variant):
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import nn

    width, heads, layers, context = (variant[key] for key in ("width", "heads", "layers", "context"))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def attend(self, x):
            b, t, d = x.shape
            q, k, v = (
                part.view(b, t, heads, d // heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
            )
            if variant["attention"] == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                mask = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
                scores = (q @ k.transpose(-2, -1) / (d // heads) ** 0.5).masked_fill(mask, float("-inf"))
                y = scores.softmax(-1) @ v
            return self.out(y.transpose(1, 2).reshape(b, t, d))

        def forward(self, x):
            x = x + self.attend(self.norm_1(x))
            return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(variant["vocab"], width), nn.Embedding(context, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, variant["vocab"], bias=False)
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, 0, 0.02)

        def forward(self, inputs, targets):
            x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
            logits = self.head(self.norm(self.blocks(x)))
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model = Plain().to(variant["device"])
    loss = torch.compile(model) if variant["compile"] else model
    if variant["precision"] == "fp32":
        return model, loss

    def narrow(inputs, targets):
        with torch.autocast(variant["device"], torch.bfloat16):
            return loss(inputs, targets)

    return model, narrow


def our_model(variant):
    import torch
    import torch.nn.functional as F  # noqa: N812

    from trainer import distributed, session

    config = our_config(variant)
    if variant.get("allocator") == "keeps":
        session.keep_memory()
    here = distributed.World(0, 1, 0, 1, place(variant))
    gpt, module, optimizer = session.build(config, here)
    session.use_seed_weights(gpt, config)
    count = float(variant["batch"] * variant["context"])
    if variant["loss"] == "chunked":
        return gpt, (lambda inputs, targets: module(inputs, targets, count)), optimizer

    def full_logits(hidden, weight, targets):
        logits = F.linear(hidden.flatten(0, 1), weight.to(hidden.dtype))
        return F.cross_entropy(logits.float(), targets.flatten())

    compiled = torch.compile(full_logits)
    return gpt, (lambda inputs, targets: compiled(gpt.hidden(inputs), gpt.head.weight, targets)), optimizer


def place(variant):
    import torch

    return torch.device("cuda", 0) if variant["device"] == "cuda" else torch.device("cpu")


def our_config(variant):
    from trainer.config import DataConfig, ModelConfig, TrainConfig, TrainerConfig

    model = ModelConfig(vocab_size=VOCAB, context_length=variant["context"], emb_dim=variant["width"],
                        n_heads=variant["heads"], n_layers=variant["layers"], qkv_bias=True)  # fmt: skip
    train = TrainConfig(global_batch_size=variant["batch"], steps=1000, device=variant["device"],
                        precision=variant["precision"])  # fmt: skip
    return TrainerConfig(DataConfig(train=["-"]), model, train)


def batches(variant, folder):
    """What gives (inputs, targets) of the next step: the same ones each time on a CPU, where reading is nothing."""
    import torch

    from trainer import bench
    from trainer.batches import Batches

    size, context, device = variant["batch"], variant["context"], place(variant)
    reader = bench.synthetic(our_config(variant), folder, 4 * size)
    if variant.get("batches") == "read ahead":
        ahead = Batches(reader, global_batch_size=size, microbatch_size=size, rank=0, world_size=1, first_step=1,
                        last_step=10**6, device=device)  # fmt: skip
        return ahead.next
    tokens = torch.empty(size, context + 1, dtype=torch.int64)
    reader.read(range(size), tokens.numpy())
    if variant.get("batches") == "read at need":

        def read():
            reader.read(range(size), tokens.numpy())
            moved = tokens.to(device)
            return moved[:, :-1], moved[:, 1:]

        return read
    fixed = tokens.to(device)
    return lambda: (fixed[:, :-1], fixed[:, 1:])


def worker(variant):
    """Hold one variant; for every number read, make that many steps and answer with the seconds that one took."""
    import torch

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    if variant.get("tf32"):
        torch.set_float32_matmul_precision("high")
    fused = None
    if variant["model"] == "plain":
        model, loss = plain_model(variant)
    else:
        model, loss, fused = our_model(variant)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step(following):
        value = loss(*following())
        value.backward()
        if variant.get("optimizer") == "fused":
            fused.step(1.0)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            plain.step()
            plain.zero_grad()
        if variant.get("host") == "waits":
            value.item()

    wait = torch.cuda.synchronize if variant["device"] == "cuda" else contextlib.nullcontext
    with tempfile.TemporaryDirectory() as folder:
        following = batches(variant, Path(folder))
        for _ in range(3):
            step(following)
        if variant.get("collector") == "frozen":
            gc.collect()
            gc.freeze()
            gc.disable()
        wait()
        print("ready", flush=True)
        for line in sys.stdin:
            begun = time.perf_counter()
            for _ in range(int(line)):
                step(following)
            wait()
            print(json.dumps((time.perf_counter() - begun) / int(line)), flush=True)
        os._exit(0)  # the reading thread is in the middle of something


@contextlib.contextmanager
def started(variants):
    """A process for each variant, all of them ready; gone afterwards."""
    processes = [
        subprocess.Popen([sys.executable, __file__, "worker", json.dumps(variant)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for variant in variants
    ]  # fmt: skip
    try:
        for variant, process in zip(variants, processes, strict=True):
            while process.stdout.readline().strip() != "ready":
                if process.poll() is not None:
                    raise SystemExit(f"the worker for {variant} ended with {process.returncode}")
        yield processes
    finally:
        for process in processes:
            process.stdin.close()
            process.wait()


def compare(variants, processes, rounds):
    """Median tokens per second of two variants that take turns of a few steps."""
    seconds = [[], []]
    for _ in range(rounds):
        for taken, variant, process in zip(seconds, variants, processes, strict=True):
            print(variant["steps"], file=process.stdin, flush=True)
            taken.append(json.loads(process.stdout.readline()))
    return [
        variant["batch"] * variant["context"] / statistics.median(taken)
        for taken, variant in zip(seconds, variants, strict=True)
    ]


def ladder(given, rounds, last):
    """Print the rungs, each beside the one below it."""
    rungs, starts = RUNGS[given["device"]], STARTS[given["device"]]
    variants = [{**given, **rungs[0][1]}]
    for _, change in rungs[1:]:
        variants.append({**variants[-1], **change})
    first = max(0, len(rungs) - 1 - last) if last else 0
    print("| change | before, tok/s | after, tok/s | ratio |\n|---|---|---|---|")
    for start, end in itertools.pairwise([*starts, len(rungs) - 1]):
        begin = max(start, first)
        with started(variants[begin : end + 1] if begin < end else []) as processes:
            for index in range(begin, end):
                pair = processes[index - begin : index - begin + 2]
                slow, fast = compare(variants[index : index + 2], pair, rounds)
                print(
                    f"| {rungs[index + 1][0]} | {slow:,.0f} | {fast:,.0f} | {fast / slow:.2f} |", flush=True
                )


def ratio(given, rounds):
    """Print the trainer beside the plain compiled model, in the precisions that this device is made for."""
    plain, ours = RATIO[given["device"]]
    for left, right in PRECISIONS[given["device"]]:
        pair = [{**given, **plain, "precision": left}, {**given, **ours, "precision": right}]
        with started(pair) as processes:
            slow, fast = compare(pair, processes, rounds)
        print(
            f"plain compiled GPT-2, {left}: {slow:,.0f} tok/s; this trainer, {right}: {fast:,.0f} tok/s; {fast / slow:.3f}x",
            flush=True,
        )


def machine(device):
    """The processor or the GPU, and torch's version."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{model}, {len(os.sched_getaffinity(0))} threads, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["ladder", "ratio", "worker"])
    parser.add_argument("variant", nargs="?")
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--last", type=int, metavar="N", help="only the last N rungs")
    options = parser.parse_args()
    if options.what == "worker":
        worker(json.loads(options.variant))
        return
    print(machine(options.device))
    given = {**SIZES[options.device], "device": options.device}
    if options.what == "ratio":
        ratio(given, options.rounds)
    else:
        ladder(given, options.rounds, options.last)


if __name__ == "__main__":
    main()
