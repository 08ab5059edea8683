"""The trainer's configuration: the spec's sections `data`, `model`, `train`, `checkpoint` and `evaluate`.

Standard library only, because it goes to the node. Pydantic validates these same classes where a RunSpec embeds
them (`__pydantic_config__` forbids unknown keys there), so a field exists once and means one thing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

FORBID: dict[str, Any] = {"extra": "forbid"}


class ConfigError(ValueError):
    """A configuration that cannot be trained: `key` is the dotted field, the message says why and what would do."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `90s`, `30m`, `6h`, `2d` or `1h30m`. Raises ValueError on anything else."""
    parts = _DURATION.findall(text)
    if not parts or _DURATION.sub("", text).strip():
        raise ValueError(f"{text!r} is not a duration; write 90s, 30m, 6h or 2d")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


@dataclass(frozen=True)
class DataConfig:
    """Token shards. In a spec: paths, globs, `s3://`, `hf://repo/file`, `builtin:NAME`. On the node: paths."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    train: list[str]
    """Training shards, in the order in which they are read."""
    validation: list[str] = field(default_factory=list)
    """Held-out shards; empty: no validation."""
    tokenizer: str = "gpt2"
    """`gpt2`, `bytes`, or the path of a tokenizer.json."""
    train_tokens: list[int] | None = None
    """Tokens in each training shard. Written by llmctl, so that training can start before all shards are there."""


@dataclass(frozen=True)
class ModelConfig:
    """A GPT-2-shaped decoder; the defaults are GPT-2 small with an untied head."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    vocab_size: int = 50257
    """Tokens in the vocabulary; the embedding is padded inside, the loss is over these."""
    context_length: int = 1024
    """Tokens in one sequence."""
    emb_dim: int = 768
    """Width of the residual stream."""
    n_heads: int = 12
    """Attention heads; divides emb_dim."""
    n_layers: int = 12
    """Transformer blocks."""
    drop_rate: float = 0.0
    """Dropout on embeddings, attention and residual branches."""
    qkv_bias: bool = False
    """Biases in the query, key and value projections."""
    tie_weights: bool = False
    """The output head shares the token embedding's weights."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm with scale and shift, or RMSNorm with scale."""
    activation: Literal["gelu", "relu2", "swiglu"] = "gelu"
    """Feed-forward non-linearity: tanh GELU, squared ReLU, or gated SiLU."""
    position: Literal["learned", "rope"] = "learned"
    """Learned absolute positions, or rotary."""
    rotary_fraction: float = 1.0
    """Share of each head's dimensions that rotate (position: rope)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    n_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); null: n_heads."""
    ffn_dim: int | None = None
    """Hidden width of the feed-forward layers; null: 4·emb_dim (swiglu: 8/3 of emb_dim, rounded up to 256)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head."""
    logit_softcap: float | None = None
    """Bound c of the logits: c·tanh(x/c); null: none."""
    init: Literal["gpt2", "torch", "zero_proj"] = "gpt2"
    """gpt2: N(0, 0.02), residual projections by 1/√(2·layers); torch: the modules' own; zero_proj: residual projections at zero."""


HARMLESS = ("tokens", "steps", "learning_rate", "min_learning_rate", "schedule", "warmup_steps", "weight_decay", "grad_clip", "betas",
            "eps", "muon_learning_rate", "cooldown_fraction", "seed", "log_every", "validate_every", "validation_tokens")  # fmt: skip
