"""A plan chooses, predicts and refuses, and changes nothing."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from orchestrator.actions import dryrun
from orchestrator.actions import plan as planning
from orchestrator.actions.limits import Limits
from orchestrator.errors import NoOffer, OverBudget, Usage
from runs import spec as specs
from runs.predict import Verdict
from tests.seeds import SPEC, Seed


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCTL_HOME", str(tmp_path / "home"))
    shard = tmp_path / "shard.bin"
    shard.write_bytes(struct.pack("<256i", 20240520, 1, 40_000, *([0] * 253)) + bytes(80_000))
    return tmp_path


def spec(home: Path, **changes: Any) -> Any:
    data = {"train": [str(home / "shard.bin")], "tokenizer": "bytes"}
    return specs.from_dict({**SPEC, "data": data, **changes})


def test_a_plan_for_this_machine_needs_no_account_and_leaves_no_store(home: Path) -> None:
    made = planning.make(None, spec(home))
    document = made.document()
    assert {"offer", "alternatives", "predicted"} <= set(document)
    assert {"parameters", "flops_per_token", "memory_gib", "fits", "microbatch_size", "tokens_per_second", "mfu", "training_hours",
            "overhead_hours", "cost_usd"} <= set(document["predicted"])  # fmt: skip
    assert document["offer"]["instance_type"] == "local" and document["offer"]["usd_per_hour"] == 36.0
    assert document["bytes_to_send"] > 0
    assert made.exit_code == 0
    assert not (home / "home" / "llmctl.db").exists()


def test_history_makes_a_prediction_and_a_budget_that_it_exceeds_refuses(home: Path) -> None:
    seed = Seed(home / "home", data={"train": [str(home / "shard.bin")], "tokenizer": "bytes"}).finished()
    made = planning.make(seed.store, spec(home))
    assert made.chosen is not None and made.chosen.basis == "history"
    assert made.chosen.cost_usd == pytest.approx(2.52, rel=0.15)
    planning.refuse(made)
    poor = planning.make(seed.store, spec(home), Limits(max_usd=0.5))
    assert poor.exit_code == 5
    with pytest.raises(OverBudget, match="over the budget"):
        planning.refuse(poor)


def test_the_uplink_of_an_earlier_run_prices_the_upload(home: Path) -> None:
    seed = Seed(home / "home").finished()  # 7,000,000 bytes in 18 seconds
    evidence = planning.history(seed.store, "local")
    sent = planning.transfer(planning.make(None, spec(home)).data, True, evidence)
    assert (sent.measured, sent.bytes_per_second) == (True, pytest.approx(7_000_000 / 18))
    assert planning.transfer(None, True).bytes_per_second == 2.5e6


def test_a_plan_without_a_network_goes_on_without_the_prompts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import tokenize

    def unreachable(*_: object) -> list[int]:
        raise tokenize.TokenizerUnreachable("nobody answers")

    monkeypatch.setattr(tokenize, "encode", unreachable)
    made = planning.make(None, spec(home, evaluate={"prompts": ["Every effort"]}))
    assert made.exit_code == 0 and any("prompts were not tokenised" in text for text in made.warnings)


def test_no_offer_is_refused(home: Path) -> None:
    made = planning.make(None, spec(home, hardware={"provider": "local", "gpu": "H100:8"}))
    assert made.chosen is None and made.exit_code == 5
    with pytest.raises(NoOffer):
        planning.refuse(made)
    assert made.verdict == Verdict(refused=True)


def test_a_dry_run_shows_the_first_effects_and_a_request_without_secrets(home: Path) -> None:
    document = dryrun.rehearse(spec(home), Limits()).document()
    assert [item["effect"] for item in document["effects"]][:2] == ["BeginAttempt", "Launch"]
    assert document["request"]["name"].startswith("llmctl-demo-0000-a1-n0-t")
    assert "PRIVATE KEY" not in str(document)
    assert not (home / "home" / "llmctl.db").exists()


@pytest.mark.parametrize(("wait", "usd"), [("soon", None), (None, -1.0), (None, float("nan"))])
def test_limits_that_make_no_sense(wait: str | None, usd: float | None) -> None:
    with pytest.raises(Usage):
        Limits.read(wait, usd)


def test_limits() -> None:
    assert Limits.read("6h", 45.0) == Limits(21_600, 45.0)
