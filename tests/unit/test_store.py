"""The store: one durable transaction a commit, rows that are the fold, epochs, several processes."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from runs import events as e
from runs.nodefold import FoldError
from runs.store import StaleEpoch, Store, StoreError
from tests.simulation.builders import KEY, RUN, Story, at, spec


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, synchronous="OFF")


def _create(store: Store, run: str, name: str = "demo", seconds: float = 0.0) -> None:
    created = e.RunCreated(at=at(seconds), run=run, spec={**spec(), "name": name}, steps=10)
    store.commit([(e.run_stream(run), created)])


def test_rows_are_the_fold_and_can_be_made_anew(store: Store) -> None:
    story = (
        Story(max_micro_usd=10**9)
        .training()
        .seen(50, here=True)
        .after(100)
        .ended("failed")
        .terminated()
        .gone()
    )
    store.commit(story.changes[:2])
    store.commit(story.changes[2:])
    other = Store(store.home)
    assert store.record(RUN) == other.record(RUN) == story.record
    rows = [list(other._db.execute(f"SELECT * FROM {table} ORDER BY 1")) for table in ("runs", "nodes")]
    other.rebuild()
    assert [
        [tuple(row) for row in other._db.execute(f"SELECT * FROM {table} ORDER BY 1")]
        for table in ("runs", "nodes")
    ] == [[tuple(row) for row in table] for table in rows]
    assert store.record(RUN) == story.record
    assert [kind["kind"] for _, _, kind in store.history(RUN)] == [event.kind for _, event in story.changes]


def test_a_commit_is_whole_or_nothing(store: Store) -> None:
    story = Story().begun().intended()
    store.commit(story.changes)
    twice = [(e.run_stream(RUN), e.StopRequested(at=at(1), reason="user")), story.changes[-1]]
    with pytest.raises(FoldError):
        store.commit(twice)
    for reader in (store, Store(store.home)):
        record = reader.record(RUN)
        assert record is not None
        assert record.stop is None
    store.commit(twice[:1])  # and the connection is still good
    assert store.record(RUN).stop is not None  # type: ignore[union-attr]


def test_another_connection_is_seen_at_once(store: Store) -> None:
    _create(store, "a-0001")
    other = Store(store.home)
    assert other.record("a-0001").stop is None  # type: ignore[union-attr]
    store.commit([("run:a-0001", e.StopRequested(at=at(1), reason="user"))])
    assert other.record("a-0001").stop is not None  # type: ignore[union-attr]
    other.commit([("run:a-0001", e.WaitCancelled(at=at(2)))])
    assert store.record("a-0001").cancelled  # type: ignore[union-attr]


def _driver(store: Store, epoch: int) -> None:
    store.commit(
        [(e.run_stream(RUN), e.DriverStarted(at=at(0), epoch=epoch, pid=1, start_time=0.0, boot_id="b"))],
        epoch=epoch,
    )


def test_a_stale_epoch_writes_nothing(store: Store) -> None:
    story = Story().begun().intended()
    store.commit(story.changes)
    _driver(store, 2)
    for change in [
        (e.run_stream(RUN), e.StopRequested(at=at(1), reason="x")),
        (e.node_stream(KEY), e.LaunchAbandoned(at=at(1))),
    ]:
        with pytest.raises(StaleEpoch):
            store.commit([change], epoch=1)
    with pytest.raises(StaleEpoch):
        _driver(store, 2)  # two that take over at once
    record = Store(store.home).record(RUN)
    assert record is not None
    assert record.stop is None
    assert record.nodes[0].answer == "none"
    store.commit(
        [(e.run_stream(RUN), e.StopRequested(at=at(1), reason="x"))]
    )  # other processes have no epoch
    store.commit([(e.node_stream(KEY), e.LaunchAbandoned(at=at(1)))], epoch=2)


def test_nodes_come_in_the_order_of_their_intents(store: Store) -> None:
    story = Story(nodes=3).begun(nodes=3)
    for index in range(3):
        story.launched(index=index)
    story.observed("booting", f"llmctl-{RUN}-a1-n0")
    for change in story.changes:
        store.commit([change])
    assert [node.marker.index for node in Store(store.home).record(RUN).nodes] == [0, 1, 2]  # type: ignore[union-attr]
    assert len(store.nodes(unsettled=True)) == 3
    store.commit([(e.node_stream(KEY), e.NodeGone(at=at(9), evidence="x"))])
    assert [node.marker.index for node in store.nodes(RUN, unsettled=True)] == [1, 2]


def test_find(store: Store) -> None:
    assert store.find(None) is None
    for seconds, (run, name) in enumerate(
        [("demo-aaaa", "demo"), ("demo-ab00", "demo"), ("other-0001", "other")]
    ):
        _create(store, run, name, seconds)
    assert store.find("demo-aaaa") == "demo-aaaa"
    assert store.find("demo") == "demo-ab00"
    assert store.find("demo-aa") == "demo-aaaa"
    assert store.find("nothing") is None
    with pytest.raises(LookupError, match="demo-ab00, demo-aaaa"):
        store.find("demo-a")
    assert store.find(None) == "other-0001"
    store.commit([("run:other-0001", e.RunEnded(at=at(9), outcome="failed", reason="x"))])
    assert store.find(None) == "demo-ab00"


def test_notes_and_the_owner_stay(store: Store) -> None:
    store.remember("microbatch", {"x": 4})
    again = Store(store.home)
    assert again.note("microbatch") == {"x": 4}
    assert again.note("nothing") is None
    assert again.owner == store.owner
    assert len(store.owner) == 16


def test_launches_that_others_gave_up_are_watched_for_a_day(store: Store) -> None:
    story = Story().begun().intended().after(70)
    store.commit(story.tell(e.LaunchAbandoned(at=story.now)).changes)

    def seen(since: float, beside: str = "next-0001") -> list[str]:
        return [node.key for node in store.given_up("sim", at(since), beside=beside)]

    assert seen(0) == [KEY]
    assert seen(1) == []  # intended longer ago
    assert seen(0, RUN) == []
    assert store.given_up("other", at(0), beside="next-0001") == ()
    story.changes.clear()
    story.tell(e.LaunchFound(at=story.now, id="i-10")).tell(
        e.TerminateIntended(at=story.now, reason="late arrival")
    )
    store.commit(story.changes)
    assert seen(1) == [KEY]  # until its end is confirmed, however old it is
    story.changes.clear()
    store.commit(story.gone().changes)
    assert seen(0) == []


def test_what_a_driver_asks_at_each_step_reads_no_whole_table(store: Store) -> None:
    """Ten thousand nodes that ended long ago cost a driver nothing."""
    store.commit(Story().begun().launched().changes)
    asked: list[str] = []
    driver = Store(store.home)
    driver._db.set_trace_callback(asked.append)
    driver.given_up("sim", at(0), beside="next-0001")
    driver.record(RUN)
    driver.nodes(unsettled=True)
    driver.concerning()
    driver._db.set_trace_callback(None)
    questions = [sql for sql in asked if sql.startswith("SELECT")]
    plans = [row["detail"] for sql in questions for row in store._db.execute(f"EXPLAIN QUERY PLAN {sql}")]
    assert len(questions) >= 4 and not [step for step in plans if step.startswith("SCAN")], plans


def test_the_bill_of_a_run_that_was_forgotten_stays(store: Store) -> None:
    store.commit(Story().begun().launched().changes)
    store.forget(RUN)
    assert store.find(RUN) is None
    assert store.events(e.node_stream(KEY))


def test_a_store_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught:
        Store(tmp_path / "file")
    assert "LLMCTL_HOME" in caught.value.hint
    (tmp_path / "llmctl.db").write_text("this is no database" * 100)
    with pytest.raises(StoreError, match="cannot use the store"):
        Store(tmp_path)


def test_a_full_disk_is_an_error_and_not_the_end(store: Store) -> None:
    _create(store, "a-0001")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    big = e.EvaluationRecorded(at=at(1), name="x", result={"text": "x" * 100_000})
    with pytest.raises(StoreError, match="full"):
        store.commit([("run:a-0001", big)])
    store._db.execute("PRAGMA max_page_count=1000000")
    store.commit([("run:a-0001", big)])
    assert len(store.record("a-0001").evaluations) == 1  # type: ignore[union-attr]


def test_a_driver_writes_through_to_the_disk(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from runs import events as e
        from runs.store import Store, utcnow
        store = Store(Path(sys.argv[1]), synchronous="OFF")
        for number in range(40):
            store.commit([("run:a-0001", e.EvaluationRecorded(at=utcnow(), name=f"{sys.argv[2]}-{number}", result={}))])
    """)
    _create(Store(tmp_path), "a-0001")
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name])
        for name in ("one", "two", "three")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    store = Store(tmp_path)
    record = store.record("a-0001")
    assert record is not None
    assert len(record.evaluations) == 120
    assert len(store.events("run:a-0001")) == 121


