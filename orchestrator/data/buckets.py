"""Which runs use S3, and the client that they use it with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.errors import Invalid
from trainer.config import TestSet, TrainerConfig

if TYPE_CHECKING:
    from provisioning.objects import S3


def sources_of(config: TrainerConfig) -> list[str]:
    """Every place that a run reads from or pushes to."""
    tests = [
        source for item in config.evaluate.test_sets if isinstance(item, TestSet) for source in item.data
    ]
    return [*config.data.train, *config.data.validation, *tests, config.checkpoint.push or ""]


def objects_for(config: TrainerConfig) -> S3 | None:
    """The client of the run's buckets; None where it has none, so that boto3 is needed by those runs alone. Raises CredentialsError
    where the extra is not installed."""
    if not any(source.startswith("s3://") for source in sources_of(config)):
        return None
    from provisioning.objects import S3

    return S3()


def check_push(config: TrainerConfig) -> None:
    """Write and delete an object where checkpoints are to go, so that a name or a permission that is wrong is met while it costs
    nothing. Raises Invalid, ProviderError."""
    place = config.checkpoint.push
    store = objects_for(config)
    if not place or store is None:
        return
    from provisioning.base import Refused

    probe = f"{place.rstrip('/')}/.llmctl-probe"
    try:
        store.write(probe, b"")
        store.delete(probe)
    except Refused as error:
        raise Invalid(f"checkpoint.push: {error}", error.hint) from None
