"""Sampling: integrate a velocity from noise (t = 1) to data (t = 0).

The loop is written once; a solver is a time grid and a step. ODE: `dx = v dt`. SDE (SiT, arXiv 2401.08740): drift
`v − w(t)/2 score` and noise `sqrt(w(t))`, with w(t) = 2t, whose marginals are those of the ODE.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sprint.arguments import checked
from sprint.flow.guidance import Guidance, predict
from sprint.flow.holders import unwrapped
from sprint.flow.inputs import check_conditions, check_count
from sprint.flow.interpolants import Interpolant, Prediction
from sprint.flow.scheduled import Field, Scheduled, is_scheduler
from sprint.flow.velocity import Velocity, understood
from sprint.random import Generators, normal

LAST_NOISE_TIME = 1e-3  # a noise prediction says nothing about the data at t = 1: start this much later


class Solver(Protocol):
    """What a solver is: anything with these two methods."""

    def times(self, steps: int) -> list[float]:
        """steps + 1 decreasing times from 1 to 0."""
        ...

    def step(
        self,
        velocity: Field,
        x: Tensor,
        t: float,
        t_next: float,
        *,
        interpolant: Interpolant,
        generator: Generators,
    ) -> Tensor:
        """The state at t_next, given the state x (B, *) at t."""
        ...


@checked
class Euler:
    """First order, one evaluation per step; the paper's ODE sampler."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def times(self, steps: int) -> list[float]:
        """Uniform grid from 1 to 0."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()

    def step(
        self,
        velocity: Field,
        x: Tensor,
        t: float,
        t_next: float,
        *,
        interpolant: Interpolant,
        generator: Generators,
    ) -> Tensor:
        """`x + (t' − t) v(x, t)`."""
        return x + (t_next - t) * velocity(x, t)


@checked
class Heun(Euler):
    """Second order, two evaluations per step; the step that arrives at t = 0 is Euler's, as in EDM (arXiv 2206.00364)."""

    def step(
        self,
        velocity: Field,
        x: Tensor,
        t: float,
        t_next: float,
        *,
        interpolant: Interpolant,
        generator: Generators,
    ) -> Tensor:
        """`x + (t' − t) (v(x, t) + v(x', t')) / 2`, x' being Euler's step."""
        first = velocity(x, t)
        if t_next == 0:
            return x + (t_next - t) * first
        second = velocity(x + (t_next - t) * first, t_next)
        return x + (t_next - t) * (first + second) / 2


@checked
@dataclass(frozen=True)
class EulerMaruyama:
    """The paper's SDE sampler, diffusion w(t) = 2t; the step that arrives at t = 0 adds no noise.

    Args:
        last: time at which noise stops, in (0, 1); the last step goes from there to 0.
    """

    last: float = 0.04

    def __post_init__(self) -> None:
        if not 0 < self.last < 1:
            raise ValueError(f"last must lie between 0 and 1, got {self.last}")

    def times(self, steps: int) -> list[float]:
        """`linspace(1, last, steps)`, then 0."""
        if steps < 2:
            raise ValueError(f"the SDE solver needs at least 2 steps, got {steps}")
        return [*torch.linspace(1, self.last, steps, dtype=torch.float64).tolist(), 0.0]

    def step(
        self,
        velocity: Field,
        x: Tensor,
        t: float,
        t_next: float,
        *,
        interpolant: Interpolant,
        generator: Generators,
    ) -> Tensor:
        """`x + (t' − t) (v − w/2 score) + sqrt(w |t' − t|) ε`."""
        w = 2 * t
        v = velocity(x, t)
        drift = v - w / 2 * interpolant.score(v, x, torch.tensor(t, dtype=torch.float64))
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + math.sqrt(w * (t - t_next)) * normal(x.shape, device=x.device, dtype=x.dtype, generator=generator)
        return x


SOLVERS: dict[str, Solver] = {"euler": Euler(), "heun": Heun(), "sde": EulerMaruyama()}


class State(NamedTuple):
    """A point of a trajectory."""

    step: int
    """Steps taken."""
    t: float
    """Time reached."""
    x: Tensor
    """(B, *), of the state's dtype."""


