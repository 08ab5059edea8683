"""A Lambda-shaped cloud on loopback: stateful, strict about requests, and able to break every promise on demand.

`python -m tests.lambda_server --state DIR [--port 0] [--switches FILE]` prints one JSON line with its address and keys.
`server.LambdaServer` is the same in this process. What can go wrong is in `switches.py`; what the API promises is in
`schema.py`, and in the official document where it is at hand.
"""
