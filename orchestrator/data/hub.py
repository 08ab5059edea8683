"""Files that others publish: names and revisions on the Hugging Face Hub, and byte ranges of any HTTPS file.

`hf://owner/name[@revision]/file` names a file of a *dataset* repository, which is where token shards are published;
`hf://models/owner/name/file` one of a model repository. HF_ENDPOINT and HF_TOKEN mean what they mean to
huggingface_hub; the API used is the Hub's `GET /api/datasets/{repo}/revision/{revision}?blobs=true`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from orchestrator.data.errors import DataError, Offline

_NAME = re.compile(
    r"hf://(?:(?P<kind>datasets|models)/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>.+)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
TRIES = 3


@dataclass(frozen=True)
class HubName:
    """The parts of an hf:// source."""

    kind: str
    """datasets | models"""
    repo: str
    revision: str | None
    file: str
    """A path in the repository; it may be a glob."""

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @classmethod
    def parse(cls, source: str) -> HubName:
        """Raises DataError."""
        match = _NAME.fullmatch(source)
        if match is None:
            hint = "Write hf://owner/name/file, as in hf://kjj0/fineweb10B-gpt2/fineweb_val_000000.bin; @COMMIT after the name pins it"
            raise DataError(f"{source} names no file on the Hub", hint)
        return cls(match["kind"] or "datasets", match["repo"], match["revision"], match["file"])


@dataclass(frozen=True)
class HubFile:
    """A published file; `sha256` is known for large ones (LFS)."""

    bytes: int | None
    sha256: str | None = None


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    commit: str
    files: Mapping[str, HubFile] = field(default_factory=dict)


class Hub(Protocol):
    """What `sources` needs of the Hub; tests have their own."""

    def listing(self, name: HubName) -> Listing:
        """Raises Offline, or DataError where there is no such repository or revision, or no right to see it."""

    def url(self, name: HubName, commit: str, file: str) -> str:
        """Where the file is downloaded from."""

    def read(self, url: str, start: int, count: int) -> bytes:
        """Up to `count` bytes of a file from `start` on. Raises DataError, Offline."""


class HttpHub:
    """The Hub over HTTPS; what it says of a pinned commit is remembered under `cache`."""

    def __init__(self, cache: Path) -> None:
        self._endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self._cache = cache

    def listing(self, name: HubName) -> Listing:
        """See Hub."""
        place = self._cache / f"{name.kind}-{name.repo.replace('/', '-')}-{name.revision}.json"
        if name.pinned and place.exists():
            return _listing(json.loads(place.read_text(encoding="utf-8")))
        revision = quote(name.revision or "main", safe="")
        url = f"{self._endpoint}/api/{name.kind}/{name.repo}/revision/{revision}?blobs=true"
        try:
            raw = json.loads(_get(url, {}))
            listing = _listing(raw)
        except (ValueError, KeyError, TypeError) as error:
            raise Offline(f"{url}: the answer is no listing of a repository ({error})") from error
        self._cache.mkdir(parents=True, exist_ok=True)
        place = self._cache / f"{name.kind}-{name.repo.replace('/', '-')}-{listing.commit}.json"
        temporary = place.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"sha": raw["sha"], "siblings": raw["siblings"]}), encoding="utf-8")
        temporary.replace(place)
        return listing

    def url(self, name: HubName, commit: str, file: str) -> str:
        """See Hub."""
        prefix = "datasets/" if name.kind == "datasets" else ""
        return f"{self._endpoint}/{prefix}{name.repo}/resolve/{quote(commit, safe='')}/{quote(file)}"

    def read(self, url: str, start: int, count: int) -> bytes:
        """See Hub."""
        return read_range(url, start, count)


def _listing(raw: dict[str, Any]) -> Listing:
    files = {}
    for item in raw["siblings"]:
        lfs = item.get("lfs") or {}
        files[str(item["rfilename"])] = HubFile(lfs.get("size", item.get("size")), lfs.get("sha256"))
    return Listing(str(raw["sha"]), files)


def read_range(url: str, start: int, count: int) -> bytes:
    """Up to `count` bytes of an HTTPS file, also from a server that ignores ranges. Raises DataError, Offline."""
    return _get(url, {"Range": f"bytes={start}-{start + count - 1}"}, start, count)


def _get(url: str, headers: dict[str, str], start: int = 0, count: int | None = None) -> bytes:
    import httpx2

    from provisioning.retries import stamina

    token = os.environ.get("HF_TOKEN")
    if token and url.startswith(os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + "/"):
        headers = {**headers, "Authorization": f"Bearer {token}"}

    @stamina.retry(
        on=(httpx2.TransportError, _Busy), attempts=TRIES, timeout=60, wait_initial=0.5, wait_max=5
    )
    def once() -> bytes:
        with httpx2.stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=httpx2.Timeout(20, connect=5)
        ) as answer:
            if answer.status_code == 429 or answer.status_code >= 500:
                raise _Busy(f"HTTP {answer.status_code}")
            if answer.status_code >= 400:
                raise _refused(url, answer.status_code)
            skip = start if answer.status_code == 200 else 0
            body = bytearray()
            for block in answer.iter_bytes():
                body += block
                if count is not None and len(body) >= skip + count:
                    break
            return bytes(body[skip:] if count is None else body[skip : skip + count])

    try:
        return once()
    except (httpx2.TransportError, _Busy) as error:
        raise Offline(f"{_plain(url)} cannot be read: {str(error) or type(error).__name__}",
                      "Check the network; a source with @COMMIT whose listing was read once needs none") from error  # fmt: skip


class _Busy(Exception):
    """A 429 or 5xx answer."""


def _refused(url: str, status: int) -> DataError:
    if status in (401, 403):
        return DataError(f"{_plain(url)}: access refused (HTTP {status})",
                         "Set HF_TOKEN to a token that may read the repository, and list it under node.secrets; check the name as well")  # fmt: skip
    return DataError(
        f"{_plain(url)}: HTTP {status}", "Check owner, name, revision and file" if status == 404 else ""
    )


def _plain(url: str) -> str:
    """Without the query, where presigned URLs keep their signature."""
    return url.partition("?")[0]
