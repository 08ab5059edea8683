"""What the nodes' Python has, looked at once in a session of tests: importing torch takes seconds of processor time a node."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "LLMCTL_TEST_ENVIRONMENTS"
"""The folder where a session keeps what was found; without it each node is looked at, as an image that nobody knows."""


def known(home: Path) -> None:
    """Give the node that will have this home what earlier nodes of the session were found to have, as a shared filesystem would."""
    folder, link = os.environ.get(VARIABLE), home / "llmctl" / "environments"
    if folder and not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        Path(folder).mkdir(exist_ok=True)
        link.symlink_to(folder)


def unknown(home: Path) -> None:
    """Take that back."""
    (home / "llmctl" / "environments").unlink()
