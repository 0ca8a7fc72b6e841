"""Guidance: extrapolate from a weak prediction to a strong one.

    v = v_weak + w (v_strong − v_weak)          w = 1: the strong prediction alone

Classifier-free guidance (arXiv 2207.12598) runs the whole model twice. Path-Drop Guidance (SPRINT, arXiv 2510.21986) takes
the shallow path for the weak prediction, where the middle blocks never run.

A guidance is called as `guidance(model, x, t, y)` and returns what the model predicts, so that any sampler can use it. It
may be applied to predictions of v, x or noise and to drifts alike: all of them are affine in each other at one (x, t).
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sprint.arguments import called, checked
from sprint.flow.conventions import prediction_in
from sprint.flow.holders import unwrapped
from sprint.flow.interpolants import like
from sprint.middle.drop import Drop

Weak = Literal["null", "same"]
Scale = float | Tensor | Callable[[float], float | Tensor]
"""w: one for all samples, one for each (B,), or a function of t that gives either."""


_UNTRAINED = (
    "the null condition of this {} was never trained (its label_drop=0), so guidance leads away from noise: train with "
    "label_drop, or use PathDropGuidance(…, weak='same'), which needs none"
)


@called("a guidance such as ClassifierFreeGuidance(3.0)")
class Guidance(Protocol):
    """What a guidance is: anything called like this."""

    def __call__(self, model: Callable[..., Any], x: Tensor, t: float, y: Any) -> Tensor:
        """Predict at x (B, *) and time t, with condition y."""
        ...


def guide(weak: Tensor, strong: Tensor, scale: float | Tensor, *, rescale: float = 0.0) -> Tensor:
    """`weak + scale (strong − weak)`, its standard deviation moved towards that of `strong`.

    Args:
        weak: (B, *).
        strong: (B, *).
        scale: w, one for all or one for each sample (B,); 1 gives `strong`.
        rescale: 0 leaves the result as it is, 1 gives each sample the standard deviation of `strong`, against
            overexposure at high scales (arXiv 2305.08891, equations 14 to 16). It is that of what is guided: of the
            velocity, with a `Velocity`, where pipelines of noise models take the noise's.

    Examples:
        >>> guide(torch.tensor(1.0), torch.tensor(2.0), 3.0)
        tensor(4.)
    """
    if isinstance(scale, Tensor):
        if scale.ndim and scale.shape != strong.shape[:1]:
            raise ValueError(f"scale is {tuple(scale.shape)} for {len(strong)} samples: give one number, or one per sample")
        scale = like(scale.to(strong), strong)
    guided = weak + scale * (strong - weak)
    if rescale == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    before, after = guided.std(dims, keepdim=True), strong.std(dims, keepdim=True)
    factor = torch.where(before > 0, after / before.clamp_min(torch.finfo(before.dtype).tiny), 1.0)  # constant: as it is
    return guided * (1 - rescale + rescale * factor)


def predict(model: Callable[..., Any], x: Tensor, t: float, y: Any, **options: Any) -> Any:
    """Call a model at one time for the whole batch; the model gets t as (B,) in at least float32."""
    times = torch.full((len(x),), t, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    output = model(x, times, **options) if y is None else model(x, times, y, **options)
    return output if options else prediction_in(output, model)


@checked
@dataclass(frozen=True, eq=False)  # null may be a tensor, which has no single truth value
class ClassifierFreeGuidance:
    """Guidance whose weak prediction is the whole model with the null condition.

    Args:
        scale: w; a number, of which 1 is off and calls the model once, one per sample (B,), or a function of t that gives
            either.
        interval: guide only while low <= t <= high (arXiv 2404.07724), with t = 0 data and 1 noise.
        null: null condition, (B, *) or (1, *), or whatever the model takes as y; of a dictionary of conditions those that
            differ; by default `model.null_condition(B)`.
        rescale: 0 to 1, as in `guide`.
    """

    scale: Scale
    interval: tuple[float, float] = (0.0, 1.0)
    null: Any = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        _check(self.scale, self.interval, self.rescale)

    def __call__(self, model: Callable[..., Any], x: Tensor, t: float, y: Any) -> Tensor:
        """Guided prediction at x (B, *) and time t with condition y.

        Raises:
            ValueError: no condition to guide towards, or no null condition to guide away from.
            TypeError: the model returned no prediction.
        """
        scale = _scale_at(self.scale, self.interval, t)
        if scale is None:
            return predict(model, x, t, y)
        null = _null(model, self.null, y, len(x))
        return guide(predict(model, x, t, null), predict(model, x, t, y), scale, rescale=self.rescale)


@checked
@dataclass(frozen=True, eq=False)
class PathDropGuidance:
    """Guidance whose weak prediction takes the shallow path: encoder, mask token, decoder (SPRINT, Path-Drop Guidance).

    Args:
        scale: w, as in `ClassifierFreeGuidance`. The paper uses 3.0 for its ImageNet models; the best scale differs
            from model to model, so sweep it.
        interval: guide only while low <= t <= high, with t = 0 data and 1 noise.
        weak: condition of the weak prediction: "null" as in the paper, or "same", which needs no null condition and lets a
            `SiT` run its encoder once for both predictions (28 + 2 blocks for XL/2 instead of 28 + 4).
        null: as in `ClassifierFreeGuidance`.
        rescale: 0 to 1, as in `guide`.
    """

    scale: Scale
    interval: tuple[float, float] = (0.0, 1.0)
    weak: Weak = "null"
    null: Any = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        _check(self.scale, self.interval, self.rescale)
        if self.weak not in ("null", "same"):
            raise ValueError(f"weak must be 'null' or 'same', got {self.weak!r}")
        if self.weak == "same" and self.null is not None:
            raise ValueError("weak='same' uses no null condition: leave null out, or choose weak='null'")

    def __call__(self, model: Callable[..., Any], x: Tensor, t: float, y: Any) -> Tensor:
        """Guided prediction at x (B, *) and time t with condition y.

        Raises:
            ValueError: the model has no sparse middle, or as for `ClassifierFreeGuidance`.
        """
        scale = _scale_at(self.scale, self.interval, t)
        if scale is None:
            return predict(model, x, t, y)
        middle = _middle(model)
        if self.weak == "same" and getattr(unwrapped(model), "shares_encoder", False):
            strong, weak = predict(model, x, t, y, path="both")
            return guide(weak, strong, scale, rescale=self.rescale)
        condition = y if self.weak == "same" else _null(model, self.null, y, len(x))
        strong = predict(model, x, t, y)
        with middle.routed(path="shallow"):
            return guide(predict(model, x, t, condition), strong, scale, rescale=self.rescale)


@checked
@dataclass(frozen=True, eq=False)
class SparseGuidance:
    """Guidance whose weak prediction runs with most tokens dropped, same condition (Sparse Guidance, arXiv 2601.01608).

    Args:
        scale: w; a number, of which 1 is off and calls the model once, one per sample (B,), or a function of t that gives
            either.
        drop: drop sampler of the weak prediction.
        interval: guide only while low <= t <= high, with t = 0 data and 1 noise.
        rescale: 0 to 1, as in `guide`.
        generator: for the draws.
    """

    scale: Scale
    drop: Drop
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        _check(self.scale, self.interval, self.rescale)

    def __call__(self, model: Callable[..., Any], x: Tensor, t: float, y: Any) -> Tensor:
        """Guided prediction at x (B, *) and time t with condition y.

        Raises:
            ValueError: the model has no sparse middle.
        """
        scale = _scale_at(self.scale, self.interval, t)
        if scale is None:
            return predict(model, x, t, y)
        part, host = _middle(model), unwrapped(model)
        strong = predict(model, x, t, y)
        route: dict[str, Any] = {"drop": self.drop, "generator": self.generator}
        if hasattr(host, "token_grid"):  # our SiT takes the subset, a wrapped model draws it when it knows its tokens
            grid = host.token_grid(x)
            route = {"subset": self.drop.sample(len(x), grid, device=x.device, generator=self.generator)}
        with part.routed(path="sparse", **route):
            return guide(predict(model, x, t, y), strong, scale, rescale=self.rescale)


def _scale_at(scale: Scale, interval: tuple[float, float], t: float) -> float | Tensor | None:
    """w at time t; None where it does not act."""
    if not interval[0] <= t <= interval[1]:
        return None
    if callable(scale):
        scale = scale(t)
        _check_scale(scale, f"scale({t:.4g})")
    return None if not isinstance(scale, Tensor) and scale == 1 else scale


def _null(model: Any, null: Any, y: Any, batch: int) -> Any:
    if y is None:
        raise ValueError("guidance needs a condition to guide towards: pass y, or sample without guidance")
    if null is None:
        host = unwrapped(model)
        if not hasattr(host, "null_condition"):
            raise ValueError(f"{type(host).__name__} has no null_condition(batch): pass null=… to the guidance")
        if getattr(getattr(host, "config", None), "label_drop", None) == 0:
            warnings.warn(_UNTRAINED.format(type(host).__name__), stacklevel=4)
        return host.null_condition(batch)
    if isinstance(null, Mapping) and isinstance(y, Mapping):
        if unknown := null.keys() - y.keys():
            raise ValueError(
                f"null has {', '.join(sorted(unknown))}, which y has not: name conditions of y ({', '.join(y)})"
            )
        return {**y, **{name: _expanded(value, batch) for name, value in null.items()}}
    return _expanded(null, batch)


def _expanded(null: Any, batch: int) -> Any:
    return null.expand(batch, *null.shape[1:]) if isinstance(null, Tensor) and null.ndim and len(null) == 1 else null


def middle_of(model: Any) -> Any:
    """The part of a model whose path can be chosen: its `SparseMiddle`, or all of a wrapped model; None without just one."""
    found = _with_paths(model)
    return found[0] if len(found) == 1 else None


def _with_paths(model: Any) -> list[Any]:
    host = unwrapped(model)
    modules = host.modules() if isinstance(host, nn.Module) else ()
    return [module for module in modules if hasattr(type(module), "routed")]  # PEFT's modules pass attributes on


def _middle(model: Any) -> Any:
    if (found := middle_of(model)) is None:
        raise ValueError(
            f"Path-Drop Guidance needs a model with one SparseMiddle, or a wrapped one, "
            f"{type(unwrapped(model)).__name__} has {len(_with_paths(model))}: "
            "use ClassifierFreeGuidance for a model without a shallow path"
        )
    return found


def _check(scale: Scale, interval: tuple[float, float], rescale: float) -> None:
    if not callable(scale):
        _check_scale(scale, "scale")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must be from 0 (off) to 1, got {rescale}")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"interval must be (low, high) with 0 <= low <= high <= 1 (0 data, 1 noise), got {interval}")


def _check_scale(scale: Any, name: str) -> None:
    if isinstance(scale, Tensor):
        if scale.ndim > 1:
            raise ValueError(f"{name} must be one number, or one per sample, (B,), got {tuple(scale.shape)}")
        return  # its values stay on their device
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise TypeError(f"{name} must be a number, a tensor (B,), or a function of t, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"{name} must be a finite number, 1 for off, got {scale}")
