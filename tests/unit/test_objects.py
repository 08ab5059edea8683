# ruff: noqa: F811 - fixtures are imported by name
"""S3 over HTTP with real bytes: signed addresses, uploads in parts, `data push`, and checkpoints pushed by the node's own uploader."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from orchestrator.data import buckets, sources
from orchestrator.data import prepare as data
from orchestrator.data import push as data_push
from orchestrator.data.errors import DataError
from orchestrator.errors import Invalid
from orchestrator.site import collect, pushed
from provisioning import objects
from provisioning.base import CredentialsError, InvalidHardware, Refused
from provisioning.objects import S3, etag_of
from tests.aws_server import AwsServer, aws, aws_factory  # noqa: F401
from trainer import manifest, push
from trainer import pull as ranges
from trainer.config import CheckpointConfig, DataConfig, ModelConfig, TrainConfig, TrainerConfig

PART = 5 * 2**20
"""The least that S3 takes as a part."""
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def store(aws: AwsServer) -> S3:
    aws.client("s3").create_bucket(Bucket="bucket")
    return S3()


def test_addresses_are_signed_with_version_4_for_the_bucket_and_expire(aws: AwsServer, store: S3) -> None:
    query = parse_qs(urlsplit(store.presign_get("s3://bucket/a/b", 60)).query)
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"] and query["X-Amz-Expires"] == ["60"]
    assert query["X-Amz-Credential"][0].split("/")[2:4] == ["us-east-1", "s3"]
    longest = parse_qs(urlsplit(store.presign_put("s3://bucket/a", 10**9)).query)
    assert longest["X-Amz-Expires"] == [str(7 * 86_400)]


def test_list_read_write_delete(store: S3) -> None:
    for name in ("a/1", "a/2", "b/1"):
        store.write(f"s3://bucket/{name}", name.encode())
    assert [(item.key, item.bytes) for item in store.list("s3://bucket/a/")] == [
        ("s3://bucket/a/1", 3),
        ("s3://bucket/a/2", 3),
    ]
    assert store.read("s3://bucket/b/1") == b"b/1"
    store.delete("s3://bucket/b/1")
    store.delete("s3://bucket/b/1")
    with pytest.raises(Refused) as error:
        store.read("s3://bucket/b/1")
    assert error.value.code == "NoSuchKey"


def test_buckets_that_are_not_there_or_not_ours(aws: AwsServer, store: S3) -> None:
    with pytest.raises(Refused) as missing:
        store.list("s3://no-such-bucket/x")
    assert missing.value.code == "NoSuchBucket" and "aws s3 mb" in missing.value.hint
    aws.fault("s3 HEAD /secret", "refuse", code="AccessDenied", status=403)
    with pytest.raises(CredentialsError) as forbidden:
        store.list("s3://secret/x")
    assert "iam-policy.json" in forbidden.value.hint
    with pytest.raises(InvalidHardware):
        store.list("s3:///x")


def test_an_upload_that_broke_goes_on_with_the_parts_that_are_missing(
    aws: AwsServer, store: S3, tmp_path: Path
) -> None:
    body = os.urandom(3 * PART + 1000)
    (tmp_path / "shard").write_bytes(body)
    aws.fault("s3 PUT /bucket/shard", "refuse", code="AccessDenied", status=403)
    with pytest.raises(CredentialsError):
        store.put(tmp_path / "shard", "s3://bucket/shard", part_bytes=PART)
    before = sum(row["bytes"] for row in aws.sent("s3 PUT /bucket/shard"))
    assert before >= 3 * PART
    aws.requests.clear()
    told: list[int] = []
    store.put(tmp_path / "shard", "s3://bucket/shard", told.append, PART)
    assert sum(row["bytes"] for row in aws.sent("s3 PUT /bucket/shard")) <= PART, (
        "only the part that failed is sent again"
    )
    assert sum(told) == len(body) and store.read("s3://bucket/shard") == body
    (found,) = store.list("s3://bucket/shard")
    assert found.etag == etag_of(tmp_path / "shard", PART)


def test_the_shipped_policy_allows_what_is_asked_of_a_bucket_and_no_more(
    aws: AwsServer, store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actions = {
        "head_bucket": "ListBucket", "list_objects_v2": "ListBucket", "get_object": "GetObject", "put_object": "PutObject",
        "delete_object": "DeleteObject", "create_multipart_upload": "PutObject", "upload_part": "PutObject",
        "complete_multipart_upload": "PutObject", "list_multipart_uploads": "ListBucketMultipartUploads",
        "list_parts": "ListMultipartUploadParts",
    }  # fmt: skip
    asked: set[str] = set()
    told = S3._told
    monkeypatch.setattr(S3, "_told", staticmethod(lambda client, operation, parameters: (
        asked.add(f"s3:{actions[operation]}") or told(client, operation, parameters))))  # fmt: skip
    (tmp_path / "shard").write_bytes(os.urandom(PART + 1000))
    for times in (1, 0):
        aws.fault("s3 PUT /bucket/shard", "refuse", times=times, code="AccessDenied", status=403)
        with pytest.raises(CredentialsError) if times else nullcontext():
            store.put(tmp_path / "shard", "s3://bucket/shard", part_bytes=PART)
    store.write("s3://bucket/x", store.read("s3://bucket/shard"))
    store.list("s3://bucket/")
    store.delete("s3://bucket/x")
    policy = json.loads((Path(objects.__file__).parent / "iam-policy.json").read_text())
    (statement,) = [item for item in policy["Statement"] if item["Sid"] == "LlmctlObjects"]
    assert set(statement["Action"]) == asked


def test_checkpoints_that_could_not_be_written_are_refused_before_anything_is_rented(
    aws: AwsServer, store: S3
) -> None:
    def check(place: str | None) -> None:
        train = TrainConfig(global_batch_size=1, steps=1)
        config = TrainerConfig(DataConfig(["x.bin"]), ModelConfig(), train, CheckpointConfig(push=place))
        buckets.check_push(config)

    check(None)
    check("s3://bucket/ckpt")
    assert store.list("s3://bucket/") == []
    with pytest.raises(Invalid, match="NoSuchBucket"):
        check("s3://no-such-bucket/ckpt")
    aws.fault("s3 PUT /bucket/ckpt", "refuse", code="AccessDenied", status=403)
    with pytest.raises(CredentialsError, match="AccessDenied"):
        check("s3://bucket/ckpt/")


@pytest.mark.parametrize("kind", ["truncate", "corrupt"])
def test_a_pull_survives_what_breaks_on_the_way(aws: AwsServer, store: S3, tmp_path: Path, kind: str) -> None:
    body = os.urandom(300_000)
    store.write("s3://bucket/x", body)
    aws.fault("s3 GET /bucket/x", kind, times=2)
    item = ranges.Item(
        store.presign_get("s3://bucket/x"), tmp_path / "x", len(body), hashlib.sha256(body).hexdigest()
    )
    assert ranges.Pull([item], 4, 100_000, 10.0, lambda **_: None).run() == 0
    assert (tmp_path / "x").read_bytes() == body


def test_an_address_that_has_run_out_says_so_and_a_new_one_goes_on(
    aws: AwsServer, store: S3, tmp_path: Path
) -> None:
    body = os.urandom(300_000)
    store.write("s3://bucket/x", body)
    url = store.presign_get("s3://bucket/x", 1)
    stale = url.replace(parse_qs(urlsplit(url).query)["X-Amz-Date"][0], "20200101T000000Z")
    told: list[Any] = []
    items = [ranges.Item(stale, tmp_path / "x", len(body))]
    assert ranges.Pull(items, 4, 100_000, 10.0, lambda **values: told.append(values)).run() == 7
    assert any("expired" in str(item.get("error")) and "X-Amz" not in str(item) for item in told)
    again = ranges.Item(store.presign_get("s3://bucket/x"), tmp_path / "x", len(body))
    assert ranges.Pull([again], 4, 100_000, 10.0, lambda **_: None).run() == 0


# ---------------------------------------------------------------- data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("of the making of many books there is no end\n" * 3000)
    (tmp_path / "more.txt").write_text("and much study is a weariness of the flesh\n" * 3000)
    recipe = data.Recipe("bytes", 50_000, 0.5)
    files = [str(tmp_path / name) for name in ("text.txt", "more.txt")]
    return data.prepare(files, tmp_path / "shards", recipe, cache=tmp_path / "cache").folder


def test_data_push_sends_what_has_changed_and_verify_reads_it_all(
    aws: AwsServer, store: S3, folder: Path
) -> None:
    first = data_push.push(folder, "s3://bucket/set/", store)
    assert first.uploaded and data_push.verify("s3://bucket/set", store) == []
    again = data_push.push(folder, "s3://bucket/set", store)
    assert again.uploaded == () and set(again.unchanged) == set(first.uploaded)
    victim = first.uploaded[0]
    store.write(f"s3://bucket/set/{victim}", b"\0" * (folder / victim).stat().st_size)
    assert data_push.verify("s3://bucket/set", store) == [
        f"s3://bucket/set/{victim} does not have the checksum of its manifest"
    ]
    store.delete("s3://bucket/set/shards.json")
    assert data_push.push(folder, "s3://bucket/set", store).uploaded == (victim,), (
        "without a manifest the ETags tell what is whole"
    )
    store.delete(f"s3://bucket/set/{victim}")
    assert data_push.verify("s3://bucket/set", store) == [f"s3://bucket/set/{victim} is not there"]
    with pytest.raises(DataError):
        data_push.verify("s3://bucket/nothing", store)


def test_s3_globs_become_shards_with_hashes_and_fresh_addresses(
    aws: AwsServer, store: S3, folder: Path, tmp_path: Path
) -> None:
    data_push.push(folder, "s3://bucket/set", store)
    config = DataConfig(
        ["s3://bucket/set/train_*.bin"], ["s3://bucket/set/validation_*.bin"], tokenizer="bytes"
    )
    plan = sources.resolve(config, cache=tmp_path / "cache2", needed_tokens=10_000, context_length=64, vocab_size=256,
                           validation_tokens=1000, objects=store)  # fmt: skip
    shard = plan.train[0]
    listed = {item.name: item for item in data.read(folder).shards}
    assert shard.sha256 == listed[Path(shard.url or "").name].sha256
    item = sources.pull_item(shard, "x", store)
    assert (
        item["sha256"] == shard.sha256
        and "X-Amz-Signature" in item["url"]
        and "X-Amz" not in json.dumps(dataclasses.asdict(shard), default=str)
    )
    with pytest.raises(DataError):
        sources.resolve(
            DataConfig(["s3://bucket/none*.bin"], tokenizer="bytes"),
            cache=tmp_path / "c",
            needed_tokens=1,
            objects=store,
        )


# ---------------------------------------------------------------- checkpoints


def a_run(keep: int = 2) -> Any:
    """What `pushed` asks of a record."""
    model = {"vocab_size": 64, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 1}
    spec = {"checkpoint": {"keep": keep, "push": "s3://bucket/ckpt/"}, "model": model}
    return SimpleNamespace(run="tiny-abcd", spec=spec, checkpoints={})


def checkpoint(run: Path, step: int, *, best: bool = False) -> dict[str, bytes]:
    """A checkpoint as the trainer leaves it."""
    folder = run / "checkpoints" / manifest.directory_name(step)
    folder.mkdir(parents=True)
    files = {
        "model.safetensors": os.urandom(70_000),
        "training_state.pt": os.urandom(150_000),
        "config.json": b"{}",
    }
    for name, body in files.items():
        (folder / name).write_bytes(body)
    listed = [
        {"name": name, "sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
        for name, body in files.items()
    ]
    (folder / "manifest.json").write_text(json.dumps({"step": step, "files": listed}))
    for link in ("latest", "best") if best else ("latest",):
        (run / "checkpoints" / link).unlink(missing_ok=True)
        (run / "checkpoints" / link).symlink_to(folder.name)
    return files


def plan(store: S3, run: Path, record: Any, part_bytes: int = 100_000) -> None:
    """push.json as the driver writes it, with small parts."""
    body = pushed.addresses(store, record, NOW + timedelta(hours=1), NOW)
    for slot in body["slots"]:
        place = f"s3://bucket/ckpt/{record.run}/{slot['name']}/"
        slot["parts"] = [store.presign_put(pushed.part(place, index)) for index in range(4)]
    (run / "push.json").write_text(json.dumps({**body, "part_bytes": part_bytes}))


def upload(run: Path) -> int:
    """The uploader of a run that has ended, as a process without anything in its environment."""
    (run / "supervisor.json").write_text('{"state": "ended"}')
    script = shutil.copy(push.__file__, run.parent / "push.py")  # alone, as it is on a node
    argv = [sys.executable, "-S", script, "--run", str(run)]
    return subprocess.run(argv, env={"PATH": "/usr/bin:/bin"}, check=False, timeout=120).returncode


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = tmp_path / "node" / "run"
    made.mkdir(parents=True)
    return made


def test_a_pushed_checkpoint_comes_back_whole(aws: AwsServer, store: S3, run: Path, tmp_path: Path) -> None:
    record, files = a_run(), checkpoint(run, 10)
    plan(store, run, record)
    assert upload(run) == 0
    (item,) = pushed.found(store, record)
    assert item.step == 10 and [part["bytes"] for part in item.parts] == [100_000, 100_000, 20_002]
    whole = pushed.fetch(store, item, tmp_path / "home")
    assert not whole.weights_only and {name: (whole.path / name).read_bytes() for name in files} == files
    aws.requests.clear()
    assert pushed.fetch(store, item, tmp_path / "home") == whole and aws.requests == [], (
        "what is here moves no bytes"
    )
    assert not (run / ".push" / "step-000010").exists()


def test_slots_are_used_again_and_keep_the_newest_and_the_best(store: S3, run: Path) -> None:
    record = a_run(keep=1)
    plan(store, run, record)
    for step in (1, 2, 3, 4, 5):
        checkpoint(run, step, best=step == 2)
        assert upload(run) == 0
    steps = [item.step for item in pushed.found(store, record)]
    assert len(steps) == 3 and {2, 5} <= set(steps), "keep + best + one in writing"
    assert json.loads((run / "push-status.json").read_text())["state"] == "done"


def test_another_node_goes_on_where_the_slots_are(store: S3, run: Path, tmp_path: Path) -> None:
    record = a_run(keep=1)
    plan(store, run, record)
    checkpoint(run, 7)
    assert upload(run) == 0
    other = tmp_path / "other"
    other.mkdir()
    plan(store, other, record)
    checkpoint(other, 8)
    assert upload(other) == 0
    assert [item.step for item in pushed.found(store, record)] == [7, 8], (
        "what the slots hold is told to the next node"
    )


def test_what_breaks_on_the_way_is_sent_again(aws: AwsServer, store: S3, run: Path) -> None:
    record = a_run()
    checkpoint(run, 10)
    plan(store, run, record)
    aws.fault("s3 PUT /bucket/ckpt/tiny-abcd/slot-0/part-00001", "lose-request")
    aws.fault("s3 PUT /bucket/ckpt/tiny-abcd/slot-0/part-00000", "refuse", code="SlowDown", status=503)
    aws.fault("s3 PUT /bucket/ckpt/tiny-abcd/slot-0/part-00002", "lose-answer")
    assert upload(run) == 0
    assert [item.step for item in pushed.found(store, record)] == [10]


def test_expired_addresses_are_waited_for_and_renewed(store: S3, run: Path) -> None:
    record = a_run()
    checkpoint(run, 10)
    plan(store, run, record)
    fresh = (run / "push.json").read_text()
    date = parse_qs(urlsplit(json.loads(fresh)["slots"][0]["index"]).query)["X-Amz-Date"][0]
    (run / "push.json").write_text(fresh.replace(date, "20200101T000000Z"))
    result: list[int] = []
    worker = threading.Thread(target=lambda: result.append(upload(run)))
    worker.start()
    deadline = time.monotonic() + 60
    while (
        json.loads(
            (run / "push-status.json").read_text() if (run / "push-status.json").exists() else "{}"
        ).get("state")
        != "expired"
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (run / "new").write_text(fresh)
    (run / "new").replace(run / "push.json")
    worker.join(90)
    assert result == [0] and [item.step for item in pushed.found(store, record)] == [10]


def test_a_slot_in_writing_or_damaged_is_no_checkpoint(
    aws: AwsServer, store: S3, run: Path, tmp_path: Path
) -> None:
    record = a_run()
    checkpoint(run, 10)
    plan(store, run, record)
    assert upload(run) == 0
    (item,) = pushed.found(store, record)
    store.write(pushed.part(item.slot, 1), b"x" * 100_000)
    with pytest.raises(collect.VerificationError):
        pushed.fetch(store, item, tmp_path / "home")
    assert not (tmp_path / "home" / "step-000010").exists()
    store.write(pushed.part(item.slot, 1), b"short")
    assert pushed.found(store, record) == []
    store.write(f"{item.slot}index.json", b'{"step": null}')
    assert pushed.found(store, record) == []


def test_the_addresses_are_for_the_runs_own_slots_and_die_with_the_lease(store: S3) -> None:
    body = pushed.addresses(store, a_run(), NOW + timedelta(hours=2), NOW)
    urls = [url for slot in body["slots"] for url in (slot["index"], *slot["parts"])]
    assert len(body["slots"]) == 4 and body["part_bytes"] <= 256 * 2**20
    for url in urls:
        assert urlsplit(url).path.startswith("/bucket/ckpt/tiny-abcd/slot-")
        assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == [str(3 * 3600)]


class Uploading:
    """A node whose uploader says `status`, and the clock of the driver beside it."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = {}
        self.at, self.plans, self.started = 0.0, 0, 0
        self.remote = self

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.at)

    def monotonic(self) -> float:
        return self.at

    def read(self, path: str) -> bytes:
        assert path.endswith("push-status.json")
        return json.dumps(self.status).encode()

    def write(self, path: str, data: bytes, mode: int) -> None:
        self.plans += path.endswith("push.json")

    def detach(self, argv: list[str], **_: object) -> None:
        self.started += 1


