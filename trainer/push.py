"""Upload checkpoints from the node to S3 by presigned addresses: `python3 push.py --run DIR`, this file alone.

`push.json`, by the driver, which writes it anew while it lives:
    slots        [{"name", "index": URL, "parts": [URL, …], "step": null or what it holds}]
    part_bytes   bytes of a part, 256 MiB at the most
    keep         the newest checkpoints that must stay, besides the best
Each slot is a place for one checkpoint that can be written again and again. A checkpoint is the concatenation of its files in the
order of its manifest, cut into parts; the slot's index, written last, says which step it is, and each part's SHA-256. Before a
slot is written anew its index is emptied, so an index never speaks of other bytes than those beside it.

The newest checkpoint comes first, then the best. Every PUT carries its MD5, which S3 checks. An address that
has run out is waited for until the driver renews it. State is kept in `push-state.json`; the last word is in
`push-status.json`. One uploader a run directory; it ends when the supervisor has and nothing is left to upload. Standard library only.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import random
import shutil
import sys
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 1.0
BLOCK_BYTES = 1024 * 1024
TRIES = 6
TIMEOUT_SECONDS = 60.0
LAST_WORDS_SECONDS = 1800.0
"""How long a finished run's uploader goes on trying."""


class PushError(Exception):
    """An upload that failed for now; the message says why, and holds no address."""


class ExpiredError(PushError):
    """The addresses have run out."""


@dataclass(frozen=True)
class Bundle:
    """A checkpoint, kept by hard links for as long as it is read."""

    step: int
    folder: Path
    manifest: str
    sha256: str
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / name).stat().st_size for name in self.names)

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes [start, end) of all files behind one another."""
        at = 0
        for name in self.names:
            size = (self.folder / name).stat().st_size
            if at + size > start and at < end:
                with (self.folder / name).open("rb") as file:
                    file.seek(max(0, start - at))
                    left = min(end, at + size) - max(start, at)
                    while left and (block := file.read(min(BLOCK_BYTES, left))):
                        left -= len(block)
                        yield block
            at += size


def hold(run: Path, step_name: str) -> Bundle | None:
    """A checkpoint by hard links, so that the trainer's retention does not take it away; None where it is no longer there."""
    source, folder = run / "checkpoints" / step_name, run / ".push" / step_name
    try:
        text = (source / "manifest.json").read_text(encoding="utf-8")
        raw = json.loads(text)
        names = tuple(str(item["name"]) for item in raw["files"])
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in names:
            os.link(source / name, folder / name)
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Bundle(int(raw["step"]), folder, text, hashlib.sha256(text.encode()).hexdigest(), names)


