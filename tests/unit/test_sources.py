"""From the spec's data section to files."""

import hashlib
import http.server
import json
import re
import sys
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import stamina

from orchestrator.data import corpora, shares, sources
from orchestrator.data.errors import DataError, Offline
from orchestrator.data.find import Found, ObjectInfo, paths, probe_head
from orchestrator.data.hashes import HashCache, quiet
from orchestrator.data.hub import HttpHub, HubFile, HubName, Listing
from orchestrator.data.shares import Cutter
from orchestrator.models.evaluation import slice_name
from trainer import shards
from trainer.config import DataConfig, TestSet

COMMIT = "a" * 40


class FakeHub:
    """Repositories in memory, that may be out of reach."""

    def __init__(self, files=None, *, offline=False):
        self.files, self.offline, self.reads = files or {}, offline, 0

    def listing(self, name):
        if self.offline:
            raise Offline("nobody answers", "Check the network")
        return Listing(
            COMMIT,
            {key: HubFile(len(body), hashlib.sha256(body).hexdigest()) for key, body in self.files.items()},
        )

    def url(self, name, commit, file):
        return f"https://hub/datasets/{name.repo}/resolve/{commit}/{file}"

    def read(self, url, start, count):
        self.reads += 1
        return self.files[url.rpartition("/")[2]][start : start + count]


class FakeStore:
    def __init__(self, objects):
        self.objects = objects

    def list(self, prefix):
        return [
            ObjectInfo(key, len(body), f"etag-{key[-5]}")
            for key, body in self.objects.items()
            if key.startswith(prefix)
        ]

    def presign_get(self, key):
        return f"https://signed/{key.rpartition('/')[2]}?signature=s3cret"


def write(path: Path, ids) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shards.write_bin(path, ids)
    return path


def body(count: int, start: int = 0) -> bytes:
    return shares.header(count, "uint16") + array("H", [(start + i) % 50257 for i in range(count)]).tobytes()


def resolve(tmp_path, train, *, needed=10_000, context=100, hub=None, **more):
    data = DataConfig(
        train=train, validation=more.pop("validation", []), tokenizer=more.pop("tokenizer", "bytes")
    )
    return sources.resolve(
        data,
        cache=tmp_path / "cache",
        needed_tokens=needed,
        context_length=context,
        hub=hub or FakeHub(offline=True),
        **more,
    )


@pytest.fixture
def three(tmp_path):
    return [write(tmp_path / "shards" / f"train_{i}.bin", [i] * 1001) for i in range(3)]


def test_only_as_many_shards_as_the_tokens_need(tmp_path, three):
    plan = resolve(tmp_path, [f"{tmp_path}/shards/*.bin"], needed=1500)
    assert [item.path.name for item in plan.train] == ["train_0.bin", "train_1.bin"]
    assert (plan.train_tokens, plan.epochs) == (3000, 0.5)
    assert resolve(tmp_path, [f"{tmp_path}/shards/*.bin"], needed=1000).train == plan.train[:1]
    assert len(resolve(tmp_path, [f"{tmp_path}/shards/*.bin"], needed=1001).train) == 2


def test_less_data_than_tokens_makes_epochs(tmp_path, three):
    plan = resolve(tmp_path, [str(path) for path in three], needed=9000)
    assert (len(plan.train), plan.epochs) == (3, 3.0)


def test_names_on_the_node_are_those_of_the_content(tmp_path, three):
    (shard,) = resolve(tmp_path, [str(three[0])]).train
    digest = hashlib.sha256(three[0].read_bytes()).hexdigest()
    assert (shard.sha256, shard.node_name, shard.bytes, shard.tokens) == (
        digest,
        f"{digest[:16]}-train_0.bin",
        3026,
        1001,
    )
    odd = write(tmp_path / "with a $ name.bin", [0] * 1001)
    assert resolve(tmp_path, [str(odd)]).train[0].node_name == f"{digest[:16]}-with_a___name.bin"


