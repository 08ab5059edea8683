"""What a run.yaml may say: the models of its sections, and RunSpec, the whole of it.

The trainer's sections are the dataclasses of `trainer.config`, so that a field exists once. `runs.spec` reads files
into these models; `docs/run-yaml.md` is generated from them.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from runs.hardware import Dollars, Hardware, Section
from trainer.after.settings import (
    METHODS,
    Classify,
    Dpo,
    Finetune,
    Known,
    LoraConfig,
    Measure,
    MeasureTrain,
    TuneData,
    TuneTrain,
)
from trainer.config import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    TestSet,
    TrainConfig,
    TrainerConfig,
    check_batch,
    parse_duration,
)

DURATION_PATTERN = r"^\s*(\d+(\.\d+)?\s*[smhd]\s*)+$"


def _duration(value: object) -> object:
    """`value` where it is a duration; the pattern of an error otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a duration; write 90s, 30m, 6h or 2d")  # noqa: TRY004
    parse_duration(value)
    return value


def _environment_value(value: object) -> object:
    """Environment variables are text; a plain number is taken as its text."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Duration = Annotated[
    str, BeforeValidator(_duration), WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN})
]
EnvironmentValue = Annotated[
    str, BeforeValidator(_environment_value), WithJsonSchema({"type": ["string", "number"]})
]


class Budget(Section):
    """What a run may cost at most. Both limits are required for rented nodes."""

    max_usd: Dollars | None = None
    """Dollars over all attempts."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours from the first node on; also the lease of each node."""


class Wandb(Section):
    """Weights & Biases, written from the metrics beside the training, which never waits for it."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """disabled: nothing is imported; offline: files to sync later; online."""
    project: Annotated[str, Field(min_length=1)] = "llmctl"
    """Project that the run appears in."""
    from_: Annotated[Literal["driver", "node"], Field(alias="from")] = "driver"
    """driver: this machine writes, no key on the node, and sends behind what it missed while it slept; node: the first node writes, also while this machine sleeps; online gives the key of your environment (WANDB_API_KEY) or ~/.netrc to that process alone; its files come home with the last checkpoint, and are lost with a lost node; dollars and the table's row are added at the end, by this machine."""


class Trainer(Section):
    """Which trainer runs."""

    path: str | None = None
    """Your own trainer package with the same command line, instead of ours."""


class Node(Section):
    """How a node is prepared, kept alive and let go."""

    python: Annotated[str, Field(min_length=1)] = "auto"
    """auto: the image's Python if its torch, numpy and safetensors satisfy the pins, else an environment of its own; or a path."""
    env: dict[str, EnvironmentValue] = Field(default_factory=dict)
    """Environment variables of the trainer, plain values."""
    secrets: list[str] = Field(default_factory=lambda: ["HF_TOKEN"])
    """Names only: the values come from your environment and never touch argv, logs or the store."""
    on_finish: Literal["terminate", "keep"] | Duration = "terminate"
    """After the run: terminate, keep, or a duration to keep the node for."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts of torchrun from the last whole checkpoint."""
    replace: bool = True
    """A new node when one is lost, within the budget."""
    boot_timeout: Duration = "30m"
    """How long a node may take to answer before it is terminated."""
    self_terminate: bool = False
    """Leaves a credential on the node, so that its lease ends without this machine."""

    @property
    def boot_timeout_seconds(self) -> float:
        """`boot_timeout` in seconds."""
        return parse_duration(self.boot_timeout)

    @property
    def keep_seconds(self) -> float | None:
        """How long the node stays after the run: 0 for terminate, None for as long as you like."""
        if self.on_finish in {"terminate", "keep"}:
            return 0.0 if self.on_finish == "terminate" else None
        return parse_duration(self.on_finish)


Tune = Annotated[Finetune | Classify | Dpo | Measure, Field(discriminator="method")]