"""Of the section `train`: what changes neither memory nor compiled code."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how big, how fast. The loss depends on `global_batch_size`; the machine on `microbatch_size`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    global_batch_size: int
    """Sequences per optimizer step over all processes."""
    tokens: int | None = None
    """Tokens to train on, rounded down to whole steps; or `steps`."""
    steps: int | None = None
    """Optimizer steps; or `tokens`."""
    microbatch_size: int | Literal["auto"] = "auto"
    """Sequences per forward on one process; divides global_batch_size / processes."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the blocks' matrices with AdamW for the rest."""
    learning_rate: float = 4e-4
    """Peak learning rate of AdamW."""
    min_learning_rate: float = 4e-5
    """Learning rate at the last step (cosine, wsd), in AdamW's scale; Muon's falls by the same factor."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """After the warm-up: constant, cosine to the minimum, or stable and then linear to the minimum (wsd)."""
    warmup_steps: int = 500
    """Steps of linear warm-up from zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors have none."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute type; master weights are always float32."""
    deterministic: bool = False
    """Bit-exact resume on a GPU too, at some cost in speed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon (optimizer: muon)."""
    cooldown_fraction: float = 0.7
    """Share of the steps in which wsd decays."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Replicate (ddp) or shard (fsdp) parameters and optimizer state."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in backward."""
    compile: bool = True
    """torch.compile each block."""
    seed: int = 42
    """Seed of weights and dropout; the data order does not depend on it."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Never falls back from one to the other in silence."""
    processes_per_node: int | None = None
    """Processes of torchrun on each node; null: one per GPU (cpu: one)."""
    log_every: int = 10
    """Steps between lines in the log."""
    validate_every: int = 500
    """Steps between validations; 0: only at the end."""
    validation_tokens: int = 1_000_000
    """Tokens of the validation shards that one validation reads."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, which stay, and which come home."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    every_steps: int = 500
    """Steps between checkpoints; 0: not by steps."""
    every: str | None = "15m"
    """Time between checkpoints, whichever comes first; null: not by time."""
    keep: int = 2
    """Latest checkpoints kept on the node, besides the best; with `fetch: all` also those not fetched yet, while its disk has room."""
    fetch: Literal["none", "latest", "best", "all"] = "best"
    """What is pulled when the run succeeds; on any other end it is the full latest one, always."""
    push: str | None = None
    """s3:// prefix to which the node uploads every checkpoint."""


@dataclass(frozen=True)
class TestSet:
    """An immutable slice of tokens on which a loss means the same for ever."""

    __test__: ClassVar[bool] = False
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    name: str
    """What it is called; llmctl adds hash, offset and token count, and losses are compared only under one whole name."""
    data: list[str]
    """Shards that hold the slice."""
    offset: int = 0
    """First token of the slice."""
    tokens: int = 1_000_000
    """Tokens that are predicted."""
    bytes: int | None = None
    """UTF-8 bytes that those tokens stand for, for bits per byte; written by llmctl."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured once training has ended."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    test_sets: list[TestSet | str] = field(default_factory=list)
    """Named test sets: a built-in name, or {name, data, offset, tokens}."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that the final model continues."""
    prompt_tokens: list[list[int]] = field(default_factory=list)
    """The prompts as tokens. Written by llmctl: the node has no tokenizer."""


@dataclass(frozen=True)
class Tuned:
    """What a checkpoint became after pretraining. Written by the scripts of trainer.after, read by whoever opens it."""

    kind: Literal["instruction", "classification", "preference"]
    """Which script made it."""
    template: str | None = None
    """The chat template that its examples were written in."""
    classes: list[str] = field(default_factory=list)
    """The labels of a classifier's head, in order."""


@dataclass(frozen=True)
class TrainerConfig:
    """`config.json`: everything the trainer reads."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tuned: Tuned | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return self.train.tokens // self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all processes."""
        return self.train.global_batch_size * self.model.context_length


def check(config: TrainerConfig) -> None:
    """Refuse what cannot be trained, before a node or a GPU is touched. Raises ConfigError naming the field."""
    _check_model(config.model)
    _check_train(config.train)
    checkpoint = config.checkpoint
    require(checkpoint.every_steps >= 0, "checkpoint.every_steps", "must not be negative")
    require(checkpoint.keep >= 1, "checkpoint.keep", "at least one checkpoint must stay")
    if checkpoint.every is not None:
        try:
            seconds = parse_duration(checkpoint.every)
        except ValueError as error:
            raise ConfigError("checkpoint.every", str(error)) from None
        require(seconds > 0, "checkpoint.every", "must be longer than nothing")
    require(bool(config.data.train), "data.train", "names no shard")
    require(config.steps >= 1, "train.tokens",
             f"{config.train.tokens} tokens are less than one step of {config.tokens_per_step}")  # fmt: skip


