"""How many tokens `speedrun` needs for the loss that `gpt2` has after N.

    python benchmarks/sample_efficiency.py --text FILE… [--text FILE… …] [--steps 200] [--threads 1]

Trains both recipes on bytes of each given text, a corpus named after its first file, and of the running Python's
standard library, on the CPU: `gpt2` for N steps at each of three learning rates, of which the best counts, `speedrun`
for N/2 at its one. The held-out tenth decides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this script's folder has a `trainer` of its own: another script
SHAPE = {"vocab_size": 256, "context_length": 128, "emb_dim": 128, "n_heads": 4, "n_layers": 4}
GPT2 = {"model": {"qkv_bias": True}, "train": {"schedule": "cosine"}}
SPEEDRUN = {
    "model": {"norm": "rms", "activation": "relu2", "position": "rope", "rotary_fraction": 0.5, "qk_norm": True,
              "logit_softcap": 15.0, "init": "zero_proj"},
    "train": {"optimizer": "muon", "schedule": "wsd", "min_learning_rate": 0.0, "warmup_steps": 0, "weight_decay": 0.01,
              "muon_learning_rate": 0.02},
}  # fmt: skip


def shards(name: str, text: bytes, folder: Path) -> tuple[str, str]:
    from trainer.shards import write_bin

    cut = len(text) * 9 // 10
    write_bin(folder / f"{name}-train.bin", list(text[:cut]))
    write_bin(folder / f"{name}-val.bin", list(text[cut:]))
    return str(folder / f"{name}-train.bin"), str(folder / f"{name}-val.bin")


def final_loss(recipe, data, *, steps, learning_rate, out: Path) -> float:
    """Train once; the validation loss of the last step."""
    train = {"global_batch_size": 16, "microbatch_size": 16, "steps": steps, "learning_rate": learning_rate,
             "min_learning_rate": learning_rate / 10, "warmup_steps": steps // 20, "device": "cpu", "precision": "fp32",
             "compile": False, "log_every": 100, "validate_every": 0, "validation_tokens": 100_000, **recipe["train"]}  # fmt: skip
    config = {
        "data": {"train": [data[0]], "validation": [data[1]]},
        "model": {**SHAPE, **recipe["model"]},
        "train": train,
        "checkpoint": {"every_steps": 0, "every": None},
    }
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "trainer",
        "train",
        "--config",
        str(out / "config.json"),
        "--out",
        str(out),
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in lines if line["kind"] == "validation"][-1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", nargs="+", type=Path, action="append", default=[])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    corpora = {paths[0].stem: b"".join(path.read_bytes() for path in paths) for paths in options.text}
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    corpora["python-stdlib"] = b"".join(path.read_bytes() for path in library)[:4_000_000]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for corpus, text in corpora.items():
            data = shards(corpus, text, folder)
            found = {}
            for rate in (1e-3, 2e-3, 4e-3):
                out = folder / f"{corpus}-gpt2-{rate}"
                found[rate] = final_loss(GPT2, data, steps=options.steps, learning_rate=rate, out=out)
                print(
                    f"{corpus}: gpt2 at {rate:g} after {options.steps} steps: {found[rate]:.4f}", flush=True
                )
            out = folder / f"{corpus}-speedrun"
            loss = final_loss(SPEEDRUN, data, steps=options.steps // 2, learning_rate=4e-3, out=out)
            reached = "reaches" if loss <= min(found.values()) else "misses"
            print(
                f"{corpus}: speedrun after {options.steps // 2} steps: {loss:.4f}, {reached} {min(found.values()):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
