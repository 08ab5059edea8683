"""No training: a checkpoint is measured, by all ranks together: `python -m trainer.after.evaluate --config config.json --out DIR`.

It writes the evaluations.json that the end of a training run writes, so a loss is the same wherever it is measured.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer import clock, distributed, ending, evaluate, flops
from trainer import config as configuration
from trainer.after import bases, script, session
from trainer.after.settings import MeasureConfig, load, train_config
from trainer.config import ConfigError, TrainerConfig
from trainer.progress import Metrics, Status, log
from trainer.session import peak_memory_gib, set_up_process
from trainer.shards import ShardError


def run(config_path: Path, out: Path) -> int:
    """Measure as `config_path` says; the exit code. Every rank runs this."""

    def work(status: Status | None, stop: threading.Event) -> str:
        return _measure(load(MeasureConfig, config_path), out, status, stop)

    return ending.carry(out, work, ShardError)


def _measure(settings: MeasureConfig, out: Path, status: Status | None, stop: threading.Event) -> str:
    train = train_config(settings, 0)
    base = bases.load(settings.base)
    if base.config.tuned is not None and base.config.tuned.kind == "classification":
        raise ConfigError("base", f"{settings.base} is a classifier, no language model")
    step = settings.known.step if settings.known is not None and settings.known.step is not None else 0
    with distributed.world(train) as here:
        configuration.check_batch(train, here.size)
        size = session.microbatch(train.global_batch_size // here.size, settings.train.microbatch_size)
        set_up_process(TrainerConfig(base.config.data, base.model, train))
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        gpt = bases.assemble(base.model, base.weights, drop_rate=0.0, dtype=dtype).to(here.device).eval()
        metrics = Metrics(out / "metrics.jsonl") if here.rank == 0 else None
        if metrics is not None:
            metrics.write({
                "kind": "system", "step": 0, "time": clock.now(), "torch": torch.__version__, "world_size": here.size,
                "microbatch_size": size, "parameters": flops.parameters(base.model),
                "flops_per_token": flops.flops_per_token(base.model), "compile": False,
            })  # fmt: skip
            log(f"{flops.parameters(base.model):,} parameters, {len(settings.evaluate.test_sets)} test sets")
        if status is not None:
            status.update(state="evaluating", microbatch_size=size, steps=1)
        results = evaluate.slices(
            gpt, settings.evaluate, base.model, microbatch_size=size, here=here, step=step,
            stopped=lambda: stop.is_set() or (status is not None and status.stop.is_set()),
        )  # fmt: skip
        if results is not None and here.rank == 0:
            texts = evaluate.samples(Path(settings.base), settings.evaluate.prompt_tokens, here.device)
            evaluate.report(out, results, texts, step)
        if metrics is not None:
            metrics.write(
                {
                    "kind": "system",
                    "step": 0,
                    "time": clock.now(),
                    "peak_memory_gib": peak_memory_gib(here.device),
                }
            )
        here.tell(None)  # nobody leaves while rank 0 still works
        return "stopped" if results is None else "finished"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    options = script.command_line("trainer.after.evaluate", argv)
    return run(options.config, options.out)


if __name__ == "__main__":
    sys.exit(main())