def test_hashes_are_remembered_until_the_file_changes(tmp_path, three, monkeypatch):
    cache, reads = HashCache(tmp_path / "cache"), []
    first = cache.sha256(three[0], lambda what, done, total: reads.append(done))
    assert HashCache(tmp_path / "cache").sha256(three[0], lambda *_: reads.append(-1)) == first
    assert reads == [3026]
    three[0].write_bytes(three[1].read_bytes())
    assert cache.sha256(three[0]) == hashlib.sha256(three[1].read_bytes()).hexdigest()
    with pytest.raises(DataError, match="absent"):
        cache.sha256(tmp_path / "absent")
    with pytest.raises(DataError, match="changed while"):
        cache.sha256(three[2], lambda *_: three[2].write_bytes(b"other"))


@pytest.mark.parametrize(("make", "message"), [
    (lambda folder: "absent.bin", "No such file"),
    (lambda folder: "*.nothing", "matches no file"),
    (lambda folder: "", "is a folder"),
    (lambda folder: (folder / "a.bin").write_bytes(body(1000)[:-2]) and "a.bin", "ends early"),
    (lambda folder: (folder / "b.bin").write_bytes(b"\1" + body(1000)[1:]) and "b.bin", "magic"),
    (lambda folder: (folder / "c.bin").write_bytes(b"PAR1" + body(10)) and "c.bin", "parquet"),
    (lambda folder: (folder / "d.bin").write_bytes(body(100)) and "d.bin", "no shard holds a sequence of 100 tokens"),
])  # fmt: skip
def test_unusable_files_are_refused_with_a_next_step(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as error:
        resolve(tmp_path, [f"{tmp_path}/{make(tmp_path)}"])
    assert error.value.hint
    assert error.value.exit_code == 3


def test_ids_beyond_the_vocabulary_are_noticed(tmp_path):
    path = write(tmp_path / "a.bin", [300] * 1001)
    with pytest.raises(DataError, match=r"holds token 300, and model.vocab_size is 256") as error:
        resolve(tmp_path, [str(path)], vocab_size=256)
    assert "50257" in error.value.hint
    assert resolve(tmp_path, [str(path)], vocab_size=301).train


def test_validation_and_test_sets(tmp_path, three):
    held_out = write(tmp_path / "val.bin", list(range(256)) * 10)
    plan = resolve(tmp_path, [str(three[0])], validation=[str(held_out)], validation_tokens=500,
                   test_sets=[TestSet("mine", [str(held_out)], offset=100, tokens=250)], prompts=["hi"])  # fmt: skip
    (item,) = plan.test_sets
    assert (item.test_set.offset, item.test_set.tokens, item.test_set.bytes) == (100, 250, 250)
    assert item.test_set.name == slice_name([held_out], 100, 250, "mine")  # as `evaluate` calls it here
    assert plan.prompt_tokens == [[104, 105]]
    assert [shard.node_name for shard in plan.shards] == [
        plan.train[0].node_name,
        plan.validation[0].node_name,
    ]
    assert plan.first == {plan.train[0].node_name, plan.validation[0].node_name}
    with pytest.raises(DataError, match=r"takes 301 tokens from token 2400 on, its data has 2560"):
        resolve(
            tmp_path, [str(three[0])], test_sets=[TestSet("mine", [str(held_out)], offset=2400, tokens=250)]
        )
    with pytest.raises(DataError, match="no built-in test set"):
        resolve(tmp_path, [str(three[0])], test_sets=["nope"])


def test_a_test_set_over_several_files(tmp_path, three):
    plan = resolve(
        tmp_path,
        [str(three[0])],
        test_sets=[TestSet("both", [str(path) for path in three], offset=900, tokens=500)],
    )
    (item,) = plan.test_sets
    assert ([shard.path.name for shard in item.shards], item.test_set.offset) == (
        ["train_0.bin", "train_1.bin"],
        900,
    )
    assert item.test_set.bytes == 500


def test_the_name_of_a_test_set_says_what_is_in_it(tmp_path, three, monkeypatch):
    """Another content, part or revision is another name, whatever the spec calls it; a built-in name stands for itself."""

    def name(source, offset=0, tokens=250):
        (item,) = resolve(
            tmp_path, [str(three[0])], test_sets=[TestSet("mine", [source], offset, tokens)]
        ).test_sets
        return item.test_set.name

    held_out = write(tmp_path / "val.bin", list(range(256)) * 10)
    names = {name(str(held_out)), name(str(held_out), 1), name(str(held_out), 0, 251), name(str(three[1]))}
    write(held_out, list(range(255, -1, -1)) * 10)
    assert len(names | {name(str(held_out))}) == 5 and all(
        re.match(r"mine-[0-9a-f]{12}@\d\+25\d$", item) for item in names
    )
    cutter = Cutter(tmp_path, HashCache(tmp_path), 100, None, quiet)
    first, second = (
        Found("hf://o/n/a.bin", "a.bin", url="https://x/a.bin", revision=commit) for commit in ("c1", "c2")
    )
    assert cutter.named(TestSet("mine", []), [first]) != cutter.named(TestSet("mine", []), [second])
    with pytest.raises(DataError, match="tokens of gpt2, and the model's tokenizer is bytes"):
        resolve(tmp_path, [str(three[0])], test_sets=["fineweb-gpjt"])


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(shares, "PIECE_TOKENS", 1000)
    monkeypatch.setattr(shares, "SMALL_BYTES", 0)


def sequences(files, context: int, count: int) -> list[list[int]]:
    """What the trainer reads: the first sequences of files of tokens, labels included."""
    order = shards.Order([len(ids) for ids in files], context)
    found = []
    for number in range(count):
        index, start = order.locate(number)
        found.append(files[index][start : start + context + 1])
    return found


def ids(data: bytes, offset: int = 1024) -> list[int]:
    return list(array("H", data[offset:]))


@pytest.mark.parametrize("needed", [100, 900, 2500, 6900])
def test_pieces_hold_the_sequences_of_the_file_in_its_order(tmp_path, small_pieces, needed):
    whole = body(10_000)
    (tmp_path / "big.bin").write_bytes(whole)
    plan = resolve(tmp_path, [f"{tmp_path}/big.bin"], needed=needed)
    got = [ids(item.path.read_bytes()) for item in plan.train]
    assert [item.tokens for item in plan.train] == [len(piece) for piece in got]
    assert sum(item.bytes for item in plan.train) < 2 * (needed + 100) + 1100 * len(got)
    count = -(-needed // 100)
    assert sequences(got, 100, count) == sequences([ids(whole)], 100, count)
    assert plan.train == resolve(tmp_path, [f"{tmp_path}/big.bin"], needed=needed).train
    assert all(shards.probe(item.path).tokens == item.tokens for item in plan.train)


def test_a_published_file_is_cut_into_ranges(tmp_path, small_pieces):
    whole = body(10_000)
    fake = FakeHub({"big.bin": whole})
    plan = resolve(
        tmp_path,
        ["hf://o/n/big.bin"],
        needed=2500,
        hub=fake,
        test_sets=[TestSet("t", ["hf://o/n/big.bin"], 5000, 150)],
    )
    assert [item.tokens for item in plan.train] == [1001, 1001, 501]
    first = sources.pull_item(plan.train[0], "llmctl/data/x")
    assert (first["url"], first["span"]) == (
        f"https://hub/datasets/o/n/resolve/{COMMIT}/big.bin",
        [1024, 1024 + 2002],
    )
    assert bytes.fromhex(first["header"]).ljust(first["header_bytes"], b"\0") == shares.header(1001, "uint16")
    assert (first["bytes"], first["bearer_env"]) == (1024 + 2002, "HF_TOKEN")
    got = [ids(whole[slice(*item.span)], 0) for item in plan.train]
    assert sequences(got, 100, 25) == sequences([ids(whole)], 100, 25)
    (item,) = plan.test_sets
    assert (item.test_set.offset, [piece.span for piece in item.shards]) == (
        0,
        [(1024 + 10_000, 1024 + 10_402)],
    )
    assert len({piece.node_name for piece in plan.shards}) == 4
    assert plan.remote_bytes == sum(piece.bytes for piece in plan.shards)
    before = fake.reads
    resolve(tmp_path, ["hf://o/n/big.bin"], hub=fake)
    assert fake.reads == before  # what was learnt of a pinned file is remembered


def test_a_published_shard_is_taken_whole_with_its_hash(tmp_path):
    whole = {f"train_{i}.bin": body(5000, i) for i in range(3)}
    plan = resolve(tmp_path, ["hf://o/n/train_*.bin"], needed=6000, hub=FakeHub(whole))
    assert [item.sha256 for item in plan.train] == [
        hashlib.sha256(whole[f"train_{i}.bin"]).hexdigest() for i in range(2)
    ]
    assert sources.pull_item(plan.train[0], "p")["bytes"] == len(whole["train_0.bin"])
    with pytest.raises(DataError, match="no such file"):
        resolve(tmp_path, ["hf://o/n/absent.bin"], hub=FakeHub(whole))
    with pytest.raises(DataError, match="magic"):
        resolve(tmp_path, ["hf://o/n/bad.bin"], hub=FakeHub({"bad.bin": b"\1" + body(5000)[1:]}))
    with pytest.raises(DataError, match="holds token 4999"):
        resolve(tmp_path, ["hf://o/n/train_0.bin"], hub=FakeHub(whole), vocab_size=256)


def test_without_a_network(tmp_path):
    pinned = resolve(tmp_path, [f"hf://o/n@{COMMIT}/a.bin"])
    assert (pinned.train[0].url, pinned.train[0].revision) == (
        f"https://hub/datasets/o/n/resolve/{COMMIT}/a.bin",
        COMMIT,
    )
    assert (pinned.train[0].bytes, pinned.train_tokens, pinned.epochs) == (None, None, None)
    assert "was not looked at" in pinned.warnings[0]
    with pytest.raises(Offline, match="nobody answers") as error:
        resolve(tmp_path, ["hf://o/n/a.bin"])
    assert "hf://o/n@COMMIT/a.bin" in error.value.hint
    assert resolve(tmp_path, ["hf://o/n/a.bin"], pinned=False).train[0].revision == "main"
    with pytest.raises(Offline):
        resolve(tmp_path, ["hf://o/n/*.bin"], pinned=False)


def test_names_on_the_hub():
    assert HubName.parse("hf://o/n/d/f.bin") == HubName("datasets", "o/n", None, "d/f.bin")
    assert HubName.parse("hf://models/o/n@v1/f.bin") == HubName("models", "o/n", "v1", "f.bin")
    assert HubName.parse("hf://datasets/o/n/f").file == "f"
    for wrong in ("hf://o/n", "hf://o", "hf://"):
        with pytest.raises(DataError):
            HubName.parse(wrong)


def test_objects_of_a_bucket(tmp_path, monkeypatch):
    store = FakeStore(
        {f"s3://b/p/train_{i}.bin": body(5000) for i in range(3)} | {"s3://b/p/notes.txt": b"x"}
    )
    fake = FakeHub({f"train_{i}.bin?signature=s3cret": body(5000) for i in range(3)})
    plan = resolve(tmp_path, ["s3://b/p/train_*.bin"], needed=6000, hub=fake, objects=store)
    assert [(item.url, item.revision, item.tokens) for item in plan.train] == [
        ("s3://b/p/train_0.bin", "etag-0", 5000),
        ("s3://b/p/train_1.bin", "etag-1", 5000),
    ]
    assert (
        sources.pull_item(plan.train[0], "p", store)["url"] == "https://signed/train_0.bin?signature=s3cret"
    )
    assert (
        resolve(tmp_path, ["s3://b/p/train_1.bin"], hub=fake, objects=store).train[0].url
        == "s3://b/p/train_1.bin"
    )
    sources.save_plan(plan, tmp_path / "plan.json")
    assert "s3cret" not in (tmp_path / "plan.json").read_text()
    for source, objects in (("s3://b/p/*.nothing", store), ("s3://b/p/train_0.bin", None)):
        with pytest.raises(DataError):
            resolve(tmp_path, [source], hub=fake, objects=objects)
    with pytest.raises(DataError):
        sources.pull_item(plan.train[0], "p")


def test_plans_are_kept(tmp_path, three, small_pieces):
    plan = resolve(tmp_path, [str(three[0]), "hf://o/n/big.bin"], needed=3000, hub=FakeHub({"big.bin": body(10_000)}),
                   validation=[str(three[1])], test_sets=[TestSet("t", [str(three[2])], 0, 100)], prompts=["x"])  # fmt: skip
    sources.save_plan(plan, tmp_path / "plan.json")
    assert sources.load_plan(tmp_path / "plan.json") == plan
    assert sources.load_plan(tmp_path / "absent.json") is None


def test_safetensors_heads_are_understood():
    head = json.dumps({"tokens": {"dtype": "U16", "shape": [5000], "data_offsets": [0, 10_000]}}).encode()
    data = len(head).to_bytes(8, "little") + head
    info = probe_head(data, Found("s", "t.safetensors", bytes=len(data) + 10_000))
    assert (info.tokens, info.offset) == (5000, len(data))


def test_a_literal_name_with_brackets_is_no_glob(tmp_path):
    path = write(tmp_path / "a[1].bin", [0] * 10)
    assert paths(str(path)) == [path]


@pytest.fixture
def library(tmp_path, monkeypatch):
    root = tmp_path / "lib"
    for index in range(200):
        path = root / ("site-packages" if index % 50 == 0 else f"p{index % 3}") / f"m{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {index}\n" * 30)
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    monkeypatch.setattr(corpora, "SHARD_TOKENS", 20_000)
    corpora.library.cache_clear()
    yield root
    corpora.library.cache_clear()


def test_the_standard_library_as_shards(tmp_path, library):
    made = corpora.prepare("python-stdlib", "bytes", tmp_path / "cache")
    counts = [shards.probe(path).tokens for path in made.train]
    assert counts[:-1] == [20_000] * (len(counts) - 1)
    assert len(made.validation) == 1
    text = b"".join(bytes(ids(path.read_bytes())) for path in [*made.train, *made.validation])
    documents = sorted(text.split(b"\0")[1:])
    assert documents == sorted(path.read_bytes() for key, path in corpora.stdlib(library))
    assert len(documents) == 196
    kept_back = {
        document for path in made.validation for document in bytes(ids(path.read_bytes())).split(b"\0")[1:]
    }
    assert kept_back == {path.read_bytes() for key, path in corpora.stdlib(library) if int(key, 16) % 20 == 0}
    assert not kept_back & {
        document for path in made.train for document in bytes(ids(path.read_bytes())).split(b"\0")[1:]
    }


def test_the_corpus_is_made_once_and_again_when_it_changes_or_is_damaged(tmp_path, library):
    made = corpora.prepare("python-stdlib", "bytes", tmp_path / "cache")
    stamp = made.train[0].stat().st_mtime_ns
    assert corpora.prepare("python-stdlib", "bytes", tmp_path / "cache").train[0].stat().st_mtime_ns == stamp
    made.train[0].write_bytes(b"")
    assert (
        shards.probe(corpora.prepare("python-stdlib", "bytes", tmp_path / "cache").train[0]).tokens == 20_000
    )
    (library / "p1" / "new.py").write_text("new = 1\n")
    corpora.library.cache_clear()  # another process reads it anew
    assert (
        corpora.prepare("python-stdlib", "bytes", tmp_path / "cache").train[0].parent != made.train[0].parent
    )
    left = [path.name for path in (tmp_path / "cache" / "builtin").iterdir() if path.name.startswith(".")]
    assert all(name.endswith(".lock") for name in left)


def test_many_at_once_make_the_corpus_once(tmp_path, library, monkeypatch):
    written, write_it = [], corpora._write

    def counted(*arguments):
        write_it(*arguments)
        written.append(arguments[0])

    monkeypatch.setattr(corpora, "_write", counted)
    with ThreadPoolExecutor(
        8
    ) as pool:  # an flock parts threads as it parts processes: each opens the file anew
        made = list(
            pool.map(lambda _: corpora.prepare("python-stdlib", "bytes", tmp_path / "cache"), range(8))
        )
    assert len(written) == 1
    assert all(path.exists() for corpus in made for path in corpus.train)


def test_the_builtin_name_serves_both_lines(tmp_path, library):
    plan = resolve(
        tmp_path,
        ["builtin:python-stdlib"],
        validation=["builtin:python-stdlib"],
        needed=20_000,
        vocab_size=256,
    )
    assert [item.path.name for item in plan.train] == ["train_000000.bin", "train_000001.bin"]
    assert [item.path.name for item in plan.validation] == ["validation_000000.bin"]
    with pytest.raises(DataError, match="tokens of bytes"):
        resolve(tmp_path, ["builtin:python-stdlib"], tokenizer="gpt2")
    with pytest.raises(DataError, match="no built-in corpus"):
        resolve(tmp_path, ["builtin:other"])


@pytest.fixture
def published(monkeypatch):
    """A server that answers as the Hub does, for one dataset; it counts and can be told to fail."""
    files = {"a.bin": body(5000), "d/b.bin": body(50)}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append((self.path, self.headers.get("Authorization")))
            code, text = 200, b""
            if server.failures:
                code = server.failures.pop()
            elif self.path in [f"/api/datasets/o/n/revision/{name}?blobs=true" for name in ("main", COMMIT)]:
                siblings = [
                    {
                        "rfilename": name,
                        "size": len(data),
                        "lfs": {
                            "sha256": hashlib.sha256(data).hexdigest(),
                            "size": len(data),
                            "pointerSize": 1,
                        },
                    }
                    for name, data in files.items()
                ]
                text = json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
            elif self.path.startswith(f"/datasets/o/n/resolve/{COMMIT}/"):
                text = files[self.path.split(f"{COMMIT}/")[1]]
                if span := self.headers.get("Range"):
                    start, end = map(int, span[6:].split("-"))
                    code, text = 206, text[start : end + 1]
            else:
                code = 404
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.failures = [], []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()


def test_the_hub_is_asked_once_for_a_pinned_revision(tmp_path, published, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    plan = resolve(tmp_path, ["hf://o/n/a.bin"], hub=HttpHub(tmp_path / "hub"), needed=1000)
    assert (plan.train[0].revision, plan.train[0].tokens, plan.train[0].sha256) == (
        COMMIT,
        5000,
        hashlib.sha256(body(5000)).hexdigest(),
    )
    assert {token for _, token in published.asked} == {"Bearer hf_x"}
    published.asked.clear()
    assert resolve(tmp_path, [f"hf://o/n@{COMMIT}/a.bin"], hub=HttpHub(tmp_path / "hub"), needed=1000).train[
        0
    ].bytes == len(body(5000))
    assert published.asked == []


@pytest.fixture
def no_pauses():
    stamina.set_testing(True, attempts=2)
    yield
    stamina.set_testing(False)


@pytest.mark.usefixtures("no_pauses")
def test_the_hub_failing_and_refusing(tmp_path, published, monkeypatch):
    published.failures = [503]
    assert HttpHub(tmp_path).listing(HubName.parse("hf://o/n/a.bin")).commit == COMMIT
    published.failures = [503, 503, 503]
    with pytest.raises(Offline, match="503"):
        HttpHub(tmp_path).listing(HubName.parse("hf://o/n/a.bin"))
    published.failures = [401]
    with pytest.raises(DataError, match="access refused") as error:
        HttpHub(tmp_path).listing(HubName.parse("hf://o/n/a.bin"))
    assert "HF_TOKEN" in error.value.hint
    with pytest.raises(DataError, match="404"):
        HttpHub(tmp_path).listing(HubName.parse("hf://o/other/a.bin"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Offline):
        HttpHub(tmp_path).listing(HubName.parse("hf://o/n/a.bin"))


def test_uint32_tokens_in_pieces(tmp_path, small_pieces):
    ids32 = array("I", range(70_000, 75_000))
    assert ids32.itemsize == 4
    (tmp_path / "big.bin").write_bytes(shares.header(5000, "uint32") + ids32.tobytes())
    plan = resolve(tmp_path, [f"{tmp_path}/big.bin"], needed=1500)
    got = [list(array("I", item.path.read_bytes()[1024:])) for item in plan.train]
    assert sequences(got, 100, 15) == sequences([list(ids32)], 100, 15)
    assert sys.byteorder == "little"
