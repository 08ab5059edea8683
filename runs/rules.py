"""What a spec may not say although each of its keys is well-formed: rules over several keys, and the trainer's own checks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from runs.complaints import Complaint, nearest
from runs.hardware import LambdaHardware, SshHardware
from runs.sections import RunSpec
from runs.tuning import BUILTIN, DERIVED
from runs.yamlfile import Path
from trainer.after import settings
from trainer.after.settings import Measure
from trainer.config import ConfigError, TestSet, check, check_batch, parse_duration
from trainer.gpus import parse_request
from trainer.slices import SLICES

BUILTINS = ("python-stdlib",)
"""Corpora that llmctl makes itself: `builtin:NAME`."""
VOCABULARY = {"gpt2": 50257, "bytes": 256}
"""Token ids that the named tokenizers give out."""

_SOURCE = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.]+):(?P<rest>.*)", re.DOTALL)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME = re.compile(
    r"(.*_)?(API_?)?(KEY|TOKEN)|.*SECRET.*|.*PASSW(OR)?D.*|.*CREDENTIAL.*", re.IGNORECASE
)
_NODE_SOURCES = ("s3", "hf", "builtin")


def broken(spec: RunSpec) -> Iterator[Complaint]:
    """Every rule that a well-formed spec breaks."""
    for rule in _RULES:
        yield from rule(spec)


def beside_tune(raw: Mapping[str, Any]) -> Iterator[Complaint]:
    """Sections of pretraining that a file has beside `tune`, as it was written."""
    tune = raw.get("tune")
    if tune is None or (isinstance(tune, Mapping) and tune.get("known")):
        return
    for key in DERIVED:
        if key in raw:
            where = "the base has its own" if key == "model" else f"what is meant belongs under tune.{key}"
            yield Complaint((key,), f"has no place beside tune: {where}", "Delete it")


def _tune(spec: RunSpec) -> Iterator[Complaint]:
    tune = spec.tune
    if tune is None:
        return
    yield from _trainable(lambda: settings.check(tune), ("tune",))
    wanted = BUILTIN.get(tune.method)
    if not isinstance(tune, Measure):
        for key in ("train", "validation", "test"):
            for index, source in enumerate(getattr(tune.data, key)):
                for message, hint in _examples(source, wanted or ""):
                    yield Complaint(("tune", "data", key, index), message, hint)
        if tune.data.template not in {None, "alpaca", "llama2"}:
            yield Complaint(("tune", "data", "template"), f"there is no chat template {tune.data.template!r}",
                            "Write alpaca or llama2")  # fmt: skip
    if not tune.base.strip():
        yield Complaint(("tune", "base"), "is empty", "Name a run, a folder, or hf://owner/name")
    if isinstance(tune, Measure) and not spec.evaluate.test_sets and not spec.evaluate.prompts:
        yield Complaint(("evaluate",), "nothing is measured", "Add `evaluate: {test_sets: [fineweb-gpjt]}`")
    if tune.method == "classify" and (spec.evaluate.test_sets or spec.evaluate.prompts):
        yield Complaint(
            ("evaluate",), "a classifier predicts no tokens", "Delete it; tune.data.test measures it"
        )
    if spec.trainer.path is not None:
        yield Complaint(("trainer", "path"), "is for pretraining only", "Delete it")


def _examples(source: str, wanted: str) -> Iterator[tuple[str, str]]:
    match = _SOURCE.match(source)
    if not source.strip():
        yield "is empty", f"Write a path, or builtin:{wanted}"
    elif match is not None and (match["scheme"], match["rest"]) != ("builtin", wanted):
        yield f"{source} is no set of examples for this method", f"Write a path, or builtin:{wanted}"


def _rented(spec: RunSpec) -> Iterator[Complaint]:
    hardware = spec.hardware
    if hardware.provider not in {"lambda", "ec2"}:
        return
    for key, example in (("max_usd", "max_usd: 45"), ("max_hours", "max_hours: 6")):
        if getattr(spec.budget, key) is None:
            hint = f"Add `{example}` under budget: it ends a run that you forgot"
            yield Complaint(("budget", key), "is required for a rented node", hint)
    if not hardware.gpu_requests and not hardware.instance_types:
        hint = "Add `gpu: A100-40GB:8`, or instance_type; `llmctl offers --all` lists both"
        yield Complaint(("hardware", "gpu"), "is required for a rented node", hint)
    if hardware.gpu is not None and hardware.instance_type is not None:
        yield Complaint(
            ("hardware", "instance_type"), "says the same as gpu in another way", "Keep one of the two"
        )
    if any(not item.strip() for item in [*hardware.instance_types, *hardware.regions]):
        yield Complaint(("hardware",), "an instance type or a region is empty", "Delete it")
    if isinstance(hardware, LambdaHardware):
        yield from _lambda_key(hardware)


def _hosts(spec: RunSpec) -> Iterator[Complaint]:
    hardware = spec.hardware
    if not isinstance(hardware, SshHardware):
        return
    hosts = [hardware.host] if isinstance(hardware.host, str) else hardware.host
    if len(set(hosts)) < len(hosts):
        yield Complaint(("hardware", "host"), "names a machine twice", "Delete one of the two")
    elif hardware.nodes > len(hosts):
        hint = "Name as many machines as the run has nodes: `host: [first, second]`"
        yield Complaint(("hardware", "nodes"), f"is {hardware.nodes}, but host names {len(hosts)}", hint)


def _lambda_key(hardware: LambdaHardware) -> Iterator[Complaint]:
    if hardware.ssh_key_name and not hardware.identity_file:
        hint = "Add its private half as identity_file, or delete ssh_key_name: llmctl then makes a key"
        yield Complaint(("hardware", "ssh_key_name"), "needs identity_file", hint)
    if hardware.identity_file and not hardware.ssh_key_name:
        hint = "Add the name under which Lambda knows its public half"
        yield Complaint(("hardware", "identity_file"), "needs ssh_key_name", hint)


def _gpus(spec: RunSpec) -> Iterator[Complaint]:
    for index, request in enumerate(spec.hardware.gpu_requests):
        path: Path = (
            ("hardware", "gpu", index) if isinstance(spec.hardware.gpu, list) else ("hardware", "gpu")
        )
        try:
            name, _, count = parse_request(request)
        except ValueError as error:
            yield Complaint(path, str(error))
            continue
        if swapped := re.fullmatch(r"(\d+)x(\w+)", name):
            yield Complaint(path, f"{request!r} names no GPU", f"Did you mean {swapped[2]}:{swapped[1]}?")
            continue
        # `trainer.config.check` and _batch look at processes_per_node; here it is one process a GPU.
        if spec.train.processes_per_node is None and spec.train.device == "cuda":
            yield from _divides(spec, spec.processes(count))


def _batch(spec: RunSpec) -> Iterator[Complaint]:
    if spec.train.processes_per_node is not None and spec.train.processes_per_node >= 1:
        yield from _divides(spec, spec.processes(0))


def _divides(spec: RunSpec, world: int) -> Iterator[Complaint]:
    yield from _trainable(lambda: check_batch(spec.train, world), ("tune",) if spec.tune is not None else ())


def _trainer(spec: RunSpec) -> Iterator[Complaint]:
    where = ("tune",) if spec.tune is not None else ()
    yield from _trainable(lambda: check(spec.trainer_config()), where)


def _trainable(look: Callable[[], None], where: Path = ()) -> Iterator[Complaint]:
    try:
        look()
    except ConfigError as error:
        path = [int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", error.key)]
        hint = "To replace one with the other: --set train.steps=100 --set train.tokens=null"
        either = error.key == "train.tokens" and "either" in str(error)
        yield Complaint((*where, *path), str(error).removeprefix(f"{error.key}: "), hint if either else "")


def _data(spec: RunSpec) -> Iterator[Complaint]:
    listed: list[tuple[Path, list[str]]] = [] if spec.tune is not None else [
        (("data", "train"), spec.data.train), (("data", "validation"), spec.data.validation)]  # fmt: skip
    for index, test_set in enumerate(spec.evaluate.test_sets):
        if isinstance(test_set, TestSet):
            listed.append((("evaluate", "test_sets", index, "data"), test_set.data))
    for path, sources in listed:
        for index, source in enumerate(sources):
            for message, hint in _source(source):
                yield Complaint((*path, index), message, hint)
    if spec.data.train_tokens is not None or spec.evaluate.prompt_tokens:
        key: Path = ("data", "train_tokens") if spec.data.train_tokens else ("evaluate", "prompt_tokens")
        yield Complaint(key, "is written by llmctl for the node", "Delete it")


def _source(source: str) -> Iterator[tuple[str, str]]:
    match = _SOURCE.match(source)
    if not source.strip():
        yield "is empty", "Write a path, a glob, s3://…, hf://… or builtin:NAME"
    elif match is None:
        return
    elif match["scheme"] not in _NODE_SOURCES:
        yield (f"{match['scheme']}: is no source of shards",
               f"Write a path (./{source} if that is its name), s3://bucket/key, hf://owner/name/file or builtin:NAME")  # fmt: skip
    elif match["scheme"] == "builtin" and match["rest"] not in BUILTINS:
        yield (
            f"there is no built-in {match['rest']!r}",
            f"Did you mean builtin:{nearest(match['rest'], BUILTINS)}?",
        )
    elif match["scheme"] == "s3" and not re.fullmatch(r"//[^/]+/.+", match["rest"]):
        yield "names no object", "Write s3://bucket/key; the key may be a glob"
    elif match["scheme"] == "hf" and not re.fullmatch(r"//[^/]+/[^/]+/.+", match["rest"]):
        yield (
            "names no file",
            "Write hf://owner/name/file, as in hf://kjj0/fineweb10B-gpt2/fineweb_val_000000.bin",
        )


def _vocabulary(spec: RunSpec) -> Iterator[Complaint]:
    """Token ids beyond the vocabulary would come from data or prompts that llmctl tokenises itself."""
    if spec.tune is not None:
        return  # the base brings its own
    needed = VOCABULARY.get(spec.data.tokenizer, 0)
    tokenises = spec.evaluate.prompts or any(item.startswith("builtin:") for item in spec.data.train)
    if tokenises and spec.model.vocab_size < needed:
        message = f"{spec.model.vocab_size} is less than the {needed} tokens of data.tokenizer {spec.data.tokenizer}"
        yield Complaint(("model", "vocab_size"), message, f"Write {needed}, or another tokenizer")


def _evaluate(spec: RunSpec) -> Iterator[Complaint]:
    names: set[str] = set()
    for index, item in enumerate(spec.evaluate.test_sets):
        path: Path = ("evaluate", "test_sets", index)
        name = item.name if isinstance(item, TestSet) else item
        if name in names:
            yield Complaint(
                path, f"the test set {name!r} is listed twice", "A name stands for one slice of tokens"
            )
        names.add(name)
        if isinstance(item, str):
            told = spec.tune is None or spec.tune.known is not None  # else the base will say
            yield from _named_slice(path, item, spec.data.tokenizer if told else None)
        else:
            for key, low in (("offset", 0), ("tokens", 1)):
                if getattr(item, key) < low:
                    yield Complaint((*path, key), f"must be at least {low}, not {getattr(item, key)}")
            if not item.name or not item.data:
                yield Complaint(path, "a test set needs a name and data")


def _named_slice(path: Path, name: str, tokenizer: str | None) -> Iterator[Complaint]:
    known = SLICES.get(name)
    if known is None:
        hint = f"The built-in ones are {', '.join(SLICES)}; any other is {{name, data, offset, tokens}}"
        yield Complaint(path, f"there is no built-in test set {name!r}", hint)
    elif tokenizer is not None and known.tokenizer != tokenizer:
        message = f"{name} is in tokens of {known.tokenizer}, and data.tokenizer is {tokenizer}"
        yield Complaint(path, message, "A loss compares only within one tokenizer")


def _node(spec: RunSpec) -> Iterator[Complaint]:
    for key in spec.node.env:
        path: Path = ("node", "env", key)
        if not _VARIABLE.fullmatch(key):
            yield Complaint(path, "is no name of an environment variable", "Letters, digits and _ only")
        elif _SECRET_NAME.fullmatch(key):
            hint = f"Delete it, and write `secrets: [{key}]` under node: the value then comes from your environment"
            yield Complaint(path, "looks like a secret, and this file is stored and shown", hint)
        elif key in spec.node.secrets:
            yield Complaint(path, "is listed under secrets as well", "Keep one of the two")
    for index, name in enumerate(spec.node.secrets):
        if not _VARIABLE.fullmatch(name):
            yield Complaint(("node", "secrets", index), "is no name of an environment variable",
                            "Write the variable's name here, never its value")  # fmt: skip
    for key, text in (("boot_timeout", spec.node.boot_timeout), ("on_finish", spec.node.on_finish)):
        if text not in {"terminate", "keep"} and parse_duration(text) <= 0:
            yield Complaint(("node", key), "must be longer than nothing")


def _push(spec: RunSpec) -> Iterator[Complaint]:
    push = spec.checkpoint.push
    if push is not None and not re.fullmatch(r"s3://[^/]+(/.*)?", push):
        yield Complaint(("checkpoint", "push"), f"{push!r} is no S3 prefix", "Write s3://bucket/prefix")


_RULES = (
    _tune,
    _trainer,
    _batch,
    _rented,
    _hosts,
    _gpus,
    _data,
    _vocabulary,
    _evaluate,
    _node,
    _push,
)
