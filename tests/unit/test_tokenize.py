"""Text to ids and back."""

from array import array
from itertools import pairwise
from pathlib import Path

import pytest

from trainer import tokenize

VOCABULARY = Path(__file__).resolve().parents[2].parent / "shared" / "gpt2-bpe"
TEXT = "Every effort moves you — naïve 東京 🙂\n\tdef f(x):\n"


@pytest.fixture
def gpt2(monkeypatch):
    pytest.importorskip("tiktoken")
    if not VOCABULARY.is_dir():
        pytest.skip(f"tiktoken's gpt2 vocabulary is not at {VOCABULARY}, and tests use no network")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
    return "gpt2"


@pytest.fixture
def trained(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    tokenize.train_bpe([TEXT * 20, "the cat sat on the mat " * 50], 300, path)
    return str(path)


def test_bytes():
    assert tokenize.encode("bytes", "é") == [0xC3, 0xA9]
    assert tokenize.decode("bytes", tokenize.encode("bytes", TEXT)) == TEXT
    assert tokenize.decode("bytes", [0xC3]) == "\ufffd"
    assert tokenize.text_bytes("bytes", [0, 1, 2]) == 3


def test_gpt2_ids_are_openais(gpt2):
    assert tokenize.encode(gpt2, "Every effort moves you") == [6109, 3626, 6100, 345]
    assert tokenize.decode(gpt2, tokenize.encode(gpt2, TEXT)) == TEXT
    assert 50256 not in tokenize.encode(gpt2, "a<|endoftext|>b")


def test_gpt2_bytes_of_a_slice(gpt2):
    ids = [50256, *tokenize.encode(gpt2, TEXT)]
    assert tokenize.text_bytes(gpt2, ids) == len(TEXT.encode())


def test_a_trained_bpe(trained):
    ids = tokenize.encode(trained, TEXT + "the cat")
    assert tokenize.decode(trained, ids) == TEXT + "the cat"
    assert len(ids) < len((TEXT + "the cat").encode())
    tokenizer = tokenize.load(trained)
    assert tokenizer.vocab_size <= 300
    assert tokenizer.separator is not None
    assert tokenize.text_bytes(trained, [tokenizer.separator, *ids]) == len((TEXT + "the cat").encode())


def test_what_cannot_be_had_is_said(tmp_path):
    with pytest.raises(tokenize.TokenizerError, match=r"there is no tokenizer .*nope"):
        tokenize.load(str(tmp_path / "nope"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(tokenize.TokenizerError, match=r"no tokenizer\.json"):
        tokenize.load(str(tmp_path / "bad.json"))
    with pytest.raises(tokenize.TokenizerError, match="id 256 is not in the vocabulary"):
        tokenize.decode("bytes", [256])
    with pytest.raises(tokenize.TokenizerError, match="257 to 65536"):
        tokenize.train_bpe(["x"], 100, tmp_path / "t.json")


def test_documents_are_preceded_by_their_separator(gpt2):
    (batch,) = tokenize.encode_documents(gpt2, ["one", "two"], processes=1)
    assert batch.documents == 2
    assert list(batch.train) == [50256, *tokenize.encode(gpt2, "one"), 50256, *tokenize.encode(gpt2, "two")]


def test_several_processes_give_what_one_gives():
    documents = [f"document {index} " * 2000 for index in range(120)]
    one = list(tokenize.encode_documents("bytes", documents, processes=1, held_out=0.1))
    two = list(tokenize.encode_documents("bytes", documents, processes=2, held_out=0.1))
    assert len(one) > 2
    assert one == two
    assert sum(batch.documents for batch in one) == 120


def test_held_out_documents_are_chosen_by_their_text():
    documents = [f"document {index}" for index in range(2000)]
    forward = array("H")
    for batch in tokenize.encode_documents("bytes", documents, processes=1, held_out=0.1):
        forward.extend(batch.held_out)
    kept = {bytes(part) for part in _split(forward)}
    backward = array("H")
    for batch in tokenize.encode_documents("bytes", documents[::-1], processes=1, held_out=0.1):
        backward.extend(batch.held_out)
    assert kept == {bytes(part) for part in _split(backward)}
    assert 140 < len(kept) < 260


def _split(ids: array) -> list[array]:
    starts = [index for index, value in enumerate(ids) if value == 0] + [len(ids)]
    return [array("B", ids[a + 1 : b]) for a, b in pairwise(starts)]
