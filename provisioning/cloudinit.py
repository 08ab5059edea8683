"""Cloud-init user data: the SSH host key that the node shall have, and the timer with which a node ends itself.

JSON is YAML, so `#cloud-config` and one JSON object need no quoting rules of our own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

HEADER = "#cloud-config\n"
LARGEST_BYTES = 1_000_000
"""Lambda's limit."""

GUARD_DIRECTORY = "/var/lib/llmctl-guard"
_UNITS = "/etc/systemd/system"


RISK = (
    "self_terminate leaves the Lambda API key on the node. A key can do all that the account can, and `ubuntu` has sudo "
    "without a password: whatever runs there, every package included, can read it and rent machines with it. Make a "
    "workspace and a key for llmctl alone to bound the damage."
)
"""What `node.self_terminate: true` means, to be shown where it is switched on."""


@dataclass(frozen=True, repr=False)
class SelfTerminate:
    """What a node needs to end itself when its lease is over (`node.self_terminate: true`); see RISK."""

    api_key: str
    base_url: str
    intent: str
    """The marker's key: how the node finds itself in the instance list."""
    lease_end: datetime


def user_data(
    host_private_key: str | None, host_public_key: str | None, self_terminate: SelfTerminate | None = None
) -> str | None:
    """The `#cloud-config` text, or None where there is nothing to say. It holds secrets: never log it."""
    config: dict[str, object] = {}
    if host_private_key is not None and host_public_key is not None:
        # cloud-init's module ssh: the image's keys go, ours is the only one, and none is generated beside it.
        config["ssh_deletekeys"] = True
        config["ssh_genkeytypes"] = []
        config["ssh_keys"] = {
            "ed25519_private": host_private_key
            if host_private_key.endswith("\n")
            else host_private_key + "\n",
            "ed25519_public": host_public_key.strip() + "\n",
        }
    if self_terminate is not None:
        config["write_files"] = guard_files(self_terminate)
        config["runcmd"] = [
            ["systemctl", "daemon-reload"],
            ["systemctl", "enable", "--now", "llmctl-guard.timer"],
        ]
    return HEADER + json.dumps(config, indent=1) + "\n" if config else None


def guard_files(guard: SelfTerminate) -> list[dict[str, str]]:
    """cloud-init `write_files`: settings (key included), script, service and timer; all root's."""
    settings = {
        "api_key": guard.api_key,
        "base_url": guard.base_url,
        "intent": guard.intent,
        "lease_end": int(guard.lease_end.timestamp()),
        "pause_seconds": 1.1,  # between two requests: Lambda's limit
    }
    files = [
        (f"{GUARD_DIRECTORY}/settings.json", "0600", json.dumps(settings)),
        (f"{GUARD_DIRECTORY}/guard.py", "0700", GUARD),
        (f"{_UNITS}/llmctl-guard.service", "0644", _SERVICE),
        (f"{_UNITS}/llmctl-guard.timer", "0644", TIMER),
    ]
    return [
        {"path": path, "permissions": mode, "owner": "root:root", "content": content}
        for path, mode, content in files
    ]


_SERVICE = f"""\
[Unit]
Description=End this machine when its llmctl lease is over
After=network-online.target
Wants=network-online.target

[Service]
Type=oneshot
UMask=0077
ExecStart=/usr/bin/python3 {GUARD_DIRECTORY}/guard.py
TimeoutStartSec=300
"""

# Every minute, also after a reboot: the lease may be over before the network is up.
TIMER = """\
[Unit]
Description=Look at the llmctl lease every minute

[Timer]
OnBootSec=60
OnUnitActiveSec=60
AccuracySec=5

[Install]
WantedBy=timers.target
"""

GUARD = '''\
#!/usr/bin/env python3
"""Ends this machine when its llmctl lease is over. Started every minute; talks to the network only then.

The lease that counts is the one in the machine's own name at the provider (llmctl extend renames it), else the one in
settings.json. Exit status: 0 nothing to do or termination accepted, 1 try again in a minute.
"""
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request

DIRECTORY = os.environ.get("LLMCTL_GUARD_DIRECTORY", os.path.dirname(os.path.abspath(__file__)))
SETTINGS = os.path.join(DIRECTORY, "settings.json")


def call(settings, path, body=None):
    request = urllib.request.Request(
        settings["base_url"] + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": "Bearer " + settings["api_key"], "Content-Type": "application/json",
                 "Accept": "application/json", "User-Agent": "llmctl-guard"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["data"]


def mine(settings, instance):
    tags = {tag.get("key"): tag.get("value") for tag in instance.get("tags") or []}
    name = instance.get("name") or ""
    return settings["intent"] in (tags.get("llmctl-intent"), name) or name.startswith(settings["intent"] + "-t")


def lease_end(settings, instances):
    ends = [settings["lease_end"]]
    for instance in instances:
        match = re.fullmatch(re.escape(settings["intent"]) + "-t([0-9a-z]+)", instance.get("name") or "")
        if match:
            ends.append(int(match.group(1), 36) * 60)
    return max(ends)


def remember(settings, end):
    text = json.dumps(dict(settings, lease_end=end))
    temporary = SETTINGS + ".new"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(temporary, SETTINGS)


def main():
    with open(SETTINGS) as file:
        settings = json.load(file)
    if time.time() < settings["lease_end"]:
        return 0
    try:
        instances = [instance for instance in call(settings, "/instances") if mine(settings, instance)]
        end = lease_end(settings, instances)
        if time.time() < end:
            remember(settings, end)
            return 0
        ids = [instance["id"] for instance in instances if instance.get("status") not in ("terminating", "terminated")]
        if not ids:
            print("llmctl-guard: the lease is over, but the instance list does not show this machine", file=sys.stderr)
            return 0 if instances else 1
        time.sleep(settings["pause_seconds"])
        call(settings, "/instance-operations/terminate", {"instance_ids": ids})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # The request, and with it the key, is in no message.
        print("llmctl-guard: " + type(error).__name__ + ", trying again in a minute", file=sys.stderr)
        return 1
    print("llmctl-guard: the lease is over, termination was accepted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''
