"""A trainer of the user's own for cases that are about nodes, links and bills: the command line, files and metrics of docs/own-trainer.md
without a tensor. torchrun, its ranks, the supervisor, the checkpoints' manifests and every byte that travels are real; what a step costs
is a wait of some milliseconds instead of a quarter of a minute of processor time for each launch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import trainer

MAIN = '''
"""A trainer without tensors: a step is a wait, a checkpoint is a small file with a manifest."""

import json
import math
import os
import signal
import sys
import threading
from pathlib import Path

from trainer import clock, manifest
from trainer.progress import Metrics, Status, log, step_line

STEP_SECONDS = 0.01


def weights(step):
    """A safetensors file of one number."""
    header = json.dumps({"value": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + step.to_bytes(8, "little")


def point(folder, link, name):
    temporary = folder / f".{link}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(folder / link)


def save(folder, step, config, keep):
    name, temporary = manifest.directory_name(step), folder / f".tmp-{step}"
    temporary.mkdir(exist_ok=True)
    (temporary / "model.safetensors").write_bytes(weights(step))
    (temporary / "training_state.pt").write_bytes(step.to_bytes(8, "little"))
    (temporary / "config.json").write_text(json.dumps(config))
    written = manifest.write(temporary, step)
    if not (folder / name).exists():
        temporary.replace(folder / name)
    point(folder, "latest", name)
    point(folder, "best", name)
    whole = sorted(path for path in folder.iterdir() if manifest.step_of(path.name) is not None)
    for old in whole[:-keep]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    return manifest.digest(folder / name), written.bytes


def newest(folder):
    whole = [path for path in folder.glob("step-*") if manifest.step_of(path.name) and not manifest.verify(path)]
    return max((manifest.step_of(path.name) for path in whole), default=0)


def train(config, out, resume):
    settings, every = config["train"], config["checkpoint"]["every_steps"]
    stop, folder = threading.Event(), out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    steps, batch = settings["steps"], settings["global_batch_size"] * config["model"]["context_length"]
    step = newest(folder) if resume else 0
    status = Status(out, world_size=int(os.environ["WORLD_SIZE"]), microbatch_size=settings["microbatch_size"])
    metrics = Metrics(out / "metrics.jsonl")
    status.update(state="running", step=step, steps=steps)
    metrics.write({"kind": "system", "step": step, "time": clock.now(), "gpus": 0, "parameters": 1, "world_size": 2,
                   "microbatch_size": settings["microbatch_size"], "flops_per_token": 6})
    if resume:
        metrics.write({"kind": "resume", "step": step, "time": clock.now()})
    saved = step
    while step < steps and not (stop.is_set() or status.stop.is_set()):
        stop.wait(STEP_SECONDS)
        step += 1
        loss = 2.0 + 3.0 * math.exp(-step / 40)
        line = {"kind": "step", "step": step, "tokens": step * batch, "time": clock.now(), "loss": loss,
                "learning_rate": settings["learning_rate"], "grad_norm": 1.0, "step_seconds": STEP_SECONDS,
                "tokens_per_second": batch / STEP_SECONDS, "mfu": None, "memory_gib": 0.1}
        metrics.write(line)
        status.update(step=step, last_step_time=clock.now(), step_seconds=STEP_SECONDS)
        if step % settings["log_every"] == 0:
            log(step_line(line, steps))
        validated = None
        if settings["validate_every"] and step % settings["validate_every"] == 0 or step == steps:
            validated = loss + 0.1
            metrics.write({"kind": "validation", "step": step, "tokens": step * batch, "time": clock.now(),
                           "validation_loss": validated, "seconds": 0.0})
        if step % every == 0 or step == steps or stop.is_set() or status.stop.is_set():
            saved = announce(metrics, status, folder, step, config, validated)
    if saved != step:
        announce(metrics, status, folder, step, config, None)
    metrics.sync()
    status.end("finished" if step == steps else "stopped")
    (out / "stop").unlink(missing_ok=True)


def announce(metrics, status, folder, step, config, validated):
    digest, size = save(folder, step, config, config["checkpoint"]["keep"])
    metrics.write({"kind": "checkpoint", "step": step, "time": clock.now(), "sha256": digest, "bytes": size,
                   "validation_loss": validated, "best": validated is not None, "seconds": 0.0})
    status.update(checkpoint_step=step)
    return step


def main(argv):
    if argv[0] == "supervise":
        from trainer.supervise import main as supervise

        return supervise(argv[1:])
    if argv[0] == "preflight":
        from trainer.preflight import main as preflight

        return preflight(argv[1:])
    out = Path(argv[argv.index("--out") + 1])
    if os.environ["RANK"] == "0":
        train(json.loads(Path(argv[argv.index("--config") + 1]).read_text()), out, "--resume" in argv)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''
KEPT = ("__init__", "clock", "config", "gpus", "interruption", "manifest", "preflight", "processes", "progress", "pull", "push", "supervise",
        "supervisor", "utilisation", "watchdog")  # fmt: skip
"""The modules of our trainer that need no torch and that the node's side of llmctl runs."""


def plain_trainer(folder: Path, *, step_seconds: float = 0.01) -> str:
    """Write the package into `folder`; its path, for `trainer.path`."""
    own = folder / "plain-trainer"
    own.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copy(Path(trainer.__file__).with_name(f"{name}.py"), own)
    (own / "__main__.py").write_text(MAIN.replace("STEP_SECONDS = 0.01", f"STEP_SECONDS = {step_seconds}"))
    return str(own)
