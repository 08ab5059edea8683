"""The lease of an EC2 node: its user data, and the guard that powers it off."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from provisioning import ec2_guard, keys
from provisioning.cloudinit import HEADER
from tests.aws_server.nodes import Metadata

NOW = datetime.now(UTC)


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    made = Metadata(lambda: TAGS)
    yield made
    made.close()


TAGS: dict[str, str] = {}


def guard(tmp_path: Path, metadata: Metadata | None, lease: datetime, tag: datetime | None) -> bool:
    """One tick; whether the machine powers itself off."""
    TAGS.clear()
    if tag is not None:
        TAGS["llmctl-lease"] = str(int(tag.timestamp()))
    config = json.loads(ec2_guard.guarded(None, None, lease).removeprefix(HEADER))
    for file in config["write_files"]:
        if file["path"].startswith(ec2_guard.DIRECTORY) and not (tmp_path / Path(file["path"]).name).exists():
            (tmp_path / Path(file["path"]).name).write_text(file["content"])
    env = {"LLMCTL_GUARD_DIRECTORY": str(tmp_path), "LLMCTL_POWEROFF": f"touch {tmp_path}/off", "PATH": "/usr/bin:/bin",
           "LLMCTL_IMDS": metadata.url if metadata else "http://127.0.0.1:1"}  # fmt: skip
    subprocess.run([sys.executable, "-S", str(tmp_path / "guard.py")], env=env, check=True)
    return (tmp_path / "off").exists()


def test_the_lease_of_the_launch_holds_without_a_tag(tmp_path: Path) -> None:
    assert not guard(tmp_path, None, NOW + timedelta(hours=1), None)


def test_a_lease_that_is_over_powers_off(tmp_path: Path) -> None:
    assert guard(tmp_path, None, NOW - timedelta(seconds=1), None)


def test_the_tag_extends_and_is_remembered(tmp_path: Path, metadata: Metadata) -> None:
    assert not guard(tmp_path, metadata, NOW - timedelta(hours=1), NOW + timedelta(hours=1))
    metadata.off = True
    assert not guard(tmp_path, metadata, NOW - timedelta(hours=1), None), "what the tag said is remembered"
    assert json.loads((tmp_path / "lease.json").read_text())["lease_end"] > time.time()


def test_a_tag_never_shortens_the_lease(tmp_path: Path, metadata: Metadata) -> None:
    assert not guard(tmp_path, metadata, NOW + timedelta(hours=1), NOW - timedelta(hours=1))


def test_a_disk_that_is_full_is_no_reason_to_live_on(tmp_path: Path, metadata: Metadata) -> None:
    (tmp_path / "lease.json.new").mkdir()
    assert guard(tmp_path, metadata, NOW - timedelta(hours=2), NOW - timedelta(hours=1))


def test_user_data_holds_the_host_key_and_a_timer_and_fits() -> None:
    pair = keys.generate("node")
    text = ec2_guard.guarded(pair.private, pair.public, NOW)
    config = json.loads(text.removeprefix(HEADER))
    assert config["ssh_keys"]["ed25519_private"].startswith("-----BEGIN OPENSSH PRIVATE KEY")
    assert ["systemctl", "enable", "--now", "llmctl-lease.timer"] in config["runcmd"]
    assert len(text.encode()) < ec2_guard.LARGEST_BYTES
    assert "AWS" not in text.replace("X-aws", "").replace("AWS ", ""), "no credential has a place in it"
