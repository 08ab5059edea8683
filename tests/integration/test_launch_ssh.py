"""The main job on a machine of one's own: provider `ssh`, whose host key is pinned at the first connection. And wandb, offline."""

from __future__ import annotations

import pytest

from tests.cli import Cli, spec
from tests.nodes import Node, node  # noqa: F401  fixture
from tests.plain_trainer import plain_trainer

pytestmark = pytest.mark.slow


def test_a_run_on_a_machine_of_ones_own(cli: Cli, node: Node) -> None:  # noqa: F811
    """Trained, collected, priced; the machine stays, and is free for the next run. wandb gets an offline run beside it."""
    address = node.address
    hardware = {
        "provider": "ssh",
        "host": address.host,
        "port": address.port,
        "user": address.user,
        "identity_file": str(address.identity_file),
        "usd_per_hour": 3.6,
    }
    (cli.home / "run.yaml").write_text(
        spec(hardware=hardware, wandb={"mode": "offline"}, trainer={"path": plain_trainer(cli.home)})
    )
    cli.run("launch", "run.yaml")
    run = cli.only()
    document = cli.show(run)
    assert document["state"] == "succeeded"
    assert document["cost_usd"] == pytest.approx(document["billed_seconds"] * 3.6 / 3600, abs=2e-6)
    assert (node.home / "llmctl" / "runs" / run / "metrics.jsonl").exists(), "it ran on that machine"
    offers = cli.json("plan", "run.yaml")
    assert offers["offer"]["available"], "the claim on the machine was let go"
    assert cli.left(patience=60) == [], "the driver has written wandb's last lines, and is gone"
    (written,) = (cli.home / "runs" / run / "wandb").glob("offline-run-*/run-*.wandb")
    assert written.stat().st_size > 1000
