"""Fetch files over HTTPS, many ranges at once: `python -m trainer pull --manifest pull.json`, or this file alone.

The manifest is {"files": [{"url", "path", …}]}, and each file may say
    bytes         the size of the finished file; its absence leaves the check to the server's own figure
    sha256        of the finished file
    span          [start, end): take these bytes of the URL only
    header        hex; written in front, with zeros up to `header_bytes`: a part of a shard becomes a shard
    headers       HTTP headers; never sent to another host when the server redirects
    bearer_env    the environment variable with a token, sent like the headers

Files are published by rename, whole and verified, in the order of the manifest. A fetch that broke goes on where it was: what
has arrived is in PATH.part, which ranges those are in PATH.part.json. Without a sha256 a file is
verified by its length, and by the ETag that every range must come with. Says what it does in JSON lines on
stdout; exits 0, or 7 when something could not be fetched or verified, 3 when the manifest cannot be read. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import random
import shutil
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHUNK_BYTES = 16 * 1024 * 1024
BLOCK_BYTES = 256 * 1024
WORKERS = 16
FILES_AT_ONCE = 4
TRIES = 6
"""Attempts in a row that bring no byte; a range that moves forward is not counted against it."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 20.0
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class PullError(Exception):
    """A file that cannot be had; the message says which and why."""


class _Broken(Exception):
    """An exchange that failed and may succeed next time; `pause`: seconds that the server asked for."""

    def __init__(self, message: str, pause: float = 0) -> None:
        super().__init__(message)
        self.pause = pause


class _GivenUp(PullError):
    """Stopped because something else failed."""


class _NoRanges(Exception):
    """The server sent the whole file instead of the range."""


class _Changed(Exception):
    """The file at the URL is not the one that the other ranges came from."""


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps what identifies us from other hosts."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:  # noqa: PLR0917
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and _host(newurl) != _host(req.full_url):
            new.headers = {name: value for name, value in new.headers.items() if name == "Range"}
        return new


_OPENER = urllib.request.build_opener(_SameHost)


