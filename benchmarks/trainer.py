"""What each change in the trainer is worth on this machine: the ladder of docs/performance.md.

    python benchmarks/trainer.py ladder [--rounds 5] [--last N]     every rung, or the last ones, against the one below
    python benchmarks/trainer.py ratio  [--rounds 9]                the trainer against a plain compiled GPT-2

Two processes hold one variant each and take turns, a few steps at a time, so that whatever else the machine does hits
both; medians over all turns count. 6 layers x 384, context 256, batch 8, vocabulary 50,257, untied, float32 unless a
rung says otherwise; synthetic tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # this script's folder has a `trainer` of its own: the script
WIDTH, LAYERS, HEADS, CONTEXT, BATCH, VOCAB = 384, 6, 6, 256, 8, 50_257
PLAIN = {"model": "plain", "attention": "written out", "compile": False, "vocab": VOCAB, "precision": "fp32"}
RUNGS = [
    ("plain PyTorch: attention written out, AdamW, clipping", PLAIN),
    ("scaled_dot_product_attention", {"attention": "sdpa"}),
    ("torch.compile of the whole model", {"compile": True}),
    ("vocabulary padded to 50,304", {"vocab": 50_304}),
    (
        "this trainer's model, blocks compiled in place, loss over all logits",
        {"model": "ours", "loss": "plain"},
    ),
    ("chunked cross-entropy with its gradient in forward", {"loss": "chunked"}),
    ("fused AdamW that clips in the same pass", {"optimizer": "fused"}),
    ("allocator keeps its memory", {"allocator": "keeps"}),
    ("bf16 compute, float32 weights", {"precision": "bf16"}),
]
RATIO = ({**PLAIN, "attention": "sdpa", "compile": True, "vocab": 50_304},
         {"model": "ours", "loss": "chunked", "optimizer": "fused", "allocator": "keeps", "precision": "fp32"})  # fmt: skip


def plain_model(variant):
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def attend(self, x):
            b, t, d = x.shape
            q, k, v = (
                part.view(b, t, HEADS, d // HEADS).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
            )
            if variant["attention"] == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                mask = torch.ones(t, t, dtype=torch.bool).triu(1)
                scores = (q @ k.transpose(-2, -1) / (d // HEADS) ** 0.5).masked_fill(mask, float("-inf"))
                y = scores.softmax(-1) @ v
            return self.out(y.transpose(1, 2).reshape(b, t, d))

        def forward(self, x):
            x = x + self.attend(self.norm_1(x))
            return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(variant["vocab"], WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, variant["vocab"], bias=False)
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, 0, 0.02)

        def forward(self, inputs, targets):
            x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
            logits = self.head(self.norm(self.blocks(x)))
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model = Plain()
    return model, torch.compile(model) if variant["compile"] else model


def our_model(variant):
    import torch
    import torch.nn.functional as F  # noqa: N812

    from trainer import distributed, session
    from trainer.config import DataConfig, ModelConfig, TrainConfig, TrainerConfig

    model = ModelConfig(
        vocab_size=VOCAB, context_length=CONTEXT, emb_dim=WIDTH, n_heads=HEADS, n_layers=LAYERS, qkv_bias=True
    )
    train = TrainConfig(global_batch_size=BATCH, steps=1000, device="cpu", precision=variant["precision"])
    config = TrainerConfig(DataConfig(train=["-"]), model, train)
    if variant.get("allocator") == "keeps":
        session.keep_memory()
    here = distributed.World(0, 1, 0, 1, torch.device("cpu"))
    gpt, module, optimizer = session.build(config, here)
    session.use_seed_weights(gpt, config)
    if variant["loss"] == "chunked":
        return gpt, (lambda inputs, targets: module(inputs, targets, float(BATCH * CONTEXT))), optimizer

    def full_logits(hidden, weight, targets):
        return F.cross_entropy(F.linear(hidden.flatten(0, 1), weight), targets.flatten())

    compiled = torch.compile(full_logits)
    return gpt, (lambda inputs, targets: compiled(gpt.hidden(inputs), gpt.head.weight, targets)), optimizer


def worker(variant):
    """Hold one variant; for every number read, make that many steps and answer with the seconds of each."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    fused = None
    if variant["model"] == "plain":
        model, loss = plain_model(variant)
    else:
        model, loss, fused = our_model(variant)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(VOCAB, (BATCH, CONTEXT + 1))

    def step():
        loss(tokens[:, :-1], tokens[:, 1:]).backward()
        if variant.get("optimizer") == "fused":
            fused.step(1.0)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            plain.step()
            plain.zero_grad()

    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begun = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begun)
        print(json.dumps(seconds), flush=True)


def start(variant):
    command = [sys.executable, __file__, "worker", json.dumps(variant)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != "ready":
        if process.poll() is not None:
            raise SystemExit(f"the worker for {variant} ended with {process.returncode}")
    return process


def compare(left, right, rounds):
    """Median tokens per second of two variants that take turns of two steps."""
    processes = [start(left), start(right)]
    seconds = [[], []]
    try:
        for _ in range(rounds):
            for index, process in enumerate(processes):
                print(2, file=process.stdin, flush=True)
                seconds[index] += json.loads(process.stdout.readline())
    finally:
        for process in processes:
            process.stdin.close()
            process.wait()
    return [BATCH * CONTEXT / statistics.median(times) for times in seconds]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["ladder", "ratio", "worker"])
    parser.add_argument("variant", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--last", type=int, default=len(RUNGS) - 1, metavar="N", help="only the last N rungs")
    options = parser.parse_args()
    if options.what == "worker":
        worker(json.loads(options.variant))
        return
    import torch

    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    print(f"{model}, {len(os.sched_getaffinity(0))} threads, torch {torch.__version__}")
    if options.what == "ratio":
        for precision in ("fp32", "bf16"):
            plain, ours = compare(RATIO[0], {**RATIO[1], "precision": precision}, options.rounds)
            print(
                f"plain compiled GPT-2, fp32: {plain:,.0f} tok/s; this trainer, {precision}: {ours:,.0f} tok/s; {ours / plain:.3f}x",
                flush=True,
            )
        return
    variant = RUNGS[0][1]
    print("| change | before, tok/s | after, tok/s | ratio |\n|---|---|---|---|")
    for number, (name, change) in enumerate(RUNGS[1:], 1):
        before, variant = variant, {**variant, **change}
        if number < len(RUNGS) - options.last:
            continue
        slow, fast = compare(before, variant, options.rounds)
        print(f"| {name} | {slow:,.0f} | {fast:,.0f} | {fast / slow:.2f} |", flush=True)


if __name__ == "__main__":
    main()
