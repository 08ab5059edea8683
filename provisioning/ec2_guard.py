"""The dead man's switch of an EC2 node: a timer, armed at boot, that powers the machine off when its lease is over.

Powering off ends an instance for good, volume included, because it is launched with the shutdown behaviour
`terminate`. The lease is the instance's own tag `llmctl-lease`, which the node reads from its metadata service; so `extend` needs
nothing but a tag, from any machine, and the node needs no credentials. Where the tag cannot be read, the
longest lease that was ever seen holds, at first the one of the launch.
"""

from __future__ import annotations

import json
from datetime import datetime

from provisioning.base import InvalidHardware
from provisioning.cloudinit import HEADER, TIMER, user_data

DIRECTORY = "/var/lib/llmctl-lease"
LARGEST_BYTES = 16_384
"""EC2's limit of user data, before base64."""
_UNITS = "/etc/systemd/system"


def guarded(host_private_key: str | None, host_public_key: str | None, lease_end: datetime) -> str:
    """User data with the host key and the armed lease. It holds the host's private key: never log it."""
    text = user_data(host_private_key, host_public_key)
    config: dict[str, object] = json.loads(text.removeprefix(HEADER)) if text else {}
    files = [
        (f"{DIRECTORY}/lease.json", "0600", json.dumps({"lease_end": int(lease_end.timestamp())})),
        (f"{DIRECTORY}/guard.py", "0700", GUARD),
        (f"{_UNITS}/llmctl-lease.service", "0644", _SERVICE),
        (f"{_UNITS}/llmctl-lease.timer", "0644", TIMER),
    ]
    config["write_files"] = [
        {"path": path, "permissions": mode, "owner": "root:root", "content": content}
        for path, mode, content in files
    ]
    # The units need their files first; a lease is longer than a boot, so the end of cloud-init is early enough.
    config["runcmd"] = [
        ["systemctl", "daemon-reload"],
        ["systemctl", "enable", "--now", "llmctl-lease.timer"],
    ]
    made = HEADER + json.dumps(config) + "\n"
    if len(made.encode()) > LARGEST_BYTES:
        raise InvalidHardware("the user data is larger than EC2 takes", code="user-data")
    return made


_SERVICE = f"""\
[Unit]
Description=End this machine when its llmctl lease is over

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 {DIRECTORY}/guard.py
TimeoutStartSec=60
"""

GUARD = '''\
#!/usr/bin/env python3
"""Powers this machine off when its llmctl lease is over; EC2 then terminates it. Started every minute.

The lease is the tag llmctl-lease of this instance, as the metadata service shows it; the latest one seen is kept in lease.json.
"""
import json
import os
import subprocess
import time
import urllib.request

DIRECTORY = os.environ.get("LLMCTL_GUARD_DIRECTORY", os.path.dirname(os.path.abspath(__file__)))
LEASE = os.path.join(DIRECTORY, "lease.json")
METADATA = os.environ.get("LLMCTL_IMDS", "http://169.254.169.254")


def ask(path, method, headers):
    request = urllib.request.Request(METADATA + path, method=method, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=5) as answer:
        return answer.read(4096).decode()


def tagged():
    try:
        token = ask("/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        header = {"X-aws-ec2-metadata-token": token}
        return int(ask("/latest/meta-data/tags/instance/llmctl-lease", "GET", header))
    except (OSError, ValueError):
        return 0


def main():
    with open(LEASE) as file:
        known = json.load(file)["lease_end"]
    end = max(known, tagged())
    if end > known:
        try:
            with open(LEASE + ".new", "w") as file:
                json.dump({"lease_end": end}, file)
            os.replace(LEASE + ".new", LEASE)
        except OSError as error:  # a full disk is no reason to live on
            print("llmctl: cannot remember the lease:", error, flush=True)
    if time.time() >= end:
        print("llmctl: the lease is over, powering off", flush=True)
        subprocess.call(os.environ.get("LLMCTL_POWEROFF", "systemctl poweroff").split())


if __name__ == "__main__":
    main()
'''
