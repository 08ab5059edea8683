"""`llmctl data`: text in, verified shards out."""

import hashlib
import json
import random
from array import array
from pathlib import Path

import pytest

from orchestrator.data import prepare as data
from orchestrator.data import sources, texts
from orchestrator.data.errors import DataError
from orchestrator.data.hub import HubFile, Listing
from trainer import shards, tokenize
from trainer.config import DataConfig

VOCABULARY = Path(__file__).resolve().parents[2].parent / "shared" / "gpt2-bpe"


@pytest.fixture
def library(tmp_path):
    """Two hundred small text files."""
    words = random.Random(1)
    for index in range(200):
        path = tmp_path / "text" / f"d{index % 7}" / f"{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"{index}: " + " ".join(words.choice(["one", "two", "three", "naïve"]) for _ in range(100))
        )
    return tmp_path / "text"


def prepare(tmp_path, *names, progress=data.quiet, processes=1, hub=None, **recipe):
    recipe = data.Recipe(
        **{"tokenizer": "bytes", "shard_tokens": 20_000, "validation_fraction": 0.1, **recipe}
    )
    return data.prepare(
        [str(name) for name in names],
        tmp_path / "out",
        recipe,
        cache=tmp_path / "cache",
        processes=processes,
        hub=hub,
        progress=progress,
    )


def texts_of(made: data.Prepared, part: str) -> list[str]:
    whole = array("H")
    for item in made.shards:
        if item.part == part:
            whole.frombytes((made.folder / item.name).read_bytes()[1024:])
    return [document.decode() for document in bytes(list(whole)).split(b"\0")[1:]]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_every_document_is_on_one_side_and_whole(tmp_path, library):
    made = prepare(tmp_path, library)
    train, validation = texts_of(made, "train"), texts_of(made, "validation")
    assert sorted(train + validation) == sorted(path.read_text() for path in library.rglob("*.txt"))
    assert 8 < len(validation) < 35
    assert [item.tokens for item in made.shards if item.part == "train"][:-1] == [20_000] * (
        made.tokens("train") // 20_000
    )
    assert made.documents == 200
    assert data.verify(made.folder) == []
    assert hidden(tmp_path) == []


def test_the_shards_serve_a_run(tmp_path, library):
    made = prepare(tmp_path, library)
    spec = DataConfig(
        train=[f"{made.folder}/train_*.bin"],
        validation=[f"{made.folder}/validation_*.bin"],
        tokenizer="bytes",
    )
    plan = sources.resolve(
        spec, cache=tmp_path / "cache", needed_tokens=50_000, context_length=128, vocab_size=256
    )
    assert len(plan.train) == 3
    assert {item.sha256 for item in plan.train} < {item.sha256 for item in made.shards}


def test_nothing_is_done_twice(tmp_path, library):
    first = prepare(tmp_path, library)
    stamp = (first.folder / data.MANIFEST).stat().st_mtime_ns
    again = prepare(tmp_path, library)
    assert (again.unchanged, (again.folder / data.MANIFEST).stat().st_mtime_ns) == (True, stamp)
    assert again.shards == first.shards
    (library / "d0" / "0.txt").write_text("something else")
    assert not prepare(tmp_path, library).unchanged
    assert not prepare(tmp_path, library, shard_tokens=10_000).unchanged
    (first.folder / "train_000000.bin").unlink()
    assert not prepare(tmp_path, library, shard_tokens=10_000).unchanged
    assert hidden(tmp_path) == []


def test_an_interrupted_preparation_goes_on_after_its_last_shard(tmp_path, library, monkeypatch):
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 3000)
    whole = prepare(tmp_path, library)
    kept = [(item, (whole.folder / item.name).read_bytes()) for item in whole.shards]
    (whole.folder / data.MANIFEST).write_text("{}")
    encoded = []
    encode = tokenize._encode_batch

    def break_off(name, documents, held_out):
        encoded.append(len(documents))
        if sum(encoded) > 120:
            raise KeyboardInterrupt
        return encode(name, documents, held_out)

    monkeypatch.setattr(tokenize, "_encode_batch", break_off)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, library)
    state = json.loads((tmp_path / ".out.partial" / "state.json").read_text())
    assert 0 < state["documents"] < 200
    encoded.clear()
    monkeypatch.setattr(
        tokenize,
        "_encode_batch",
        lambda name, documents, held_out: encoded.append(len(documents)) or encode(name, documents, held_out),
    )
    again = prepare(tmp_path, library)
    assert sum(encoded) == 200 - state["documents"]
    assert [(item, (again.folder / item.name).read_bytes()) for item in again.shards] == kept
    assert hidden(tmp_path) == []


def test_a_partial_of_other_text_is_not_continued(tmp_path, library):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "state.json").write_text(json.dumps({"key": "other", "documents": 3, "entries": []}))
    (partial / "train_000099.bin").write_bytes(b"")
    assert "train_000099.bin" not in [path.name for path in prepare(tmp_path, library).folder.iterdir()]


def test_verify_finds_every_kind_of_damage(tmp_path, library):
    made = prepare(tmp_path, library)
    first, second, third = (made.folder / item.name for item in made.shards[:3])
    first.write_bytes(first.read_bytes()[:-1] + b"\7")
    second.write_bytes(second.read_bytes()[:-2])
    third.unlink()
    problems = data.verify(made.folder)
    assert len(problems) == 3
    assert "does not have the checksum" in problems[0]
    assert "ends early" in problems[1]
    assert third.name in problems[2]
    (made.folder / data.MANIFEST).write_text('{"tokenizer": "bytes", "vocab_size": 1, "documents": 1, "shards": '
                                             '[{"name": "../x", "part": "train", "tokens": 1, "bytes": 1, "sha256": ""}]}')  # fmt: skip
    with pytest.raises(DataError, match="no plain file name"):
        data.verify(made.folder)
    with pytest.raises(DataError, match=r"has no shards\.json"):
        data.verify(tmp_path)


