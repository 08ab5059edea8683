"""Checkpoints: a snapshot in host memory, written by a thread while training goes on.

A checkpoint is a directory that appears by one rename, after every byte of it is on the disk. `latest` and `best` are
symbolic links, replaced in one step. Whatever instant a process dies in, the newest whole checkpoint is found again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer import manifest, reading
from trainer.config import CheckpointConfig, ConfigError, ModelConfig, TrainerConfig
from trainer.distributed import World, whole
from trainer.model import GPT, fill, plain_name, unpadded
from trainer.optim import Optimizer

ROOM = 3
"""Checkpoints for which the disk must have room beside those that only wait to be fetched."""
WEIGHTS, STATE, CONFIG = "model.safetensors", "training_state.pt", "config.json"


@dataclass
class Snapshot:
    """The state after a step, copied out of training's way."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]
    """Plain values that go into training_state.pt."""
    more: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Tensors that have a safetensors file of their own, by its name."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk under its name."""

    step: int
    sha256: str
    bytes: int
    best: bool


class HostCopies:
    """Host memory for snapshots, pinned and kept on a GPU machine so that a copy takes a tenth of a second."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._buffers: dict[str, Tensor] = {}
        self._reserving: threading.Thread | None = None

    def reserve(self, named: Mapping[str, Tensor]) -> None:
        """Pin memory for these tensors in the background: it takes about a second for 2 GB, and the first checkpoint would stand still
        for it."""
        if self._pinned:
            self._reserving = threading.Thread(
                target=self._pin, args=(named,), name="pin-memory", daemon=True
            )
            self._reserving.start()

    def _pin(self, named: Mapping[str, Tensor]) -> None:
        torch.cuda.set_device(
            self._device
        )  # a thread begins on GPU 0, and pinning would open a context there
        for name, tensor in named.items():
            self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of `tensor` on the host; from a GPU it is under way still, and valid until the next of this name."""
        if not self._pinned or tensor.device.type != "cuda":
            return tensor.detach().to("cpu", copy=True)
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return buffer.copy_(tensor.detach(), non_blocking=True)


