"""Bringing home: checkpoints (verified against their manifest, published by rename), the rest of the log, evaluations.

A checkpoint is pulled into `checkpoints/.step-000500.partial/`, which a broken transfer leaves behind and the next one
continues; only when each byte of it is what the manifest says does it get its name. So a folder `step-*` is always whole, or
holds the whole weights alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.clock import Clock
from orchestrator.remote import transfer
from orchestrator.remote.connection import NoSuchFile, RemoteError
from orchestrator.remote.mirror import Mirror
from orchestrator.remote.node import Remote, node_path
from runs import events as e
from runs.lock import Lock
from runs.record import CheckpointRecord, RunRecord
from trainer import manifest

WEIGHTS = ("model.safetensors", "config.json", "adapter.safetensors")
"""What is needed to use a model; the rest is needed to go on training it."""
DRAIN_SECONDS = 600.0
"""How long the rest of a log may take to arrive before the collection is tried again."""


class VerificationError(Exception):
    """A file is not what its manifest says, or a manifest is not the announced one."""

    exit_code = 7
    code = "verification_failed"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = (
            hint or "try again: a damaged transfer is fetched anew; a damaged checkpoint on the node is not"
        )


class _GaveWay(Exception):
    """A pull in the background was ended, because the run has ended and something else is waited for."""


@dataclass(frozen=True)
class Whole:
    """A checkpoint that is here."""

    step: int
    path: Path
    sha256: str
    bytes: int
    weights_only: bool


def here(path: Path) -> Whole | None:
    """The checkpoint in `path`, which was verified before it got that name; None where there is none."""
    try:
        listed = manifest.read(path)
    except manifest.ManifestError:
        return None
    present = [item for item in listed.files if (path / item.name).is_file()]
    size = sum(item.bytes for item in present)
    return Whole(
        listed.step, path, manifest.digest(path), size, weights_only=len(present) < len(listed.files)
    )


def pull(
    remote: Remote,
    node_directory: str,
    item: CheckpointRecord,
    to: Path,
    *,
    weights_only: bool = False,
    progress: transfer.Progress | None = None,
) -> Whole:
    """Bring one checkpoint from `node_directory` (a run's) to the folder `to`, verified; what is here already moves no bytes.

    Weights come first and are published before the rest. Raises VerificationError, NoSuchFile where the node no longer
    has it, RemoteError or TransferError where it cannot be had now.
    """
    to.mkdir(parents=True, exist_ok=True)
    with Lock(to / ".lock").hold():  # the driver and `fetch-checkpoint` may want the same one at once
        return _pull(remote, node_directory, item, to, weights_only=weights_only, progress=progress)


def _pull(
    remote: Remote,
    node_directory: str,
    item: CheckpointRecord,
    to: Path,
    *,
    weights_only: bool,
    progress: transfer.Progress | None,
) -> Whole:
    final = to / manifest.directory_name(item.step)
    known = here(final)
    if known is not None and known.sha256 == item.sha256 and (weights_only or not known.weights_only):
        return known
    if known is not None and known.sha256 != item.sha256:
        shutil.rmtree(final)  # the same step of an earlier attempt, made again with another outcome
    partial = to / f".{manifest.directory_name(item.step)}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    source = f"{node_directory}/checkpoints/{manifest.directory_name(item.step)}"
    kept, published = partial / manifest.NAME, final / manifest.NAME
    if not kept.exists() or manifest.digest(partial) != item.sha256:  # else of a transfer that broke
        body = published.read_bytes() if published.exists() else remote.read(f"{source}/{manifest.NAME}")
        kept.write_bytes(body)
    if manifest.digest(partial) != item.sha256:
        raise VerificationError(
            f"the manifest of step {item.step} on the node is not the one that was announced"
        )
    try:
        files = {entry.name: entry for entry in manifest.read(partial).files}
    except manifest.ManifestError as error:
        raise VerificationError(f"step {item.step} has no manifest that can be used: {error}") from error
    stages = [[name for name in WEIGHTS if name in files], [name for name in files if name not in WEIGHTS]]
    for names in stages[: 1 if weights_only else 2]:
        missing = [name for name in names if not (final / name).exists()]
        transfer.pull(remote, source, missing, partial, progress=progress)
        for name in missing:
            _verify(partial / name, files[name])
        _publish(partial, final, [*missing, "manifest.json"])
    shutil.rmtree(partial, ignore_errors=True)
    result = here(final)
    if result is None:
        raise VerificationError(
            f"{final} vanished while it was written", "is another program cleaning LLMCTL_HOME?"
        )
    return result


def let_go(remote: Remote, node_directory: str, item: CheckpointRecord) -> bool:
    """Whether a checkpoint that is not found on its node was let go by retention there: a newer one has taken its place. Where
    nothing newer is found either, the folder itself is out of reach, and that is no reason to give anything up."""
    try:
        newest = json.loads(remote.read(f"{node_directory}/checkpoints/latest/{manifest.NAME}"))
        return int(newest["step"]) > item.step
    except (RemoteError, ValueError, KeyError, TypeError):
        return False


def _verify(path: Path, entry: manifest.Entry) -> None:
    if manifest.sha256(path) != entry.sha256:
        path.unlink()
        raise VerificationError(f"{path.name} is not what its manifest says (sha256 differs)")


def _publish(partial: Path, final: Path, names: Sequence[str]) -> None:
    """Move verified files under the checkpoint's name: the folder as a whole the first time."""
    for name in names:
        _sync(partial / name)
    if not final.exists():
        staging = final.with_name(f".{final.name}.new")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for name in names:
            shutil.copy2(partial / name, staging / name) if name == "manifest.json" else (
                partial / name
            ).rename(staging / name)
        staging.rename(final)
    else:
        for name in names:
            if name != "manifest.json":
                (partial / name).rename(final / name)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Make a file or a folder's names durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(to: Path, name: str, step: int) -> None:
    """Point the symlink `latest` or `best` at a step, atomically."""
    temporary = to / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(manifest.directory_name(step))
    temporary.replace(to / name)


def superfluous(run: RunRecord) -> Iterator[int]:
    """Steps that retention lets go of here: all but the newest `keep` and the best, unless all are wanted."""
    if run.spec["checkpoint"]["fetch"] == "all":
        return
    fetched = sorted(item.step for item in run.checkpoints.values() if item.path)
    best = run.best
    for step in fetched[: -int(run.spec["checkpoint"]["keep"])]:
        if best is None or step != best.step:
            yield step


class Puller:
    """Pulls one checkpoint at a time, in the background while steps run and on demand when they have ended."""

    def __init__(
        self,
        directory: Path,
        clock: Clock,
        wake: Callable[[], None],
        gone: Callable[[CheckpointRecord], None],
    ) -> None:
        """`gone` is told of what its node has let go."""
        self.folder = directory / "checkpoints"
        self._clock, self._wake, self._gone = clock, wake, gone
        self._lock = threading.Lock()
        self._hurry = threading.Event()
        self._whole: dict[int, Whole] = {}
        self._tried: dict[tuple[int, str], float] = {}
        self._thread: threading.Thread | None = None
        for path in sorted(self.folder.glob("step-*")):
            found = here(path)
            if found is not None:
                self._whole[found.step] = found

    def whole(self) -> list[Whole]:
        """The checkpoints that are here."""
        return list(self._whole.values())

    def fetch(
        self, remote: Remote, directory: str, items: Sequence[CheckpointRecord], weights_only: bool
    ) -> None:
        """Pull these now, one after the other; weights of all before the rest of any. What is under way in the background gives way: the
        node bills on meanwhile."""
        self._hurry.set()
        with self._lock:
            self._hurry.clear()
            left = list(items)
            for first in [True, weights_only] if not weights_only else [True]:
                left = [item for item in left if self._take(remote, directory, item, weights_only=first)]

    def background(self, remote: Remote, directory: str, run: RunRecord) -> None:
        """Begin to pull the newest announced checkpoint, then the best (all, oldest first, where all are wanted)."""
        if self._thread is not None and self._thread.is_alive():
            return
        now = self._clock.monotonic()
        wanted = run.available if run.spec["checkpoint"]["fetch"] == "all" else [run.latest, run.best]
        waiting = [
            item
            for item in wanted
            if item is not None
            and not item.fetched
            and not item.gone
            and run.attempt is not None
            and item.attempt == run.attempt.number
            and now - self._tried.get((item.step, item.sha256), -1e9) > 30
        ]
        if not waiting:
            return
        item, everything = waiting[0], run.spec["checkpoint"]["fetch"] == "all"

        def work() -> None:
            self._tried[item.step, item.sha256] = now
            try:
                with self._lock:
                    self._take(remote, directory, item, weights_only=False, progress=self._give_way)
                if everything:
                    self._tell(remote, directory)
            except (RemoteError, VerificationError, transfer.TransferError, OSError, _GaveWay):
                return  # tried again later, and at the end with a voice
            self._wake()

        self._thread = threading.Thread(target=work, name=f"pull step {item.step}", daemon=True)
        self._thread.start()

    def _give_way(self, _done: int, _total: int) -> None:
        """Progress of a pull that nobody waits for. Raises _GaveWay once something is waited for."""
        if self._hurry.is_set():
            raise _GaveWay

    def _take(
        self,
        remote: Remote,
        directory: str,
        item: CheckpointRecord,
        *,
        weights_only: bool,
        progress: transfer.Progress | None = None,
    ) -> bool:
        """Pull one; False where the node has let it go."""
        try:
            whole = pull(remote, directory, item, self.folder, weights_only=weights_only, progress=progress)
        except NoSuchFile:
            if not let_go(remote, directory, item):
                raise
            self._gone(item)
            return False
        self._whole[item.step] = whole
        self._wake()
        return True

    def _tell(self, remote: Remote, directory: str) -> None:
        """Leave word on the node of what is whole here: its retention lets go of that first (`trainer.checkpoint`)."""
        whole = [item.sha256 for item in self.whole() if not item.weights_only]
        remote.write(f"{directory}/checkpoints/{manifest.FETCHED}", "\n".join(whole).encode())

    def clean(self, run: RunRecord) -> None:
        """Delete what the record has let go of, and point `latest` and `best` at what it has."""
        for item in run.checkpoints.values():
            if item.dropped and item.step in self._whole:
                shutil.rmtree(self.folder / manifest.directory_name(item.step), ignore_errors=True)
                self._whole.pop(item.step, None)
        if self._thread is None or not self._thread.is_alive():
            for partial in self.folder.glob(".step-*.partial"):
                step = manifest.step_of(partial.name[1:].removesuffix(".partial"))
                known = run.checkpoints.get(step) if step is not None else None
                if known is None or known.dropped:  # a transfer that will not be continued
                    shutil.rmtree(partial, ignore_errors=True)
        mine = [item.step for item in run.checkpoints.values() if item.path]
        if mine:
            for word, step in (("latest", max(mine)), ("best", run.best.step if run.best else max(mine))):
                if step in mine and _target(self.folder / word) != manifest.directory_name(step):
                    link(self.folder, word, step)

    def close(self) -> None:
        """Nothing to wait for: a broken pull is continued by the next driver."""


def _target(path: Path) -> str | None:
    return str(path.readlink()) if path.is_symlink() else None


# ---------------------------------------------------------------- the rest of the files


def drain(remote: Remote, directory: str, mirrors: dict[str, Mirror], clock: Clock) -> None:
    """Wait until the mirrors have all that the node's files hold. Raises TimeoutError after DRAIN_SECONDS without that."""
    sizes = {name: int(remote.run(_size(f"{directory}/{name}")).text or 0) for name in mirrors}
    waiting, never = clock.monotonic(), threading.Event()
    while any(mirrors[name].offset < size and not mirrors[name].paused for name, size in sizes.items()):
        if clock.monotonic() - waiting > DRAIN_SECONDS:
            raise TimeoutError("log and metrics of the node did not arrive")
        clock.wait(never, 0.05)


def bring(
    remote: Remote, directory: str, mirrors: dict[str, Mirror], clock: Clock, fetch: Callable[[], None]
) -> None:
    """Everything in the order of its worth: the metrics, which announce checkpoints; the checkpoints, by `fetch`; then the rest
    of the log, however long that is. Raises as `drain` and `fetch` do."""
    drain(remote, directory, {"metrics.jsonl": mirrors["metrics.jsonl"]}, clock)
    fetch()
    drain(remote, directory, mirrors, clock)


def _size(path: str) -> str:
    quoted = shlex.quote(node_path(path))
    return f"[ -f {quoted} ] && wc -c < {quoted} || echo 0"


def evaluations(
    remote: Remote, directory: str, run: RunRecord, clock: Clock, decode: Callable[[list[int]], str]
) -> list[tuple[str, e.RunEvent | e.NodeEvent]]:
    """The events of evaluations.json: losses on the named test sets, and samples as text."""
    try:
        found: dict[str, Any] = json.loads(remote.read(f"{directory}/evaluations.json"))
    except NoSuchFile:
        return []
    now, stream = clock.now(), e.run_stream(run.run)
    known = {(item["name"], item["step"]) for item in run.evaluations}
    prompts = run.spec["evaluate"]["prompts"]
    result: list[tuple[str, e.RunEvent | e.NodeEvent]] = []
    for item in found.get("test_sets", []):
        step = item.get("checkpoint_step")
        if (item["name"], step) not in known:
            result.append(
                (
                    stream,
                    e.EvaluationRecorded(
                        at=now, name=item["name"], step=step, result={"kind": "test_set", **item}
                    ),
                )
            )
    for item in found.get("samples", []):
        prompt = prompts[item["prompt_index"]]
        name = f"sample {item['prompt_index']}"
        if (name, None) not in known:
            text = {"kind": "sample", "prompt": prompt, "text": decode(item["tokens"])}
            result.append((stream, e.EvaluationRecorded(at=now, name=name, step=None, result=text)))
    return result
