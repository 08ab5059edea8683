"""Models by whatever name: our checkpoints and Hugging Face folders open with a tokenizer that fits, or say why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.data import bases
from orchestrator.data.errors import DataError, Offline
from orchestrator.errors import Invalid
from orchestrator.models import load as models
from orchestrator.models.load import Drawing, Opened, complete, locate, open_model, pieces, until
from trainer import checkpoint, tokenize
from trainer.checkpoint import Snapshot
from trainer.config import DataConfig, ModelConfig, TrainConfig, TrainerConfig
from trainer.model import initial_weights

MODEL = ModelConfig(vocab_size=256, context_length=32, emb_dim=32, n_heads=2, n_layers=2, tie_weights=True)
BPE = Path(__file__).parents[3] / "shared" / "gpt2-bpe"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two threads to help each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(folder: Path, model: ModelConfig = MODEL, tokenizer: str = "bytes") -> Path:
    config = TrainerConfig(
        DataConfig(["-"], tokenizer=tokenizer), model, TrainConfig(1, steps=1, device="cpu", precision="fp32")
    )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder, Snapshot(1, dict(initial_weights(model, 5)), {}, {}), config)
    return folder / "step-000001"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 that transformers made."""
    import transformers

    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    folder = tmp_path_factory.mktemp("theirs")
    transformers.GPT2LMHeadModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture
def gpt2_vocabulary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not BPE.is_dir():
        pytest.skip("GPT-2's vocabulary is not here (../shared/gpt2-bpe)")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(BPE))
    tokenize.load.cache_clear()
    yield
    tokenize.load.cache_clear()


def test_a_checkpoint_of_ours_opens_with_its_tokenizer(ours: Path) -> None:
    model, config, tokenizer = open_model(ours)
    assert (config.model, tokenizer) == (MODEL, "bytes")
    assert model.head.weight is model.token_embedding.weight and not model.training
    assert models.facts(Opened(model, config, tokenizer))["parameters"] == sum(
        p.numel() for _, p in initial_weights(MODEL, 5)
    )


def test_a_gpt2_of_transformers_has_the_same_logits_here(theirs: Path) -> None:
    import transformers

    opened = open_model(theirs, tokenizer="bytes")
    assert opened.config.model.vocab_size == 300 and opened.config.model.context_length == 32
    tokens = torch.arange(24).reshape(2, 12) * 7 % 300
    with torch.no_grad():
        expected = transformers.GPT2LMHeadModel.from_pretrained(theirs)(tokens).logits
        assert torch.allclose(opened.model.logits(tokens), expected, atol=1e-5)


def test_a_folder_without_a_tokenizer_is_known_by_its_vocabulary_or_not_at_all(
    theirs: Path, tmp_path: Path
) -> None:
    with pytest.raises(Invalid, match="has no tokenizer, and 300 tokens are nobody's") as caught:
        open_model(theirs)
    assert "--tokenizer" in caught.value.hint
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for vocabulary, name in ((50257, "gpt2"), (256, "bytes")):
        config = TrainerConfig(DataConfig(["-"]), ModelConfig(vocab_size=vocabulary), TrainConfig(1, steps=1))
        assert bases.tokenizer_of(tmp_path, config) == name


def test_a_tokenizer_file_is_recognised_by_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": bases.byte_vocabulary(), "merges": []}}))
    assert bases._of_file(path) == "bytes"
    path.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}))
    assert bases._of_file(path) == str(path)
    path.write_text("{")
    with pytest.raises(Invalid, match=r"is no tokenizer\.json"):
        bases._of_file(path)


def test_gpt2_s_own_merges_are_gpt2(tmp_path: Path) -> None:
    if not BPE.is_dir():
        pytest.skip("GPT-2's vocabulary is not here (../shared/gpt2-bpe)")
    text = next(path.read_text(encoding="utf-8") for path in BPE.iterdir() if path.stat().st_size < 500_000)
    merges = [line.split(" ") for line in text.split("\n")[1:] if line]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {}, "merges": merges}}))
    assert bases._of_file(path) == "gpt2"
    path.write_text(json.dumps({"model": {"vocab": {}, "merges": merges[:-1]}}))
    assert bases._of_file(path) == str(path)


def test_a_tokenizer_of_another_vocabulary_is_refused(ours: Path, gpt2_vocabulary: None) -> None:
    with pytest.raises(Invalid, match="the tokenizer gpt2 has 50257 tokens, the model's vocabulary 256"):
        open_model(ours, tokenizer="gpt2")
    with pytest.raises(Invalid, match="there is no tokenizer"):
        open_model(ours, tokenizer="/nowhere/tokenizer.json")


def test_what_is_no_model_is_said(tmp_path: Path, ours: Path) -> None:
    with pytest.raises(Invalid, match=r"has no config\.json"):
        open_model(tmp_path)
    with pytest.raises(Invalid, match="is no folder"):
        open_model(tmp_path / "missing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(Invalid, match="holds a bert model"):
        open_model(tmp_path, tokenizer="bytes")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True})
    )
    with pytest.raises(Invalid, match="scale_attn_by_inverse_layer_idx is True"):
        open_model(tmp_path, tokenizer="bytes")
    broken = write(tmp_path / "broken")
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(Invalid, match="does not have the checksum"):
        open_model(broken)


def test_a_model_is_known_by_its_weights(ours: Path, theirs: Path, tmp_path: Path) -> None:
    assert bases.identity(ours) == bases.identity(write(tmp_path / "same"))
    other = write(tmp_path / "other", ModelConfig(**{**vars(MODEL), "n_heads": 4}))
    assert len({bases.identity(path) for path in (ours, other, theirs)}) == 3


def test_a_model_on_the_hub_is_fetched_by_name(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[Any] = []

    def snapshot(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        assert "model*.safetensors" in allow_patterns
        return str(theirs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("hf://someone/small@main") == theirs and locate("hf://models/someone/small") == theirs
    assert asked == [("someone/small", "main"), ("someone/small", None)]

    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(Offline, match=r"hf://someone/small cannot be fetched: no network"):
        locate("hf://someone/small")
    with pytest.raises(DataError, match="names no model on the Hub"):
        locate("hf://someone")


def test_text_is_drawn_as_the_seed_says_and_bad_prompts_are_refused(ours: Path) -> None:
    opened = open_model(ours)
    drawn = [complete(opened, "def ", Drawing(seed=seed, tokens=20, top_k=100)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(Invalid, match="the prompt is empty"):
        complete(opened, "", Drawing())
    with pytest.raises(Invalid, match="the prompt has 33 tokens, the model was trained on at most 32"):
        complete(opened, "x" * 33, Drawing())


def test_characters_come_whole_and_the_separator_ends_the_text() -> None:
    tokenizer = tokenize.load("bytes")
    text = "né — 你好"
    assert list(pieces(tokenizer, [*text.encode(), 0, *b"more"])) == list(text)
    assert "".join(pieces(tokenizer, [0xC3])) == "\ufffd"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_stop_text_is_found_over_the_edges_of_pieces(size: int) -> None:
    text = "one ### two###stop### three"
    cut = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(until(cut, ["###stop", "zzz"])) == "one ### two"
    assert "".join(until(cut, [])) == text and "".join(until(cut, ["absent"])) == text
