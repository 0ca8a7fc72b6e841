"""The sizes and options of a SiT, and the paper's four presets."""

import dataclasses
import json
from collections.abc import Collection
from typing import Literal, NamedTuple, TypedDict

from sprint.arguments import checked
from sprint.flow.interpolants import Prediction, check_prediction
from sprint.middle.fusion import Sources

Positions = Literal["rope", "sincos"]
Preset = Literal["S/2", "B/2", "L/2", "XL/2"]


class Size(NamedTuple):
    """Width, heads and depths of a preset (SPRINT, model sizes)."""

    dim: int
    heads: int
    encoder_depth: int
    middle_depth: int
    decoder_depth: int


PRESETS: dict[str, Size] = {
    "S/2": Size(384, 6, 2, 8, 2),
    "B/2": Size(768, 12, 2, 8, 2),
    "L/2": Size(1024, 16, 2, 20, 2),
    "XL/2": Size(1152, 16, 2, 24, 2),
}


class Options(TypedDict, total=False):
    """Fields of `SiTConfig` as keyword arguments, for completion and type checkers."""

    dim: int
    heads: int
    encoder_depth: int
    middle_depth: int
    decoder_depth: int
    patch_size: int
    in_channels: int
    mlp_ratio: float
    num_classes: int | None
    cond_dim: int | None
    positions: Positions
    time_scale: float
    prediction: Prediction
    qk_norm: bool
    label_drop: float
    path_drop: float
    sources: Sources
    learnable_mask: bool
    repa_dim: int | None
    repa_hidden: int
    repa_depth: int | None


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class SiTConfig:
    """Everything that defines a `SiT`; stored in its checkpoints.

    Args:
        dim: width C, divisible by `heads` into heads of a multiple of 4 channels.
        heads: attention heads.
        encoder_depth: first blocks, on all tokens.
        middle_depth: blocks on the kept tokens.
        decoder_depth: last blocks, on all tokens.
        patch_size: side of a square patch.
        in_channels: channels of x (4 for SD-VAE latents).
        mlp_ratio: hidden width of the MLP over C.
        num_classes: class condition, ids 0 to num_classes - 1; None for a vector condition or none.
        cond_dim: vector condition of this width; excludes `num_classes`.
        positions: "rope" (rotary, in every block), or "sincos" (added to the tokens once, as in the original SiT and DiT).
        time_scale: what t is multiplied with before its sinusoids are taken; 1000 in DiT, whose time is a step.
        prediction: what the output is: "v", or "x" or "noise" for a model that was trained so (DiT). `sample` and
            `FlowMatchingLoss` refuse another one.
        qk_norm: RMSNorm on queries and keys; the original SiT and DiT have none.
        label_drop: probability of replacing a sample's condition by the null condition, in training.
        path_drop: probability of dropping a sample's deep path, in training.
        sources: what the fusion joins; "deep" and "shallow" are the paper's ablations.
        learnable_mask: train the mask token (the reference freezes it).
        repa_dim: teacher width of the REPA head (768 for DINOv2-B); None for no head.
        repa_hidden: its hidden width.
        repa_depth: number of blocks, counted from the encoder's first, that have run where the head taps. The reference's
            `representation_depth` is one more.
    """

    dim: int
    heads: int
    encoder_depth: int = 2
    middle_depth: int
    decoder_depth: int = 2
    patch_size: int = 2
    in_channels: int = 4
    mlp_ratio: float = 4.0
    num_classes: int | None = 1000
    cond_dim: int | None = None
    positions: Positions = "rope"
    time_scale: float = 1.0
    prediction: Prediction = "v"
    qk_norm: bool = True
    label_drop: float = 0.1
    path_drop: float = 0.1
    sources: Sources = "both"
    learnable_mask: bool = False
    repa_dim: int | None = None
    repa_hidden: int = 2048
    repa_depth: int | None = None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.encoder_depth + self.middle_depth + self.decoder_depth

    @classmethod
    def from_json(cls, text: str, names: Collection[str], *, source: str) -> "SiTConfig":
        """The options that a file holds beside its tensors.

        Args:
            text: JSON.
            names: of the tensors; as many blocks must be among them as the options say, before any is built.
            source: what errors call the file.

        Raises:
            ValueError: no options, such that this version does not know, or of another model than the tensors.
        """
        try:
            said = json.loads(text)
            known = {field.name for field in dataclasses.fields(cls)}
            if unknown := sorted(said.keys() - known):
                raise ValueError(f"the options {', '.join(unknown)} are unknown to this version: update sprint")
            config = cls(**said)
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{source} holds a configuration that cannot be read: {error}") from error
        for part, depth in (
            ("encoder", config.encoder_depth), ("middle.blocks", config.middle_depth), ("decoder", config.decoder_depth)
        ):  # fmt: skip
            numbers = {name[len(part) + 1 :].partition(".")[0] for name in names if name.startswith(f"{part}.")}
            if len(numbers) != depth:
                raise ValueError(f"{source} holds {len(numbers)} blocks of {part}, and its configuration says {depth}")
        return config

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "patch_size", "in_channels", "num_classes", "cond_dim", "repa_dim", "repa_hidden"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("encoder_depth", "middle_depth", "decoder_depth"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(
                f"dim={self.dim} does not split into {self.heads} heads of a multiple of 4 channels, "
                f"which axial rotary positions need: choose dim a multiple of {4 * self.heads}"
            )
        if not self.time_scale > 0:
            raise ValueError(f"time_scale must be positive, got {self.time_scale}")
        check_prediction(self.prediction)
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop is a probability in [0, 1], got {self.label_drop}")
        if self.num_classes is not None and self.cond_dim is not None:
            raise ValueError(f"got num_classes={self.num_classes} and cond_dim={self.cond_dim}: set one of them to None")
        if self.repa_depth is not None and self.repa_dim is None:
            raise ValueError(
                f"repa_depth={self.repa_depth} has no REPA head to tap for: set repa_dim to the teacher's width"
            )
        if self.repa_depth is not None and not 1 <= self.repa_depth <= self.depth:
            raise ValueError(f"repa_depth must be 1 to {self.depth} (the number of blocks), got {self.repa_depth}")
