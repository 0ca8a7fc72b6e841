"""Schedulers of diffusers as solvers: their timesteps as our times, our velocity as what their `step` takes."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sprint.flow.interpolants import Interpolant, LinearInterpolant
from sprint.random import Generators

Field = Callable[[Tensor, float], Tensor]
"""The velocity at a state x (B, *) and a time."""


def is_scheduler(solver: Any) -> bool:
    """Whether it has the interface of diffusers' schedulers."""
    return not isinstance(solver, type) and all(hasattr(solver, name) for name in ("set_timesteps", "step", "config"))


class Scheduled:
    """One run of a scheduler.

    Args:
        scheduler: of diffusers, for flow matching (`FlowMatchEulerDiscreteScheduler`, `FlowMatchHeunDiscreteScheduler`,
            others with `use_flow_sigmas`) or for DDPM's schedule (`DDIMScheduler`, `DPMSolverMultistepScheduler`, …).
        interpolant: of the model.
        steps: at least 1.
        device: of the state.
        tokens: tells how many the model makes, for schedulers with `use_dynamic_shifting`.

    Raises:
        ValueError: the scheduler is not of this interpolant, or shifts by a number of tokens that is unknown.
    """

    def __init__(
        self, scheduler: Any, interpolant: Interpolant, *, steps: int, device: torch.device, tokens: Callable[[], int | None]
    ) -> None:
        self.scheduler, self.interpolant = scheduler, interpolant
        self.kind = _kind(scheduler)
        _check(scheduler, interpolant, self.kind)
        scheduler.set_timesteps(**_settings(scheduler, steps, tokens), device=device)
        self.timesteps: list[Any] = list(scheduler.timesteps)
        count, first = scheduler.config.num_train_timesteps, 0 if self.kind == "flow" else 1
        self.times = [min((float(k) + first) / count, 1.0) for k in self.timesteps] + [0.0]
        """In [0, 1]; some schedulers call the model twice at one time."""
        self.scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
        """Of the noise at the start."""

    def step(self, velocity: Field, generator: Generators) -> Callable[[Tensor, float, float], Tensor]:
        """The function that takes a state from one of the times to the next."""
        left = iter(self.timesteps)
        takes = "generator" in inspect.signature(self.scheduler.step).parameters
        options: dict[str, Any] = {"generator": _listed(generator)} if takes and generator is not None else {}

        def step(x: Tensor, t: float, t_next: float) -> Tensor:
            k = next(left)
            seen = self.scheduler.scale_model_input(x, k) if hasattr(self.scheduler, "scale_model_input") else x
            output = self._predicted(velocity(seen, t), seen, torch.tensor(t, dtype=torch.float64, device=x.device))
            return self.scheduler.step(output, k, x, return_dict=False, **options)[0].to(x.dtype)

        return step

    def _predicted(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """What `step` takes, of a velocity at x and t."""
        between = self.interpolant
        if self.kind == "epsilon":
            return between.noise(v, x, t)
        if self.kind == "sample":
            return between.data(v, x, t)
        if self.kind == "v_prediction":
            return between.alpha(t) * between.noise(v, x, t) - between.sigma(t) * between.data(v, x, t)
        return v


def _listed(generator: Generators) -> Any:
    return list(generator) if isinstance(generator, Sequence) else generator


def _kind(scheduler: Any) -> str:
    """What its `step` takes: "flow", "epsilon", "sample" or "v_prediction".

    Raises:
        ValueError: its options contradict each other, or it is of no kind that is known here.
    """
    name, config = type(scheduler).__name__, scheduler.config
    kind, flows = config.get("prediction_type"), bool(config.get("use_flow_sigmas"))
    if flows != (kind == "flow_prediction"):
        raise ValueError(
            f"{name} has prediction_type={kind!r} and use_flow_sigmas={flows}: a model of velocities needs "
            "prediction_type='flow_prediction' with use_flow_sigmas=True, any other one neither"
        )
    other = [
        key
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        if config.get(key)
    ]
    if flows and other:
        raise ValueError(f"{name} has use_flow_sigmas and {other[0]}, of which it takes one: leave {other[0]} out")
    if "stages" in config:
        raise ValueError(f"{name} goes through stages of several resolutions: it is not known here")
    if "Inverse" in name:
        raise ValueError(f"{name} goes from data to noise, and samplers here the other way: use its counterpart")
    for key, fits in (("invert_sigmas", False), ("timestep_type", "discrete"), ("interpolation_type", "linear")):
        if config.get(key, fits) != fits:
            raise ValueError(f"{name} has {key}={config[key]!r}, which is not known here: {key}={fits!r}")
    if str(config.get("variance_type")).startswith("learned"):
        raise ValueError(
            f"{name} has variance_type={config['variance_type']!r}, and a velocity holds no variance: make it with "
            "variance_type='fixed_small'"
        )
    if any(word in name for word in _DISTILLED):
        warnings.warn(
            f"{name} is for models that were distilled for it: with another one its images are blurred or noisy, whatever "
            "the steps; DDIMScheduler, or FlowMatchEulerDiscreteScheduler for linear interpolants, is for any",
            stacklevel=5,
        )
    if flows or name in _FLOWS:
        return "flow"
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"{name} takes {'what it does not say' if kind is None else repr(kind)}: it is not known here")
    return str(kind)


_DISTILLED = ("LCM", "TCD")
_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def _check(scheduler: Any, interpolant: Interpolant, kind: str) -> None:
    name = type(scheduler).__name__
    if kind == "flow":
        if not isinstance(interpolant, LinearInterpolant):
            raise ValueError(
                f"{name} moves along x = (1 - t) x0 + t noise, and the model is of the {interpolant}: take a scheduler of "
                "its noise schedule, such as DDIMScheduler for ddpm, or solver='heun'"
            )
        return
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{name} has no noise schedule of DDPM's kind (alphas_cumprod): it is not known here")
    share = scheduler.alphas_cumprod.double().cpu()
    t = torch.arange(1, len(share) + 1, dtype=torch.float64) / len(share)
    if (interpolant.alpha(t).square() - share).abs().max() > 1e-4:
        raise ValueError(
            f"{name} has another noise schedule (beta_schedule={scheduler.config.get('beta_schedule')!r}) than the model's, "
            f"the {interpolant}: make it with that of the model; DiT's is beta_start=1e-4, beta_end=0.02, "
            "beta_schedule='linear', and models of a linear interpolant take FlowMatchEulerDiscreteScheduler"
        )


def _settings(scheduler: Any, steps: int, count: Callable[[], int | None]) -> dict[str, Any]:
    """Arguments of `set_timesteps`: a uniform grid where one can be given, and the shift."""
    settings: dict[str, Any] = {"num_inference_steps": steps}
    takes, config = inspect.signature(scheduler.set_timesteps).parameters, scheduler.config
    if "sigmas" in takes and config.get("prediction_type") is None:
        settings["sigmas"] = np.linspace(1, 1 / steps, steps)
    if config.get("use_dynamic_shifting") and "max_shift" not in config:
        raise ValueError(
            f"{type(scheduler).__name__} has use_dynamic_shifting, and no max_shift to shift by: give flow_shift instead"
        )
    if config.get("use_dynamic_shifting") and "mu" in takes:
        if (tokens := count()) is None:
            raise ValueError(
                f"{type(scheduler).__name__} shifts its times by the number of tokens, which this model does not tell: pass "
                "sprint.Velocity(model), or turn use_dynamic_shifting off"
            )
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        settings["mu"] = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return settings
