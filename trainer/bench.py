"""How fast a configuration trains here: real steps on synthetic tokens, with optimizer, clipping and all."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from trainer import config as configuration
from trainer import distributed, flops, microbatch, reading, schedule
from trainer.batches import Batches, Reader, training_reader
from trainer.config import ConfigError, DataConfig, TrainerConfig
from trainer.distributed import World
from trainer.session import (
    Mark,
    build,
    can_compile,
    gpu_of,
    peak_memory_gib,
    set_up_process,
    use_seed_weights,
)
from trainer.shards import write_bin

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Measured:
    """What steps took on this machine."""

    microbatch_size: int
    context_length: int
    step_seconds: float
    tokens_per_second: float
    mfu: float | None
    peak_memory_gib: float


def measure(
    config: TrainerConfig, here: World, reader: Reader, *, microbatch_size: int, steps: int
) -> Measured:
    """Run `steps` timed steps after a few that warm up (compiling among them); the median step counts."""
    train = config.train
    model, module, optimizer = build(config, here)
    use_seed_weights(model, config)
    if here.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(here.device)
    batches = Batches(
        reader, global_batch_size=train.global_batch_size, microbatch_size=microbatch_size, rank=here.rank,
        world_size=here.size, first_step=1, last_step=WARM_UP_STEPS + steps, device=here.device,
    )  # fmt: skip
    share = train.global_batch_size // here.size
    ended: list[Mark] = []
    try:
        for step in range(1, WARM_UP_STEPS + steps + 1):
            for index in range(share // microbatch_size):
                inputs, targets = batches.next()
                with distributed.synchronised(module, index == share // microbatch_size - 1):
                    module(inputs, targets, float(share * config.model.context_length)).backward()
            optimizer.step(schedule.factor(step, WARM_UP_STEPS + steps, train))
            ended.append(Mark(here.device))
            if step > 1:
                ended[-2].wait()  # as in training: at most one step ahead of the GPU
        ended[-1].wait()
    finally:
        batches.close()
    seconds = statistics.median(a.seconds_until(b) for a, b in pairwise(ended[WARM_UP_STEPS - 1 :]))
    speed = config.tokens_per_step / seconds
    gpu = gpu_of(here.device)
    peak = gpu.bf16_flops * here.size if gpu and gpu.bf16_flops and train.precision == "bf16" else None
    mfu = speed * flops.flops_per_token(config.model) / peak if peak else None
    return Measured(
        microbatch_size, config.model.context_length, seconds, speed, mfu, peak_memory_gib(here.device)
    )


def synthetic(config: TrainerConfig, directory: Path, sequences: int) -> Reader:
    """A reader of pseudo-random tokens, enough for `sequences`."""
    context = config.model.context_length
    generator = torch.Generator().manual_seed(config.train.seed)
    top = min(config.model.vocab_size, 65_536)
    tokens = torch.randint(top, (min(sequences, 256) * context + 1,), generator=generator)
    path = directory / f"synthetic-{os.getpid()}-{context}.bin"
    write_bin(path, tokens.tolist())
    return training_reader(DataConfig(train=[str(path)]), context, config.model.vocab_size)


def main(argv: Sequence[str]) -> int:
    """`python -m trainer bench --config config.json --steps 20 [--json] [--sweep]`."""
    parser = argparse.ArgumentParser(prog="trainer bench")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout and nothing else")
    parser.add_argument(
        "--sweep", action="store_true", help="map speed and memory by microbatch and context length"
    )
    options = parser.parse_args(argv)
    try:
        config = reading.load(options.config)
        with distributed.world(config.train) as here, tempfile.TemporaryDirectory() as directory:
            if options.sweep:
                rows = sweep(config, here, Path(directory), steps=options.steps)
                document: Any = {"sweep": rows}
            else:
                document = bench(config, here, Path(directory), steps=options.steps)
    except ConfigError as error:
        sys.stderr.write(f"trainer: {error}\n")
        return 3
    if here.rank == 0:
        sys.stdout.write(json.dumps(document) + "\n" if options.json else _text(document))
    return 0


def bench(config: TrainerConfig, here: World, directory: Path, *, steps: int) -> dict[str, Any]:
    """The document of `bench --json`."""
    configuration.check_batch(config.train, here.size)
    set_up_process(config)
    size = microbatch.choose(config, here, None)
    reader = synthetic(config, directory, config.train.global_batch_size)
    measured = measure(config, here, reader, microbatch_size=size, steps=steps)
    gpu = gpu_of(here.device)
    name = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "cpu"
    return {
        "parameters": flops.parameters(config.model),
        "tokens_per_second": measured.tokens_per_second,
        "mfu": measured.mfu,
        "step_seconds": measured.step_seconds,
        "peak_memory_gib": measured.peak_memory_gib,
        "device": name,
        "compile": config.train.compile and can_compile(here.device),
        "processes": here.size,
        "microbatch_size": size,
        "flops_per_token": flops.flops_per_token(config.model),
        "flops_formula": flops.FORMULA,
        "peak_flops": gpu.bf16_flops if gpu else None,
        "peak_source": gpu.source if gpu else None,
        "predicted_memory_gib": flops.memory_gib(config.model, config.train, size, here.size),
        "torch": torch.__version__,
    }


def sweep(config: TrainerConfig, here: World, directory: Path, *, steps: int) -> list[dict[str, Any]]:
    """Speed and peak memory of every microbatch candidate at the context length and its halves, one microbatch a step;
    where memory runs out the row says so. Peak memory on a CPU is that of the process so far, so it never falls."""
    set_up_process(config)
    rows: list[dict[str, Any]] = []
    for context in (
        config.model.context_length,
        config.model.context_length // 2,
        config.model.context_length // 4,
    ):
        if context < 1:
            continue
        for size in sorted(microbatch.candidates(config, here.size)):
            one = replace(
                config,
                model=replace(config.model, context_length=context),
                train=replace(config.train, global_batch_size=size * here.size, microbatch_size=size),
            )
            row: dict[str, Any] = {"context_length": context, "microbatch_size": size}
            row["predicted_memory_gib"] = flops.memory_gib(one.model, one.train, size, here.size)
            try:
                reader = synthetic(one, directory, one.train.global_batch_size)
                found = measure(one, here, reader, microbatch_size=size, steps=steps)
                row |= {
                    "tokens_per_second": found.tokens_per_second,
                    "mfu": found.mfu,
                    "peak_memory_gib": found.peak_memory_gib,
                }
            except torch.OutOfMemoryError:
                row |= {"tokens_per_second": None, "mfu": None, "peak_memory_gib": None}
            rows.append(row)
    return rows


def _text(document: dict[str, Any]) -> str:
    if "sweep" not in document:
        return _table(document)
    lines = [f"{'context':>8} {'microbatch':>10} {'tok/s':>12} {'peak GiB':>9} {'predicted':>9}\n"]
    for row in document["sweep"]:
        speed = "out of memory" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}"
        peak = "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.2f}"
        lines.append(
            f"{row['context_length']:>8} {row['microbatch_size']:>10} {speed:>12} {peak:>9} {row['predicted_memory_gib']:>9.2f}\n"
        )
    return "".join(lines)


def _table(document: dict[str, Any]) -> str:
    mfu = (
        "unknown: no published dense bf16 peak for this device"
        if document["mfu"] is None
        else f"{document['mfu']:.1%}"
    )
    lines = {
        **document,
        "tokens_per_second": f"{document['tokens_per_second']:,.0f}",
        "mfu": mfu,
    }
    return "".join(f"{key:>22}  {value}\n" for key, value in lines.items())
