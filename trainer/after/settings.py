"""What may be done with a checkpoint: the spec's section `tune`, one class a method, and the config.json of each script.

Standard library only. As with `trainer.config`, pydantic validates the classes of the section where a RunSpec embeds them;
a script's config.json is its section with the node's paths and the spec's `checkpoint` and `evaluate` beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from trainer import config as configuration
from trainer import reading
from trainer.config import (
    FORBID,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    TrainConfig,
    TrainerConfig,
    Tuned,
    require,
)


@dataclass(frozen=True)
class TuneData:
    """Examples. In a spec: files of text or `builtin:NAME`. On the node: JSON lines of token numbers (`trainer.after.examples`)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    train: list[str]
    """Training examples: files, or `builtin:instructions` (finetune), `builtin:reviews` (classify), `builtin:preferences` (dpo)."""
    validation: list[str] = field(default_factory=list)
    """Held-out examples, which choose the best epoch and end the run; empty: a built-in set's own part, of other files every tenth item."""
    test: list[str] = field(default_factory=list)
    """Files on which the best epoch is measured at the end, each under a name of its own; a built-in set brings its own."""
    tokenizer: str | None = None
    """`gpt2`, `bytes` or the path of a tokenizer.json; null: the base's own."""
    template: str | None = None
    """`alpaca` or `llama2`: how a request becomes a prompt; null: the base's own where it was tuned, else alpaca."""
    max_length: int | None = None
    """Longest sequence in tokens; null: the model's context. Longer examples are cut at the end."""


@dataclass(frozen=True)
class TuneTrain:
    """How an existing model is trained on."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

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

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """Scale of the product, divided by the rank."""
    targets: list[str] = field(default_factory=lambda: ["query", "value"])
    """Linear maps of each block that are adapted: query, key, value, output, up, gate, down."""


@dataclass(frozen=True)
class Known:
    """What llmctl found out about the base and the examples before the run began."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    path: str
    """The base as it is on the machine that launched the run."""
    sha256: str
    """Of the base's manifest, or of its weight files where it has none."""
    run: str | None = None
    """The run that the base is a checkpoint of."""
    step: int | None = None
    """The base's step."""
    examples: int = 0
    """Training examples."""
    epoch_tokens: int = 0
    """Tokens of one pass over them, the padding not counted."""
    held_out: str | None = None
    """SHA-256 of the held-out examples as tokens: validation losses are compared only under one."""


@dataclass(frozen=True)
class Finetune:
    """Instruction tuning: the next token of a response."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    base: str
    """The model to start from: a run (its best checkpoint), the folder of a checkpoint or of a Hugging Face model, or `hf://owner/name`."""
    data: TuneData
    """Examples: Alpaca-style JSON lines, or one JSON list: instruction, input, output."""
    method: Literal["finetune"] = "finetune"
    """Instruction tuning."""
    train: TuneTrain = field(default_factory=TuneTrain)
    """How the model is trained on."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights."""
    mask_prompt: bool = True
    """Count the loss of the response only; false: of the prompt too."""
    known: Known | None = None
    """Written by llmctl."""


@dataclass(frozen=True)
class Classify:
    """Classification with a new head in place of the language model's."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    base: str
    """The model to start from: a run (its best checkpoint), the folder of a checkpoint or of a Hugging Face model, or `hf://owner/name`."""
    data: TuneData
    """Examples: JSON lines of text and label."""
    method: Literal["classify"] = "classify"
    """A new head over classes."""
    classes: list[str] = field(default_factory=list)
    """The labels in the order of their numbers; empty: those of the training examples, sorted."""
    train: TuneTrain = field(default_factory=TuneTrain)
    """How the model is trained on."""
    trainable: Literal["all", "last_block", "head"] = "last_block"
    """What is trained besides the new head; last_block includes the final norm."""
    lora: LoraConfig | None = None
    """Train adapters and the head, whatever `trainable` says."""
    known: Known | None = None
    """Written by llmctl."""


@dataclass(frozen=True)
class Dpo:
    """Preference tuning (DPO), the step after instruction tuning."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    base: str
    """The model to start from, and the reference that the loss compares with: a run, a folder, or `hf://owner/name`."""
    data: TuneData
    """Examples: as for finetune, with chosen and rejected in place of output."""
    method: Literal["dpo"] = "dpo"
    """Preference tuning."""
    train: TuneTrain = field(default_factory=lambda: TuneTrain(learning_rate=5e-7, epochs=1))
    """How the model is trained on; unless it is given, learning_rate is 5e-7 and epochs is 1."""
    beta: float = 0.1
    """How strongly the model is held to the reference."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights."""
    known: Known | None = None
    """Written by llmctl."""


@dataclass(frozen=True)
class MeasureTrain:
    """How a checkpoint is measured."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    global_batch_size: int = 64
    """Sequences per forward over all processes; the losses do not depend on it."""
    microbatch_size: int | None = None
    """Sequences per forward on one process; null: the largest divisor of its share up to 8."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Compute type."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Never falls back from one to the other in silence."""
    processes_per_node: int | None = None
    """Processes of torchrun on each node; null: one per GPU (cpu: one)."""


@dataclass(frozen=True)
class Measure:
    """No training: a checkpoint is measured on the test sets of `evaluate`, and continues its prompts."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    base: str
    """The model that is measured: a run (its best checkpoint), the folder of a checkpoint or of a Hugging Face model, or `hf://owner/name`."""
    method: Literal["evaluate"] = "evaluate"
    """Measure only."""
    train: MeasureTrain = field(default_factory=MeasureTrain)
    """How it is computed."""
    tokenizer: str | None = None
    """`gpt2`, `bytes` or the path of a tokenizer.json; null: the base's own."""
    known: Known | None = None
    """Written by llmctl."""


