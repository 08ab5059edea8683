"""What goes to the node: model, data, loop, checkpoint, and the supervisor that keeps them running.

Imports nothing else of this project, and nothing of PyPI but torch, numpy and safetensors. Python 3.10.
"""
