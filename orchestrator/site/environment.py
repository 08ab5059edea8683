"""The environment lane: an interpreter on the node that has what the trainer needs, without touching the image's own packages.

In this order: a Python of the image whose packages satisfy the pins; an overlay (a folder on PYTHONPATH) where only small
wheels are missing; an isolated environment made by uv, with the torch build that the node's driver can run. The choice is
remembered by what the image's interpreters are, on the node or in the filesystem that outlives it, and looked at again only when they
changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.remote.connection import CommandFailed
from orchestrator.remote.node import Remote

MINIMUM = {"torch": (2, 9), "numpy": (1, 26), "safetensors": (0, 4)}
"""Pins: torch 2.9 is the first with torch.optim.Muon, which ours is tested against; the others are what the trainer was tested with at the least."""
SMALL = ("numpy", "safetensors")
"""Wheels of a few megabytes."""
UV_PACKAGES = ("torch>=2.9,<3", "numpy>=1.26", "safetensors>=0.4")
UV_PYTHON = "3.12"
IMAGE_PYTHONS = ("python3", "/opt/pytorch/bin/python")
"""Where images keep their torch, looked at in this order: in the system's Python (Lambda Stack), in an environment of its own (AWS's
Deep Learning AMI: docs.aws.amazon.com/dlami/latest/devguide, PyTorch)."""
ROOT = "llmctl/environments"
INSTALL_SECONDS = 1800.0
_PROBE = """
import json, os, sys
found = {"executable": sys.executable, "version": list(sys.version_info[:2]), "packages": {}}
for name in ("torch", "numpy", "safetensors"):
    try:
        found["packages"][name] = __import__(name).__version__
    except Exception:
        found["packages"][name] = None
torch = sys.modules.get("torch")
if torch is not None:
    found["cuda"] = torch.cuda.is_available()
    found["gpus"] = torch.cuda.device_count() if found["cuda"] else 0
    found["cuda_build"] = torch.version.cuda
print(json.dumps(found))
"""


class EnvironmentFailed(Exception):
    """No usable interpreter could be had; the message says what was tried."""


def ensure(remote: Remote, python: str, *, cuda: bool) -> dict[str, Any]:
    """An interpreter for the trainer: {python, env, versions, cuda, kind}. `python`: `auto` or a path.

    Raises EnvironmentFailed, RemoteError.
    """
    candidates = IMAGE_PYTHONS if python == "auto" else (python,)
    stamp = remote.run(["sh", "-c", _STAMP, "sh", *candidates], check=False).text
    image = hashlib.sha256(f"{stamp} {cuda}".encode()).hexdigest()[:12]
    remembered = _remembered(remote, image)
    if remembered is not None:
        return remembered
    chosen = _choose(remote, candidates, image, only=python != "auto", cuda=cuda)
    remote.write(f"~/{ROOT}/{image}.json", json.dumps(chosen).encode(), 0o644)
    return chosen


def _choose(
    remote: Remote, candidates: Sequence[str], image: str, *, only: bool, cuda: bool
) -> dict[str, Any]:
    """The first candidate that lacks nothing, else the first that lacks small wheels alone, else an environment of our own."""
    small: tuple[str, list[str]] | None = None
    for candidate in candidates:
        found = _probe(remote, candidate, {})
        missing = lacking(found, cuda=cuda)
        if not missing:
            return _chosen(found, "image", {})
        if only:
            raise EnvironmentFailed(
                f"{candidate} on the node lacks {', '.join(missing)}; use node.python: auto, or install them there"
            )
        if small is None and set(missing) <= set(SMALL):
            small = candidate, missing
    return _overlay(remote, *small, image, cuda=cuda) if small else _isolated(remote, image, cuda=cuda)


_STAMP = """for name; do
  p=$(command -v "$name") && echo "$p" && ls -lLn "$p" && "$p" -c "import sys; print(sys.prefix, sys.version)"
