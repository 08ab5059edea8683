"""How good a model is, measured here: the loss on a named slice of tokens, and HellaSwag.

A slice's name says what it is: the built-in ones are published protocols (trainer/slices.py); any other is named by the
hash of its data, the offset and the number of tokens, so that two losses under one name are of the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.data import shares
from orchestrator.data.bases import fitting
from orchestrator.data.errors import DataError
from orchestrator.errors import Invalid
from orchestrator.models.load import Opened

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config import TestSet
    from trainer.tokenize import Tokenizer

MICROBATCH = 8
HELLASWAG = ("Rowan/hellaswag", "refs/convert/parquet", "default/validation/0000.parquet")
"""The validation split on the Hub: dataset, revision and file."""


def slice_name(paths: Sequence[Path], offset: int, tokens: int, name: str = "") -> str:
    """The whole name of a slice of local files; without a `name` that of the first file stands in it. Raises DataError."""
    return shares.slice_name(name or paths[0].stem, [_sha256(path) for path in paths], offset, tokens)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}", "Name a shard that is on this machine"
        ) from error
    return digest.hexdigest()


def evaluate_slice(
    opened: Opened, test_set: TestSet, *, context_length: int | None = None, microbatch_size: int = MICROBATCH
) -> dict[str, Any]:
    """Mean loss, perplexity and bits per byte on a slice whose shards are on this machine, as a line of evaluations.json.

    `context_length` replaces the model's, which it must not exceed. A slice without a name gets one from its content.
    Raises Invalid, DataError.
    """
    from trainer.config import ConfigError
    from trainer.distributed import World
    from trainer.evaluate import mean_loss, summary
    from trainer.shards import ShardError

    model = opened.config.model
    if context_length is not None and not 1 <= context_length <= model.context_length:
        raise Invalid(f"a context of {context_length} tokens, but the model was trained on at most {model.context_length}",
                      "choose a shorter one")  # fmt: skip
    paths = [Path(path) for path in test_set.data]
    if not test_set.name:
        test_set = replace(test_set, name=slice_name(paths, test_set.offset, test_set.tokens))
    shape = replace(model, context_length=context_length or model.context_length)
    device = opened.model.token_embedding.weight.device
    here = World(rank=0, size=1, local_rank=0, local_size=1, device=device)
    try:
        loss = mean_loss(opened.model, paths, offset=test_set.offset, tokens=test_set.tokens, config=shape,
                         microbatch_size=microbatch_size, here=here)  # fmt: skip
        count = test_set.bytes or slice_bytes(
            opened, paths, test_set.offset, test_set.tokens, shape.context_length
        )
    except ShardError as error:
        raise DataError(str(error), "Check that the slice was made with the model's tokenizer") from error
    except ConfigError as error:
        raise Invalid(str(error), "ask for fewer tokens, or a smaller offset") from error
    assert loss is not None
    return {
        **summary(replace(test_set, bytes=count), loss, 0),
        "checkpoint_step": None,
        "context_length": shape.context_length,
    }


def slice_bytes(opened: Opened, paths: Sequence[Path], offset: int, tokens: int, context_length: int) -> int:
    """UTF-8 bytes that the predicted tokens of a slice stand for. Raises DataError, ShardError."""
    import numpy as np

    from trainer import shards
    from trainer.batches import map_tokens
    from trainer.tokenize import TokenizerError

    tokenizer = fitting(opened.tokenizer, opened.config.model.vocab_size)
    try:
        lengths = np.array(tokenizer.lengths(), dtype=np.int64)
    except TokenizerError as error:
        raise DataError(f"bits per byte are not known: {error}", "Give the slice's `bytes`") from error
    infos = [shards.probe(path) for path in paths]
    starts, skip = [], offset
    for info in infos:
        starts.append(min(skip, info.tokens))
        skip -= starts[-1]
    total, left = 0, tokens
    for info, start in zip(infos, starts, strict=True):
        whole = max(0, info.tokens - start - 1) // context_length * context_length
        taken = min(left, whole)
        if taken:
            targets = np.asarray(map_tokens(info)[start + 1 : start + 1 + taken])
            if targets.max() >= len(lengths):
                raise DataError(f"{info.path} has token {targets.max()}, the tokenizer {opened.tokenizer} only {len(lengths)}",
                                "The slice was made with another tokenizer")  # fmt: skip
            total += int(lengths[targets].sum())
        left -= taken
    return total


@dataclass(frozen=True)
class Choice:
    """One HellaSwag item: a context, four endings, and which one is right."""

    context: str
    endings: tuple[str, ...]
    right: int


def hellaswag_items(path: Path, limit: int | None = None) -> list[Choice]:
    """The items of a local JSON-lines or parquet file. Raises DataError naming the line."""
    rows = _parquet(path) if path.suffix == ".parquet" else _lines(path)
    items: list[Choice] = []
    for raw, where in rows:
        if limit is not None and len(items) >= limit:
            break
        items.append(_choice(raw, where))
    if not items:
        raise DataError(f"{path} holds no item", "HellaSwag's files have one JSON object a line")
    return items


def _choice(raw: Any, where: str) -> Choice:
    fine = isinstance(raw, dict) and isinstance(raw.get("ctx"), str) and isinstance(raw.get("endings"), list)
    endings = [item for item in raw["endings"] if isinstance(item, str) and item] if fine else []
    label = str(raw.get("label", "")) if fine else ""
    if not fine or not raw["ctx"] or len(endings) < 2 or len(endings) != len(raw["endings"]):
        raise DataError(
            f"{where}: an item has `ctx`, a text, and `endings`, a list of texts",
            "Correct the line, or leave it out",
        )
    if not label.isdigit() or int(label) >= len(endings):
        raise DataError(
            f"{where}: label {label!r} names no ending; the test split has no labels",
            "Use the validation split",
        )
    return Choice(raw["ctx"], tuple(endings), int(label))


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    try:
                        yield json.loads(line), where
                    except ValueError as error:
                        raise DataError(f"{where}: is not JSON: {error}", "Fetch the file again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}", "Give HellaSwag's validation file") from error


def _parquet(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise Invalid(
            "reading parquet needs pyarrow", "pip install 'llmctl[data]'", code="no-extra"
        ) from error
    try:
        rows = parquet.read_table(path, columns=["ctx", "endings", "label"]).to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: {error}", "Fetch the file again") from error
    yield from ((row, f"{path}, row {number}") for number, row in enumerate(rows, 1))


def fetch_hellaswag() -> Path:
    """The validation split from the Hub, downloaded once. Raises Invalid, Offline."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise Invalid(
            "HellaSwag from the Hub needs huggingface_hub", "pip install 'llmctl[data]'", code="no-extra"
        ) from error
    from orchestrator.data.errors import Offline

    try:
        return Path(hf_hub_download(HELLASWAG[0], HELLASWAG[2], revision=HELLASWAG[1], repo_type="dataset"))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise Offline(
            f"HellaSwag cannot be fetched: {str(error).splitlines()[0]}", "Give a local file"
        ) from error