Tune = Finetune | Classify | Dpo | Measure
"""The spec's section `tune`, told apart by `method`."""
METHODS: dict[str, type[Any]] = {"finetune": Finetune, "classify": Classify, "dpo": Dpo, "evaluate": Measure}
"""By method, which is also the name of the script in this package."""


@dataclass(frozen=True)
class FinetuneConfig(Finetune):
    """config.json of `trainer.after.finetune`."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass(frozen=True)
class ClassifyConfig(Classify):
    """config.json of `trainer.after.classify`."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass(frozen=True)
class DpoConfig(Dpo):
    """config.json of `trainer.after.dpo`."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass(frozen=True)
class MeasureConfig(Measure):
    """config.json of `trainer.after.evaluate`."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


Settings = FinetuneConfig | ClassifyConfig | DpoConfig
TARGETS = {
    "query": "attention.query", "key": "attention.key", "value": "attention.value", "output": "attention.output",
    "up": "feed_forward.up", "gate": "feed_forward.gate", "down": "feed_forward.down",
}  # fmt: skip
"""The linear maps of a block that LoRA may adapt, and where they are."""
T = TypeVar("T", FinetuneConfig, ClassifyConfig, DpoConfig, MeasureConfig)


def load(kind: type[T], path: Path) -> T:
    """Read and check a config.json. Raises ConfigError naming the field."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), error.strerror or str(error)) from error
    except ValueError as error:
        raise ConfigError(str(path), f"is not JSON: {error}") from error
    settings: T = reading.from_dict(kind, raw, "")
    check(settings)
    if not isinstance(settings, MeasureConfig):
        require(
            bool(settings.data.validation),
            "data.validation",
            "names no file; without one no epoch is better than another",
        )
    if isinstance(settings, ClassifyConfig):
        require(len(settings.classes) >= 2, "classes", "must be at least two different labels")
    return settings


def check(settings: Tune) -> None:
    """What a section may not say although each of its keys is well-formed. Raises ConfigError naming the key."""
    train = settings.train
    require(train.global_batch_size >= 1, "train.global_batch_size", "must be at least 1")
    size = train.microbatch_size
    require(size is None or size >= 1, "train.microbatch_size", "must be at least 1")
    if isinstance(settings, Measure):
        return
    assert isinstance(train, TuneTrain)
    require(bool(settings.data.train), "data.train", "names no file")
    for name in ("epochs", "patience", "log_every"):
        require(getattr(train, name) >= 1, f"train.{name}", "must be at least 1")
    require(0 <= train.drop_rate < 1, "train.drop_rate", "must be in [0, 1)")
    if settings.lora is not None:
        _check_lora(settings.lora)
    if isinstance(settings, Classify) and settings.classes:
        different = len(set(settings.classes)) == len(settings.classes) >= 2
        require(different, "classes", "must be at least two different labels")
    if isinstance(settings, Dpo):
        require(settings.beta > 0, "beta", "must be positive")


def _check_lora(lora: LoraConfig) -> None:
    require(lora.rank >= 1, "lora.rank", "must be at least 1")
    require(lora.alpha > 0, "lora.alpha", "must be positive")
    require(bool(lora.targets), "lora.targets", "names nothing to adapt")
    for target in lora.targets:
        require(target in TARGETS, "lora.targets", f"{target!r} is none of {', '.join(TARGETS)}")


def max_length(data: TuneData, model: ModelConfig) -> int:
    """Tokens of the longest sequence. Raises ConfigError where the model was never trained on as many."""
    length = data.max_length or model.context_length
    require(2 <= length <= model.context_length, "data.max_length",
             f"{length} tokens, but the base model's context is {model.context_length}")  # fmt: skip
    return length


def data_config(settings: Tune) -> DataConfig:
    """What is read, in the words of pretraining."""
    if isinstance(settings, Measure):
        return DataConfig(train=["-"], tokenizer=settings.tokenizer or "gpt2")
    return DataConfig(settings.data.train, settings.data.validation, settings.data.tokenizer or "gpt2")


def train_config(settings: Tune, examples: int) -> TrainConfig:
    """How it is trained, in the words of pretraining; the steps of all epochs are its length."""
    train = settings.train
    same: dict[str, Any] = {
        "global_batch_size": train.global_batch_size, "microbatch_size": train.microbatch_size or "auto",
        "precision": train.precision, "device": train.device, "processes_per_node": train.processes_per_node,
        "compile": False, "validate_every": 0,
    }  # fmt: skip
    if not isinstance(train, TuneTrain):
        return TrainConfig(**same, steps=1, warmup_steps=0)
    return TrainConfig(
        **same, steps=max(1, train.epochs * steps_per_epoch(train, examples)), learning_rate=train.learning_rate,
        min_learning_rate=train.min_learning_rate, schedule=train.schedule, warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay, grad_clip=train.grad_clip, betas=train.betas, deterministic=train.deterministic,
        seed=train.seed, log_every=train.log_every,
    )  # fmt: skip


def trainer_config(settings: Settings, model: ModelConfig, examples: int, tuned: Tuned) -> TrainerConfig:
    """What a checkpoint of this run says it is. Raises ConfigError."""
    made = TrainerConfig(
        data_config(settings), model, train_config(settings, examples), settings.checkpoint, settings.evaluate, tuned
    )  # fmt: skip
    configuration.check(made)
    return made


def steps_per_epoch(train: TuneTrain, examples: int) -> int:
    """Optimizer steps of one pass over the examples."""
    return -(-examples // train.global_batch_size)


def to_dict(settings: Any) -> dict[str, Any]:
    """The plain JSON value of a configuration."""
    return reading.to_dict(settings)
