"""All kinds of fault, in the order of the table."""

from tests.faults import here, there
from tests.faults.kind import KINDS, SKIPPED, Kind

__all__ = ["KINDS", "SKIPPED", "Kind", "here", "there"]
