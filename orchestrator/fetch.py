"""`fetch-checkpoint`: a verified copy of a run's checkpoint, from this side where it is here, else from its living node."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from orchestrator import collect, transfer
from orchestrator.access import Access
from orchestrator.remote import Remote
from provisioning import open_provider
from provisioning.base import Home
from runs import events as e
from runs.record import CheckpointRecord, RunRecord
from runs.store import Store, run_dir, utcnow


class NothingToFetch(Exception):
    """There is no such checkpoint, or no place to have it from any more."""

    exit_code = 7
    code = "no_checkpoint"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def choose(run: RunRecord, which: str) -> list[CheckpointRecord]:
    """The checkpoints that `best`, `latest`, `all` or a step mean. Raises NothingToFetch."""
    have = run.available
    if not have:
        raise NothingToFetch(
            f"{run.run} has no checkpoint",
            "the first one comes with the first validation or checkpoint.every_steps",
        )
    if which == "all":
        return have
    if which in {"best", "latest"}:
        one = run.best if which == "best" else run.latest
        return [one] if one is not None else []
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
    """Verified copies of `items`, in the run's own folder and, with `to`, there as well. What is here moves no bytes.

    Raises NothingToFetch, collect.VerificationError, RemoteError, TransferError.
    """
    folder = run_dir(store.home, run.run) / "checkpoints"
    result = []
    for item in items:
        whole = collect.here(Path(item.path)) if item.path else None
        if whole is None or whole.sha256 != item.sha256 or (whole.weights_only and not weights_only):
            whole = _from_node(store, run, item, folder, weights_only=weights_only, progress=progress)
        result.append(_copy(whole, to, weights_only=weights_only) if to is not None else whole)
    return result


def _from_node(
    store: Store,
    run: RunRecord,
    item: CheckpointRecord,
    folder: Path,
    *,
    weights_only: bool,
    progress: transfer.Progress | None,
) -> collect.Whole:
    node = next((node for node in run.attempt_nodes() if node.alive and node.ip), None)
    node = node or next((node for node in run.nodes if node.kept and node.ip), None)
    if node is None:
        kept = "its weights are here: use --weights-only" if item.path else "its node is gone"
        raise NothingToFetch(f"step {item.step} of {run.run} cannot be fetched: {kept}")
    hardware = dict(run.spec["hardware"])
    provider = open_provider(run.provider, Home(store.home, store.owner), hardware)
    access = Access(Home(store.home, store.owner), hardware, provider.traits)
    with Remote(access.address(node)) as remote:
        whole = collect.pull(
            remote, f"~/llmctl/runs/{run.run}", item, folder, weights_only=weights_only, progress=progress
        )
    verified = e.CheckpointVerified(
        at=utcnow(),
        step=whole.step,
        path=str(whole.path),
        sha256=whole.sha256,
        bytes=whole.bytes,
        weights_only=whole.weights_only,
    )
    store.commit([(e.run_stream(run.run), verified)])
    return whole


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
