"""`Velocity`: a model of another convention, called as the library calls every model, `v = velocity(x, t, y)`.

The loss, samplers and guidance speak one language: t runs from 0 (data) to 1 (noise), and the answer is the velocity.
Models differ in what they predict, in how their time runs and is counted, in the names of their arguments, and in what they
return. Those that are known are listed in `sprint.flow.conventions`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sprint.flow.conventions import CONVENTIONS, Convention, known, prediction_in
from sprint.flow.guidance import unwrapped
from sprint.flow.interpolants import Interpolant, Prediction, check_prediction, get_interpolant


class Velocity(nn.Module):
    """A model as its velocity, for `FlowMatchingLoss`, `sample`, guidance, `TrainStep` and `SprintPipeline`.

    For diffusers' `DiTTransformer2DModel`, `PixArtTransformer2DModel`, `SD3Transformer2DModel`, `FluxTransformer2DModel` and
    `WanTransformer3DModel`, as they were pretrained, `Velocity(model)` is all. For the original DiT's and SiT's classes, and
    those made after them, say which: `Velocity(model, like="SiT")`. For any other, say what it predicts, and what of the
    rest is not as it is here; each option replaces that of the convention.

    Args:
        model: the model, wrapped or not, of any convention. It stays as it is and learns in place; its state is the
            `Velocity`'s `model.`.
        like: name of a convention: "DiT", "SiT", or the class of diffusers.
        prediction: what it predicts: "v", "x" or "noise".
        interpolant: that it was trained with, "linear", "cosine", "ddpm" or an `Interpolant`; "linear" by default.
        time: what it calls the time: a factor (1000), or a function of t (B,) that gives it; 1 by default.
        reverse: its time runs from 0 (noise) to 1 (data), and its velocity points to the data.
        channels: how many of the channels that it returns (axis 1) are the prediction, the first ones, for models that
            return a variance too.
        call: how it is called, `call(model, x, time, y)`; by default `model(x, time, y)`, `model(x, time)` without a
            condition, and `model(x, time, **y)` for a dictionary of conditions.
        null: the null condition of a batch, `null(model, B)`, for guidance; by default it has none.

    Raises:
        TypeError: model is none.
        ValueError: it is not known what the model predicts, or an option is unknown.

    Examples:
        >>> class Reversed(nn.Module):  # as SiT: time from noise to data, the velocity too
        ...     def forward(self, x, t, y):
        ...         return -x * t.view(-1, 1, 1, 1)
        >>> velocity = Velocity(Reversed(), prediction="v", reverse=True)
        >>> velocity(torch.ones(1, 1, 1, 1), torch.tensor([0.25]), torch.tensor([3])).item()
        0.75
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        like: str | None = None,
        prediction: Prediction | None = None,
        interpolant: str | Interpolant | None = None,
        time: float | Callable[[Tensor], Tensor] | None = None,
        reverse: bool | None = None,
        channels: int | None = None,
        call: Callable[[Any, Tensor, Tensor, Any], Any] | None = None,
        null: Callable[[Any, int], Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if hasattr(model, "token_grid") or isinstance(model, Velocity):
            raise ValueError(f"{type(model).__name__} is called as model(x, t, y) already: use it without Velocity")
        convention = _convention(_held(model), like, prediction, interpolant)
        _check_options(time, reverse, channels, call, null)
        self.model = model
        given = {"like": like, "prediction": prediction, "interpolant": interpolant, "time": time, "reverse": reverse}
        given |= {"channels": channels, "call": call, "null": null}
        self._given = {name: value for name, value in given.items() if value is not None}
        self.prediction: Prediction = prediction or convention.prediction
        check_prediction(self.prediction)
        self.interpolant = get_interpolant(interpolant or convention.interpolant)
        self.time = convention.time if time is None else time
        self.reverse = convention.reverse if reverse is None else reverse
        self.channels = convention.channels(_held(model)) if channels is None and convention.channels else channels
        self.call, self.null, self._convention = call or convention.call, null or convention.null, convention
        self.training = model.training

    def extra_repr(self) -> str:
        """What it predicts, and when."""
        time = self.time if not callable(self.time) else getattr(self.time, "__name__", "…")
        parts = [f"prediction={self.prediction!r}", f"interpolant={self.interpolant}", f"time={time}"]
        return ", ".join(parts + ["reverse=True"] * self.reverse)

    def forward(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        """The velocity.

        Args:
            x: state, as the model takes it, (B, *).
            t: times in [0, 1], (B,), 1 for noise.
            y: condition, or a dictionary of conditions by the names of the model's arguments.

        Returns:
            (B, *) like x; of at least float32 where it is converted from another prediction.

        Raises:
            TypeError: no tensor was found in what the model returned, or y is no dictionary where one is needed.
            ValueError: the model returned another shape.
        """
        seen = 1 - t if self.reverse else t
        output = self.call(self.model, x, self.time(seen) if callable(self.time) else self.time * seen, y)
        output = prediction_in(output, self.model)[:, : self.channels]
        if output.shape != x.shape:
            raise ValueError(
                f"{type(self.model).__name__} returned {tuple(output.shape)} for x {tuple(x.shape)}"
                + (
                    ""
                    if self.channels
                    else f": for a model that returns a variance too, Velocity(model, channels={x.shape[1]})"
                )
            )
        if self.prediction == "v":
            return -output if self.reverse else output
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.interpolant.to_velocity(output.to(wide), x.to(wide), t.to(wide), kind=self.prediction)

    def null_condition(self, batch: int) -> Any:
        """The null condition of a batch.

        Raises:
            ValueError: the convention has none.
        """
        if self.null is None:
            raise ValueError(
                f"{type(self.model).__name__} has no null condition of its own: pass null=… to the guidance, such as the "
                "embedding of an empty prompt; of a dictionary of conditions, only those that differ"
            )
        return self.null(_held(self.model), batch)

    def options(self) -> dict[str, Any]:
        """The options that it was made with, as a file can hold them: `Velocity(model, **options)` makes the same again.

        Raises:
            ValueError: one of them is a function or an interpolant of the user's own.
        """
        for name, value in self._given.items():
            if not isinstance(value, str | int | float):
                raise ValueError(
                    f"{name}={value!r} of this Velocity cannot be written to a file: save the model itself, and make the "
                    "Velocity anew"
                )
        return dict(self._given)

    def num_tokens(self, x: Tensor) -> int:
        """How many tokens the model makes of x, by which schedules are shifted."""
        return self._convention.tokens(_held(self.model), x)

    @property
    def in_channels(self) -> int:
        """Channels of x."""
        return self._convention.in_channels(_held(self.model))


def _held(model: Any) -> Any:
    """The model that others hold: DistributedDataParallel, `torch.compile`, a PeftModel."""
    model = unwrapped(model)
    return model.get_base_model() if type(model).__module__.startswith("peft.") else model


def _check_options(time: Any, reverse: Any, channels: Any, call: Any, null: Any) -> None:
    number = isinstance(time, int | float) and not isinstance(time, bool)
    if time is not None and not callable(time) and not (number and 0 < time < math.inf):
        raise ValueError(f"time must be a positive factor, such as 1000, or a function of t, got {time!r}")
    if not isinstance(reverse, bool | None):
        raise TypeError(f"reverse must be True or False, got {reverse!r}")
    if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
        raise ValueError(f"channels must be a whole number, at least 1, got {channels!r}")
    for name, function in (("call", call), ("null", null)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")


def _convention(model: Any, like: str | None, prediction: str | None, interpolant: Any) -> Convention:
    """That of a model, or the library's own if its user says what it predicts."""
    if like is not None and like not in CONVENTIONS:
        raise ValueError(f"unknown convention {like!r}: choose one of {', '.join(CONVENTIONS)}, or say what differs")
    found = CONVENTIONS[like] if like is not None else known(model)
    name = type(model).__name__
    if found is None and prediction is None:
        raise ValueError(
            f"it is not known what {name} predicts: Velocity(model, prediction='v'), 'x' or 'noise', with t = 0 at the data "
            "(reverse=True if at the noise), or, for models in the manner of the original ones, like='DiT' or like='SiT'"
        )
    if found is not None and prediction not in (None, found.prediction) and interpolant is None:
        raise ValueError(
            f"pretrained models of {like or name} predict {found.prediction!r} on the {found.interpolant} interpolant, with "
            f"a time of their own; for one that was trained to predict {prediction!r} say it all: Velocity(model, "
            f"prediction={prediction!r}, interpolant='linear', time=1000)"
        )
    return found or Convention()


def refuse_unadapted(model: Any) -> None:
    """Raise ValueError for a model that is known to be called in another way than `model(x, t, y)`."""
    model = _held(getattr(model, "__self__", model))
    if isinstance(model, nn.Module) and type(model).__module__.startswith("diffusers."):
        options = "model" if known(model) else "model, prediction=…"
        raise ValueError(
            f"{type(model).__name__} is not called as model(x, t, y) with t from 0 (data) to 1 (noise), and returns more "
            f"than a tensor: pass sprint.Velocity({options}), which translates, here and wherever a model is called"
        )


def interpolant_of(model: Any, given: str | Interpolant | None) -> Interpolant:
    """The interpolant that was given, or that a `Velocity` was made for or a model trained with, or the linear one.

    Raises:
        ValueError: they contradict each other, or the name is unknown.
    """
    within = [module for module in model.modules() if isinstance(module, Velocity)] if isinstance(model, nn.Module) else []
    if len(within) != 1:
        trained = getattr(getattr(model, "recipe", None), "interpolant", None)
        if given is not None and trained is not None and repr(get_interpolant(given)) != repr(get_interpolant(trained)):
            raise ValueError(f"interpolant={given!r}, but this model was trained with {trained!r}: leave interpolant out")
        return get_interpolant(given or trained or "linear")
    (velocity,) = within
    if given is not None and repr(get_interpolant(given)) != repr(velocity.interpolant):
        raise ValueError(
            f"interpolant={given!r}, but this Velocity is on the {velocity.interpolant}: leave interpolant out, or make the "
            "Velocity with it"
        )
    return velocity.interpolant


def check_predicts(prediction: Prediction, model: Any) -> None:
    """Raise ValueError unless the model may be taken to predict this."""
    if isinstance(model, Velocity) and prediction != "v":
        raise ValueError(
            f"prediction={prediction!r}, but a Velocity gives velocities, whatever its model predicts: leave it out"
        )
    check_prediction(prediction, model)
