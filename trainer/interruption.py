"""A spot instance's notice that it will be taken away. Standard library only.

EC2 announces it two minutes ahead at `spot/instance-action` of the instance metadata service, which answers 404 until
then and wants a session token (IMDSv2). `LLMCTL_IMDS` replaces the service's address.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.parse

POLL_SECONDS = 5.0


def notice(base: str, timeout: float = 2.0) -> str | None:
    """The announced action with its time, or None where there is none or nobody answers."""
    address = urllib.parse.urlsplit(base)
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=timeout)
    try:
        connection.request("PUT", "/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        token = connection.getresponse().read(4096).decode("ascii")
        connection.request(
            "GET", "/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
        )
        answer = connection.getresponse()
        body = json.loads(answer.read(4096)) if answer.status == 200 else None
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return f"{body.get('action')} at {body.get('time')}" if isinstance(body, dict) else None


class Interruption(threading.Thread):
    """Asks every few seconds, beside the supervisor's loop; `notice` is what was announced."""

    def __init__(self) -> None:
        super().__init__(name="interruption", daemon=True)
        self.notice: str | None = None
        self._base = os.environ.get("LLMCTL_IMDS", "http://169.254.169.254")
        self._closed = threading.Event()

    def run(self) -> None:
        """Poll until something is announced or `close` is called."""
        while self.notice is None and not self._closed.is_set():
            self.notice = notice(self._base)
            if self.notice is None:
                self._closed.wait(POLL_SECONDS)

    def close(self) -> None:
        """End the polling."""
        self._closed.set()