def waiting(run: Path, held: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the checkpoints to upload: the newest, then the best, unless a slot has them as they are."""
    known = {(item.get("step"), item.get("sha256")) for item in held.values()}
    found = []
    for link in ("latest", "best"):
        path = run / "checkpoints" / link
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            name = str(path.readlink())
            text = (path.parent / name / "manifest.json").read_bytes()
            key = json.loads(text)["step"], hashlib.sha256(text).hexdigest()
            if key not in known and name not in found:
                found.append(name)
    return found


def victim(names: list[str], held: dict[str, dict[str, Any]], step: int, best: int | None, keep: int) -> str:
    """The slot to write: one of the same step, an empty one, else the oldest that retention lets go of."""
    steps = {name: held.get(name, {}).get("step") for name in names}
    for name in names:
        if steps[name] == step:
            return name
    for name in names:
        if steps[name] is None:
            return name
    newest = sorted((value for value in steps.values() if value is not None), reverse=True)[
        : max(0, keep - 1)
    ]
    free = [name for name in names if steps[name] not in newest and steps[name] != best] or names
    return min(free, key=lambda name: steps[name] or 0)


class Pusher:
    """The uploader of one run directory."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._renewed: tuple[int, ...] = ()
        self.plan: dict[str, Any] = {}
        self.held: dict[str, dict[str, Any]] = _json(run / "push-state.json")

    def work(self) -> int:
        """Until the run is over and everything is there. 0, or 1 when the last checkpoint could not be uploaded."""
        over_at: float | None = None
        failures = 0
        while self.run.is_dir():
            self._read_plan()
            names = waiting(self.run, self.held)
            over = _json(self.run / "supervisor.json").get("state") == "ended"
            over_at = (over_at or time.monotonic()) if over else None
            if not names:
                self._say("done" if over else "idle")
                if over:
                    return 0
            elif over_at is not None and time.monotonic() - over_at > LAST_WORDS_SECONDS:
                return 1
            for name in names[:1]:
                try:
                    self._upload(name)
                    failures = 0
                except (PushError, OSError) as error:
                    failures += 1
                    self._say("expired" if isinstance(error, ExpiredError) else "failing", str(error))
                    time.sleep(min(30.0, 2.0**failures * random.uniform(0.5, 1.0)))  # noqa: S311 - jitter
            if not names:
                time.sleep(POLL_SECONDS)
        return 0

    def _read_plan(self) -> None:
        path = self.run / "push.json"
        with contextlib.suppress(OSError):
            info = path.stat()
            seen = (info.st_mtime_ns, info.st_ino)
            if seen != self._renewed:
                self.plan, self._renewed = _json(path), seen
                for slot in self.plan.get("slots", ()):
                    if slot["name"] not in self.held and slot.get("step") is not None:
                        self.held[slot["name"]] = {"step": slot["step"], "sha256": slot.get("sha256")}

    def _upload(self, name: str) -> None:
        """One checkpoint into one slot. Raises PushError, OSError."""
        if not self.plan.get("slots"):
            raise PushError("there are no addresses yet")
        bundle = hold(self.run, name)
        if bundle is None:
            raise PushError(f"{name} is no longer whole here")
        try:
            self._say("uploading", f"step {bundle.step}")
            slots = {slot["name"]: slot for slot in self.plan["slots"]}
            best = _step(self.run / "checkpoints" / "best")
            chosen = victim(list(slots), self.held, bundle.step, best, int(self.plan["keep"]))
            self._fill(slots[chosen], chosen, bundle)
        finally:
            shutil.rmtree(bundle.folder, ignore_errors=True)

    def _fill(self, slot: dict[str, Any], name: str, bundle: Bundle) -> None:
        width, size = int(self.plan["part_bytes"]), bundle.size
        count = -(-size // width)
        if count > len(slot["parts"]):
            raise PushError(
                f"step {bundle.step} has {size} bytes, more than the {len(slot['parts'])} parts there are addresses for"
            )
        self.held.pop(name, None)
        self._keep()
        put(slot["index"], b'{"step": null}')
        parts = []
        for index in range(count):
            start, end = index * width, min(size, (index + 1) * width)
            parts.append({"bytes": end - start, "sha256": put_part(slot["parts"][index], bundle, start, end)})
        body = {
            "step": bundle.step,
            "sha256": bundle.sha256,
            "manifest": bundle.manifest,
            "parts": parts,
            "time": time.time(),
        }
        put(slot["index"], json.dumps(body).encode())
        self.held[name] = {"step": bundle.step, "sha256": bundle.sha256}
        self._keep()

    def _keep(self) -> None:
        _write(self.run / "push-state.json", self.held)

    def _say(self, state: str, detail: str = "") -> None:
        steps = sorted(item["step"] for item in self.held.values() if item.get("step") is not None)
        with contextlib.suppress(OSError):
            _write(
                self.run / "push-status.json",
                {"state": state, "detail": detail, "steps": steps, "time": time.time()},
            )


def put(url: str, data: bytes) -> None:
    """One small object. Raises PushError."""
    _tried(lambda: _send(url, [data], len(data), hashlib.md5(data, usedforsecurity=False).digest()))


def put_part(url: str, bundle: Bundle, start: int, end: int) -> str:
    """The bytes [start, end) of a bundle; their SHA-256. Read twice: the MD5 goes ahead of them. Raises PushError, OSError."""
    digest, check = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    for block in bundle.read(start, end):
        digest.update(block)
        check.update(block)
    _tried(lambda: _send(url, bundle.read(start, end), end - start, check.digest()))
    return digest.hexdigest()


def _tried(action: Any) -> None:
    for failures in range(1, TRIES + 1):
        try:
            action()
            return
        except ExpiredError:
            raise
        except PushError:
            if failures == TRIES:
                raise
            time.sleep(min(20.0, 0.1 * 2**failures * random.uniform(0.5, 1.5)))  # noqa: S311 - jitter


def _send(url: str, blocks: Any, size: int, md5: bytes) -> None:
    """PUT. Raises ExpiredError for an address that no longer serves, PushError for what may pass."""
    where = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    connection = kind(where.hostname or "", where.port, timeout=TIMEOUT_SECONDS)
    headers = {"Content-Length": str(size), "Content-MD5": base64.b64encode(md5).decode()}
    try:
        connection.request("PUT", f"{where.path}?{where.query}", body=iter(blocks), headers=headers)
        answer = connection.getresponse()
        body = answer.read(4096)
        etag = (answer.headers.get("ETag") or "").strip('"')
    except (OSError, http.client.HTTPException) as error:
        raise PushError(f"PUT {where.path}: {type(error).__name__}: {error}") from None
    finally:
        connection.close()
    if answer.status in (401, 403):
        raise ExpiredError(f"PUT {where.path}: HTTP {answer.status}; a signed address may have expired")
    if answer.status != 200:
        raise PushError(f"PUT {where.path}: HTTP {answer.status} {body[:200].decode(errors='replace')}")
    # Plain objects have their MD5 as ETag, encrypted ones have not: then S3's own check of Content-MD5 stands alone.
    if (
        len(etag) == 32
        and etag != md5.hex()
        and "x-amz-server-side-encryption" not in {key.lower() for key in answer.headers}
    ):
        raise PushError(f"PUT {where.path}: other bytes arrived than were sent")


def _step(link: Path) -> int | None:
    try:
        return int(str(link.readlink()).rpartition("-")[2])
    except (OSError, ValueError):
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def main(argv: list[str]) -> int:
    """The command line; returns the exit code. 0 also where another uploader is at work."""
    parser = argparse.ArgumentParser(
        prog="push", description="Upload a run's checkpoints by presigned addresses."
    )
    parser.add_argument("--run", type=Path, required=True, help="the run directory")
    run = parser.parse_args(argv).run.resolve()
    descriptor = os.open(run / "push.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    return Pusher(run).work()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
