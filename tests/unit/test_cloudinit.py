"""User data that cloud-init reads as meant."""

from __future__ import annotations

import ast
import io
from datetime import UTC, datetime

import pytest
from ruamel.yaml import YAML

from provisioning import keys
from provisioning.cloudinit import GUARD, GUARD_DIRECTORY, LARGEST_BYTES, SelfTerminate, user_data

LEASE = datetime(2026, 11, 21, 6, 0, tzinfo=UTC)


def parsed(text: str | None) -> dict[str, object]:
    """As cloud-init does it: the first line decides, the rest is YAML."""
    assert text is not None
    first, rest = text.split("\n", 1)
    assert first == "#cloud-config"
    config: dict[str, object] = YAML(typ="safe").load(io.StringIO(rest))
    return config


def guard(**changes: object) -> SelfTerminate:
    values: dict[str, object] = {
        "api_key": "secret_k",
        "base_url": "https://x/api/v1",
        "intent": "llmctl-r-abcd-a1-n0",
    }
    return SelfTerminate(**(values | {"lease_end": LEASE} | changes))  # type: ignore[arg-type]


def test_the_host_key_arrives_byte_for_byte_and_is_the_only_one() -> None:
    pair = keys.generate("node")
    config = parsed(user_data(pair.private, pair.public))
    assert config["ssh_keys"] == {"ed25519_private": pair.private, "ed25519_public": pair.public + "\n"}
    assert config["ssh_deletekeys"] is True
    assert config["ssh_genkeytypes"] == []
    assert set(config) == {"ssh_keys", "ssh_deletekeys", "ssh_genkeytypes"}


def test_nothing_to_say_is_no_user_data() -> None:
    assert user_data(None, None) is None
    assert user_data("private", None) is None


def test_the_guard_is_roots_and_survives_a_reboot() -> None:
    text = user_data(None, None, guard())
    config = parsed(text)
    files = {file["path"]: file for file in config["write_files"]}  # type: ignore[attr-defined]
    assert "ssh_keys" not in config
    assert {file["owner"] for file in files.values()} == {"root:root"}
    assert files[f"{GUARD_DIRECTORY}/settings.json"]["permissions"] == "0600"
    assert files[f"{GUARD_DIRECTORY}/guard.py"]["permissions"] == "0700"
    assert [path for path, file in files.items() if "secret_k" in file["content"]] == [
        f"{GUARD_DIRECTORY}/settings.json"
    ]
    timer = files["/etc/systemd/system/llmctl-guard.timer"]["content"]
    assert "WantedBy=timers.target" in timer
    assert ["systemctl", "enable", "--now", "llmctl-guard.timer"] in config["runcmd"]  # type: ignore[operator]
    assert len(text or "") < LARGEST_BYTES


@pytest.mark.parametrize("intent", ["a: b", "a'b\"c", "a\nb", "#x", "{x}", "é", "a\\b"])
def test_no_value_can_break_the_yaml(intent: str) -> None:
    import json

    config = parsed(user_data(None, None, guard(intent=intent)))
    settings = next(file for file in config["write_files"] if file["path"].endswith("settings.json"))  # type: ignore[attr-defined]
    assert json.loads(settings["content"])["intent"] == intent


def test_the_guard_runs_on_the_oldest_python_of_an_image() -> None:
    ast.parse(GUARD, feature_version=(3, 8))


def test_the_key_is_in_no_repr() -> None:
    assert "secret_k" not in repr(guard())
