"""What a command line says about waiting and spending."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.errors import Usage
from trainer.config import parse_duration


@dataclass(frozen=True)
class Limits:
    """What a command line says about waiting and spending."""

    wait_seconds: float = 0.0
    max_usd: float | None = None

    @classmethod
    def read(cls, wait: str | None, max_usd: float | None) -> Limits:
        """From the options' text. Raises Usage."""
        try:
            seconds = parse_duration(wait) if wait is not None else 0.0
        except ValueError as error:
            raise Usage(f"--wait {error}", "for example --wait 6h") from None
        if max_usd is not None and not (math.isfinite(max_usd) and max_usd > 0):
            raise Usage(f"--max-usd {max_usd} is no amount of money", "for example --max-usd 45")
        return cls(seconds, max_usd)
