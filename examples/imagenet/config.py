"""Options of train.py. Names are the SPRINT reference's and, where it says nothing, those of REPA and of diffusers' training
scripts; the section `finetune:` of a file holds what differs in the second stage. How a file is read: reading.py.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, Literal

import sprint
from sprint.data.teacher import DINOV2_B
from sprint.models.config import PRESETS
from sprint.training.schedule import Decay

MaskType = Literal["random", "structured_with_random_offset"]
Stages = Literal["pretrain", "finetune", "both"]
Numbers = float | list[float] | None

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
    """A run; `train.py --help` shows these texts."""

    # Model
    model: str = "XL/2"
    """size and patch size: S/2, B/2, L/2 or XL/2"""
    hidden_size: int | None = None
    """instead of the size's own, as the four options below"""
    num_heads: int | None = None
    encoder_depth: int | None = None
    """blocks before tokens are dropped"""
    middle_depth: int | None = None
    """blocks that see the kept tokens"""
    decoder_depth: int | None = None
    """blocks after the fusion"""
    patch_size: int = 2
    mlp_ratio: float = 4.0
    in_channels: int | None = None
    """of the latents, checked against the data"""
    num_classes: int = 1000
    qk_norm: bool = True
    """RMSNorm of queries and keys"""
    positions: Literal["rope", "sincos"] = "rope"
    time_scale: float = 1.0
    """times are multiplied with it before they are embedded"""
    residual_type: Literal["both", "deep", "shallow"] = "both"
    """what the fusion joins; deep and shallow are the paper's ablations"""
    class_dropout_prob: float = 0.1
    """of the null condition in training"""
    path_drop_prob: float = 0.1
    """of a sample without its middle blocks in training"""
    # Token dropping
    mask_ratio: float = 0.75
    """share of the tokens dropped in the first stage"""
    mask_type: MaskType = "structured_with_random_offset"
    # Objective
    path_type: Literal["linear", "cosine", "ddpm"] = "linear"
    """interpolant"""
    prediction: Literal["v", "x", "noise"] = "v"
    weighting: Literal["lognormal", "uniform"] = "lognormal"
    """distribution of the training times"""
    representation_align: bool = False
    """REPA"""
    representation_depth: int = 8
    """as the reference counts: one more than the blocks that have run"""
    representation_weight: float = 0.5
    representation_encoder: str = DINOV2_B
    """vision transformer of timm"""
    representation_weights: str | None = None
    """file of the encoder, instead of timm's hub"""
    # Data
    data_dir: str = "latents"
    """what prepare.py made, or REPA's preprocessing"""
    input_size: int | None = None
    """side of the latents, checked against the data"""
    latent_scale: Numbers = None
    """latents are (z - latent_shift) * latent_scale; by default what prepare.py kept of the VAE, else SD-VAE's 0.18215"""
    latent_shift: Numbers = None
    """one number or one per channel; by default what prepare.py kept of the VAE, else 0"""
    num_workers: int = 4
    """processes that read latents, per GPU"""
    # Optimisation
    max_train_steps: int = 400_000
    batch_size: int = 256
    """per update, over all processes"""
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    lr_schedule: Decay = "constant"
    gradient_accumulation_steps: int = 1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """gradients are clipped at it; .inf for never"""
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    """the decay rises by (1 + n) / (10 + n) after n updates, so that the average forgets the first weights early"""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    allow_tf32: bool = True
    activation_checkpointing: bool = False
    """less memory for a third more work"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 0
    init_from: str | None = None
    """weights to start from"""
    # Output
    output_dir: str = "runs"
    exp_name: str = "sprint"
    """the run's folder in output_dir"""
    checkpointing_steps: int = 10_000
    checkpoints_total_limit: int = 3
    logging_steps: int = 100
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    sampling_steps: int = 0
    """a grid of samples every so many steps; 0 for none"""
    guidance_scale: float = 2.0
    """of those samples, with Path-Drop Guidance"""
    vae: str | None = None
    """of the latents, to decode samples: hub name, folder, or none for pixels; by default what prepare.py kept"""

    finetune: Finetune = Finetune()
    stages: Stages = "pretrain"
    """which of the two run"""

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

    def recipe(self, side: int, image_size: int | None) -> sprint.models.Recipe:
        """What sampling must know of the training."""
        return sprint.models.Recipe(
            interpolant=self.path_type, time=self.weighting, latent_scale=self.latent_scale,
            latent_shift=self.latent_shift, vae=self.vae, latent_side=side, image_size=image_size,
        )  # fmt: skip

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

    def schedule(self) -> sprint.training.TwoStage:
        """Of the stages asked for."""
        first = sprint.training.Stage(
            steps=self.max_train_steps,
            batch=self.batch_size,
            lr=self.learning_rate,
            drop=self.drop(),
            warmup=self.warmup_steps,
            decay=self.lr_schedule,
        )
        if self.stages == "pretrain":
            return sprint.training.TwoStage(first)
        second = sprint.training.Stage(
            steps=self.finetune.max_train_steps,
            batch=self.finetune.batch_size or self.batch_size,
            lr=self.finetune.learning_rate or self.learning_rate,
            warmup=self.finetune.warmup_steps,
            decay=self.finetune.lr_schedule,
        )
        return sprint.training.TwoStage(first, second) if self.stages == "both" else sprint.training.TwoStage(second)

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
    ("sampling_steps", 0, ("guidance_scale",)),
]


