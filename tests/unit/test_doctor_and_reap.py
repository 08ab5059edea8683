"""What doctor calls a fault, and which nodes reap may end."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from orchestrator.actions import doctor
from orchestrator.actions.reap import Found, Orphan, known, orphan
from provisioning.base import Check, CredentialsError, Unavailable
from runs import events as e
from runs.facts import NodeFacts
from tests.seeds import Seed, at

LATER = at(300)


def facts(
    key: str | None = "llmctl-demo-0001-a1-n0",
    owner: str | None = "me",
    lease: float = 86_400,
    **more: object,
) -> NodeFacts:
    return NodeFacts.model_validate(
        {
            "id": "i-1",
            "name": "n",
            "status": "active",
            "provider": "local",
            "key": key,
            "owner": owner,
            "lease_end": at(lease),
            **more,
        }
    )


def judge(seed: Seed | None, node: NodeFacts, *, foreign: bool = False) -> str | None:
    record = seed.record if seed else None
    return orphan(node, "me", LATER, record, known(seed.store, node) if seed else None, foreign=foreign)


def test_the_node_of_a_live_run_stays_even_past_its_lease(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented()
    assert judge(seed, facts()) is None
    assert judge(seed, facts(lease=10)) is None


def test_a_node_that_came_back_without_name_and_tags_is_known_by_its_id(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented()
    bare = facts(key=None, id=seed.record.nodes[0].id, lease_end=None)
    assert judge(seed, bare) is None
    seed.ended("failed", "x")
    assert judge(seed, bare) == "no live run has it"
    assert judge(seed, bare.model_copy(update={"owner": None})) == "no live run has it"
    assert judge(seed, bare.model_copy(update={"owner": None, "id": "somebody-elses"}), foreign=True) is None


def test_a_live_runs_node_whose_end_is_asked_for_in_vain_goes(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented().tell(e.TerminateIntended(at=at(100), reason="x"))
    assert judge(seed, facts()) is None, "its driver has only just asked"
    seed.tell(e.TerminateIntended(at=at(160), reason="x"))
    assert judge(seed, facts()) == "its end is asked for, and not confirmed"


def test_the_node_of_a_run_that_is_over_goes(tmp_path: Path) -> None:
    assert judge(Seed(tmp_path).rented().ended("failed", "x"), facts()) == "no live run has it"


def test_a_node_that_the_run_believes_gone_goes_even_while_the_run_lives(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented().tell(e.NodeGone(at=at(100), evidence="x"))
    assert judge(seed, facts()) == "no live run has it"


def test_a_kept_node_stays_until_its_time(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented().tell(e.NodeKept(at=at(100), until=LATER + timedelta(hours=1))).ended()
    assert judge(seed, facts()) is None
    late = Seed(tmp_path / "late").rented().tell(e.NodeKept(at=at(100), until=at(200))).ended()
    assert judge(late, facts()) == "no live run has it"
    seed.tell(e.ReleaseRequested(at=at(300), key=seed.key))
    assert judge(seed, facts()) == "no live run has it", "its end is asked for, and its driver may be dead"


def test_nodes_without_a_run_here() -> None:
    assert judge(None, facts()) == "no live run has it"
    assert judge(None, facts(owner="someone")) is None
    assert judge(None, facts(owner="someone"), foreign=True) == "of another owner"
    assert "past its lease" in str(judge(None, facts(owner="someone", lease=200)))


def test_what_is_not_ours_or_is_gone_is_nobodys_business() -> None:
    assert judge(None, facts(key=None, owner=None, lease=1), foreign=True) is None
    assert judge(None, facts(status="terminated", lease=1), foreign=True) is None


def test_reaps_exit_codes() -> None:
    node = Orphan("local", facts(), "x")
    assert Found(()).exit_code == 0
    assert Found((node,), unconfirmed=(node,), errors={"lambda": CredentialsError("no")}).exit_code == 8
    assert Found((), errors={"lambda": CredentialsError("no")}).exit_code == 4
    assert Found((), errors={"lambda": Unavailable("down")}).exit_code == 6
    assert set(Found((node,)).document()) >= {"found", "terminated", "unconfirmed"}


def test_doctor_on_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LLMCTL_HOME", str(blocked / "home"))
    checks = doctor.examine()
    bad = next(item for item in checks if item.name == "home")
    assert not bad.ok and "LLMCTL_HOME" in bad.hint
    assert doctor.exit_code(checks) == 3


def test_doctor_does_without_ssh_and_rsync_and_says_what_it_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCTL_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LAMBDA_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    checks = {item.name: item for item in doctor.examine()}
    assert (
        checks["program ssh"].ok
        and "not installed" in checks["program ssh"].detail
        and checks["program ssh"].hint
    )
    assert checks["program rsync"].ok and "hashes" in checks["program rsync"].detail


def test_a_refused_account_is_4() -> None:
    assert doctor.exit_code([Check("lambda account", False, "no"), Check("disk", False, "no")]) == 4
    assert doctor.exit_code([Check("x", True, "")]) == 0
