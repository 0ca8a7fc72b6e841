"""`TwoStage`: what changes while a SPRINT run goes on, and when.

A run trains long on a quarter of the tokens, then briefly on all of them (SPRINT, arXiv 2510.21986, two-stage training),
with another batch and learning rate. The rate is warmed up again after the switch, where loss spikes were seen otherwise.
Everything is a function of the step alone, so that a resumed run needs no state of its schedule.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sprint.arguments import checked
from sprint.middle.drop import Drop

Decay = Literal["constant", "linear", "cosine"]


@checked
@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Args:
        steps: updates.
        batch: images per update, over all processes.
        lr: learning rate after the warm-up.
        drop: drop sampler of the middle's tokens; None for all tokens.
        warmup: updates over which the rate rises from zero.
        decay: of the rate after the warm-up, to zero at the end of the stage: "constant" (none), "linear", "cosine".
    """

    steps: int
    batch: int
    lr: float
    drop: Drop | None = None
    warmup: int = 0
    decay: Decay = "constant"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch must be at least 1, got {self.steps} and {self.batch}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup must be 0 to {self.steps} (the steps of its stage), got {self.warmup}")

    def rate(self, step: int) -> float:
        """Learning rate of a step of this stage, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        gone = (step - self.warmup) / max(1, self.steps - self.warmup)
        match self.decay:
            case "linear":
                return self.lr * (1 - gone)
            case "cosine":
                return self.lr * (1 + math.cos(math.pi * gone)) / 2
            case _:
                return self.lr


class Moment(NamedTuple):
    """What holds at one step of a run."""

    stage: int
    """0 or 1."""
    drop: Drop | None
    """Drop sampler; None for all tokens."""
    lr: float
    """Learning rate."""
    batch: int
    """Images of this step."""
    images: int
    """Images seen before this step: the position in the data."""


@checked
@dataclass(frozen=True)
class TwoStage:
    """Sparse pre-training, then full-token fine-tuning.

    Args:
        pretrain: first stage, with a drop sampler (without one: a dense run, to compare with).
        finetune: second stage, on all tokens; None to leave it out.

    Examples:
        >>> from sprint import StructuredDrop
        >>> pretrain = Stage(steps=90, batch=256, lr=1e-4, drop=StructuredDrop(0.75))
        >>> schedule = TwoStage(pretrain, Stage(steps=10, batch=1024, lr=2e-4, warmup=4))
        >>> schedule.steps, schedule.at(90)
        (100, Moment(stage=1, drop=None, lr=5e-05, batch=1024, images=23040))
    """

    pretrain: Stage
    finetune: Stage | None = None

    def __post_init__(self) -> None:
        if self.finetune is not None and self.finetune.drop is not None:
            raise ValueError(f"the second stage trains on all tokens, got drop={self.finetune.drop!r}: leave its drop out")

    @property
    def steps(self) -> int:
        """Of both stages."""
        return self.pretrain.steps + (self.finetune.steps if self.finetune else 0)

    def at(self, step: int) -> Moment:
        """What holds at a step, counted from 0.

        Raises:
            ValueError: the run has no such step.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"this run has steps 0 to {self.steps - 1}, got {step}")
        first = self.pretrain
        if step < first.steps or self.finetune is None:
            return Moment(0, first.drop, first.rate(step), first.batch, step * first.batch)
        inner, second = step - first.steps, self.finetune
        images = first.steps * first.batch + inner * second.batch
        return Moment(1, None, second.rate(inner), second.batch, images)
