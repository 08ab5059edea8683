"""A model as a folder that `transformers` loads: weights, configuration, generation settings, tokenizer, model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from orchestrator.data.bases import byte_vocabulary, fitting, tokenizer_of
from orchestrator.errors import Invalid
from orchestrator.models.load import need_torch

END_OF_TEXT = "<|endoftext|>"
_GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"


class HubApi(Protocol):
    """What `push` needs of huggingface_hub.HfApi."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make the repository unless it is there."""

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        """Upload every file."""


def export(
    checkpoint: Path, to: Path, *, facts: Mapping[str, Any] | None = None, tokenizer: str | None = None
) -> Path:
    """Write the checkpoint in `checkpoint` as a Hugging Face folder `to`, which must not be there yet or be empty; it
    appears whole or not at all. `facts` go into the model card: see `card`.

    Raises Invalid where no transformers architecture computes the same, or the tokenizer cannot be had.
    """
    need_torch()
    from trainer import checkpoint as checkpoints
    from trainer import hf
    from trainer.config import ConfigError

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Invalid(f"{to} is there already", "choose a folder that is new or empty")
    if not (checkpoint / checkpoints.WEIGHTS).exists():
        raise Invalid(f"{checkpoint} has no {checkpoints.WEIGHTS}", "name the folder of a checkpoint")
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        config = checkpoints.load_config(checkpoint)
        if config.tuned is not None and config.tuned.kind == "classification":
            raise Invalid(
                "a classifier is no language model; GPT-2 in transformers has another head", "export its base"
            )
        hf.family(config.model)
        name = tokenizer or tokenizer_of(checkpoint, config)
        end = fitting(name, config.model.vocab_size).separator
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        family = hf.export(checkpoint, temporary)
        write_tokenizer(name, temporary, config.model.context_length)
        _name_end(temporary, end)
        document = {"name": to.name, "family": family, "config": config, "tokenizer": name, **(facts or {})}
        (temporary / "README.md").write_text(card(document), encoding="utf-8")
        if to.exists():
            to.rmdir()
        temporary.rename(to)
    except ConfigError as error:
        raise Invalid(str(error), "only GPT-2- and Llama-shaped models can be exported") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return to


def _name_end(folder: Path, end: int | None) -> None:
    """Which token ends a text, in the model's configuration and in that of `generate`."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "bos_token_id": end, "eos_token_id": end}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 50,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(name: str, folder: Path, context_length: int) -> None:
    """tokenizer.json, and what AutoTokenizer needs beside it. Raises Invalid where GPT-2's vocabulary cannot be had."""
    if name == "bytes":
        _byte_level(byte_vocabulary(), [], folder)
    elif name == "gpt2":
        merges, encoder = (_published(file) for file in _GPT2_FILES)
        pairs = [tuple(line.split(" ")) for line in merges.decode().split("\n")[1:] if line]
        _byte_level(json.loads(encoder), pairs, folder)
        (folder / "merges.txt").write_bytes(merges)
        (folder / "vocab.json").write_bytes(encoder)
    else:
        shutil.copyfile(name, folder / "tokenizer.json")
    special = (
        {}
        if name == "bytes"
        else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    )
    if name not in {"bytes", "gpt2"} and fitting(name, 1 << 32).separator is None:
        special = {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length,
              "clean_up_tokenization_spaces": False, **special}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _byte_level(vocabulary: dict[str, int], merges: list[Any], folder: Path) -> None:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise Invalid(
            "writing a tokenizer needs tokenizers", "pip install 'llmctl[data]'", code="no-extra"
        ) from error
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocabulary:
        made.add_special_tokens([END_OF_TEXT])
    made.save(str(folder / "tokenizer.json"))


def _published(file: str) -> bytes:
    """One of the two files of GPT-2's vocabulary, from tiktoken's cache or the place that tiktoken has it from."""
    try:
        from tiktoken.load import read_file_cached
    except ImportError as error:
        raise Invalid(
            "GPT-2's tokenizer needs tiktoken", "pip install 'llmctl[data]'", code="no-extra"
        ) from error
    try:
        data: bytes = read_file_cached(f"{_GPT2_URL}/{file}", _GPT2_FILES[file])
    except (OSError, ValueError) as error:
        raise Invalid(f"GPT-2's {file} cannot be had: {error}",
                      "it is downloaded once; without a network set TIKTOKEN_CACHE_DIR to a folder that has it") from error  # fmt: skip
    return data


