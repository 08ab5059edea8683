"""What tests write outside their own folders goes with them."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images

gc.set_threshold(10_000, 50, 100)  # as the program itself (orchestrator/cli.py): modules are no garbage
# As in an activated environment: every node's python3 is this one. A version manager's shim (pyenv's) is a shell script instead,
# a tenth of a second and forty processes each time that a node is asked something.
os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


@pytest.fixture(scope="session", autouse=True)
def _scratch() -> Iterator[None]:
    """A temporary folder of this session for whatever uses one, and for SSH's control sockets: its name is short. Gone at the end."""
    outside = {
        name: os.environ.get(name)
        for name in ("TMPDIR", "XDG_RUNTIME_DIR", "TORCHINDUCTOR_CACHE_DIR", images.VARIABLE)
    }
    folder = Path(tempfile.mkdtemp(prefix="llmctl-tests-"))
    os.environ |= {
        "TMPDIR": str(folder),
        "XDG_RUNTIME_DIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        images.VARIABLE: str(folder / "environments"),
    }
    tempfile.tempdir = None  # it is read anew
    yield
    for name, value in outside.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    tempfile.tempdir = None
    shutil.rmtree(folder, ignore_errors=True)