def held(model: GPT, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor of a checkpoint under the name of its copy on the host: weights by their own, states as `weight.state`."""
    named = {plain_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    states = optimizer.state().items()
    return named | {f"{name}.{key}": tensor for name, state in states for key, tensor in state.items()}


def snapshot(
    model: GPT, optimizer: Optimizer, *, copies: HostCopies, here: World, step: int, facts: dict[str, Any]
) -> Snapshot | None:
    """The state after `step`. Every rank calls it (sharded tensors are gathered); rank 0 gets the snapshot."""
    weights: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for key, parameter in model.named_parameters():
        name = plain_name(key)
        full = whole(parameter.detach())
        if here.rank == 0:
            weights[name] = unpadded(name, copies.take(name, full), model.config).contiguous()
    for name, state in optimizer.state().items():
        for key, tensor in state.items():
            full = whole(tensor)
            if here.rank == 0:
                copy = copies.take(f"{name}.{key}", full)
                states.setdefault(name, {})[key] = unpadded(name, copy, model.config) if copy.ndim else copy
    if here.rank != 0:
        return None
    if here.device.type == "cuda":
        torch.cuda.synchronize(here.device)
    return Snapshot(step, weights, states, facts)


class Writer:
    """Writes snapshots in a thread, one at a time; keeps the latest `keep` and the best."""

    def __init__(self, directory: Path, config: TrainerConfig) -> None:
        self.directory, self._config = directory, config
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def start(self, snapshot: Snapshot, *, best: bool, saved: Callable[[Saved], None]) -> None:
        """Write in the background, after the previous one; `saved` is called once the checkpoint has its name. Raises
        what the previous one met (a full disk)."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(snapshot, best, saved), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is being written. Raises OSError where that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, snapshot: Snapshot, best: bool, saved: Callable[[Saved], None]) -> None:
        try:
            write(self.directory, snapshot, self._config)
            point(self.directory, "latest", snapshot.step)
            if best:
                point(self.directory, "best", snapshot.step)
            retain(self.directory, self._config.checkpoint)
            target = self.directory / manifest.directory_name(snapshot.step)
            saved(Saved(snapshot.step, manifest.digest(target), manifest.read(target).bytes, best))
        except (OSError, RuntimeError, manifest.ManifestError) as error:
            self._error = error


def write(directory: Path, snapshot: Snapshot, config: TrainerConfig) -> None:
    """Write one checkpoint under a temporary name, sync it, and rename it to `step-NNNNNN`."""
    name = manifest.directory_name(snapshot.step)
    temporary, target = directory / f".{name}.{os.getpid()}.tmp", directory / name
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file, tensors in {WEIGHTS: snapshot.weights, **snapshot.more}.items():
        # More than one metadata key would make the bytes depend on the hash seed.
        save_file(tensors, temporary / file, metadata={"format": "pt"})
    torch.save({"step": snapshot.step, "optimizer": snapshot.optimizer, **snapshot.facts}, temporary / STATE)
    (temporary / CONFIG).write_text(json.dumps(reading.to_dict(config), indent=1) + "\n", encoding="utf-8")
    manifest.write(temporary, snapshot.step)
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    if target.exists():  # of an attempt that went further before it died
        _remove(target)
    temporary.rename(target)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(target: Path) -> None:
    """Remove a checkpoint so that no half of it is ever seen under its name."""
    doomed = target.with_name(f".{target.name}.{time.monotonic_ns()}.tmp")
    target.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def point(directory: Path, link: str, step: int) -> None:
    """Let the symbolic link `link` name the checkpoint of `step`."""
    temporary = directory / f".{link}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(manifest.directory_name(step))
    temporary.replace(directory / link)
    _sync(directory)


def steps(directory: Path) -> list[int]:
    """Steps of all checkpoint directories, ascending."""
    found = [
        manifest.step_of(path.name) for path in directory.iterdir() if path.is_dir() and not path.is_symlink()
    ]
    return sorted(step for step in found if step is not None)


def linked(directory: Path, link: str) -> int | None:
    """The step that a symbolic link names, or None."""
    try:
        return manifest.step_of((directory / link).readlink().name)
    except OSError:
        return None


def retain(directory: Path, rules: CheckpointConfig) -> None:
    """Remove all checkpoints but the `keep` latest and the best. Later steps than `latest` are remains of a run that was
    resumed from an earlier one; they go too. Where all are to be fetched, one that is not yet stays as long as there is room
    for `ROOM` more, and the oldest goes first."""
    latest, best = linked(directory, "latest"), linked(directory, "best")
    present = steps(directory)
    upto = [step for step in present if latest is None or step <= latest]
    wanted = {*upto[-rules.keep :], latest, best}
    for step in present:
        if step not in wanted and not (rules.fetch == "all" and step in upto and _awaited(directory, step)):
            _remove(directory / manifest.directory_name(step))


def _awaited(directory: Path, step: int) -> bool:
    """Whether a checkpoint is still to be fetched, and the disk has room for it meanwhile."""
    here = directory / manifest.directory_name(step)
    try:
        fetched = (directory / manifest.FETCHED).read_text(encoding="ascii").split()
    except OSError:
        fetched = []
    try:
        size = manifest.read(here).bytes
        return manifest.digest(here) not in fetched and shutil.disk_usage(directory).free >= ROOM * size
    except manifest.ManifestError:
        return False


def newest_whole(directory: Path, log: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: `latest` where it is whole, else the newest that is, else None."""
    if not directory.is_dir():
        return None
    first = linked(directory, "latest")
    candidates = [
        *([first] if first is not None else []),
        *(s for s in reversed(steps(directory)) if s != first),
    ]
    for step in candidates:
        path = directory / manifest.directory_name(step)
        problems = manifest.verify(path)
        if not problems:
            return path
        log(f"checkpoint of step {step} is not whole, trying an earlier one: {problems[0]}")
    return None


def load_config(path: Path) -> TrainerConfig:
    """The configuration of the checkpoint at `path`. Raises ConfigError."""
    return reading.load(path / CONFIG)


def load_state(path: Path) -> dict[str, Any]:
    """training_state.pt of the checkpoint at `path`; tensors and plain values only."""
    state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True)
    return state


def weights(path: Path) -> dict[str, Tensor]:
    """The named weights in a checkpoint directory, on the CPU."""
    with safe_open(path / WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping


def outline(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Shape and type of each tensor, single numbers whole: what a rank without the file must know of them."""
    return {
        name: item if item.ndim == 0 else (tuple(item.shape), item.dtype) for name, item in tensors.items()
    }


def hollow(outline: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors as `outline` describes them, of zeros."""
    return {
        name: item if isinstance(item, Tensor) else torch.zeros(item[0], dtype=item[1])
        for name, item in outline.items()
    }


def restore_weights(
    model: GPT, named: Mapping[str, Tensor], place: Callable[[Tensor, Tensor], None] | None = None
) -> None:
    """Fill `model`. Raises ConfigError where the weights are of another model."""
    try:
        fill(model, iter(named.items()), place)
    except (KeyError, ValueError) as error:
        raise ConfigError("model", f"the checkpoint is of another model: {error}") from error


def check_same_model(path: Path, model: ModelConfig) -> None:
    """Raises ConfigError unless the checkpoint at `path` has the configuration's model."""
    theirs, ours = reading.to_dict(load_config(path).model), reading.to_dict(model)
    for key, value in ours.items():
        if key != "drop_rate" and theirs[key] != value:
            raise ConfigError(
                f"model.{key}", f"is {value}, but the checkpoint {path} was trained with {theirs[key]}"
            )
