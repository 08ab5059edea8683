"""The CLI of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import Cli


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of token shards that all homes share: nothing is tokenised twice."""
    return tmp_path_factory.mktemp("shards")


@pytest.fixture
def cli(tmp_path: Path, shards: Path) -> Iterator[Cli]:
    """A CLI with an empty home; nothing of it may be left running."""
    cli = Cli(tmp_path / "home", cache=shards)
    yield cli
    left = cli.left()
    cli.end()
    assert left == []
