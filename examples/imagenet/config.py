"""Options of train.py: a YAML file, checked whole before anything else happens.

Names are the SPRINT reference's and, where it says nothing, those of REPA and of diffusers' training scripts; `ALIASES`
lists others that are understood. Sections (`model:`, `training:`, ...) may group options; they change nothing. The section
`finetune:` holds what differs in the second stage.

Unknown options are errors, and so are options without effect: `representation_depth` while `representation_align` is not
mentioned, say. Next to an explicit `representation_align: false` it is understood as parked.
"""

import contextlib
import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

import sprint
from sprint.config import PRESETS
from sprint.schedule import Decay
from sprint.teacher import DINOV2_B

MaskType = Literal["random", "structured_with_random_offset"]
Stages = Literal["pretrain", "finetune", "both"]

ALIASES = {  # other projects' names
    "drop_ratio": "mask_ratio",
    "cfg_prob": "class_dropout_prob",
    "path_drop": "path_drop_prob",
    "proj_coeff": "representation_weight",
    "enc_type": "representation_encoder",
    "lr": "learning_rate",
    "lr_warmup_steps": "warmup_steps",
    "lr_scheduler": "lr_schedule",
    "ema": "ema_decay",
    "weight_decay": "adam_weight_decay",
    "gradient_checkpointing": "activation_checkpointing",
    "global_batch_size": "batch_size",
    "data_path": "data_dir",
}
ENCODERS = {"dinov2-vit-b": DINOV2_B, "dinov2-vit-l": "vit_large_patch14_dinov2.lvd142m"}  # REPA's names, timm's names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune:
    """The second stage, on all tokens; what is None is as in the first."""

    max_train_steps: int = 200_000
    batch_size: int | None = 1024
    learning_rate: float | None = 2e-4
    warmup_steps: int = 5000
    lr_schedule: Decay = "constant"
    gradient_accumulation_steps: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    # Model
    model: str = "XL/2"
    hidden_size: int | None = None
    num_heads: int | None = None
    encoder_depth: int | None = None
    middle_depth: int | None = None
    decoder_depth: int | None = None
    patch_size: int = 2
    mlp_ratio: float = 4.0
    in_channels: int | None = None  # of the latents, checked against the data
    num_classes: int = 1000
    qk_norm: bool = True
    positions: Literal["rope", "sincos"] = "rope"
    time_scale: float = 1.0
    residual_type: Literal["both", "deep", "shallow"] = "both"
    class_dropout_prob: float = 0.1
    path_drop_prob: float = 0.1
    # Token dropping
    mask_ratio: float = 0.75
    mask_type: MaskType = "structured_with_random_offset"
    # Objective
    path_type: Literal["linear", "cosine", "ddpm"] = "linear"
    prediction: Literal["v", "x", "noise"] = "v"
    weighting: Literal["lognormal", "uniform"] = "lognormal"
    representation_align: bool = False
    representation_depth: int = 8  # as the reference counts: one more than the blocks that have run
    representation_weight: float = 0.5
    representation_encoder: str = DINOV2_B
    representation_weights: str | None = None  # file of the encoder, instead of timm's hub
    # Data
    data_dir: str = "latents"
    input_size: int | None = None  # side of the latents, checked against the data
    latent_scale: float = 0.18215
    num_workers: int = 4
    # Optimisation
    max_train_steps: int = 400_000
    batch_size: int = 256
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    lr_schedule: Decay = "constant"
    gradient_accumulation_steps: int = 1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    mixed_precision: Literal["bf16", "no"] = "bf16"
    allow_tf32: bool = True
    activation_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 0
    init_from: str | None = None  # weights to start from
    # Output
    output_dir: str = "runs"
    exp_name: str = "sprint"
    checkpointing_steps: int = 10_000
    checkpoints_total_limit: int = 3
    logging_steps: int = 100
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    sampling_steps: int = 0  # a grid of samples every so many steps; 0 for none
    guidance_scale: float = 2.0  # of those samples, with Path-Drop Guidance
    vae: str = "stabilityai/sd-vae-ft-mse"  # that decodes them

    finetune: Finetune = Finetune()
    stages: Stages = "pretrain"

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.output_dir) / self.exp_name

    @property
    def teacher(self) -> str:
        """timm's name of the REPA encoder."""
        return ENCODERS.get(self.representation_encoder, self.representation_encoder)

    def drop(self) -> sprint.Drop | None:
        """Drop sampler of the first stage."""
        if self.mask_ratio == 0 or self.residual_type == "shallow":
            return None
        kind = sprint.RandomDrop if self.mask_type == "random" else sprint.StructuredDrop
        return kind(self.mask_ratio)

    def sit(self, *, channels: int, repa_dim: int | None) -> sprint.SiTConfig:
        """Sizes and options of the model."""
        sizes: dict[str, Any] = PRESETS[self.model.removeprefix("SiT-")]._asdict()
        given = {
            "dim": self.hidden_size,
            "heads": self.num_heads,
            "encoder_depth": self.encoder_depth,
            "middle_depth": self.middle_depth,
            "decoder_depth": self.decoder_depth,
        }
        sizes.update({name: value for name, value in given.items() if value is not None})
        repa: dict[str, Any] = (
            {} if repa_dim is None else {"repa_dim": repa_dim, "repa_depth": self.representation_depth - 1}
        )
        return sprint.SiTConfig(
            **sizes,
            **repa,
            patch_size=self.patch_size,
            in_channels=channels,
            mlp_ratio=self.mlp_ratio,
            num_classes=self.num_classes,
            qk_norm=self.qk_norm,
            positions=self.positions,
            time_scale=self.time_scale,
            prediction=self.prediction,
            sources=self.residual_type,
            label_drop=self.class_dropout_prob,
            path_drop=self.path_drop_prob,
        )

    def schedule(self) -> sprint.TwoStage:
        """Of the stages asked for."""
        first = sprint.Stage(
            steps=self.max_train_steps,
            batch=self.batch_size,
            lr=self.learning_rate,
            drop=self.drop(),
            warmup=self.warmup_steps,
            decay=self.lr_schedule,
        )
        if self.stages == "pretrain":
            return sprint.TwoStage(first)
        second = sprint.Stage(
            steps=self.finetune.max_train_steps,
            batch=self.finetune.batch_size or self.batch_size,
            lr=self.finetune.learning_rate or self.learning_rate,
            warmup=self.finetune.warmup_steps,
            decay=self.finetune.lr_schedule,
        )
        return sprint.TwoStage(first, second) if self.stages == "both" else sprint.TwoStage(second)

    def accumulation(self, stage: int) -> int:
        """Calls per update."""
        tuned = self.stages == "finetune" or stage == 1
        return (tuned and self.finetune.gradient_accumulation_steps) or self.gradient_accumulation_steps