done"""


def _remembered(remote: Remote, image: str) -> dict[str, Any] | None:
    try:
        chosen: dict[str, Any] = json.loads(remote.read(f"~/{ROOT}/{image}.json"))
    except (CommandFailed, ValueError):
        return None
    exists = remote.run(["test", "-x", chosen["python"]], check=False).exit_code == 0
    return chosen if exists else None


def _probe(remote: Remote, python: str, env: Mapping[str, str]) -> dict[str, Any]:
    result = remote.run([python, "-c", _PROBE], check=False, timeout=180, env=dict(env))
    if result.exit_code != 0:
        return {"executable": python, "version": [0, 0], "packages": {}}
    found: dict[str, Any] = json.loads(result.text.splitlines()[-1])
    return found


def lacking(found: Mapping[str, Any], *, cuda: bool) -> list[str]:
    """What an interpreter lacks: packages that are absent or too old, or a torch that cannot use the GPUs. Pure."""
    if tuple(found["version"]) < (3, 10):
        return ["python>=3.10"]
    missing = []
    for name, least in MINIMUM.items():
        version = found["packages"].get(name)
        if version is None or numbers(version) < least:
            missing.append(name)
    if cuda and "torch" not in missing and not found.get("cuda"):
        missing.append(
            "torch"
        )  # it is there and would fall back to the CPU: the driver cannot run its CUDA build
    return missing


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13) of `2.13.0+cpu`."""
    parts = version.split("+", maxsplit=1)[0].split(".")[:2]
    return tuple(int("".join(char for char in part if char.isdigit()) or 0) for part in parts)


def _chosen(found: Mapping[str, Any], kind: str, env: dict[str, str]) -> dict[str, Any]:
    return {
        "python": found["executable"],
        "env": env,
        "kind": kind,
        "versions": {**found["packages"], "python": ".".join(map(str, found["version"]))},
        "cuda": found.get("cuda", False),
        "gpus": found.get("gpus", 0),
    }


def _overlay(remote: Remote, python: str, missing: list[str], image: str, *, cuda: bool) -> dict[str, Any]:
    """Small wheels in a folder of our own, in front of the image's packages."""
    folder = f"{ROOT}/overlay-{image}"
    wanted = [f"{name}>={'.'.join(map(str, MINIMUM[name]))}" for name in missing]
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *wanted]
    result = remote.run(command, check=False, timeout=INSTALL_SECONDS)
    home = remote.run(["sh", "-c", 'printf %s "$HOME"']).text
    env = {"PYTHONPATH": f"{home}/{folder}"}
    found = _probe(remote, python, env)
    if result.exit_code != 0 or lacking(found, cuda=cuda):
        return _isolated(remote, image, cuda=cuda)
    return _chosen(found, "overlay", env)


def _isolated(remote: Remote, image: str, *, cuda: bool) -> dict[str, Any]:
    """An environment of its own. uv chooses the torch build by the driver (`--torch-backend=auto`)."""
    folder = f"{ROOT}/uv-{image}"
    backend = "auto" if cuda else "cpu"
    result = remote.run(
        ["sh", "-c", _UV, "sh", folder, UV_PYTHON, backend, *UV_PACKAGES],
        check=False,
        timeout=INSTALL_SECONDS,
    )
    found = _probe(remote, f"{folder}/bin/python", {}) if result.exit_code == 0 else None
    if found is None:
        raise EnvironmentFailed(
            f"uv could not make an environment on the node: {result.stderr.decode(errors='replace')[-800:]}"
        )
    missing = lacking(found, cuda=cuda)
    if missing:
        raise EnvironmentFailed(
            f"the environment that uv made lacks {', '.join(missing)}: does the node's driver work? try nvidia-smi there"
        )
    return _chosen(found, "uv", {})


_UV = """
set -e
folder=$1 python=$2 backend=$3; shift 3
mkdir -p "${folder%/*}"
exec 9>"$folder.lock"
flock 9 2>/dev/null || :  # another node with the same filesystem may be making it
export UV_PYTHON_INSTALL_DIR="$PWD/llmctl/environments/python"  # beside it, so that it serves the next node too
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  python3 -m pip install --quiet --target llmctl/environments/tools uv ||
    { curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$HOME/llmctl/environments/tools/bin" INSTALLER_NO_MODIFY_PATH=1 sh; }
  uv="$HOME/llmctl/environments/tools/bin/uv"
fi
"$uv" venv --quiet --allow-existing --python "$python" "$folder" || "$uv" venv --quiet --allow-existing "$folder"
"$uv" pip install --quiet --python "$folder/bin/python" --torch-backend="$backend" "$@" ||
  "$uv" pip install --quiet --python "$folder/bin/python" "$@"  # PyPI's own build, where torch's index cannot be reached
"""