_PROBABILITY = (lambda value: 0 <= value <= 1), "a probability in [0, 1]"
_COUNT = (lambda value: value >= 1), "at least 1"
_NATURAL = (lambda value: value >= 0), "0 or more"
RANGES = [
    ("class_dropout_prob", *_PROBABILITY),
    ("path_drop_prob", *_PROBABILITY),
    ("ema_decay", lambda value: 0 <= value < 1, "in [0, 1)"),
    ("max_grad_norm", lambda value: value > 0, "positive"),
    *((name, *_COUNT) for name in ("checkpointing_steps", "checkpoints_total_limit", "logging_steps")),
    ("gradient_accumulation_steps", *_COUNT),
    *((name, *_NATURAL) for name in ("sampling_steps", "seed", "num_workers")),
    ("seed", lambda value: value < 2**63, "below 2**63"),
    *((name, lambda value: 0 <= value < 1, "in [0, 1)") for name in ("adam_beta1", "adam_beta2")),
    ("adam_epsilon", lambda value: value >= 0, "0 or more"),
]


def check(config: Config, given: dict[str, Any]) -> None:
    """Contradictions and options without effect.

    Args:
        config: to check.
        given: the options that its file names; the others have their defaults.

    Raises:
        ValueError: what is wrong, and how to mend it.
    """
    differ: list[str] = []
    if config.model.removeprefix("SiT-") not in PRESETS:
        raise ValueError(f"unknown model {config.model!r}: choose one of {', '.join(PRESETS)}")
    for switch, off, idle in SWITCHES:
        if getattr(config, switch) != off or (switch in given and off is False):
            continue  # explicitly false: what belongs to it is parked
        named = [name for name in idle if name in given and not (name == "mask_ratio" and config.mask_ratio == 0)]
        if named:
            raise ValueError(f"{', '.join(named)} has no effect with {switch}={off!r}: leave it out, or change {switch}")
    for name, fits, wanted in RANGES:
        if not fits(getattr(config, name)):
            raise ValueError(f"{name} must be {wanted}, got {getattr(config, name)}")
    if config.representation_align and config.representation_depth < 2:
        raise ValueError(
            f"representation_depth={config.representation_depth} taps no block: it is one more than the blocks that have run"
        )
    if config.stages == "finetune" and config.init_from is None:
        raise ValueError("stages=finetune starts from a trained model: give init_from=checkpoint, or stages=both")
    size = PRESETS[config.model.removeprefix("SiT-")]._asdict()
    for name, own in (("hidden_size", "dim"), ("num_heads", "heads"), *((d, d) for d in size if d.endswith("_depth"))):
        if getattr(config, name) not in (None, size[own]):
            differ.append(f"{name}={getattr(config, name)} (its own is {size[own]})")
    if differ and "model" in given:
        warnings.warn(f"model={config.model} with {', '.join(differ)}: a size of its own", UserWarning, stacklevel=2)
    config.sit(channels=4, repa_dim=768 if config.representation_align else None)
    config.schedule()
