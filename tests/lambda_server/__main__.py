"""`python -m tests.lambda_server --state DIR [--port N] [--switches FILE] [--attached]`: serves until SIGTERM, then ends
its nodes. `--attached`: also when its standard input closes, so that it never outlives a test run that was killed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path

from tests.lambda_server.server import LambdaServer
from tests.lambda_server.switches import Switches


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.lambda_server", description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="directory for nodes and ports.json")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--switches", type=Path, help="JSON file with switches")
    parser.add_argument("--attached", action="store_true")
    arguments = parser.parse_args()
    switches = (
        Switches.model_validate_json(arguments.switches.read_text()) if arguments.switches else Switches()
    )
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server = LambdaServer(arguments.state, switches, port=arguments.port).start()
    assert server.nodes is not None
    facts = {
        "url": server.url,
        "admin": server.address,
        "key": server.key,
        "ports": str(server.nodes.ports_file),
    }
    print(json.dumps(facts), flush=True)
    if arguments.attached:
        threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    ended.wait()
    server.stop()


if __name__ == "__main__":
    main()