# What decides whether an option acts: (switch, value that turns it off, options that then do nothing).
SWITCHES = [
    (
        "representation_align",
        False,
        ("representation_depth", "representation_weight", "representation_encoder", "representation_weights"),
    ),
    ("mask_ratio", 0, ("mask_type",)),
    ("residual_type", "shallow", ("mask_ratio", "mask_type", "path_drop_prob")),
    ("sampling_steps", 0, ("guidance_scale", "vae")),
    ("stages", "finetune", ("mask_ratio", "mask_type")),
]


def read(path: Path, changes: list[str] | None = None) -> Config:
    """Read a YAML file, with `name=value` changes from the command line.

    Raises:
        SystemExit: anything that is wrong with it, in one message.
    """
    if not path.is_file():
        raise SystemExit(f"there is no configuration at {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise SystemExit(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise SystemExit(f"{path} must hold options by name, got {type(content).__name__}")
    try:
        return build(content, changes or [])
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{path}: {error}") from error


def build(content: dict[str, Any], changes: list[str]) -> Config:
    """A configuration from what a file holds.

    Raises:
        ValueError, TypeError: unknown, contradictory or idle options, or values that do not fit.
    """
    options = _flat(content)
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, got {change!r}")
        section, _, inner = name.rpartition(".")
        place = options.setdefault("finetune", {}) if section == "finetune" else options
        place[_known(inner, Finetune if section == "finetune" else Config)] = yaml.safe_load(value)
    finetune = options.pop("finetune", {})
    values = {name: _fit(name, value, Config) for name, value in options.items()}
    tuned = {name: _fit(f"finetune.{name}", value, Finetune) for name, value in finetune.items()}
    config = Config(**values, finetune=Finetune(**tuned))
    _check(config, values)
    return config


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Options by their own names, sections opened."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key == "finetune":
            entries = {"finetune": {_known(name, Finetune): inner for name, inner in (value or {}).items()}}
        elif isinstance(value, dict):
            entries = _flat(value)
        else:
            entries = {_known(str(key), Config): value}
        for name, entry in entries.items():
            if name in found and found[name] != entry:
                raise ValueError(f"{name} is given twice, as {found[name]!r} and as {entry!r}")
            found[name] = entry
    return found


def _known(name: str, kind: Any) -> str:
    plain = name.replace("-", "_")
    plain = ALIASES.get(plain, plain)
    names = [field.name for field in dataclasses.fields(kind) if field.name != "finetune"]
    if plain not in names:
        near = difflib.get_close_matches(plain, [*names, *ALIASES], n=3)
        where = "the section finetune" if kind is Finetune else "train.py"
        raise ValueError(f"unknown option {name!r} of {where}: " + (f"did you mean {' or '.join(near)}?" if near else
                         f"it has {', '.join(names)}"))  # fmt: skip
    return plain


def _fit(name: str, value: Any, kind: Any) -> Any:
    """A value as its option's type."""
    wanted = typing.get_type_hints(kind)[name.rpartition(".")[2]]
    choices = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for choice in choices:
        with contextlib.suppress(ValueError, TypeError):
            return _converted(value, choice)
    names = [" or ".join(map(repr, typing.get_args(c))) if typing.get_origin(c) is Literal else c.__name__ for c in choices]
    raise TypeError(f"{name} must be {' or '.join(names)}, got {value!r}")


def _converted(value: Any, choice: Any) -> Any:
    """A value as one type; ValueError or TypeError if it is none. YAML reads 1e-4 as text."""
    if typing.get_origin(choice) is Literal:
        if value not in typing.get_args(choice):
            raise ValueError
        return value
    if choice in (bool, str, type(None)) or isinstance(value, bool):
        if type(value) is not choice:
            raise TypeError
        return value
    number = float(value)
    if choice is int and number != int(number):
        raise ValueError
    return choice(number)


def _check(config: Config, given: dict[str, Any]) -> None:
    """Contradictions and options without effect."""
    if config.model.removeprefix("SiT-") not in PRESETS:
        raise ValueError(f"unknown model {config.model!r}: choose one of {', '.join(PRESETS)}")
    for switch, off, idle in SWITCHES:
        if getattr(config, switch) != off or (switch in given and off is False):
            continue  # explicitly false: what belongs to it is parked
        named = [name for name in idle if name in given and not (name == "mask_ratio" and config.mask_ratio == 0)]
        if named:
            raise ValueError(f"{', '.join(named)} has no effect with {switch}={off!r}: leave it out, or change {switch}")
    for name in ("class_dropout_prob", "path_drop_prob"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is a probability in [0, 1], got {getattr(config, name)}")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {config.ema_decay}")
    for name in ("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "gradient_accumulation_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not config.max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive, got {config.max_grad_norm}")
    if config.representation_align and config.representation_depth < 2:
        raise ValueError(
            f"representation_depth={config.representation_depth} taps no block: it is one more than the blocks that have run"
        )
    if config.stages == "finetune" and config.init_from is None:
        raise ValueError("stages=finetune starts from a trained model: give init_from=checkpoint, or stages=both")
    config.sit(channels=4, repa_dim=768 if config.representation_align else None)
    config.schedule()