def test_summaries_need_no_model(store: Store) -> None:
    store.commit(Story().begun().launched().ready().changes)
    with sqlite3.connect(store.path) as raw:
        row = json.loads(raw.execute("SELECT summary FROM runs").fetchone()[0])
    assert row == store.summary(RUN) == store.summaries()[0] == store.concerning()[0]
    assert row["nodes"][0]["billing_from"] == at(0).timestamp()


@pytest.mark.parametrize("lost", ["record", "summary", "keys", "events"])
def test_a_run_whose_rows_are_broken_keeps_nobody_from_the_others(tmp_path: Path, lost: str) -> None:
    """Rows are made anew from the events; where those are broken too, the run is shown by its name, with gaps."""
    import sqlite3

    from runs.rows import status_document
    from runs.store import StoreError
    from tests.seeds import Seed

    seed = Seed(tmp_path, "demo-0001").finished()
    Seed(tmp_path, "whole-0002").finished().store.close()
    before = seed.store.summary("demo-0001")
    seed.store.close()
    broken = {"record": "record = '{not'", "summary": "summary = '{not'", "keys": "summary = '{\"run\": 3}'"}
    with sqlite3.connect(tmp_path / "llmctl.db") as db:
        for change in broken.values() if lost == "events" else [broken[lost]]:
            db.execute(f"UPDATE runs SET {change} WHERE run = 'demo-0001'")
        if lost == "events":
            db.execute("UPDATE events SET body = '{not' WHERE stream = 'run:demo-0001'")
    store = Store(tmp_path)
    found = {row["run"]: row for row in store.summaries()}
    assert set(found) == {"demo-0001", "whole-0002"} and found["whole-0002"]["micro_usd"] == 2_520_000
    shown = status_document(found["demo-0001"], driver_alive=False)
    assert shown["run"] == "demo-0001" and shown["cost_usd"] == (None if lost == "events" else 2.52)
    if lost == "events":
        assert (found["demo-0001"]["state"], found["demo-0001"]["micro_usd"]) == ("unreadable", None)
        with pytest.raises(StoreError, match="neither can its events"):
            store.record("demo-0001")
    else:
        assert found["demo-0001"]["micro_usd"] == before["micro_usd"] == 2_520_000  # type: ignore[index]
        assert store.record("demo-0001").state == "succeeded"  # type: ignore[union-attr]
    assert "whole-0002" in store.specs(list(found))