def test_listing_with_and_without_a_manifest(tmp_path, library):
    made = prepare(tmp_path, library)
    assert data.listing(made.folder) == made.shards
    (made.folder / data.MANIFEST).unlink()
    assert [(item.name, item.part, item.tokens) for item in data.listing(made.folder)] == [
        (item.name, item.part, item.tokens) for item in sorted(made.shards, key=lambda item: item.name)
    ]
    with pytest.raises(DataError, match="no token shards"):
        data.listing(tmp_path)


def test_text_is_divided_at_its_marks_or_at_blank_lines(monkeypatch):
    assert list(texts.divide("one\n<|endoftext|>\ntwo<|endoftext|>\n")) == ["one", "two"]
    assert list(texts.divide("short\n\ntext")) == ["short\n\ntext"]
    assert list(texts.divide(" \n")) == []
    monkeypatch.setattr(texts, "LARGE_TEXT", 100)
    monkeypatch.setattr(texts, "BLOCK_TEXT", 50)
    long = "\n\n".join(f"paragraph {index} of some length" for index in range(20))
    parts = list(texts.divide(long))
    assert "".join(parts) == long
    assert len(parts) > 5
    assert all(part.endswith("\n\n") for part in parts[:-1])


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [f"row {index}" for index in range(300)]
    parquet.write_table(pyarrow.table({"text": [*rows, None], "other": [1] * 301}), tmp_path / "a.parquet")
    made = prepare(tmp_path, tmp_path / "*.parquet")
    assert sorted(texts_of(made, "train") + texts_of(made, "validation")) == sorted(rows)
    with pytest.raises(DataError, match="no column 'body'") as error:
        prepare(tmp_path, tmp_path / "a.parquet", column="body")
    assert "text, other" in error.value.hint
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="no parquet file"):
        prepare(tmp_path, tmp_path / "bad.parquet")


def test_gpt2_and_the_convention_of_llm_c(tmp_path, monkeypatch):
    pytest.importorskip("tiktoken")
    if not VOCABULARY.is_dir():
        pytest.skip(f"tiktoken's gpt2 vocabulary is not at {VOCABULARY}, and tests use no network")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
    (tmp_path / "a.txt").write_text("Every effort moves you")
    made = prepare(tmp_path, tmp_path / "a.txt", tokenizer="gpt2", validation_fraction=0.0)
    assert list(array("H", (made.folder / "train_000000.bin").read_bytes()[1024:])) == [
        50256,
        6109,
        3626,
        6100,
        345,
    ]
    assert shards.probe(made.folder / "train_000000.bin").tokens == 5


def test_a_tokenizer_of_ones_own(tmp_path, library):
    pytest.importorskip("tokenizers")
    data.train_tokenizer([str(library)], tmp_path / "tokenizer.json", 300, cache=tmp_path / "cache")
    made = prepare(tmp_path, library, tokenizer=str(tmp_path / "tokenizer.json"))
    assert made.tokens("train") < 0.6 * prepare(tmp_path, library).tokens("train")


@pytest.mark.parametrize(("names", "recipe", "message"), [
    ([], {}, "no source"),
    (["absent.txt"], {}, "no such file"),
    (["*.none"], {}, "matches no file"),
    (["text"], {"validation_fraction": 1.5}, "not in"),
    (["text"], {"validation_fraction": 1e-9}, "none is left for validation"),
    (["text"], {"shard_tokens": 0}, "tokens a shard"),
    (["text"], {"tokenizer": "absent.json"}, "no tokenizer"),
    (["empty"], {}, "no text"),
])  # fmt: skip
def test_bad_input_is_refused_and_leaves_nothing(tmp_path, library, names, recipe, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as error:
        prepare(tmp_path, *(tmp_path / name for name in names), **recipe)
    assert error.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    assert hidden(tmp_path) == []


def test_a_folder_with_other_things_is_not_touched(tmp_path, library):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="holds something else"):
        prepare(tmp_path, library)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_two_at_once_do_not_mix(tmp_path, library):
    problems = []

    def second(what, done, total):
        if what == "tokenising" and not problems:
            with pytest.raises(DataError, match="another llmctl is preparing") as error:
                prepare(tmp_path, library, shard_tokens=5000)
            problems.append(error.value)

    prepare(tmp_path, library, progress=second)
    assert problems


def test_published_text_is_fetched_and_kept(tmp_path, monkeypatch):
    body = ("\n".join(f"line {index}" for index in range(100)) + "\n").encode()
    digest = hashlib.sha256(body).hexdigest()
    fetched = []

    class Pull:
        def __init__(self, items, *_):
            self.items = items

        def run(self):
            for item in self.items:
                fetched.append((item.url, item.sha256, item.headers))
                item.path.parent.mkdir(parents=True, exist_ok=True)
                item.path.write_bytes(body)
            return 0

    class Hub:
        def listing(self, name):
            return Listing("c" * 40, {"t/a.txt": HubFile(len(body), digest), "b.bin": HubFile(1)})

        def url(self, name, commit, file):
            return f"https://hub/{commit}/{file}"

    monkeypatch.setattr(texts.pull, "Pull", Pull)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    made = prepare(tmp_path, "hf://o/n/t/*.txt", hub=Hub(), validation_fraction=0.0)
    assert texts_of(made, "train") == [body.decode()]
    assert fetched == [(f"https://hub/{'c' * 40}/t/a.txt", digest, {"Authorization": "Bearer hf_x"})]
    with pytest.raises(DataError, match="no such file"):
        prepare(tmp_path, "hf://o/n/absent.txt", hub=Hub())
