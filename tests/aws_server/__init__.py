"""AWS for tests: moto's standalone server over real HTTP, with what moto lacks in front of it, and real SSH nodes behind its instances.

In a test module or a conftest:

    from tests.aws_server import aws, aws_factory  # noqa: F401

`aws` is an account whose instances exist on paper; `aws_factory(real_nodes=True)` makes one whose instances are embedded SSH nodes that
run their lease guard and have a metadata service each. The front honours client tokens, knows capacity, quotas and
prices, refuses what is not signed (version 4, in date), and does what `fault` asks for. Its teardown fails the test when a
fault never happened, or when an instance is left that the test did not declare with `may_bill()`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.aws_server.server import AwsServer
from tests.aws_server.wire import ACCOUNT, IMAGE, PACE, PRICES, REGION, REGIONS, SECRET

__all__ = [
    "ACCOUNT",
    "IMAGE",
    "PACE",
    "PRICES",
    "REGION",
    "REGIONS",
    "SECRET",
    "AwsServer",
    "aws",
    "aws_factory",
]


@pytest.fixture
def aws_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., AwsServer]]:
    """Makes accounts; all are closed and checked at the end. This process takes the last one for AWS."""
    made: list[AwsServer] = []

    def make(**options: Any) -> AwsServer:
        made.append(AwsServer(tmp_path / f"aws{len(made)}", **options))
        _take(made[-1], tmp_path, monkeypatch)
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def aws(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AwsServer]:
    """An account whose instances exist on paper; one server of a process serves all its tests, empty each time."""
    if _SHARED:
        _SHARED[0].renew()
    else:
        _SHARED.append(AwsServer(tmp_path_factory.mktemp("aws"), pace=0.0001))
    _take(_SHARED[0], tmp_path, monkeypatch)
    yield _SHARED[0]
    _SHARED[0].complain(_SHARED[0].alive(), _SHARED[0].unfired())


_SHARED: list[AwsServer] = []


@cache
def _loader(search_path: str | None = None) -> Any:
    from botocore.loaders import create_loader

    return create_loader(search_path)


def _take(server: AwsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process takes the server for AWS, and reads botocore's descriptions of the services once."""
    monkeypatch.setattr("botocore.session.create_loader", _loader)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