def _check_model(model: ModelConfig) -> None:
    for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
        require(getattr(model, name) >= 1, f"model.{name}", "must be at least 1")
    require(model.emb_dim % model.n_heads == 0, "model.n_heads",
             f"{model.n_heads} heads do not divide emb_dim {model.emb_dim}")  # fmt: skip
    require(0 <= model.drop_rate < 1, "model.drop_rate", "must be in [0, 1)")
    require(model.ffn_dim is None or model.ffn_dim >= 1, "model.ffn_dim", "must be at least 1")
    if model.n_kv_heads is not None:
        require(model.n_kv_heads >= 1 and model.n_heads % model.n_kv_heads == 0, "model.n_kv_heads",
                 f"{model.n_kv_heads} does not divide n_heads {model.n_heads}")  # fmt: skip
    if model.position == "rope":
        rotated = model.emb_dim // model.n_heads * model.rotary_fraction
        require(0 < model.rotary_fraction <= 1 and rotated % 2 == 0, "model.rotary_fraction",
                 f"must leave an even number of rotated dimensions per head, not {rotated:g}")  # fmt: skip
        require(_finite(model.rope_theta) and model.rope_theta > 0, "model.rope_theta", "must be positive")
    if model.logit_softcap is not None:
        require(
            _finite(model.logit_softcap) and model.logit_softcap > 0,
            "model.logit_softcap",
            "must be positive",
        )


def _check_train(train: TrainConfig) -> None:
    require((train.tokens is None) != (train.steps is None), "train.tokens", "give either tokens or steps")
    for name in (
        "tokens",
        "steps",
        "global_batch_size",
        "processes_per_node",
        "log_every",
        "validation_tokens",
    ):
        value = getattr(train, name)
        require(value is None or value >= 1, f"train.{name}", "must be at least 1")
    for name in ("warmup_steps", "validate_every"):
        require(getattr(train, name) >= 0, f"train.{name}", "must not be negative")
    for name in ("learning_rate", "muon_learning_rate", "eps"):
        require(
            _finite(getattr(train, name)) and getattr(train, name) > 0,
            f"train.{name}",
            "must be a positive number",
        )
    for name in ("min_learning_rate", "weight_decay", "grad_clip"):
        require(
            _finite(getattr(train, name)) and getattr(train, name) >= 0,
            f"train.{name}",
            "must be a number of at least 0",
        )
    require(train.min_learning_rate <= train.learning_rate or train.schedule == "constant", "train.min_learning_rate",
             f"{train.min_learning_rate:g} is above learning_rate {train.learning_rate:g}")  # fmt: skip
    require(all(0 <= beta < 1 for beta in train.betas), "train.betas", "must be in [0, 1)")
    require(0 <= train.cooldown_fraction <= 1, "train.cooldown_fraction", "must be in [0, 1]")
    require(not (train.sharding == "fsdp" and train.optimizer == "muon"), "train.sharding",
             "fsdp shards the matrices that muon needs whole; use adamw or ddp")  # fmt: skip
    if train.microbatch_size != "auto":
        require(train.microbatch_size >= 1, "train.microbatch_size", "must be at least 1, or auto")
    if train.processes_per_node:
        check_batch(train, train.processes_per_node)


def check_batch(train: TrainConfig, processes: int) -> None:
    """Raises ConfigError unless the global batch divides over `processes` and the microbatch divides that share."""
    share, rest = divmod(train.global_batch_size, processes)
    require(rest == 0, "train.global_batch_size",
             f"{train.global_batch_size} does not divide over {processes} processes; "
             f"{processes * max(1, share)} or {processes * (share + 1)} would")  # fmt: skip
    if train.microbatch_size != "auto" and train.microbatch_size >= 1:  # what is below is refused by `check`
        require(share % train.microbatch_size == 0, "train.microbatch_size",
                 f"{train.microbatch_size} does not divide the {share} sequences of each process; "
                 f"{', '.join(map(str, divisors(share)))} would")  # fmt: skip


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _finite(value: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def require(condition: bool, key: str, message: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(key, message)
