"""Every error has its exit code, and every run's end too."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from orchestrator import cli, errors, exits
from orchestrator.render.show import alarm
from provisioning.base import Ambiguous, CredentialsError, InvalidHardware, NoCapacity, Unavailable
from provisioning.keys import KeyFileError
from runs import events as e
from runs.spec import Problem, SpecError
from runs.store import StoreError
from tests.seeds import Seed, at
from trainer.config import ConfigError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.Usage("no"), 2),
        (
            SpecError([Problem("run.yaml", 3, "train.lr", "is no key", "Did you mean train.learning_rate?")]),
            3,
        ),
        (KeyFileError("no key", hint="make one"), 3),
        (ConfigError("train.steps", "must be at least 1"), 3),
        (InvalidHardware("no"), 3),
        (CredentialsError("no"), 4),
        (NoCapacity("sold out"), 5),
        (errors.OverBudget("too much"), 5),
        (Unavailable("down"), 6),
        (Ambiguous("who knows"), 6),
        (errors.Unverified("torn"), 7),
        (errors.MayBill("still there"), 8),
        (errors.NoSuchRun("none"), 102),
        (StoreError("locked"), 3),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1),
        (ZeroDivisionError("division by zero"), 1),
    ],
)
def test_each_error_has_its_code(error: Exception, code: int) -> None:
    read = errors.failure(error)
    assert read.exit_code == code
    assert read.message and read.code
    assert set(read.document()["error"]) == {"code", "message", "hint", "run"}
    assert read.text().startswith("error: ")


def test_an_error_of_a_spec_keeps_file_line_key_and_nearest() -> None:
    text = errors.failure(
        SpecError([Problem("run.yaml", 3, "train.lr", "is no key", "Did you mean train.learning_rate?")])
    ).text()
    assert "run.yaml:3" in text and "train.lr" in text and "train.learning_rate" in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["show", "--json"], True),
        (["show", "-o", "json"], True),
        (["show", "--output=json"], True),
        (["compare", "--format", "json"], True),
        (["show", "json"], False),
        (["ssh", "RUN", "--", "tool", "--json"], False),
        ([], False),
    ],
)
def test_whether_json_is_asked_for(line: list[str], expected: bool) -> None:
    assert cli.wants_json(line) is expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["status", "--json"], True),
        (["status", "-o", "json"], True),
        (["status", "demo", "--json"], True),
        (["status"], False),
        (["status", "--refresh", "--json"], False),
        (["show", "--json"], False),
        (["status", "a", "b", "--json"], False),
    ],
)
def test_which_status_needs_no_parser(line: list[str], expected: bool) -> None:
    assert cli.plain_status(line) is expected


def test_success_is_0(tmp_path: Path) -> None:
    assert exits.exit_code_of(Seed(tmp_path).finished().record) == 0


def test_a_live_run_is_unfinished(tmp_path: Path) -> None:
    assert exits.exit_code_of(Seed(tmp_path).rented().record) == 101


def test_a_node_whose_end_is_not_confirmed_outranks_success(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented().trained().tell(e.TerminateIntended(at=at(260), reason="succeeded")).ended()
    assert exits.exit_code_of(seed.record) == 8


def test_a_node_that_is_left_after_the_end_may_bill_and_a_kept_one_is_kept(tmp_path: Path) -> None:
    left = Seed(tmp_path / "left").rented().trained().ended()
    assert exits.exit_code_of(left.record) == 8
    kept = Seed(tmp_path / "kept").rented().trained().tell(e.NodeKept(at=at(260), until=None)).ended()
    assert exits.exit_code_of(kept.record) == 0
    kept.tell(e.ReleaseRequested(at=at(270), key=kept.key))
    assert exits.exit_code_of(kept.record) == 8
    assert kept.record.nodes[0].marker.name in alarm(kept.record)


@pytest.mark.parametrize(
    ("outcome", "reason", "code"),
    [
        ("failed", "the trainer failed", 100),
        ("lost", "node-lost", 100),
        ("failed", "no-capacity", 5),
        ("failed", "global/invalid-api-key: the key is refused", 4),
        ("failed", "refused: global/invalid-api-key: the key is refused", 4),
        ("failed", "refused: VcpuLimitExceeded: the quota is used up", 5),
        ("failed", "host-key", 6),
        ("failed", "boot-timeout: it never answered", 6),
        ("stopped", "user", 103),
        ("stopped", "budget", 103),
    ],
)
def test_how_a_run_ended(tmp_path: Path, outcome: str, reason: str, code: int) -> None:
    assert exits.exit_code_of(Seed(tmp_path).driven().ended(outcome, reason).record) == code


def test_a_cancelled_wait_is_130(tmp_path: Path) -> None:
    seed = Seed(tmp_path).driven().tell(e.WaitCancelled(at=at(5))).ended("stopped", "cancelled")
    assert exits.exit_code_of(seed.record) == 130
