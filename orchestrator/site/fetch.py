"""`fetch-checkpoint`: a verified copy of a run's checkpoint: from this side where it is here, else from S3 where it was pushed
there, which asks nothing of the node, else from its living node."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from orchestrator.remote import transfer
from orchestrator.remote.access import Access
from orchestrator.remote.connection import NoSuchFile
from orchestrator.remote.node import Remote
from orchestrator.site import collect, pushed
from provisioning import open_provider
from provisioning.base import Home, ProviderError
from provisioning.objects import S3
from runs import events as e
from runs.record import CheckpointRecord, NodeRecord, RunRecord
from runs.store import Store, run_dir, utcnow


class NothingToFetch(Exception):
    """There is no such checkpoint, or no place to have it from any more."""

    exit_code = 7
    code = "no_checkpoint"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class LetGo(NothingToFetch):
    """Its node has let it go, as retention there says."""


def elsewhere(run: RunRecord) -> list[CheckpointRecord]:
    """Checkpoints that are whole in S3. Raises ProviderError where nothing else is available either."""
    try:
        store = _bucket(run)
        there = pushed.found(store, run) if store is not None else []
    except ProviderError:
        if run.available:
            return []
        raise
    made = []
    for item in there:
        known = run.checkpoints.get(item.step)
        same = known if known is not None and known.sha256 == item.sha256 else None
        made.append(
            same or CheckpointRecord(step=item.step, sha256=item.sha256, bytes=item.bytes, seen_at=utcnow())
        )
    return made


def _bucket(run: RunRecord) -> S3 | None:
    return S3() if pushed.prefix(run) is not None else None


def choose(run: RunRecord, which: str, more: Sequence[CheckpointRecord] = ()) -> list[CheckpointRecord]:
    """The checkpoints that `best`, `latest`, `all` or a step mean, `more` (from `elsewhere`) among them. Raises NothingToFetch."""
    known = {item.step: item for item in more} | {item.step: item for item in run.available}
    have = [item for _, item in sorted(known.items())]
    if not have:
        raise NothingToFetch(
            f"{run.run} has no checkpoint",
            "the first one comes with the first validation or checkpoint.every_steps",
        )
    if which == "all":
        return have
    if which in {"best", "latest"}:
        judged = [(item.validation_loss, item.step) for item in have if item.validation_loss is not None]
        return [known[min(judged)[1]] if which == "best" and judged else have[-1]]
    named = [item for item in have if str(item.step) == which]
    if not named:
        raise NothingToFetch(
            f"{run.run} has no checkpoint of step {which}",
            f"it has: {', '.join(str(item.step) for item in have)}",
        )
    return named


def fetch(
    store: Store,
    run: RunRecord,
    items: Sequence[CheckpointRecord],
    *,
    to: Path | None = None,
    weights_only: bool = False,
    progress: transfer.Progress | None = None,
) -> list[collect.Whole]:
    """Verified copies of `items`, in the run's own folder and, with `to`, there as well. What is here moves no bytes; of several,
    those that their node has let go meanwhile are left out. Weights that came alone are all there is once the node is gone.

    Raises NothingToFetch, collect.VerificationError, RemoteError, TransferError.
    """
    result: list[collect.Whole] = []
    for number, item in enumerate(items, 1):
        kept = collect.here(Path(item.path)) if item.path else None
        if kept is not None and kept.sha256 != item.sha256:
            kept = None
        try:
            if kept is not None and (weights_only or not kept.weights_only):
                whole = kept
            else:
                whole = _bring(store, run, item, kept, weights_only=weights_only, progress=progress)
        except LetGo:
            if result or number < len(items):
                continue
            raise
        result.append(_copy(whole, to, weights_only=weights_only) if to is not None else whole)
    return result


def _bring(
    store: Store,
    run: RunRecord,
    item: CheckpointRecord,
    kept: collect.Whole | None,
    *,
    weights_only: bool,
    progress: transfer.Progress | None,
) -> collect.Whole:
    """From S3, or else from the node; where that is gone, `kept`, its weights, if they are here."""
    folder = run_dir(store.home, run.run) / "checkpoints"
    whole = _from_bucket(store, run, item, folder)
    if whole is not None:
        return whole
    if kept is not None and not _living(run):
        return kept
    return _from_node(store, run, item, folder, weights_only=weights_only, progress=progress)


def recover(store: Store, run: RunRecord) -> int | None:
    """Bring home the newest checkpoint in S3 where it is newer than the newest here and no node lives that could have a newer
    one still: a run that lost its node while this machine was away goes on from there. Its step, or None. Raises as `fetch`."""
    if not run.live or not run.attempts or pushed.prefix(run) is None:
        return None
    if any(node.alive for node in run.attempt_nodes()):
        return None
    newer = [item for item in elsewhere(run) if item.step > run.resume_step]
    if not newer:
        return None
    whole = _from_bucket(store, run, newer[-1], run_dir(store.home, run.run) / "checkpoints")
    return whole.step if whole else None


def _living(run: RunRecord) -> list[NodeRecord]:
    """Nodes that can be asked, those of the newest attempt first."""
    return [node for node in [*run.attempt_nodes(), *run.nodes] if node.alive and node.ip]


def _from_bucket(store: Store, run: RunRecord, item: CheckpointRecord, folder: Path) -> collect.Whole | None:
    """From S3, where it is whole there; None where it is not, or cannot be had now."""
    try:
        bucket = _bucket(run)
        there = pushed.found(bucket, run) if bucket is not None else []
        match = next((one for one in there if (one.step, one.sha256) == (item.step, item.sha256)), None)
        if bucket is None or match is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        whole = pushed.fetch(bucket, match, folder)
    except (ProviderError, collect.VerificationError):
        if _living(run):
            return None  # the node may have it
        raise
    _note(store, run, whole)
    return whole


def _from_node(
    store: Store,
    run: RunRecord,
    item: CheckpointRecord,
    folder: Path,
    *,
    weights_only: bool,
    progress: transfer.Progress | None,
) -> collect.Whole:
    living = _living(run)
    if not living:
        raise NothingToFetch(f"step {item.step} of {run.run} cannot be fetched: its node is gone")
    node = living[0]
    hardware = dict(run.spec["hardware"])
    provider = open_provider(run.provider, Home(store.home, store.owner), hardware)
    access = Access(Home(store.home, store.owner), hardware, provider.traits)
    there = f"~/llmctl/runs/{run.run}"
    with Remote(access.address(node)) as remote:
        try:
            whole = collect.pull(remote, there, item, folder, weights_only=weights_only, progress=progress)
        except NoSuchFile:
            if not collect.let_go(remote, there, item):
                raise
            gone = e.CheckpointGone(at=utcnow(), step=item.step, sha256=item.sha256)
            store.commit([(e.run_stream(run.run), gone)])
            raise LetGo(
                f"the node has let step {item.step} of {run.run} go, as checkpoint.keep says",
                "a higher checkpoint.keep, or fetch: all, keeps more of them for longer",
            ) from None
    _note(store, run, whole)
    return whole


def _note(store: Store, run: RunRecord, whole: collect.Whole) -> None:
    """The record knows that it is here."""
    verified = e.CheckpointVerified(
        at=utcnow(),
        step=whole.step,
        path=str(whole.path),
        sha256=whole.sha256,
        bytes=whole.bytes,
        weights_only=whole.weights_only,
    )
    store.commit([(e.run_stream(run.run), verified)])


def _copy(whole: collect.Whole, to: Path, *, weights_only: bool) -> collect.Whole:
    """A copy beside the run's folder, published by rename; files that are there already, with the same content, are kept."""
    from trainer import manifest

    target = to / whole.path.name
    names = {
        item.name
        for item in manifest.read(whole.path).files
        if not weights_only or item.name in collect.WEIGHTS
    }
    known = collect.here(target)
    if known is not None and known.sha256 == whole.sha256 and all((target / name).exists() for name in names):
        return known
    staging = to / f".{whole.path.name}.new"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name in [*names, "manifest.json"]:
        shutil.copy2(whole.path / name, staging / name)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    copied = collect.here(target)
    assert copied is not None
    return copied
