"""A model that was named, opened; and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.actions.named import Found, find, find_all
from orchestrator.errors import Invalid
from orchestrator.models import load as models
from orchestrator.models.load import Opened
from runs.store import Store

__all__ = ["Found", "export", "find", "find_all", "opened"]


def opened(found: Found, device: str = "cpu", tokenizer: str | None = None) -> Opened:
    """The model, ready. Raises Invalid as models.open_model."""
    return models.open_model(found.path, device=device, tokenizer=tokenizer or found.tokenizer)


# ---------------------------------------------------------------- export


def export(
    store: Store,
    found: Found,
    to: Path,
    *,
    push: str | None = None,
    public: bool = False,
    licence: str | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Write a Hugging Face folder, and upload it where `push` names a repository. Raises Invalid; what was written stays
    where only the upload failed."""
    from orchestrator.models import export as engine

    models.need_torch()
    from trainer import hf_config

    if hf_config.is_hf(found.path):
        raise Invalid(f"{found.label} is in that form already", f"it is at {found.path}")
    if push is not None:
        engine.may_push(push)
    facts = {**_facts(store, found), "licence": licence}
    folder = engine.export(found.path, to.expanduser(), facts=facts, tokenizer=tokenizer or found.tokenizer)
    url = engine.push(folder, push, private=not public) if push is not None else None
    return {"run": found.run, "step": found.step, "path": str(folder.resolve()), "format": "hf",
            "bytes": sum(file.stat().st_size for file in folder.iterdir()), "url": url}  # fmt: skip


def _facts(store: Store, found: Found) -> dict[str, Any]:
    """What the model card says of a run and its checkpoint."""
    record = store.record(found.run) if found.run is not None else None
    summary = store.summary(found.run) if found.run is not None else None
    if record is None or summary is None or found.step is None:
        return {"step": found.step}
    from runs.compare import entry

    row = entry(summary).row
    known = record.checkpoints.get(found.step)
    return {
        "run": found.run, "step": found.step, "cost_usd": row["cost_usd"], "billed_hours": row["billed_hours"],
        "instance_type": row["instance_type"], "train_loss": row["train_loss"],
        "validation_loss": known.validation_loss if known is not None else None,
        "evaluations": [item for item in record.evaluations if item.get("loss") is not None and item["step"] == found.step],
    }  # fmt: skip
