"""`llmctl ssh`: the system's ssh with the node's own key and pinned host key; without ssh, commands over our connection."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.errors import Invalid, Usage
from runs.store import Store

if TYPE_CHECKING:
    from orchestrator.remote.connection import Address
    from runs.record import NodeRecord, RunRecord


def login(store: Store, run: RunRecord, command: Sequence[str]) -> int:
    """A shell on the run's first node, or `command`; its exit code."""
    address = address_of(store, run)
    ssh = shutil.which("ssh")
    if ssh is not None:
        return subprocess.run(ssh_command(ssh, address, command), check=False).returncode
    if not command:
        raise Invalid(
            "there is no ssh on this machine",
            f"install OpenSSH, or give a command: llmctl ssh {run.run} -- uptime",
        )
    from orchestrator.remote.node import Remote

    with Remote(address) as remote:
        result = remote.run(list(command), check=False)
    sys.stdout.write(result.text)
    return result.exit_code


def address_of(store: Store, run: RunRecord) -> Address:
    """Where the first living node of `run` answers. Raises Usage where none does."""
    from orchestrator.remote.access import Access
    from provisioning import open_provider
    from provisioning.base import Home

    node = living(run)
    home, hardware = Home(store.home, store.owner), dict(run.spec["hardware"])
    return Access(home, hardware, open_provider(run.provider, home, hardware).traits).address(node)


def living(run: RunRecord) -> NodeRecord:
    """The first node that is there and has an address. Raises Usage."""
    for node in reversed(run.owned):
        if not node.settled and node.ip:
            return node
    raise Usage(
        f"{run.run} has no node that could answer",
        f"`llmctl show {run.run}` tells what became of it",
        run=run.run,
    )


def ssh_command(ssh: str, address: Address, command: Sequence[str]) -> list[str]:
    """The command line: one key, one host key, no other file of the user's."""
    import shlex

    options = {
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": str(address.known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": address.key,
        "StrictHostKeyChecking": "accept-new" if address.accept_new else "yes",
        "LogLevel": "ERROR",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    target = [ssh, "-F", "/dev/null", "-i", str(address.identity_file), "-p", str(address.port), *words,
              f"{address.user}@{address.host}"]  # fmt: skip
    return [*target, "--", shlex.join(command)] if command else target