@checked
def trajectory(
    model: Callable[..., Any],
    noise: Tensor,
    *,
    y: Any = None,
    guidance: Guidance | None = None,
    solver: Any = "euler",
    steps: int = 50,
    times: Sequence[float] | None = None,
    interpolant: str | Interpolant | None = None,
    prediction: Prediction = "v",
    generator: Generators = None,
    progress: bool = False,
    state_dtype: torch.dtype = torch.float64,
) -> Iterator[State]:
    """Yield every state from the noise (step 0) to the sample; for arguments see `sample`.

    Examples:
        >>> [(s.step, round(s.t, 2)) for s in trajectory(lambda x, t: x, torch.ones(1, 2), steps=2)]
        [(0, 1.0), (1, 0.5), (2, 0.0)]
    """
    if isinstance(solver, str) and solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(SOLVERS)}, or pass a Solver")
    check_count("steps", steps)
    if not noise.is_floating_point():
        raise TypeError(f"noise must be floating point, got {noise.dtype}: draw it with torch.randn")
    check_conditions(y, len(noise))
    host = unwrapped(model)
    between, of_noise = understood(host, prediction, interpolant)
    if any(getattr(part, "training", False) for part in (model, host, getattr(host, "model", None))):
        raise ValueError(
            "the model is in training mode, where labels and paths are dropped at random: call model.eval() first"
        )
    check: Any = getattr(host, "check_condition", None)
    if check is not None and (isinstance(y, Tensor) or isinstance(host, Velocity)):
        check(y)

    def velocity(x: Tensor, t: float) -> Tensor:
        if of_noise and between.alpha(torch.tensor(t, dtype=torch.float64)) < 1e-6:
            t = 1 - LAST_NOISE_TIME  # where the data's weight is 0, a noise prediction says nothing
        seen = x.to(noise.dtype)
        output = predict(model, seen, t, y) if guidance is None else guidance(model, seen, t, y)
        return between.to_velocity(output.to(x.dtype), x, torch.tensor(t, dtype=torch.float64), kind=prediction)

    x = noise.detach().to(state_dtype)
    if is_scheduler(solver):
        if times is not None:
            raise ValueError(f"times were given, but {type(solver).__name__} has a schedule of its own: leave them out")
        schedule = Scheduled(solver, between, steps=steps, device=x.device, tokens=lambda: _tokens(host, x))
        return _integrate(schedule.step(velocity, generator), x * schedule.scale, schedule.times, progress=progress)
    method = SOLVERS[solver] if isinstance(solver, str) else solver
    if isinstance(method, type) or not (hasattr(method, "times") and hasattr(method, "step")):
        raise TypeError(f"solver must be one of {', '.join(SOLVERS)}, a scheduler of diffusers or a Solver, got {solver!r}")
    grid = _grid(method.times(steps) if times is None else times, late=of_noise and times is None)

    def step(x: Tensor, t: float, t_next: float) -> Tensor:
        return method.step(velocity, x, t, t_next, interpolant=between, generator=generator)

    return _integrate(step, x, grid, progress=progress)


def _tokens(host: Any, x: Tensor) -> int | None:
    """How many tokens the model makes of x, if it says so."""
    if hasattr(host, "num_tokens"):
        return host.num_tokens(x)
    return math.prod(host.token_grid(x)) if hasattr(host, "token_grid") else None


@checked
def sample(
    model: Callable[..., Any],
    noise: Tensor,
    *,
    y: Any = None,
    guidance: Guidance | None = None,
    solver: Any = "euler",
    steps: int = 50,
    times: Sequence[float] | None = None,
    interpolant: str | Interpolant | None = None,
    prediction: Prediction = "v",
    generator: Generators = None,
    progress: bool = False,
    state_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Turn noise into samples.

    Args:
        model: `SiT`, `Velocity(your_model)`, or any function called as `model(x, t, y)`, or `model(x, t)` without a
            condition; x has the dtype of `noise`, t is (B,), 1 for noise. A module must be in `eval()`.
        noise: state at t = 1, standard normal, (B, *), floating point, on the model's device.
        y: condition, passed to the model.
        guidance: `ClassifierFreeGuidance`, `PathDropGuidance` or the like; None for the plain conditional model.
        solver: "euler", "heun", "sde", a scheduler of diffusers, or an object with `times` and `step`.
        steps: at least 1.
        times: decreasing times from at most 1 to at least 0, instead of the solver's grid for `steps`.
        interpolant: the one the model was trained with, "linear", "cosine", "ddpm" or an `Interpolant`; by default that of
            the `Velocity` or of the model's recipe, found also behind functions and holders (docs/velocity.md), or linear.
        prediction: what the model predicts, "v", "x" or "noise". A noise prediction says nothing at t = 1, where the data's
            weight is 0, so its default grid starts at 0.999.
        generator: for the noise of the SDE; one, or one per sample, so that no sample depends on its batch.
        progress: show a progress bar (needs tqdm).
        state_dtype: of the state between steps; float64 as in the reference. (Schedulers of diffusers keep float32.)

    Returns:
        Samples, (B, *), with the dtype of `noise`. No gradient flows; for the states on the way use `trajectory`.

    Raises:
        ValueError: unknown options, conditions that do not fit, a model in training mode or of another convention, or a
            scheduler that is not of the model's interpolant.
        TypeError: noise is not floating point.

    Examples:
        >>> sample(lambda x, t: x, torch.ones(1, 2), steps=2)
        tensor([[0.2500, 0.2500]])
    """
    states = trajectory(
        model,
        noise,
        y=y,
        guidance=guidance,
        solver=solver,
        steps=steps,
        times=times,
        interpolant=interpolant,
        prediction=prediction,
        generator=generator,
        progress=progress,
        state_dtype=state_dtype,
    )
    return deque(states, maxlen=1).pop().x.to(noise.dtype)  # only the last one is kept in memory


def _integrate(
    step: Callable[[Tensor, float, float], Tensor], x: Tensor, times: list[float], *, progress: bool
) -> Iterator[State]:
    yield State(0, times[0], x)
    with _bar(len(times) - 1, progress) as bar:
        for count, (t, t_next) in enumerate(pairwise(times), start=1):
            with torch.no_grad():  # around the step alone: the caller's own code runs between steps
                x = step(x, t, t_next)
            bar.update()
            yield State(count, t_next, x)


def _grid(times: Sequence[float], *, late: bool) -> list[float]:
    grid = [float(t) for t in times]
    if len(grid) < 2 or grid[0] > 1 or grid[-1] < 0 or not all(a > b for a, b in pairwise(grid)):
        raise ValueError(f"times must decrease, from at most 1 (noise) to at least 0 (data), and be 2 or more, got {grid}")
    if late:
        grid[0] = 1 - LAST_NOISE_TIME
    return grid


def _bar(total: int, progress: bool) -> Any:
    if not progress:
        return _NoBar()
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(total=total, desc="sampling", unit="step")


class _NoBar:
    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self) -> None:
        pass