@dataclass
class Item:
    """One file on its way."""

    url: str
    path: Path
    size: int | None = None
    sha256: str | None = None
    header: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    direct: str | None = None
    """Where the server redirected to; asked until it refuses."""
    etag: str | None = None
    start: int = 0
    end: int | None = None
    """Bytes of the URL to take; None: to the end, wherever that is."""
    spanned: bool = False
    """start and end are the manifest's."""
    ranged: bool = True
    done: set[int] = field(default_factory=set)
    """Ranges that have arrived."""
    verified: bool = False
    broken: threading.Event = field(default_factory=threading.Event)
    """One range has failed for good: the others may stop."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def part(self) -> Path:
        """Where it is gathered."""
        return self.path.with_name(self.path.name + ".part")

    @property
    def notes(self) -> Path:
        """Which of its ranges have arrived."""
        return self.path.with_name(self.path.name + ".part.json")


def read_manifest(path: Path) -> list[Item]:
    """The files of a manifest. Raises PullError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return [_item(entry) for entry in (raw["files"] if isinstance(raw, dict) else raw)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PullError(f"{path}: no manifest ({type(error).__name__}: {error})") from error


def _item(entry: dict[str, Any]) -> Item:
    if urllib.parse.urlsplit(entry["url"]).scheme not in {"http", "https"}:
        raise ValueError(f"not an HTTP address: {_plain(entry['url'])}")
    headers = dict(entry.get("headers") or {})
    token = os.environ.get(entry.get("bearer_env") or "")
    if token:
        headers["Authorization"] = f"Bearer {token}"
    header = bytes.fromhex(entry.get("header") or "").ljust(int(entry.get("header_bytes") or 0), b"\0")
    item = Item(
        str(entry["url"]), Path(entry["path"]), entry.get("bytes"), entry.get("sha256"), header, headers
    )
    if span := entry.get("span"):
        item.start, item.end, item.spanned = int(span[0]), int(span[1]), True
    return item


class Pull:
    """All files of one manifest."""

    def __init__(
        self, items: Sequence[Item], workers: int, chunk_bytes: int, timeout: float, tell: Callable[..., None]
    ) -> None:  # fmt: skip
        self.items, self._tell = items, tell
        self._chunk, self._timeout = chunk_bytes, timeout
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="range")
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._failure: str | None = None
        self._fetched = 0
        self._started = time.monotonic()

    def run(self) -> int:
        """Fetch everything; the exit code."""
        threading.Thread(target=self._report, daemon=True).start()
        published = 0
        with contextlib.ExitStack() as locks:
            for folder in sorted({item.path.parent for item in self.items}):
                folder.mkdir(parents=True, exist_ok=True)
                guard = locks.enter_context((folder / ".pull.lock").open("w"))
                fcntl.flock(
                    guard, fcntl.LOCK_EX
                )  # an earlier pull, whose connection was lost, may still be at it
            with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="file") as files:
                pending = [files.submit(self._fetch, item) for item in self.items]
                for item, future in zip(self.items, pending):  # noqa: B905 - of one length by construction
                    if future.result():
                        self._publish(item)
                        published += 1
        self._pool.shutdown()
        self._over.set()
        if self._failure is not None:
            self._tell(kind="failed", error=self._failure)
        self._tell(kind="end", published=published, fetched_bytes=self._fetched, seconds=self._seconds())
        return 0 if self._failure is None else 7

    def _publish(self, item: Item) -> None:
        if item.verified:
            item.part.replace(item.path)
        item.part.unlink(missing_ok=True)
        item.notes.unlink(missing_ok=True)
        self._tell(kind="published", path=str(item.path), bytes=item.path.stat().st_size)

    def _fetch(self, item: Item) -> bool:
        """Gather one file in its part and verify it. False where it or an earlier one failed."""
        try:
            if self._failure is None:
                self._fetch_once(item)
        except (PullError, OSError) as error:
            with self._lock:
                self._failure = self._failure or _words(error)
        return self._failure is None

    def _fetch_once(self, item: Item) -> None:
        if item.path.exists() and item.size in (None, item.path.stat().st_size):
            return
        for last in (False, True):
            try:
                self._gather(item)
                return
            except _Changed as error:  # once more, from the first byte
                item.part.unlink(missing_ok=True)
                item.notes.unlink(missing_ok=True)
                if last:
                    raise PullError(f"{item.path}: {_plain(item.url)}: {error}") from error

    def _gather(self, item: Item) -> None:
        """The whole part, verified. Raises PullError, _Changed."""
        item.broken.clear()
        self._retry(item, lambda: self._look(item))
        if item.end is not None:
            need = item.end - item.start - (item.part.stat().st_blocks * 512 if item.part.exists() else 0)
            if shutil.disk_usage(item.path.parent).free < need:
                raise PullError(f"{item.path}: the disk has no room for {need} more bytes")
        try:
            if not item.ranged or item.end is None:
                raise _NoRanges
            self._ranges(item, item.end)
        except _NoRanges:
            item.broken.clear()
            self._retry(item, lambda: self._stream(item))
        self._verify(item)
        item.verified = True

    def _look(self, item: Item) -> None:
        """Ask for one byte: tells where the file is, how long, its ETag, and whether ranges work."""
        with self._open(item, item.start, item.start + 1) as answer:
            item.etag, item.ranged = answer.headers.get("ETag"), answer.status == 206
            total = _total(answer)
        if not item.spanned:
            item.end = total
        elif total is not None and total < (item.end or 0):
            raise PullError(f"{item.path}: {_plain(item.url)} has only {total} bytes, not {item.end}")

    def _ranges(self, item: Item, end: int) -> None:
        """All ranges that have not arrived yet, side by side."""
        key = [_plain(item.url), item.etag, item.start, end, self._chunk, len(item.header)]
        known = _read_notes(item)
        if known.get("key") == key and item.part.exists():
            item.done = set(known["done"])
        else:
            item.done = set()
            item.part.write_bytes(item.header)
        with item.part.open("r+b") as file:
            file.truncate(len(item.header) + end - item.start)
            chunks = range(-(-(end - item.start) // self._chunk))
            missing = [index for index in chunks if index not in item.done]
            futures = [self._pool.submit(self._range, item, i, end, file.fileno(), key) for i in missing]
            problems = [
                future.exception() for future in futures
            ]  # waits for all: the file stays open for them
            os.fsync(file.fileno())
        ranked = sorted(filter(None, problems), key=lambda error: isinstance(error, _GivenUp))
        if ranked:
            raise ranked[0]

    def _range(self, item: Item, index: int, end: int, descriptor: int, key: list[Any]) -> None:
        """One range, continued where it broke."""
        at = item.start + index * self._chunk
        end = min(at + self._chunk, end)
        failures = 0
        try:
            while at < end:
                before = at
                try:
                    for block in self._part_of(item, at, end):
                        os.pwrite(descriptor, block, len(item.header) + at - item.start)
                        at += len(block)
                except _Broken as error:
                    failures = 1 if at > before else failures + 1
                    if failures >= TRIES:
                        raise PullError(f"{item.path}: {_plain(item.url)}: {error}, {TRIES} times") from error
                    _pause(failures, error)
        except BaseException:
            item.broken.set()
            raise
        with item.lock:
            item.done.add(index)
            temporary = item.notes.with_name(item.notes.name + ".new")
            temporary.write_text(json.dumps({"key": key, "done": sorted(item.done)}), encoding="utf-8")
            temporary.replace(item.notes)

    def _part_of(self, item: Item, at: int, end: int) -> Iterator[bytes]:
        with self._open(item, at, end) as answer:
            if answer.status != 206:
                raise _NoRanges
            if answer.headers.get("ETag") != item.etag:
                raise _Changed("changed while it was fetched")
            for block in self._blocks(item, answer, end - at):
                at += len(block)
                yield block
        if at < end:
            raise _Broken("the connection ended early")

    def _stream(self, item: Item) -> None:
        """From the first byte on, for servers that know no ranges; begins anew where it breaks."""
        with self._open(item, None, None) as answer, item.part.open("wb") as file:
            file.write(item.header)
            at = 0
            for block in self._blocks(item, answer, sys.maxsize if item.end is None else item.end):
                file.write(block[max(0, item.start - at) :])
                at += len(block)
            expected = _total(answer) if item.end is None else item.end
        if expected is not None and at < expected:
            raise _Broken("the connection ended early")

    def _blocks(self, item: Item, answer: Any, count: int) -> Iterator[bytes]:
        """The body up to `count` bytes, as it comes."""
        while count > 0 and (block := answer.read(min(BLOCK_BYTES, count))):
            if self._failure is not None or item.broken.is_set():
                raise _GivenUp(f"{item.path}: given up, since another part failed")
            count -= len(block)
            with self._lock:
                self._fetched += len(block)
            yield block

    def _retry(self, item: Item, action: Callable[[], None]) -> None:
        """TRIES turns with growing pauses. Raises PullError."""
        for failures in range(1, TRIES + 1):
            try:
                action()
                return
            except _Broken as error:
                if failures == TRIES:
                    raise PullError(f"{item.path}: {_plain(item.url)}: {error}, {TRIES} times") from error
                _pause(failures, error)

    @contextlib.contextmanager
    def _open(self, item: Item, start: int | None, end: int | None) -> Iterator[Any]:
        """A response to read from. Raises _Broken for what may pass, PullError for what will not."""
        direct = item.direct
        headers = {} if direct and _host(direct) != _host(item.url) else dict(item.headers)
        if start is not None and end is not None:
            headers["Range"] = f"bytes={start}-{end - 1}"
        request = urllib.request.Request(direct or item.url, headers=headers)  # noqa: S310 - http(s) only, see _item
        try:
            with _OPENER.open(request, timeout=self._timeout) as answer:
                if direct is None and answer.geturl() != item.url:
                    item.direct = answer.geturl()
                yield answer
        except urllib.error.HTTPError as error:
            error.close()
            if direct is not None and error.code in (401, 403, 404, 410):
                item.direct = None  # its signature has run out: the server gives another
                raise _Broken(f"HTTP {error.code}") from error
            if error.code in _PASSING:
                raise _Broken(f"HTTP {error.code}", _retry_after(error)) from error
            why = "; a signed address may have expired" if error.code in (401, 403) else ""
            raise PullError(f"{item.path}: HTTP {error.code} from {_plain(item.url)}{why}") from error
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
            ssl.SSLError,
        ) as error:
            raise _Broken(str(getattr(error, "reason", error)) or type(error).__name__) from error

    def _verify(self, item: Item) -> None:
        """Length, and hash where there is one. Raises _Changed."""
        size = item.part.stat().st_size
        if item.size is not None and size != item.size:
            raise _Changed(f"{size} bytes came, {item.size} were expected")
        if item.sha256 is not None:
            digest = hashlib.sha256()
            with item.part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != item.sha256:
                raise _Changed(
                    f"the SHA-256 of what came is {digest.hexdigest()[:16]}…, {item.sha256[:16]}… was expected"
                )

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def _report(self) -> None:
        while not self._over.wait(1):
            total = sum(item.size or 0 for item in self.items) or None
            self._tell(
                kind="progress", fetched_bytes=self._fetched, total_bytes=total, seconds=self._seconds()
            )


def _pause(failures: int, error: _Broken) -> None:
    """Wait longer after each failure, and as long as the server asked."""
    time.sleep(min(LONGEST_PAUSE, max(error.pause, FIRST_PAUSE * 2**failures * random.uniform(0.5, 1.5))))  # noqa: S311 - jitter


def _retry_after(error: urllib.error.HTTPError) -> float:
    text = error.headers.get("Retry-After") or ""
    return float(text) if text.isdigit() else 0


def _total(answer: Any) -> int | None:
    """The length of the whole file, as far as the server tells."""
    text = (
        answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status == 206
        else answer.headers.get("Content-Length")
    )
    return int(text) if text and text.isdigit() else None


def _read_notes(item: Item) -> dict[str, Any]:
    try:
        notes = json.loads(item.notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _words(error: PullError | OSError) -> str:
    return (
        f"{error.filename or 'the disk'}: {error.strerror or error}"
        if isinstance(error, OSError)
        else str(error)
    )


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc


def _plain(url: str) -> str:
    """Without the query, where signed addresses keep their signature."""
    return url.partition("?")[0]


def tell(**values: Any) -> None:
    """A JSON line on stdout, an error on stderr too; nobody listening is no reason to stop."""
    with contextlib.suppress(OSError):
        if "error" in values:
            os.write(2, f"pull: {values['error']}\n".encode())
        os.write(1, (json.dumps(values) + "\n").encode())


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="pull", description="Fetch files over HTTPS, many ranges at once.")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=WORKERS, help="ranges at once")
    parser.add_argument("--chunk-bytes", type=int, default=CHUNK_BYTES, help="bytes of a range")
    parser.add_argument(
        "--timeout",
        type=float,
        default=30,
        help="seconds without a byte after which a connection is given up",
    )
    options = parser.parse_args(argv)
    try:
        items = read_manifest(options.manifest)
    except PullError as error:
        os.write(2, f"pull: {error}\n".encode())
        return 3
    return Pull(items, options.workers, options.chunk_bytes, options.timeout, tell).run()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