class RunSpec(Section):
    """One run: what to train, on which hardware, at what cost."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")]
    """1 to 32 of a-z, 0-9 and `-`."""
    hardware: Hardware
    """Where it runs."""
    budget: Budget = Budget()
    """What it may cost."""
    tune: Tune | None = None
    """Instead of `data`, `model` and `train`: what is done with an existing model."""
    data: DataConfig
    """Token shards."""
    model: ModelConfig = ModelConfig()
    """The network."""
    train: TrainConfig
    """How it is trained."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and which come home."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured at the end."""
    wandb: Wandb = Wandb()
    """Weights & Biases."""
    notify: Annotated[str, Field(min_length=1)] | None = None
    """A shell command or a webhook URL that is told when the run ends or needs you."""
    trainer: Trainer = Trainer()
    """Which trainer runs."""
    node: Node = Node()
    """How a node is prepared and let go."""

    def trainer_config(self, world: int | None = None) -> TrainerConfig:
        """The trainer's own sections, paths as the spec has them. With `world` processes known, the batch is checked
        against it. Raises ConfigError."""
        if world is not None:
            check_batch(self.train, world)
        return TrainerConfig(self.data, self.model, self.train, self.checkpoint, self.evaluate)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.trainer_config().steps

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, in whole steps; of tuning, of all its epochs without padding."""
        if self.tune is not None:
            known, epochs = self.tune.known, getattr(self.tune.train, "epochs", 0)
            return epochs * known.epoch_tokens if known else 0
        return self.steps * self.trainer_config().tokens_per_step

    def processes(self, gpus: int) -> int:
        """Processes of the whole run on nodes with `gpus` GPUs each: one per GPU, on a CPU one, or as the spec says."""
        per_node = self.train.processes_per_node or (gpus if self.train.device == "cuda" else 1)
        return max(1, per_node) * self.hardware.nodes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values with every default filled in; `runs.spec.from_dict` reads it back to an equal spec."""
        return self.model_dump(mode="json", by_alias=True)


HARDWARE: dict[str, type[BaseModel]] = {
    get_args(cls.model_fields["provider"].annotation)[0]: cls for cls in get_args(get_args(Hardware)[0])
}
"""Provider → its section, from the union `Hardware`."""
TUNE_PARTS: dict[str, type[Any]] = {"data": TuneData, "train": TuneTrain, "lora": LoraConfig, "known": Known}
"""The sections within `tune`."""
SECTIONS: dict[str, type[Any]] = {
    "budget": Budget,
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "evaluate": EvaluateConfig,
    "wandb": Wandb,
    "trainer": Trainer,
    "node": Node,
}
WRITTEN_BY_LLMCTL = {"data.train_tokens", "evaluate.prompt_tokens"}
"""Fields of the trainer's sections that no user writes; known, but not advertised."""


def field_names(cls: type[Any]) -> list[str]:
    """The keys of a section as a file spells them."""
    if dataclasses.is_dataclass(cls):
        return [item.name for item in dataclasses.fields(cls)]
    assert issubclass(cls, BaseModel)
    return [item.alias or name for name, item in cls.model_fields.items()]


def factory_defaults(cls: type[Any]) -> dict[str, Any]:
    """The defaults of a section that are made afresh each time (lists, mappings), which a JSON Schema leaves out."""
    if dataclasses.is_dataclass(cls):
        made = {item.name: item.default_factory for item in dataclasses.fields(cls)}
        return {name: make() for name, make in made.items() if make is not dataclasses.MISSING}
    assert issubclass(cls, BaseModel)
    fields = {item.alias or name: item for name, item in cls.model_fields.items()}
    return {
        name: item.get_default(call_default_factory=True)
        for name, item in fields.items()
        if item.default_factory
    }


def _known_tune_keys(path: tuple[str | int, ...], method: object) -> list[str]:
    if len(path) == 1:
        return field_names(METHODS[method]) if isinstance(method, str) and method in METHODS else []
    parts = {**TUNE_PARTS, **({"train": MeasureTrain} if method == "evaluate" else {})}
    return field_names(parts[str(path[1])]) if len(path) == 2 and path[1] in parts else []


def known_keys(path: tuple[str | int, ...], provider: object, method: object = None) -> list[str]:
    """The keys that may stand in the section at `path`; empty where anything may."""
    if not path:
        return field_names(RunSpec)
    if path[0] == "hardware":
        return field_names(HARDWARE[provider]) if isinstance(provider, str) and provider in HARDWARE else []
    if path[:2] == ("evaluate", "test_sets"):
        return field_names(TestSet)
    if path[0] == "tune":
        return _known_tune_keys(path, method)
    return field_names(SECTIONS[str(path[0])]) if len(path) == 1 and path[0] in SECTIONS else []
