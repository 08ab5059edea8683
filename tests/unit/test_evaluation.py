"""Losses on named slices, their bytes, and HellaSwag: against the same sums done by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from orchestrator.data.errors import DataError
from orchestrator.errors import Invalid
from orchestrator.models import evaluation
from orchestrator.models.evaluation import (
    Choice,
    evaluate_slice,
    hellaswag,
    hellaswag_items,
    score,
    slice_name,
)
from orchestrator.models.load import Opened, open_model
from tests.unit.test_models import BPE, MODEL, gpt2_vocabulary, one_thread, write  # noqa: F401
from trainer import tokenize
from trainer.config import ModelConfig, TestSet
from trainer.shards import write_bin

TEXT = ("Où sont les neiges d'antan? " * 40).encode()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_model(write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bin(tmp_path_factory.mktemp("data") / "held.bin", list(TEXT)).path


def by_hand(opened: Opened, offset: int, tokens: int, context: int) -> float:
    total, left = 0.0, tokens
    for start in range(offset, offset + tokens, context):
        count = min(context, left)
        piece = torch.tensor(list(TEXT[start : start + context + 1]))
        losses = cross_entropy(opened.model.logits(piece[None, :-1])[0], piece[1:], reduction="none")
        total, left = total + float(losses[:count].sum()), left - count
    return total / tokens


@pytest.mark.parametrize(("offset", "tokens", "context"), [(0, 320, None), (7, 100, None), (5, 64, 16)])
def test_the_loss_of_a_slice_is_that_of_its_sequences(
    opened: Opened, shard: Path, offset: int, tokens: int, context: int | None
) -> None:
    result = evaluate_slice(
        opened, TestSet("held", [str(shard)], offset, tokens), context_length=context, microbatch_size=3
    )
    loss = by_hand(opened, offset, tokens, context or 32)
    assert result["loss"] == pytest.approx(loss, abs=1e-5) and result["perplexity"] == pytest.approx(
        math.exp(loss), rel=1e-4
    )
    assert result["bytes"] == tokens and result["bits_per_byte"] == pytest.approx(
        loss / math.log(2), abs=1e-5
    )
    assert (result["name"], result["tokens"], result["context_length"]) == ("held", tokens, context or 32)
    again = evaluate_slice(
        opened, TestSet("held", [str(shard)], offset, tokens), context_length=context, microbatch_size=8
    )
    assert again["loss"] == pytest.approx(result["loss"], abs=1e-6)


def test_a_slice_without_a_name_is_named_by_what_it_is(opened: Opened, shard: Path, tmp_path: Path) -> None:
    name = evaluate_slice(opened, TestSet("", [str(shard)], 3, 50))["name"]
    assert name == slice_name([shard], 3, 50) and name.startswith("held-") and name.endswith("@3+50")
    other = write_bin(tmp_path / "held.bin", [*TEXT[:-1], 0]).path
    assert (
        len(
            {
                slice_name([shard], 3, 50),
                slice_name([other], 3, 50),
                slice_name([shard], 3, 51),
                slice_name([shard], 4, 50),
            }
        )
        == 4
    )


def test_bytes_of_gpt2_tokens_are_those_of_their_text(tmp_path: Path, gpt2_vocabulary: None) -> None:  # noqa: F811
    tokens = [50256, *tokenize.encode("gpt2", TEXT.decode())]
    model = ModelConfig(
        vocab_size=50257, context_length=16, emb_dim=8, n_heads=1, n_layers=1, tie_weights=True
    )
    opened = open_model(write(tmp_path / "model", model, "gpt2"))
    path = write_bin(tmp_path / "held.bin", tokens).path
    result = evaluate_slice(opened, TestSet("held", [str(path)], 0, 80))
    assert result["bytes"] == len(tokenize.decode("gpt2", tokens[1:81]).encode())
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * 80 / result["bytes"] / math.log(2))


def test_what_cannot_be_measured_is_said(opened: Opened, shard: Path, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="a context of 33 tokens, but the model was trained on at most 32"):
        evaluate_slice(opened, TestSet("held", [str(shard)], 0, 64), context_length=33)
    with pytest.raises(Invalid, match="there are 1152 tokens in whole sequences"):
        evaluate_slice(opened, TestSet("held", [str(shard)], 0, 100_000))
    foreign = write_bin(tmp_path / "foreign.bin", [300] * 200).path
    with pytest.raises(DataError, match="made with another tokenizer"):
        evaluate_slice(opened, TestSet("held", [str(foreign)], 0, 64))
    with pytest.raises(DataError, match="No such file"):
        evaluate_slice(opened, TestSet("", [str(tmp_path / "missing.bin")], 0, 64))


def items(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hellaswag_takes_the_likeliest_ending_and_the_likeliest_per_token(
    opened: Opened, tmp_path: Path
) -> None:
    rows = [
        {"ctx": f"Item {i} is", "endings": ["ok", "a longer one", "zq", "!!"], "label": i % 4}
        for i in range(8)
    ]
    result = hellaswag(opened, items(tmp_path / "val.jsonl", rows))
    plain = normalised = 0
    for row in rows:
        sums, means = [], []
        for ending in row["endings"]:  # type: ignore[attr-defined]
            context, tail = str(row["ctx"]).encode(), f" {ending}".encode()
            whole = torch.tensor(list(context + tail))
            losses = cross_entropy(opened.model.logits(whole[None, :-1])[0], whole[1:], reduction="none")[
                len(context) - 1 :
            ]
            sums.append(-float(losses.sum()))
            means.append(-float(losses.mean()))
        plain += sums.index(max(sums)) == row["label"]
        normalised += means.index(max(means)) == row["label"]
    assert (result["accuracy"], result["accuracy_normalised"], result["items"]) == (
        plain / 8,
        normalised / 8,
        8,
    )
    assert result["standard_error"] == pytest.approx(math.sqrt(normalised / 8 * (1 - normalised / 8) / 8))
    assert hellaswag(opened, tmp_path / "val.jsonl", limit=3)["items"] == 3


def test_an_ending_is_chosen_by_its_sum_or_by_its_mean(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "score", lambda *_: (torch.tensor([-2.0, -3.0]), torch.tensor([1, 3])))
    path = items(
        tmp_path / "val.jsonl",
        [{"ctx": "x", "endings": ["a", "b"], "label": label} for label in (0, 1, 1, 1)],
    )
    result = hellaswag(opened, path)
    assert (result["accuracy"], result["accuracy_normalised"]) == (0.25, 0.75)


def test_a_context_that_is_too_long_loses_its_beginning(opened: Opened) -> None:
    tokenizer = tokenize.load("bytes")
    long, short = (
        Choice(context, (" yes", "no"), 0) for context in ("z" * 50 + "0123456789" * 3, "0123456789" * 3)
    )
    for got, expected in zip(score(opened, tokenizer, long), score(opened, tokenizer, short), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)
    assert score(opened, tokenizer, long)[1].tolist() == [5, 3]


def test_hellaswag_reads_parquet_as_the_hub_has_it(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"ind": 4, "ctx": "A man", "endings": ["sits.", "flies."], "label": "0"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "val.parquet")
    assert hellaswag_items(tmp_path / "val.parquet") == hellaswag_items(items(tmp_path / "val.jsonl", rows))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ('{"ctx": "x", "endings": "y", "label": 0}', "an item has `ctx`, a text, and `endings`"),
        (
            '{"ctx": "x", "endings": ["a", "b"], "label": ""}',
            "label '' names no ending; the test split has no labels",
        ),
        ('{"ctx": "x", "endings": ["a", "b"], "label": 2}', "label '2' names no ending"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "val.jsonl"
    path.write_text('{"ctx": "x", "endings": ["a", "b"], "label": 1}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        hellaswag_items(path)
    assert str(caught.value).startswith(f"{path}, line 2: {message}")


def test_an_ending_longer_than_the_context_is_refused(opened: Opened, tmp_path: Path) -> None:
    rows = [{"ctx": "x" * 100, "endings": ["a", "b" * 40], "label": 0}]
    with pytest.raises(Invalid, match=f"more than the model's context of {MODEL.context_length}"):
        hellaswag(opened, items(tmp_path / "val.jsonl", rows))