def card(document: Mapping[str, Any]) -> str:
    """The model card. `document` has name, family, config, tokenizer, and where known: run, step, cost_usd, billed_hours,
    instance_type, train_loss, validation_loss, evaluations (a list of {name, loss, …}), licence. What is not known is left out."""
    from trainer import flops

    config = document["config"]
    model, train = config.model, config.train
    licence, shape = document.get("licence"), "GPT-2" if document["family"] == "gpt2" else "Llama"
    head = [
        "---",
        *([f"license: {licence}"] if licence else []),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
    ]
    what = f"A {shape}-shaped language model with {flops.parameters(model):,} parameters, trained and exported with llmctl."
    lines = [*head, "", f"# {document['name']}", "", what, ""]
    lines += _section("Model", {
        "layers": model.n_layers, "width": model.emb_dim, "heads": model.n_heads, "context": f"{model.context_length} tokens",
        "vocabulary": f"{model.vocab_size} ({Path(document['tokenizer']).name})", "tied embeddings": "yes" if model.tie_weights else "no",
    })  # fmt: skip
    lines += _section("Training", {
        "run": document.get("run"), "checkpoint": f"step {document['step']}" if document.get("step") is not None else None,
        "data": ", ".join(Path(item).name if item.startswith("/") or ".." in item else item for item in config.data.train),
        "tokens": f"{config.steps * config.tokens_per_step:,}" if config.tuned is None else None,
        "tuned": None if config.tuned is None else f"{config.tuned.kind}, format {config.tuned.template}",
        "global batch": f"{train.global_batch_size} sequences", "optimizer": train.optimizer, "learning rate": f"{train.learning_rate:g}",
        "precision": train.precision, "seed": train.seed,
    })  # fmt: skip
    lines += _section("Cost", {
        "machine": document.get("instance_type"), "billed": _number(document.get("billed_hours"), "{:.2f} hours"),
        "total": _number(document.get("cost_usd"), "${:.2f}"),
    })  # fmt: skip
    losses = {
        "training": _number(document.get("train_loss"), "{:.4f}"),
        "validation": _number(document.get("validation_loss"), "{:.4f}"),
    }
    losses |= {
        item["name"]: _number(item.get("loss"), "{:.4f}") for item in document.get("evaluations") or []
    }
    lines += _section("Loss (nats per token)", losses)
    return "\n".join(lines)


def _section(title: str, values: Mapping[str, Any]) -> list[str]:
    known = {key: value for key, value in values.items() if value is not None}
    rows = [f"| {key} | {value} |" for key, value in known.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *rows, ""] if rows else []


def _number(value: Any, form: str) -> str | None:
    return form.format(value) if isinstance(value, (int, float)) else None


def may_push(repo: str, *, token: bool = True) -> None:
    """Raise Invalid where an upload could not even be tried: the name is none, or (with `token`) there is no token."""
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise Invalid(f"{repo!r} is no repository", "write it as owner/name")
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise Invalid(
            "pushing needs huggingface_hub", "pip install 'llmctl[data]'", code="no-extra"
        ) from error
    if token and get_token() is None:
        raise Invalid("there is no token for the Hugging Face Hub", "set HF_TOKEN to one that may write")


def push(folder: Path, repo: str, *, private: bool = True, api: HubApi | None = None) -> str:
    """Upload an exported folder to a model repository on the Hub, made private unless told otherwise; its address.

    Raises Invalid where there is no token, the name is none, or the Hub refuses.
    """
    may_push(repo, token=api is None)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    client: HubApi = api or HfApi()
    try:
        client.create_repo(repo, private=private, exist_ok=True)
        client.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload model")
    except (HfHubHTTPError, OSError) as error:
        raise Invalid(f"the Hub did not take {repo}: {(str(error) or type(error).__name__).splitlines()[0]}",
                      "check the name and that the token may write; the folder is kept") from error  # fmt: skip
    return f"https://huggingface.co/{repo}"
