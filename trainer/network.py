"""What the nodes of one run need of the network between them: which interface, and one node's shards for the others.

    python3 network.py interface --address A          {"interface": NAME} of the interface that has the address A
    python3 network.py share --address A --directory D
                                                      serves D's files over HTTP at A, and says {"url"}

`share` listens on that one address, on any free port, below a path that nobody can guess; it serves single files with
ranges (what `pull.py` asks for), never a list, and ends when its standard input does: with the connection that started it.
Standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import secrets
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface (netdevice(7))."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


def interface_of(address: str) -> str | None:
    """The name of this machine's interface that has the IPv4 `address`; None where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


class Share(ThreadingHTTPServer):
    """Serves the files of one folder, below a secret path."""

    daemon_threads = True

    def __init__(self, address: str, directory: Path) -> None:
        super().__init__((address, 0), _Handler)
        self.directory, self.secret = directory, secrets.token_urlsafe(32)

    @property
    def url(self) -> str:
        """What names of files are appended to."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/{self.secret}/"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """One file, or a range of it."""
        share = self.server
        assert isinstance(share, Share)
        _, _, rest = self.path.partition("/")
        secret, _, name = rest.partition("/")
        path = share.directory / name
        if (
            not secrets.compare_digest(secret.encode(), share.secret.encode())
            or not _NAME.fullmatch(name)
            or not path.is_file()
        ):
            self.send_error(404)
            return
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = _RANGE.fullmatch(self.headers.get("Range", ""))
            start = int(found[1]) if found else 0
            end = min(size, int(found[2]) + 1) if found and found[2] else size
            if start >= max(end, 1):
                self.send_error(416)
                return
            self.send_response(206 if found else 200)
            if found:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - start))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{name}-{size}"')
            self.end_headers()
            file.seek(start)
            left = end - start
            while left and (block := file.read(min(left, 1 << 18))):
                self.wfile.write(block)
                left -= len(block)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's word
        """Say nothing: the path is a secret."""


def main(argv: list[str]) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="network", description="What the nodes of one run need of each other."
    )
    parser.add_argument("command", choices=["interface", "share"])
    parser.add_argument("--address", required=True)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args(argv)
    if options.command == "interface":
        sys.stdout.write(json.dumps({"interface": interface_of(options.address)}) + "\n")
        return 0
    share = Share(options.address, options.directory)
    threading.Thread(target=share.serve_forever, daemon=True).start()
    sys.stdout.write(json.dumps({"url": share.url}) + "\n")
    sys.stdout.flush()
    while os.read(0, 4096):
        pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
