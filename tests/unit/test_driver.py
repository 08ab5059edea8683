"""The driver's step and how a run is taken over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from orchestrator.clock import SystemClock
from orchestrator.driver.loop import driver_alive, take_over
from orchestrator.driver.main import stored_spec
from runs import events as e
from runs.lock import ProcessId, boot_id
from runs.store import Store
from tests.seeds import Seed
from tests.simulation.builders import RUN, Story, at


def test_one_driver_a_run_and_each_has_a_new_epoch(tmp_path: Path) -> None:
    store, clock = Store(tmp_path, synchronous="OFF"), SystemClock()
    store.commit(Story().changes)
    first = take_over(store, RUN, clock)
    assert first is not None
    assert driver_alive(tmp_path, RUN)
    assert take_over(Store(tmp_path), RUN, clock) is None
    first[0].release()
    second = take_over(store, RUN, clock)
    assert second is not None
    assert second[1] == first[1] + 1
    record = store.record(RUN)
    assert record is not None
    me = ProcessId.mine()
    assert (record.epoch, record.driver_pid, record.driver_boot_id) == (second[1], me.pid, me.boot_id)
    second[0].release()
    assert not driver_alive(tmp_path, RUN)


def test_who_takes_over_ends_the_old_driver_first(tmp_path: Path) -> None:
    import psutil

    store = Store(tmp_path, synchronous="OFF")
    store.commit(Story().changes)
    old = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        started = psutil.Process(old.pid).create_time()
        store.commit(
            [
                (
                    f"run:{RUN}",
                    e.DriverStarted(at=at(1), epoch=2, pid=old.pid, start_time=started, boot_id=boot_id()),
                )
            ],
            epoch=2,
        )
        taken = take_over(store, RUN, SystemClock())
        assert taken is not None
        assert taken[1] == 3
        assert not ProcessId(old.pid, started, boot_id()).alive()
        taken[0].release()
    finally:
        old.kill()
        old.wait()


def test_a_run_stored_before_wandb_from_node_was_refused_keeps_its_driver(tmp_path: Path) -> None:
    record = Seed(tmp_path, wandb={"mode": "offline"}).record
    wandb = {**record.spec["wandb"], "from": "node"}
    old = record.model_copy(update={"spec": {**record.spec, "wandb": wandb}})
    assert stored_spec(old).to_dict()["wandb"] == {"mode": "offline", "project": "llmctl", "from": "driver"}
