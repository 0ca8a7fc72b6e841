"""Interpolants: the way from data to noise, and the exact conversions between what models predict.

Time runs from 0 (data) to 1 (noise):

    x_t = α(t) x0 + σ(t) ε        v = α'(t) x0 + σ'(t) ε

The interpolants and conversions are those of SiT (arXiv 2401.08740). The word "path" is left to SPRINT's paths.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from sprint.arguments import checked

Prediction = Literal["v", "x", "noise"]


def like(t: Tensor, x: Tensor) -> Tensor:
    """A time per sample, (B,), or one for all, (), shaped to multiply x (B, *) or kept as it is."""
    return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t


@checked
class Interpolant(ABC):
    """The way from data to noise: α(t), σ(t) and their derivatives, elementwise over t in [0, 1].

    All conversions are exact algebra on `x = α x0 + σ ε` and `v = α' x0 + σ' ε`; the determinant `α σ' − α' σ` is positive
    for every t, so each is defined wherever its divisor is.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """Derivative of alpha."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """Derivative of sigma."""

    @abstractmethod
    def time_at(self, noise_to_signal: Tensor) -> Tensor:
        """The time at which σ/α has this value."""

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`x_t = α x0 + σ ε`: x0 and noise (B, *), t (B,) -> (B, *)."""
        t = like(t, x0)
        return self.alpha(t) * x0 + self.sigma(t) * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`v = α' x0 + σ' ε`: x0 and noise (B, *), t (B,) -> (B, *)."""
        t = like(t, x0)
        return self.alpha_dot(t) * x0 + self.sigma_dot(t) * noise

    def data(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 implied by a velocity: `(σ' x − σ v) / (α σ' − α' σ)`."""
        t = like(t, x)
        return (self.sigma_dot(t) * x - self.sigma(t) * v) / self._determinant(t)

    def noise(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """ε implied by a velocity: `(α v − α' x) / (α σ' − α' σ)`."""
        t = like(t, x)
        return (self.alpha(t) * v - self.alpha_dot(t) * x) / self._determinant(t)

    def score(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Score of the marginal, `−ε / σ`; infinite at t = 0."""
        return -self.noise(v, x, t) / self.sigma(like(t, x))

    def to_velocity(self, prediction: Tensor, x: Tensor, t: Tensor, *, kind: Prediction) -> Tensor:
        """Velocity implied by a prediction of v, of x0 (kind "x"; not at t = 0) or of ε ("noise"; not at t = 1)."""
        t = like(t, x)
        if kind == "x":
            return self.alpha_dot(t) * prediction + self.sigma_dot(t) * (x - self.alpha(t) * prediction) / self.sigma(t)
        if kind == "noise":
            return self.alpha_dot(t) * (x - self.sigma(t) * prediction) / self.alpha(t) + self.sigma_dot(t) * prediction
        return prediction

    def per_velocity(self, t: Tensor, *, kind: Prediction) -> Tensor:
        """By how much x0 (kind "x") or ε ("noise") differ where velocities differ by one, without sign; elementwise."""
        return (self.sigma(t) if kind == "x" else self.alpha(t)) / self._determinant(t)

    def _determinant(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.sigma_dot(t) - self.alpha_dot(t) * self.sigma(t)


@checked
class LinearInterpolant(Interpolant):
    """α = 1 − t, σ = t, so v = ε − x0.

    Examples:
        >>> linear = LinearInterpolant()
        >>> linear.interpolate(torch.tensor([[2.0]]), torch.tensor([[6.0]]), torch.tensor([0.25]))
        tensor([[3.]])
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_at(self, noise_to_signal: Tensor) -> Tensor:
        return noise_to_signal / (1 + noise_to_signal)


@checked
class CosineInterpolant(Interpolant):
    """α = cos(πt/2), σ = sin(πt/2), the variance-preserving interpolant (GVP in SiT).

    Examples:
        >>> cosine, t = CosineInterpolant(), torch.tensor([0.3])
        >>> cosine.alpha(t) ** 2 + cosine.sigma(t) ** 2
        tensor([1.])
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * math.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * math.pi / 2)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(t)

    def time_at(self, noise_to_signal: Tensor) -> Tensor:
        return torch.atan(noise_to_signal) * 2 / math.pi


@checked
class DDPMInterpolant(Interpolant):
    """α² = ∏ (1 − β_j) over the first 1000 t steps of DDPM, β from 1e-4 to 0.02 (arXiv 2006.11239), the schedule of DiT.

    Continuous in t: the sum of ln(1 − β_j) is taken as its integral by the midpoint rule, which agrees with the product to
    1e-7. Step k of DiT is t = (k + 1) / 1000. σ' is infinite at t = 0, and at t = 1 a weight of 0.006 is left to the data.

    Examples:
        >>> ddpm, t = DDPMInterpolant(), torch.tensor([0.001, 1.0], dtype=torch.float64)
        >>> beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        >>> torch.allclose(ddpm.alpha(t) ** 2, (1 - beta).cumprod(0)[[0, 999]], rtol=1e-7)
        True
    """

    steps, first, last = 1000, 1e-4, 0.02

    def alpha(self, t: Tensor) -> Tensor:
        return (self._log(t) / 2).exp().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (-self._log(t).expm1()).clamp(min=0).sqrt().to(t.dtype)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return (self._log_dot(t) / 2).to(t.dtype) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def time_at(self, noise_to_signal: Tensor) -> Tensor:
        wanted = -torch.log1p(noise_to_signal.double().square())
        t = torch.full_like(wanted, 0.5)
        for _ in range(20):  # Newton, on a concave function: from above it overshoots once at most
            t = (t - (self._log(t) - wanted) / self._log_dot(t)).clamp(0, 1)
        return t.to(noise_to_signal.dtype)

    @property
    def _slope(self) -> float:
        return (self.last - self.first) / (self.steps - 1)

    def _rest(self, t: Tensor) -> Tensor:
        """1 − β at a step between the steps, float64: its differences are small."""
        return 1 - self.first - self._slope * (self.steps * t.double() - 0.5)

    def _log(self, t: Tensor) -> Tensor:
        """ln α²: the integral of ln(1 − β)."""
        u, start = self._rest(t), self._rest(torch.zeros_like(t))
        return -((u * u.log() - u) - (start * start.log() - start)) / self._slope

    def _log_dot(self, t: Tensor) -> Tensor:
        return self.steps * self._rest(t).log()


INTERPOLANTS: dict[str, Interpolant] = {
    "linear": LinearInterpolant(),
    "cosine": CosineInterpolant(),
    "ddpm": DDPMInterpolant(),
}


def get_interpolant(name: "str | Interpolant") -> Interpolant:
    """An interpolant by name, "linear", "cosine" or "ddpm"; one of your own passes through.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(name, Interpolant):
        return name
    if name not in INTERPOLANTS:
        raise ValueError(f"unknown interpolant {name!r}: choose one of {', '.join(INTERPOLANTS)}, or pass an Interpolant")
    return INTERPOLANTS[name]


def check_prediction(prediction: str) -> None:
    """Raise ValueError unless it is "v", "x" or "noise"."""
    if prediction not in get_args(Prediction):
        raise ValueError(f"unknown prediction {prediction!r}: choose one of {', '.join(get_args(Prediction))}")
