"""`doctor`: this machine and each configured provider; for every fault what it means and what to type."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orchestrator import exits
from provisioning.base import Check, CredentialsError, ProviderError
from runs.store import Store, StoreError, default_home

FREE_BYTES = 5e9
"""Less than this is too little for checkpoints and shards."""


def examine() -> list[Check]:
    """Every check, this machine's first."""
    home = default_home()
    checks = [
        _python(),
        _home(home),
        _disk(home),
        _program("ssh", ["-V"]),
        _program("rsync", ["--version"]),
        _clock(),
    ]
    checks += _extras()
    try:
        store = Store(home)
    except StoreError as error:
        return [*checks, Check("store", False, str(error), error.hint)]
    try:
        return [*checks, *_providers(store), *_left(store)]
    finally:
        store.close()


def document(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """As JSON: a list."""
    return [
        {"name": item.name, "ok": item.ok, "detail": item.detail, "hint": item.hint or None}
        for item in checks
    ]


def exit_code(checks: Sequence[Check]) -> int:
    """0 where everything is well; 4 where a provider refuses the account, 3 for any other fault."""
    bad = [item for item in checks if not item.ok]
    if not bad:
        return exits.OK
    return exits.CREDENTIALS if any(item.name.endswith("account") for item in bad) else exits.INVALID


# ---------------------------------------------------------------- this machine


def _python() -> Check:
    fits = sys.version_info >= (3, 11)
    return Check("python", fits, f"{platform.python_version()} on {platform.system()} {platform.machine()}",
                 "" if fits else "llmctl needs Python 3.11 or later")  # fmt: skip


def _home(home: Path) -> Check:
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return Check("home", False, f"{home} cannot be written to: {error.strerror}",
                     "export LLMCTL_HOME=~/llmctl, or any folder of yours")  # fmt: skip
    return Check("home", True, f"{home} is writable")


def _disk(home: Path) -> Check:
    place = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(place).free
    enough = free >= FREE_BYTES
    return Check("disk", enough, f"{free / 1e9:.1f} GB free at {place}",
                 "" if enough else "checkpoints and shards need room: free some, or move LLMCTL_HOME")  # fmt: skip


def _program(name: str, arguments: list[str]) -> Check:
    path = shutil.which(name)
    if path is None:
        package = {"ssh": "openssh-client", "rsync": "rsync"}[name]
        instead = {
            "ssh": "transfers go through the slower built-in connection",
            "rsync": "transfers compare content hashes instead",
        }
        return Check(
            f"program {name}",
            True,
            f"not installed: {instead[name]}",
            f"sudo apt install {package}  (macOS: brew install {name})",
        )
    try:
        told = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(f"program {name}", False, f"{path} does not run: {error}", f"install {name} again")
    version = re.search(r"(OpenSSH_\S+|version \S+|openrsync\S*[^\n]*)", told.stdout + told.stderr)
    return Check(f"program {name}", True, f"{path} {version[1].rstrip(',') if version else ''}".rstrip())


def _clock() -> Check:
    year = time.gmtime().tm_year
    sane = 2024 < year < 2100
    return Check("clock", sane, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
                 "" if sane else "set the clock: leases and bills are counted with it (timedatectl set-ntp true)")  # fmt: skip


def _extras() -> Iterator[Check]:
    for extra, modules, what in (
        ("trainer", ("torch", "numpy", "safetensors"), "sample, evaluate, export, and nodes on this machine"),
        ("data", ("tiktoken", "pyarrow"), "tokenising text and parquet"),
        ("aws", ("boto3",), "EC2 and S3"),
        ("wandb", ("wandb",), "Weights & Biases"),
    ):
        missing = [name for name in modules if find_spec(name) is None]
        hint = f"pip install 'llmctl[{extra}]' if you want {what}" if missing else ""
        detail = f"not installed: {', '.join(missing)}" if missing else f"installed ({what})"
        yield Check(f"extra {extra}", True, detail, hint)


# ---------------------------------------------------------------- providers


def _providers(store: Store) -> Iterator[Check]:
    from orchestrator.actions import inventory, show

    for seen in inventory.refresh(store):
        if not seen.configured:
            yield Check(
                seen.name, True, f"not configured: {seen.error}", seen.error.hint if seen.error else ""
            )
        elif seen.provider is None:
            yield Check(seen.name, False, str(seen.error), seen.error.hint if seen.error else "")
        else:
            try:
                yield from seen.provider.check()
            except ProviderError as error:
                name = f"{seen.name} account" if isinstance(error, CredentialsError) else seen.name
                yield Check(name, False, str(error), error.hint)
    for row in show.unowned(store, store.summaries()):
        node = row["nodes"][0]
        yield Check("leftovers", False, f"{node['name']} at {row['provider']} belongs to no run here and bills"
                    f" ${row['usd_per_hour']:,.2f}/h", "llmctl reap")  # fmt: skip


def _left(store: Store) -> Iterator[Check]:
    """Nodes of this home that nobody watches."""
    from orchestrator import footer

    said = footer.lines(store.home, store.concerning())
    alarms = [text for text in said if text.startswith("WARNING")]
    if not alarms:
        yield Check("leftovers", True, said[0] if said else "no node of this LLMCTL_HOME is left over")
    for text in alarms:
        yield Check(
            "leftovers", False, text.removeprefix("WARNING: "), "llmctl status --refresh, then llmctl reap"
        )
