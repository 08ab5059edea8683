"""The JSON that others rely on: exact keys, dollars that add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import footer
from orchestrator.actions import show
from provisioning import console_of
from runs import events as e
from runs.lock import Lock, driver_lock
from tests.seeds import Seed, at

STATUS = {"run", "name", "state", "reason", "provider", "instance_type", "nodes", "step", "steps", "loss", "validation_loss",
          "tokens_per_second", "cost_usd", "usd_per_hour", "eta_seconds", "driver"}  # fmt: skip
NODE = {"id", "name", "ip", "status", "usd_per_hour", "billing"}


def test_status_has_exactly_its_keys(tmp_path: Path) -> None:
    seed = Seed(tmp_path).finished()
    Seed(tmp_path, "other-0002").rented().trained(step=40)
    rows = show.status(seed.store)
    assert [row["run"] for row in rows] == ["other-0002", "demo-0001"]
    for row in rows:
        assert set(row) == STATUS
        assert all(set(node) == NODE for node in row["nodes"])
    live, over = rows
    assert (live["eta_seconds"], live["usd_per_hour"], live["nodes"][0]["billing"]) == (120, 36.0, True)
    assert (over["cost_usd"], over["usd_per_hour"], over["nodes"][0]["billing"]) == (2.52, 0, False)
    assert live["driver"] is False


def test_unowned_nodes_appear_without_a_run(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented()
    mine = {"id": seed.key, "key": seed.key, "name": seed.marker.name, "ip": None, "status": "active", "instance_type": "local",
            "micro_usd_per_hour": 1}  # fmt: skip
    stray = {
        **mine,
        "id": "i-9",
        "key": "llmctl-gone-0009-a1-n0",
        "name": "llmctl-gone-0009-a1-n0-tabc",
        "micro_usd_per_hour": 2_500_000,
    }
    seed.store.remember(
        show.INVENTORY, {"at": at(0).isoformat(), "providers": {"lambda": {"at": "", "nodes": [mine, stray]}}}
    )
    rows = show.status(seed.store)
    assert [row["run"] for row in rows] == ["demo-0001", None]
    assert set(rows[1]) == STATUS and set(rows[1]["nodes"][0]) == NODE
    assert (rows[1]["nodes"][0]["id"], rows[1]["usd_per_hour"]) == ("i-9", 2.5)
    assert show.inventory_age(seed.store, at(60)) == 60


def test_show_has_its_keys_and_its_charges_add_up(tmp_path: Path) -> None:
    seed = Seed(tmp_path).finished()
    document = show.show(seed.store, seed.record, at(10_000))
    assert {"run", "state", "reason", "spec", "attempts", "charges", "cost_usd", "billed_seconds", "training_seconds",
            "overhead_fraction", "checkpoints", "events", "summary"} <= set(document)  # fmt: skip
    assert set(document["attempts"][0]) == {"provider", "instance_type", "region", "usd_per_hour", "nodes", "started", "ended",
                                            "from_step", "world_size", "microbatch_size"}  # fmt: skip
    assert all(set(item) == {"node", "phase", "start", "end", "usd"} for item in document["charges"])
    assert [set(item) for item in document["checkpoints"]] == [
        {"step", "path", "sha256", "bytes", "fetched", "best"}
    ] * 2
    assert sum(item["usd"] for item in document["charges"]) == pytest.approx(document["cost_usd"])
    assert (document["cost_usd"], document["billed_seconds"], document["training_seconds"]) == (
        2.52,
        252,
        200,
    )
    assert document["cost_is_upper_bound"] is False
    assert [(item["step"], item["best"]) for item in document["checkpoints"]] == [(50, False), (100, True)]
    kinds = [item["kind"] for item in document["events"]]
    assert kinds[0] == "RunCreated" and kinds[-1] == "RunEnded" and "NodeGone" in kinds


def test_an_unconfirmed_bill_says_that_it_is_an_upper_bound(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented().trained().tell(e.TerminateIntended(at=at(260), reason="x"))
    assert show.show(seed.store, seed.record, at(400))["cost_is_upper_bound"] is True


def test_the_footer_tells_the_rate_once_a_node_and_who_watches(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented().trained()
    Seed(tmp_path, "other-0002").rented()
    said = footer.lines(tmp_path, seed.store.concerning())
    assert said[0] == "2 nodes billing, $72.00/h"
    assert sum("has no driver" in text for text in said) == 2


def test_the_footer_says_that_nothing_ends_a_node_while_this_machine_sleeps(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented(unguarded=True)
    (said,) = [text for text in footer.lines(tmp_path, seed.store.concerning()) if "sleeps" in text]
    assert seed.record.nodes[0].marker.name in said
    assert "reap --yes" in said


def test_the_footer_is_silent_when_all_is_settled(tmp_path: Path) -> None:
    assert footer.lines(tmp_path, Seed(tmp_path).finished().store.concerning()) == []


def test_the_footer_shouts_for_an_end_that_nobody_confirmed_until_it_is(tmp_path: Path) -> None:
    seed = (
        Seed(tmp_path)
        .rented()
        .trained()
        .tell(e.TerminateIntended(at=at(260), reason="x"))
        .ended("failed", "x")
    )
    (said,) = [text for text in footer.lines(tmp_path, seed.store.concerning()) if "MAY STILL BE" in text]
    assert str(seed.record.nodes[0].id) in said and console_of("local") in said
    seed.tell(e.NodeGone(at=at(300), evidence="not found"))
    assert footer.lines(tmp_path, seed.store.concerning()) == []


def test_a_node_kept_for_good_needs_no_driver_and_still_shows_its_price(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented().trained().tell(e.NodeKept(at=at(260), until=None)).ended()
    assert footer.lines(tmp_path, seed.store.concerning()) == ["1 node billing, $36.00/h"]


def test_a_kept_node_that_is_to_go_is_shouted_for_unless_a_driver_is_at_it(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented().trained().tell(e.NodeKept(at=at(260), until=None)).ended()
    seed.tell(e.ReleaseRequested(at=at(270), key=seed.key))
    _, named, undriven = footer.lines(tmp_path, seed.store.concerning())
    assert "MAY STILL BE BILLING" in named and seed.key in named
    assert "has no driver" in undriven
    with Lock(driver_lock(seed.directory)):
        assert footer.lines(tmp_path, seed.store.concerning()) == ["1 node billing, $36.00/h"]
