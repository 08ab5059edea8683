"""An exported checkpoint loads in transformers with equal logits and equal tokens, and comes back equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import Invalid
from orchestrator.models.export import card, export, push
from orchestrator.models.load import open_model
from tests.unit.test_models import MODEL, gpt2_vocabulary, one_thread, theirs, write  # noqa: F401
from trainer.config import ModelConfig

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 256
TEXT = "def f(x):\n    return 'né' + x  # 你好\n"


@pytest.mark.parametrize(
    "changes", [{}, {"tie_weights": False, "qkv_bias": True}, {"ffn_dim": 48, "n_heads": 4}]
)
def test_transformers_loads_it_with_equal_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    import transformers

    checkpoint = write(tmp_path / "run", replace(MODEL, **changes))
    folder = export(checkpoint, tmp_path / "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = open_model(checkpoint).model.logits(TOKENS)
        assert torch.allclose(loaded(TOKENS).logits, expected, atol=1e-5)
    back = open_model(folder)
    assert back.tokenizer == "bytes" and torch.allclose(back.model.logits(TOKENS), expected, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer(TEXT)["input_ids"] == list(TEXT.encode()) and tokenizer.decode(list(TEXT.encode())) == TEXT
    )
    assert loaded.generation_config.eos_token_id == 0 and loaded.config.eos_token_id == 0


def test_an_imported_model_comes_out_as_it_went_in(theirs: Path, tmp_path: Path) -> None:  # noqa: F811
    import transformers

    from trainer import checkpoint, hf
    from trainer.checkpoint import Snapshot

    loaded, config = hf.load(theirs)
    weights = {name: tensor.contiguous() for name, tensor in loaded.items()}
    checkpoint.write(
        tmp_path, Snapshot(1, weights, {}, {}), replace(config, data=replace(config.data, tokenizer="bytes"))
    )
    folder = export(tmp_path / "step-000001", tmp_path / "hf")
    tokens = torch.arange(20)[None] * 13 % 300
    first, second = (transformers.GPT2LMHeadModel.from_pretrained(path) for path in (theirs, folder))
    with torch.no_grad():
        assert torch.equal(first(tokens).logits, second(tokens).logits)


def test_gpt2_s_tokenizer_goes_with_the_model(tmp_path: Path, gpt2_vocabulary: None) -> None:  # noqa: F811
    import transformers

    from trainer import tokenize

    model = ModelConfig(
        vocab_size=50257, context_length=16, emb_dim=8, n_heads=1, n_layers=1, tie_weights=True
    )
    folder = export(write(tmp_path / "run", model, "gpt2"), tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT)["input_ids"] == tokenize.encode("gpt2", TEXT)
    assert tokenizer.eos_token_id == 50256 and tokenizer.model_max_length == 16
    assert open_model(folder).tokenizer == "gpt2"
    (folder / "tokenizer.json").unlink()
    assert open_model(folder).tokenizer == "gpt2"  # by merges.txt


def test_a_trained_tokenizer_is_taken_along(tmp_path: Path) -> None:
    import transformers

    from trainer import tokenize

    path = tmp_path / "tokenizer.json"
    tokenize.train_bpe(["the cat sat on the mat, the cat sat still"] * 3, 270, path)
    size = tokenize.load(str(path)).vocab_size
    folder = export(write(tmp_path / "run", replace(MODEL, vocab_size=size), str(path)), tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the cat")["input_ids"] == tokenize.encode(str(path), "the cat")
    assert tokenizer.eos_token_id == tokenize.load(str(path)).separator


def test_what_transformers_does_not_know_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "run", replace(MODEL, activation="relu2"))
    with pytest.raises(Invalid, match="cannot be exported"):
        export(checkpoint, tmp_path / "out" / "hf")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(Invalid, match="is there already"):
        export(write(tmp_path / "other"), tmp_path / "full")
    with pytest.raises(Invalid, match=r"has no model\.safetensors"):
        export(tmp_path, tmp_path / "hf")
    with pytest.raises(Invalid, match="they do not belong together"):
        export(write(tmp_path / "small", replace(MODEL, vocab_size=100)), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_card_says_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    facts = {"run": "small-ab12", "step": 600, "cost_usd": 1.234, "billed_hours": 0.5, "instance_type": "gpu_8x_a100",
             "validation_loss": 3.21987, "evaluations": [{"name": "fineweb-gpjt", "loss": 3.5}], "licence": "apache-2.0"}  # fmt: skip
    folder = export(write(tmp_path / "run"), tmp_path / "hf", facts=facts)
    text = (folder / "README.md").read_text()
    for part in ("license: apache-2.0", "# hf", "| run | small-ab12 |", "step 600", "$1.23", "0.50 hours", "gpu_8x_a100",
                 "| validation | 3.2199 |", "| fineweb-gpjt | 3.5000 |", "| layers | 2 |", "| tied embeddings | yes |"):  # fmt: skip
        assert part in text
    assert "| training |" not in text and "None" not in text
    config = open_model(write(tmp_path / "bare")).config
    bare = card({"name": "x", "family": "gpt2", "config": config, "tokenizer": "bytes"})
    assert "Cost" not in bare and "Loss" not in bare and "license" not in bare


class Hub:
    """A hub that remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_pushing_uploads_the_folder_and_needs_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, hub = export(write(tmp_path / "run"), tmp_path / "hf"), Hub()
    assert push(folder, "someone/small", api=hub) == "https://huggingface.co/someone/small"
    files = [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert hub.calls == [("create", "someone/small", True, True), ("upload", "someone/small", files)]
    with pytest.raises(Invalid, match="is no repository"):
        push(folder, "small", api=hub)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(Invalid, match="there is no token"):
        push(folder, "someone/small")
