"""`python -m trainer COMMAND`: train, bench, evaluate, sample; and, without torch, supervise and pull.

torchrun --nproc-per-node 2 -m trainer train --config config.json --out DIR [--resume]
python -m trainer bench --config config.json --steps 20 --json
python -m trainer evaluate --checkpoint DIR --data SHARD --tokens 1000000
python -m trainer sample --checkpoint DIR --prompt-tokens 1,2,3
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def _train(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="trainer train")
    parser.add_argument("--config", type=Path, required=True, help="config.json")
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for metrics, status and checkpoints"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in --out")
    options = parser.parse_args(argv)
    with _loading_torch():
        from trainer.loop import run

    return run(options.config, options.out, resume=options.resume)


@contextmanager
def _loading_torch() -> Iterator[None]:
    """With the settings that torch reads once: segments that can grow do not fragment, which is what late out-of-memory is. And no
    search for garbage among what is being loaded: with that at the end, a fifth of the time that a process needs to begin and end."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    gc.disable()
    yield
    gc.enable()


def _bench(argv: Sequence[str]) -> int:
    with _loading_torch():
        from trainer.bench import main

    return main(argv)


def _evaluate(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="trainer evaluate")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True, help="shards")
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--microbatch-size", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(argv)
    from trainer.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(
        options.checkpoint, options.data, offset=options.offset, tokens=options.tokens,
        microbatch_size=options.microbatch_size, device=options.device,
    )  # fmt: skip
    print(json.dumps({"loss": result.loss, "tokens": result.tokens}))
    return 0


def _sample(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="trainer sample")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompt-tokens", required=True, help="comma-separated token numbers")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(argv)
    from trainer.sample import generate, load_model

    model, _ = load_model(options.checkpoint, options.device)
    prompt = [int(token) for token in options.prompt_tokens.split(",")]
    tokens = generate(
        model, prompt, max_tokens=options.tokens, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, seed=options.seed,
    )  # fmt: skip
    print(json.dumps({"tokens": list(tokens)}))
    return 0


def _supervise(argv: Sequence[str]) -> int:
    from trainer.supervise import main

    return main(list(argv))


def _pull(argv: Sequence[str]) -> int:
    from trainer.pull import main

    return main(list(argv))


def _preflight(argv: Sequence[str]) -> int:
    from trainer.preflight import main

    return main(list(argv))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "bench": _bench,
    "evaluate": _evaluate,
    "sample": _sample,
    "supervise": _supervise,
    "pull": _pull,
    "preflight": _preflight,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        wanted = arguments[0] if arguments else ""
        if wanted in {"-h", "--help"}:
            print(__doc__)
            return 0
        print(f"trainer: {wanted!r} is none of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    code = main()
    gc.freeze()  # nobody looks for garbage in what goes with the process
    sys.exit(code)
