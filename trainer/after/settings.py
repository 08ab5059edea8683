"""The configurations of the scripts in this package, read and checked like the trainer's own. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from trainer import config as configuration
from trainer.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    TrainConfig,
    TrainerConfig,
    Tuned,
)


@dataclass(frozen=True)
class TuneData:
    """Examples as JSON lines of token numbers; see `trainer.after.examples`."""

    train: list[str]
    """Files of training examples."""
    validation: list[str]
    """Files of held-out examples: they choose the best epoch and end the run."""
    test: list[str] = field(default_factory=list)
    """Files on which the best epoch is measured at the end, each under a name of its own."""
    tokenizer: str = "gpt2"
    """What the tokens mean; recorded in the checkpoint."""
    template: str | None = None
    """The chat template of the examples; recorded in the checkpoint."""
    max_length: int | None = None
    """Longest sequence; null: the model's context. Longer examples are cut at the end."""


@dataclass(frozen=True)
class TuneTrain:
    """How an existing model is trained on."""

    epochs: int = 3
    """Passes over the training examples, at most."""
    patience: int = 1
    """Epochs in a row without a lower validation loss after which the run ends."""
    global_batch_size: int = 8
    """Examples per optimizer step over all processes; an epoch's last step may have fewer."""
    microbatch_size: int | None = None
    """Examples per forward on one process; null: the largest divisor of its share up to 8."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step of the last epoch (cosine, wsd)."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """As in pretraining, over all epochs."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors have none."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    drop_rate: float = 0.0
    """Dropout, whatever the base was trained with."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute type; the weights stay float32."""
    deterministic: bool = False
    """Bit-exact resume on a GPU too, at some cost in speed."""
    seed: int = 42
    """Order of the examples, dropout, and the first weights of whatever is new."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Never falls back from one to the other in silence."""
    processes_per_node: int | None = None
    """Processes of torchrun on each node; null: one per GPU (cpu: one)."""
    log_every: int = 10
    """Steps between lines in the log."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., LoRA, 2021): W + alpha/rank · B·A with only A and B trained."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """Scale of the product, divided by the rank."""
    targets: list[str] = field(default_factory=lambda: ["query", "value"])
    """Linear maps of each block that are adapted: query, key, value, output, up, gate, down."""


@dataclass(frozen=True)
class FinetuneConfig:
    """config.json of `trainer.after.finetune`."""

    base: str
    """The checkpoint to start from, ours or a GPT-2-shaped Hugging Face folder."""
    data: TuneData
    train: TuneTrain = field(default_factory=TuneTrain)
    lora: LoraConfig | None = None
    """Train adapters instead of the weights."""
    mask_prompt: bool = True
    """Count the loss of the response only; false: of the prompt too."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True)
class ClassifyConfig:
    """config.json of `trainer.after.classify`."""

    base: str
    """The checkpoint to start from, ours or a GPT-2-shaped Hugging Face folder."""
    classes: list[str]
    """The labels in the order of their numbers."""
    data: TuneData
    train: TuneTrain = field(default_factory=TuneTrain)
    trainable: Literal["all", "last_block", "head"] = "last_block"
    """What is trained besides the new head; last_block includes the final norm."""
    lora: LoraConfig | None = None
    """Train adapters and the head, whatever `trainable` says."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True)
class DpoConfig:
    """config.json of `trainer.after.dpo`."""

    base: str
    """The checkpoint to start from, and the reference that the loss compares with."""
    data: TuneData
    train: TuneTrain = field(default_factory=lambda: TuneTrain(learning_rate=5e-7, epochs=1))
    beta: float = 0.1
    """How strongly the model is held to the reference."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


Settings = FinetuneConfig | ClassifyConfig | DpoConfig
T = TypeVar("T", FinetuneConfig, ClassifyConfig, DpoConfig)


def load(kind: type[T], path: Path) -> T:
    """Read and check a config.json. Raises ConfigError naming the field."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), error.strerror or str(error)) from error
    except ValueError as error:
        raise ConfigError(str(path), f"is not JSON: {error}") from error
    settings: T = configuration.from_dict(kind, raw, "")
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    train, lora = settings.train, settings.lora
    _require(bool(settings.data.train), "data.train", "names no file")
    _require(
        bool(settings.data.validation),
        "data.validation",
        "names no file; without one no epoch is better than another",
    )
    for name in ("epochs", "patience", "global_batch_size", "log_every"):
        _require(getattr(train, name) >= 1, f"train.{name}", "must be at least 1")
    _require(0 <= train.drop_rate < 1, "train.drop_rate", "must be in [0, 1)")
    if lora is not None:
        _require(lora.rank >= 1, "lora.rank", "must be at least 1")
        _require(lora.alpha > 0, "lora.alpha", "must be positive")
        _require(bool(lora.targets), "lora.targets", "names nothing to adapt")
    if isinstance(settings, ClassifyConfig):
        _require(
            len(set(settings.classes)) == len(settings.classes) >= 2,
            "classes",
            "must be at least two different labels",
        )
    if isinstance(settings, DpoConfig):
        _require(settings.beta > 0, "beta", "must be positive")


def _require(condition: bool, key: str, message: str) -> None:
    if not condition:
        raise ConfigError(key, message)


def max_length(data: TuneData, model: ModelConfig) -> int:
    """Tokens of the longest sequence. Raises ConfigError where the model was never trained on as many."""
    length = data.max_length or model.context_length
    _require(2 <= length <= model.context_length, "data.max_length",
             f"{length} tokens, but the base model's context is {model.context_length}")  # fmt: skip
    return length


def trainer_config(settings: Settings, model: ModelConfig, examples: int, tuned: Tuned) -> TrainerConfig:
    """What a checkpoint of this run says it is; the steps of all epochs are its length. Raises ConfigError."""
    train = settings.train
    config = TrainerConfig(
        data=DataConfig(train=settings.data.train, validation=settings.data.validation, tokenizer=settings.data.tokenizer),
        model=model,
        train=TrainConfig(
            global_batch_size=train.global_batch_size, steps=train.epochs * steps_per_epoch(train, examples),
            microbatch_size=train.microbatch_size or "auto", learning_rate=train.learning_rate,
            min_learning_rate=train.min_learning_rate, schedule=train.schedule, warmup_steps=train.warmup_steps,
            weight_decay=train.weight_decay, grad_clip=train.grad_clip, betas=train.betas, precision=train.precision,
            deterministic=train.deterministic, seed=train.seed, device=train.device, compile=False,
            processes_per_node=train.processes_per_node, log_every=train.log_every, validate_every=0,
        ),
        checkpoint=settings.checkpoint,
        tuned=tuned,
    )  # fmt: skip
    configuration.check(config)
    return config


def steps_per_epoch(train: TuneTrain, examples: int) -> int:
    """Optimizer steps of one pass over the examples."""
    return -(-examples // train.global_batch_size)


def to_dict(settings: Any) -> dict[str, Any]:
    """The plain JSON value of a configuration."""
    return configuration.to_dict(settings)
