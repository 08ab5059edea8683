"""The node's downloader against a server that breaks, lies and dawdles."""

import collections
import hashlib
import http.server
import json
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.data.shares import header
from trainer import pull, shards

CHUNK = 64 * 1024
BODY = random.Random(7).randbytes(1_000_000)
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY at every path; `tricks` maps a path to what goes wrong there."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.tricks = {}
        self.asked = []
        self.broken = collections.Counter()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        trick = self.server.tricks.get(self.path.partition("?")[0])
        span = self.headers.get("Range")
        self.server.asked.append(
            (self.path, span, self.headers.get("Authorization"), self.headers.get("Host"))
        )
        count = self.server.broken[self.path]
        self.server.broken[self.path] += 1
        if callable(trick):
            trick(self, span, count)
        else:
            self.serve(BODY, span)

    def serve(self, body, span, *, etag='"1"', cut=None, code=None):
        total = len(body)
        if span:
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", span).groups())
            body = body[start : end + 1]
            self.send_response(code or 206)
            self.send_header("Content-Range", f"bytes {start}-{min(end, total - 1)}/{total}")
        else:
            self.send_response(code or 200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def fail(self, code, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield one
        one.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(pull, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(pull, "LONGEST_PAUSE", 0.01)


def fetch(folder: Path, *files, timeout=10.0, **options) -> int:
    manifest = folder / "pull.json"
    manifest.write_text(json.dumps({"files": list(files)}))
    return pull.main(["--manifest", str(manifest), "--chunk-bytes", str(CHUNK), "--timeout", str(timeout)])


def item(server, folder, name="a.bin", **more):
    return {
        "url": f"{server.url}/{name}",
        "path": str(folder / "data" / name),
        "bytes": len(BODY),
        "sha256": DIGEST,
        **more,
    }


def told(capfd):
    captured = capfd.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "data").iterdir() if path.name != ".pull.lock")


def test_many_ranges_of_several_files_published_in_order(server, tmp_path, capfd):
    names = [f"{index}.bin" for index in range(6)]
    assert fetch(tmp_path, *(item(server, tmp_path, name) for name in names)) == 0
    assert leftovers(tmp_path) == names
    assert all((tmp_path / "data" / name).read_bytes() == BODY for name in names)
    lines, _ = told(capfd)
    assert [Path(line["path"]).name for line in lines if line["kind"] == "published"] == names
    assert lines[-1]["fetched_bytes"] >= 6 * len(BODY)
    assert len({span for path, span, *_ in server.asked if path == "/0.bin"}) == 1 + -(-len(BODY) // CHUNK)


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    assert fetch(tmp_path, item(server, tmp_path)) == 0
    before = len(server.asked)
    assert fetch(tmp_path, item(server, tmp_path)) == 0
    assert len(server.asked) == before


def test_a_file_of_the_wrong_length_is_fetched_again(server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(b"torn")
    (tmp_path / "data" / "a.bin.part").write_bytes(b"old")
    assert fetch(tmp_path, item(server, tmp_path)) == 0
    assert (tmp_path / "data" / "a.bin").read_bytes() == BODY


def test_ranges_that_break_in_the_middle_go_on_where_they_were(server, tmp_path):
    server.tricks["/a.bin"] = lambda handler, span, count: handler.serve(BODY, span, cut=40_000)
    assert fetch(tmp_path, item(server, tmp_path)) == 0
    assert (tmp_path / "data" / "a.bin").read_bytes() == BODY


def test_a_broken_fetch_resumes_with_what_is_missing(server, tmp_path, capfd):
    def half(handler, span, count):
        if span and int(span[6:].split("-")[0]) >= 500_000:
            handler.fail(404)
        else:
            handler.serve(BODY, span)

    server.tricks["/a.bin"] = half
    assert fetch(tmp_path, item(server, tmp_path)) == 7
    assert leftovers(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    assert "HTTP 404" in told(capfd)[1]
    done = set(json.loads((tmp_path / "data" / "a.bin.part.json").read_text())["done"])
    server.tricks.clear()
    server.asked.clear()
    assert fetch(tmp_path, item(server, tmp_path)) == 0
    assert (tmp_path / "data" / "a.bin").read_bytes() == BODY
    assert done
    assert not {f"bytes={index * CHUNK}-{(index + 1) * CHUNK - 1}" for index in done} & {
        span for _, span, *_ in server.asked
    }
    assert leftovers(tmp_path) == ["a.bin"]


def test_a_server_without_ranges_is_streamed(server, tmp_path):
    server.tricks["/a.bin"] = lambda handler, span, count: handler.serve(
        BODY, None, cut=300_000 if count == 1 else None
    )
    assert fetch(tmp_path, item(server, tmp_path)) == 0
    assert (tmp_path / "data" / "a.bin").read_bytes() == BODY
    middle = item(
        server, tmp_path, bytes=1000, sha256=None, span=[5000, 6000], path=str(tmp_path / "data" / "middle")
    )
    assert fetch(tmp_path, middle) == 0
    assert (tmp_path / "data" / "middle").read_bytes() == BODY[5000:6000]


def test_a_server_that_forgets_ranges_half_way_is_streamed(server, tmp_path):
    server.tricks["/a.bin"] = lambda handler, span, count: handler.serve(BODY, span if count < 3 else None)
    assert fetch(tmp_path, item(server, tmp_path)) == 0
    assert (tmp_path / "data" / "a.bin").read_bytes() == BODY


def test_corrupted_bytes_are_fetched_once_more_and_then_refused(server, tmp_path, capfd):
    wrong = BODY[:-1] + bytes([BODY[-1] ^ 1])
    server.tricks["/a.bin"] = lambda handler, span, count: handler.serve(wrong if count < 18 else BODY, span)
    assert fetch(tmp_path, item(server, tmp_path)) == 0
    assert (tmp_path / "data" / "a.bin").read_bytes() == BODY
    server.tricks["/b.bin"] = lambda handler, span, count: handler.serve(wrong, span)
    assert fetch(tmp_path, item(server, tmp_path, "b.bin")) == 7
    assert "SHA-256" in told(capfd)[1]
    assert leftovers(tmp_path) == ["a.bin"]


def test_a_file_that_changes_between_two_ranges_is_begun_anew(server, tmp_path):
    def change(handler, span, count):
        handler.serve(
            *((BODY[::-1], span) if count < 4 else (BODY, span)), etag='"old"' if count < 4 else '"new"'
        )

    server.tricks["/a.bin"] = change
    assert fetch(tmp_path, item(server, tmp_path, sha256=None)) == 0
    assert (tmp_path / "data" / "a.bin").read_bytes() == BODY


def test_the_wrong_length_is_refused(server, tmp_path, capfd):
    assert fetch(tmp_path, item(server, tmp_path, bytes=len(BODY) + 1, sha256=None)) == 7
    assert "1000000 bytes came, 1000001 were expected" in told(capfd)[1]


def test_an_expired_address_says_so_and_shows_no_signature(server, tmp_path, capfd):
    server.tricks["/a.bin"] = lambda handler, span, count: handler.fail(403)
    assert (
        fetch(
            tmp_path,
            item(server, tmp_path, url=f"{server.url}/a.bin?X-Amz-Signature=s3cret"),
            item(server, tmp_path, "b.bin"),
        )
        == 7
    )
    lines, complaint = told(capfd)
    assert "may have expired" in complaint
    assert "s3cret" not in complaint + json.dumps(lines)
    assert server.broken["/a.bin?X-Amz-Signature=s3cret"] == 1  # a refusal is no reason to ask again


def test_busy_servers_are_asked_again_and_not_for_ever(server, tmp_path, capfd):
    asked = set()

    def busy(handler, span, count):
        if span in asked:
            handler.serve(BODY, span)
        else:  # each range once, in whichever order they come
            asked.add(span)
            handler.fail(503, Retry_After="0")

    server.tricks["/a.bin"] = busy
    assert fetch(tmp_path, item(server, tmp_path)) == 0
    assert len(asked) > 1
    server.tricks["/b.bin"] = lambda handler, span, count: handler.fail(503)
    assert fetch(tmp_path, item(server, tmp_path, "b.bin")) == 7
    assert server.broken["/b.bin"] == pull.TRIES
    assert "HTTP 503, 6 times" in told(capfd)[1]


def test_a_server_that_falls_silent_is_left_for_another_connection(server, tmp_path):
    silence = threading.Event()

    def stall(handler, span, count):
        if count == 3:
            silence.wait(10)
            handler.close_connection = True
        else:
            handler.serve(BODY, span)

    server.tricks["/a.bin"] = stall
    assert fetch(tmp_path, item(server, tmp_path), timeout=0.3) == 0
    silence.set()
    assert (tmp_path / "data" / "a.bin").read_bytes() == BODY


def test_redirects_are_remembered_renewed_and_get_no_credentials(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    elsewhere = server.url.replace("127.0.0.1", "localhost")

    def resolve(handler, span, count):
        handler.fail(302, Location=f"{elsewhere}/cdn?ticket={count}")

    def cdn(handler, span, count):
        handler.fail(403) if handler.path == "/cdn?ticket=0" and count == 5 else handler.serve(BODY, span)

    server.tricks.update({"/a.bin": resolve, "/cdn": cdn})
    assert fetch(tmp_path, item(server, tmp_path, bearer_env="HF_TOKEN")) == 0
    assert (tmp_path / "data" / "a.bin").read_bytes() == BODY
    given = {path.partition("?")[0]: token for path, _, token, _ in server.asked}
    assert given == {"/a.bin": "Bearer hf_x", "/cdn": None}
    assert 2 <= server.broken["/a.bin"] < 18


def test_a_span_behind_a_header_is_a_shard(server, tmp_path):
    head = header(1000, "uint16")
    piece = {"url": f"{server.url}/a.bin", "path": str(tmp_path / "data" / "p.bin"), "bytes": 1024 + 2000, "sha256": None,
             "span": [400, 2400], "header": head.rstrip(b"\0").hex(), "header_bytes": 1024}  # fmt: skip
    assert fetch(tmp_path, piece) == 0
    assert shards.probe(tmp_path / "data" / "p.bin").tokens == 1000
    assert (tmp_path / "data" / "p.bin").read_bytes() == head + BODY[400:2400]
    assert (
        fetch(tmp_path, {**piece, "path": str(tmp_path / "data" / "q.bin"), "span": [999_000, 1_001_000]})
        == 7
    )


def test_manifests_that_cannot_be_read(tmp_path, capfd):
    for text in (
        "",
        "{}",
        '{"files": [{"path": "x"}]}',
        '{"files": [{"url": "file:///etc/passwd", "path": "x"}]}',
    ):
        (tmp_path / "m.json").write_text(text)
        assert pull.main(["--manifest", str(tmp_path / "m.json")]) == 3
    assert pull.main(["--manifest", str(tmp_path / "absent.json")]) == 3
    assert "no manifest" in told(capfd)[1]


def test_it_runs_alone_as_one_file(server, tmp_path):
    script = tmp_path / "elsewhere" / "pull.py"
    script.parent.mkdir()
    script.write_bytes(Path(pull.__file__).read_bytes())
    (tmp_path / "pull.json").write_text(
        json.dumps({"files": [{"url": f"{server.url}/a.bin", "path": "data/a.bin"}]})
    )
    command = [sys.executable, "-I", "-S", str(script), "--manifest", "pull.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "data" / "a.bin").read_bytes() == BODY
