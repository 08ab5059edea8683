"""What llmctl starts itself: the driver of a run, and the server of a local node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runs.store import default_home


def register(app: typer.Typer) -> None:
    """Add the hidden commands."""
    app.command("internal-driver", hidden=True)(driver)
    app.command("internal-node", hidden=True)(node)


def driver(run: str, *, force: Annotated[bool, typer.Option("--force")] = False) -> int:
    """Drive RUN until nothing is left to do."""
    from orchestrator.driver import main as driver_main

    return driver_main.main(default_home(), run, force=force)


def node(directory: Path) -> None:
    """Serve the local node whose files are in DIRECTORY."""
    from provisioning import local_node

    local_node.serve(directory)
