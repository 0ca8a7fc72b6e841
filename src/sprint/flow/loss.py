"""Flow matching: the distribution of training times, and the loss.

    loss = mean |v_θ(x_t, t, y) − v|²        x_t, v: see `sprint.flow.interpolants`

The log-normal time is EDM's noise level, σ/α = exp(N(0, 1)) (arXiv 2206.00364), as SPRINT (arXiv 2510.21986) trains with.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sprint.arguments import called, checked
from sprint.flow.conventions import prediction_in
from sprint.flow.guidance import middle_of
from sprint.flow.holders import unwrapped
from sprint.flow.inputs import check_conditions, check_number, check_times
from sprint.flow.interpolants import Interpolant, Prediction, check_prediction, get_interpolant
from sprint.flow.velocity import understood
from sprint.middle.drop import Drop
from sprint.middle.tokens import TokenSubset
from sprint.random import Device, normal, uniform

NEAREST = 1e-6  # that a drawn time comes to either end


@called("a distribution of times such as UniformTime()")
class Time(Protocol):
    """What a time distribution is: anything that draws t (B,) in [0, 1]."""

    def __call__(
        self, batch: int, interpolant: Interpolant, *, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw t, (B,), float32."""
        ...


@checked
@dataclass(frozen=True)
class UniformTime:
    """t uniform on [0, 1)."""

    def __call__(
        self, batch: int, interpolant: Interpolant, *, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw t, (B,), float32."""
        return uniform((batch,), device=device, generator=generator)


@checked
@dataclass(frozen=True)
class LogNormalTime:
    """Noise-to-signal ratio σ/α = exp(N(mean, std)); with the linear interpolant t is logit-normal (SPRINT, training).

    Args:
        mean: of log(σ/α).
        std: of log(σ/α), positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_number("mean", self.mean)
        check_number("std", self.std, positive=True)

    def __call__(
        self, batch: int, interpolant: Interpolant, *, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw t, (B,), float32."""
        draw = normal((batch,), device=device, generator=generator)
        return interpolant.time_at(torch.exp(self.mean + self.std * draw))


@checked
@dataclass(frozen=True)
class ShiftedTime:
    """Another distribution moved towards noise, `t -> s t / (1 + (s − 1) t)` (SD3, arXiv 2403.03206, resolution shift).

    Args:
        shift: s, positive; 1 changes nothing, more means noisier. SD3 takes sqrt(tokens / base tokens).
        base: the distribution that is moved.
    """

    shift: float
    base: Time = UniformTime()

    def __post_init__(self) -> None:
        check_number("shift", self.shift, positive=True)

    def __call__(
        self, batch: int, interpolant: Interpolant, *, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw t, (B,), float32."""
        t = self.base(batch, interpolant, device=device, generator=generator)
        return self.shift * t / (1 + (self.shift - 1) * t)


TIMES: dict[str, Time] = {"uniform": UniformTime(), "lognormal": LogNormalTime()}


@dataclass(frozen=True)
class LossOutput:
    """What `FlowMatchingLoss` returns."""

    loss: Tensor
    """To call `backward` on: mean of `per_sample`, plus `repa_weight * repa` if there is REPA; scalar."""
    per_sample: Tensor
    """Mean squared error of each sample, (B,), detached."""
    t: Tensor
    """Times, (B,)."""
    repa: Tensor | None
    """REPA term before weighting, scalar in [-1, 1], detached; None without a teacher."""
    subset: TokenSubset | None
    """Tokens that the middle saw; None for all."""


@checked
class FlowMatchingLoss:
    """Mean squared error of the velocity at a random time, with optional token dropping and REPA.

    Args:
        interpolant: "linear", "cosine", "ddpm", or an `Interpolant`; by default that of the `Velocity` or of the model's
            recipe, or linear.
        time: "uniform", "lognormal", or a distribution such as `ShiftedTime(3.0)`.
        prediction: what the model predicts: "v", or "x" or "noise", which are converted exactly, so that the loss is the
            velocity's in each case ("x" needs t > 0, "noise" needs t < 1; a time at that end gives an infinite loss).
        error: whose mean squared error it is: "v", or "noise", DDPM's simple loss, with which noise models were pretrained,
            or "x". Each is the others' times a factor of t.
        repa_weight: coefficient of the REPA term (0.5 in REPA, arXiv 2410.06940, and in SPRINT).

    Examples:
        >>> from sprint import SiT, StructuredDrop
        >>> model = SiT.preset("S/2", middle_depth=1, num_classes=10)
        >>> out = FlowMatchingLoss()(model, torch.randn(2, 4, 8, 8), y=torch.tensor([3, 7]), drop=StructuredDrop(0.75))
        >>> out.loss.ndim, out.per_sample.shape, out.subset.num_kept
        (0, torch.Size([2]), 4)
    """

    def __init__(
        self,
        *,
        interpolant: str | Interpolant | None = None,
        time: str | Time = "lognormal",
        prediction: Prediction = "v",
        error: Prediction = "v",
        repa_weight: float = 0.5,
    ) -> None:
        if isinstance(time, str) and time not in TIMES:
            raise ValueError(f"unknown time {time!r}: choose one of {', '.join(TIMES)}, or pass a distribution")
        check_prediction(prediction)
        check_prediction(error)
        check_number("repa_weight", repa_weight)
        self.interpolant = None if interpolant is None else get_interpolant(interpolant)
        self.time: Time = TIMES[time] if isinstance(time, str) else time
        self.prediction: Prediction = prediction
        self.error: Prediction = error
        self.repa_weight = repa_weight

    def __repr__(self) -> str:
        parts = f"interpolant={self.interpolant or 'of the model'}, time={self.time}, prediction={self.prediction!r}"
        return f"FlowMatchingLoss({parts}, error={self.error!r}, repa_weight={self.repa_weight})"

    def __call__(
        self,
        model: Any,
        x0: Tensor,
        *,
        y: Any = None,
        drop: Drop | None = None,
        repa_target: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Compute the loss of one batch.

        Args:
            model: called as `model(x, t)`, or `model(x, t, y)` with a condition, t (B,), 1 for noise. A `SiT`, or a model of
                its interface, gets `subset=` with a drop sampler, `repa=True` with a teacher, and the generator; a wrapped
                model, also within a `Velocity` or an adapter of yours, draws its tokens itself.
            x0: data, (B, *), floating point.
            y: condition, passed on.
            drop: draws the tokens that the middle sees; None shows it all (second stage, or a dense model), unless
                `sprint.path` has chosen another path of a wrapped model.
            repa_target: teacher features of all tokens, (B, N, D), row-major over the token grid.
            t: times, (B,), instead of drawn ones.
            noise: (B, *) like x0, instead of drawn noise.
            generator: for all draws, also label-drop and path-drop of a `SiT`, and of a wrapped model path-drop.

        Returns:
            Named results; `.loss` is the one to differentiate.

        Raises:
            ValueError: shapes that do not fit, a drop sampler for a model without a token grid, or a model of another
                convention, which needs a `Velocity`.
            TypeError: x0 is not floating point, or the model returned no prediction.
        """
        host = unwrapped(model)
        wrapped = _wrapped(model)
        ours = wrapped is None and callable(getattr(host, "token_grid", None))
        between = understood(host, self.prediction, self.interpolant).interpolant
        _check_call(x0, drop, repa_target, host=type(host).__name__, drops=ours or wrapped is not None, aligns=ours)
        check_conditions(y, len(x0))
        if t is None:
            t = self.time(len(x0), between, device=x0.device, generator=generator)
            _check_times(t, len(x0))
            t = t + NEAREST * (t == 0) - NEAREST * (t == 1)  # at the ends some losses are infinite
        else:
            _check_times(t, len(x0))
        if noise is None:
            noise = normal(x0.shape, device=x0.device, dtype=x0.dtype, generator=generator)
        elif noise.shape != x0.shape:
            raise ValueError(f"noise must be {tuple(x0.shape)} like x0, got {tuple(noise.shape)}")

        options: dict[str, Any] = {}
        subset = None
        route: Any = nullcontext()
        if wrapped is not None and (drop is not None or generator is not None):
            route = wrapped.routed(**({} if drop is None else {"path": "sparse", "drop": drop}), generator=generator)
        elif drop is not None:
            subset = drop.sample(len(x0), host.token_grid(x0), device=x0.device, generator=generator)
            options["subset"] = subset
        if repa_target is not None:
            options["repa"] = True
        if generator is not None and ours:
            options["generator"] = generator

        wide = t.to(torch.promote_types(x0.dtype, torch.float32))
        x = between.interpolate(x0, noise, wide)
        with route:
            output = model(x.to(x0.dtype), t, **options) if y is None else model(x.to(x0.dtype), t, y, **options)
        prediction = output.v if repa_target is not None else prediction_in(output, host)
        if prediction.shape != x0.shape:
            raise ValueError(f"the model returned {tuple(prediction.shape)}, expected {tuple(x0.shape)} like x0")
        v = between.to_velocity(prediction.to(x.dtype), x, wide, kind=self.prediction)
        error = (v - between.velocity(x0, noise, wide)).square().flatten(1).mean(1)  # (B,)
        if self.error != "v":
            error = error * between.per_velocity(wide, kind=self.error).square()
        loss, repa = error.mean(), None
        if repa_target is not None:
            seen = repa_target if output.repa_subset is None else output.repa_subset.gather(repa_target)
            repa = repa_loss(output.repa, seen)
            loss = loss + self.repa_weight * repa
        return LossOutput(loss, error.detach(), t, None if repa is None else repa.detach(), subset)


def _check_times(t: Tensor, batch: int) -> None:
    if t.shape != (batch,):
        raise ValueError(f"t must be ({batch},), one time per sample, got {tuple(t.shape)}")
    check_times(t)


def _wrapped(model: Any) -> Any:
    """The model that `sprint.wrap` has wrapped, in whatever holds it; None for any other."""
    found = middle_of(model)
    return found if hasattr(found, "sprint") else None


def _check_call(x0: Tensor, drop: Any, repa_target: Tensor | None, *, host: str, drops: bool, aligns: bool) -> None:
    if not x0.is_floating_point():
        raise TypeError(f"x0 must be floating point, got {x0.dtype}: scale images to [-1, 1] first")
    if drop is not None and not drops:
        raise ValueError(
            f"drop was given, but {host} has no token_grid, so it cannot drop tokens: use sprint.SiT or sprint.wrap"
        )
    if repa_target is not None and not aligns:
        raise ValueError(f"repa_target was given, but {host} returns no projected tokens: use sprint.SiT with repa_dim")


@checked
def repa_loss(features: Tensor, target: Tensor) -> Tensor:
    """Minus the mean cosine similarity of projected tokens and teacher features (REPA, arXiv 2410.06940, equation 8).

    Args:
        features: projected tokens, (B, N, D).
        target: teacher features of the same tokens, (B, N, D); no gradient flows into them.

    Returns:
        Scalar in [-1, 1].

    Raises:
        ValueError: shapes differ.
    """
    if features.shape != target.shape:
        raise ValueError(
            f"teacher features are {tuple(target.shape)}, the model's projected tokens {tuple(features.shape)}: "
            "give one feature per token of the grid, row-major, as wide as repa_dim"
        )
    wide = torch.promote_types(features.dtype, torch.float32)
    return -F.cosine_similarity(features.to(wide), target.detach().to(wide), dim=-1).mean()