def hellaswag(opened: Opened, path: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Completion-style HellaSwag (Zellers et al., 2019): each ending is scored after its context, a space between.

    `accuracy` takes the ending of the highest summed log-probability, `accuracy_normalised` that of the highest mean per
    token; `standard_error` is the binomial one of the latter. Raises DataError, Invalid.
    """
    items = hellaswag_items(path, limit)
    tokenizer = fitting(opened.tokenizer, opened.config.model.vocab_size)
    plain = normalised = 0
    for item in items:
        sums, counts = score(opened, tokenizer, item)
        plain += int(sums.argmax()) == item.right
        normalised += int((sums / counts).argmax()) == item.right
    rate = normalised / len(items)
    name = f"hellaswag-{_sha256(path)[:12]}" + (f"[:{limit}]" if limit is not None else "")
    return {"name": name, "items": len(items), "accuracy": plain / len(items), "accuracy_normalised": rate,
            "standard_error": math.sqrt(rate * (1 - rate) / len(items))}  # fmt: skip


def score(opened: Opened, tokenizer: Tokenizer, item: Choice) -> tuple[Tensor, Tensor]:
    """The log-probability of each ending after the context, and its tokens, both (endings,). A context that is too long
    loses its beginning."""
    import torch

    from trainer.after.batch import padded_rows, shifted
    from trainer.after.heads import response_log_probs

    context = tokenizer.encode(item.context)
    rows = []
    for ending in item.endings:
        tokens = tokenizer.encode(" " + ending)
        room = opened.config.model.context_length + 1 - len(tokens)
        if room < 1:
            raise Invalid(f"an ending has {len(tokens)} tokens, more than the model's context of {opened.config.model.context_length}",
                          "evaluate a model with a longer context")  # fmt: skip
        rows.append(shifted(context[-room:], tokens, mask_prompt=True))
    device = opened.model.token_embedding.weight.device
    tokens_bt, targets_bt = (tensor.to(device) for tensor in padded_rows(rows))
    with torch.inference_mode():
        return response_log_probs(opened.model, tokens_bt, targets_bt).cpu(), (targets_bt >= 0).sum(1).cpu()