def test_addresses_are_signed_anew_in_time_and_at_once_where_they_died_and_a_failure_is_told_once(
    aws: AwsServer, store: S3
) -> None:
    record, node, told = a_run(), Uploading(), list[str]()
    record.attempt = SimpleNamespace(token="t", trainer_end=None)
    record.recent_attempts = (SimpleNamespace(started_at=NOW, keys=("k",)),)
    record.max_seconds = 7200.0
    renewer = pushed.Renewer(store, node, told.append)  # type: ignore[arg-type]

    def after(seconds: float, **status: str) -> int:
        node.at, node.status = node.at + seconds, dict(status)
        renewer.renew(record, node)  # type: ignore[arg-type]
        if renewer._thread is not None:
            renewer._thread.join()
        return node.plans

    assert after(0) == 1 and node.started == 1
    assert after(pushed.LOOK_SECONDS, state="uploading") == 1
    assert after(pushed.LOOK_SECONDS, state="expired", detail="PUT /x: HTTP 403") == 2
    assert after(pushed.LOOK_SECONDS, state="failing", detail="PUT /x: HTTP 500") == 2
    assert after(pushed.LOOK_SECONDS, state="failing", detail="PUT /x: HTTP 500") == 2
    assert after(pushed.LOOK_SECONDS, state="idle") == 2
    assert after(pushed.RENEW_SECONDS, state="idle") == 3
    aws.fault("s3 GET /bucket", "refuse", code="AccessDenied", status=403)
    after(pushed.RENEW_SECONDS, state="idle")
    assert [text.partition(": ")[2][:20] for text in told] == [
        "PUT /x: HTTP 403", "PUT /x: HTTP 500", "list_objects_v2 s3:/",
    ]  # fmt: skip
