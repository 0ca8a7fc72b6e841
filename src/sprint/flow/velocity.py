"""`Velocity`: a model of another convention, called as the library calls every model, `v = velocity(x, t, y)`.

The loss, samplers and guidance speak one language: t runs from 0 (data) to 1 (noise), and the answer is the velocity.
Models differ in what they predict, in how their time runs and is counted, in the names of their arguments, and in what they
return. Those that are known are listed in `sprint.flow.conventions`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sprint.arguments import checked
from sprint.flow.conventions import CONVENTIONS, Convention, known, prediction_in
from sprint.flow.holders import called, held
from sprint.flow.inputs import check_class_ids, check_count, check_times
from sprint.flow.interpolants import Interpolant, Prediction, check_prediction, get_interpolant


@checked
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
        if hasattr(model, "token_grid") or isinstance(model, Velocity):
            raise ValueError(f"{type(model).__name__} is called as model(x, t, y) already: use it without Velocity")
        found = _convention(held(model), like, prediction, interpolant)
        convention = found or Convention()
        _check_options(time, channels)
        self.model = model
        given = {"like": like, "prediction": prediction, "interpolant": interpolant, "time": time, "reverse": reverse}
        given |= {"channels": channels, "call": call, "null": null}
        self._given = {name: value for name, value in given.items() if value is not None}
        self.prediction: Prediction = convention.prediction if prediction is None else prediction
        if interpolant is None and found is not None:
            interpolant = found.interpolant
        check_prediction(self.prediction)
        self.interpolant = _agreed(model, self.prediction, interpolant).interpolant
        self.time = convention.time if time is None else time
        self.reverse = convention.reverse if reverse is None else reverse
        self.channels = convention.channels(held(model)) if channels is None and convention.channels else channels
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
            ValueError: the model returned another shape; times or class ids out of range, looked at on a CPU.
        """
        check_times(t)
        self.check_condition(y, wait=False)
        seen = 1 - t if self.reverse else t
        output = self.call(self.model, x, self.time(seen) if callable(self.time) else self.time * seen, y)
        output = prediction_in(output, self.model)[:, : self.channels]
        if output.shape != x.shape:
            fix = f"for a model that returns a variance too, Velocity(model, channels={x.shape[1]})"
            if output.shape[1] == x.shape[1]:
                fix = "give x sides that its patch size divides"
            raise ValueError(f"{type(self.model).__name__} returned {tuple(output.shape)} for x {tuple(x.shape)}: {fix}")
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
        return self.null(held(self.model), batch)

    def check_condition(self, y: Any, *, wait: bool = True) -> None:
        """Raise ValueError for class ids out of the range of a model that takes some; it waits for the device, or without
        `wait` looks at values on the CPU only."""
        count = self._convention.classes(held(self.model))
        labels = y.get("class_labels", y.get("y")) if isinstance(y, Mapping) else y
        if count is None or not isinstance(labels, Tensor):
            return
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(f"y must be (B,) int64 class ids, got {tuple(labels.shape)} {labels.dtype}")
        check_class_ids(labels, count, wait=wait)

    def around(self, model: nn.Module) -> "Velocity":
        """Another model of the same class, also compiled or wrapped, with the options of this one.

        Raises:
            ValueError: it is of another class, and options were given.
        """
        one, other = (type(held(each)) for each in (self.model, model))
        if (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__):
            return Velocity(model, **self._given)
        if self._given:
            raise ValueError(
                f"this Velocity was made of a {one.__name__} with options of its own ({', '.join(self._given)}), which may "
                f"be wrong for a {other.__name__}: give that one as sprint.Velocity(model, …), with its options"
            )
        return Velocity(model)

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
        return self._convention.tokens(held(self.model), x)

    @property
    def in_channels(self) -> int:
        """Channels of x."""
        return self._convention.in_channels(held(self.model))


def _check_options(time: Any, channels: int | None) -> None:
    if time is not None and not callable(time) and not 0 < time < math.inf:
        raise ValueError(f"time must be a positive factor, such as 1000, or a function of t, got {time!r}")
    if channels is not None:
        check_count("channels", channels)


def _convention(model: Any, like: str | None, prediction: str | None, interpolant: Any) -> Convention | None:
    """That of a model; None if its user says what it predicts."""
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
    return found


class Understood(NamedTuple):
    """How a model is to be taken."""

    interpolant: Interpolant
    of_noise: bool
    """Whether it predicts noise, or what it calls does, so that it says nothing where there is no data."""


def understood(model: Any, prediction: Prediction, interpolant: str | Interpolant | None) -> Understood:
    """Bring together what was given and what a model says of itself: a `Velocity`, a model with a recipe, or whatever
    holds or calls them. Where nobody speaks, the interpolant is linear.

    Raises:
        ValueError: they contradict each other, an unknown name, or a model that needs a `Velocity`.
    """
    _refuse_unadapted(model)
    check_prediction(prediction)
    return _agreed(model, prediction, interpolant)


def _agreed(model: Any, prediction: Prediction, interpolant: str | Interpolant | None) -> Understood:
    speaking = [part for module in called(model) for part in _speaking(module)]
    if kinds := [kind for part in speaking if (kind := _predicts(part)) is not None]:
        if prediction not in kinds and any(isinstance(part, Velocity) for part in speaking):
            raise ValueError(
                f"prediction={prediction!r}, but a Velocity gives velocities, whatever its model predicts: leave it out"
            )
        if prediction not in kinds:
            raise ValueError(
                f"prediction={prediction!r}, but this model predicts {kinds[0]!r}: pass prediction={kinds[0]!r}"
            )
    said: list[tuple[Interpolant, str]] = []
    for part in speaking:
        between = part.interpolant if isinstance(part, Velocity) else getattr(_own(part, "recipe"), "interpolant", None)
        if between is not None and not any(_same(get_interpolant(between), other) for other, _ in said):
            way = f"Velocity is on the {between}" if isinstance(part, Velocity) else f"model was trained with {between!r}"
            said.append((get_interpolant(between), way))
    if interpolant is None and len(said) > 1:
        raise ValueError(
            f"several models of different interpolants are called here (one {' and one '.join(way for _, way in said)}): "
            "pass interpolant=…, that of the velocity which is returned"
        )
    given = get_interpolant("linear" if interpolant is None else interpolant)
    if interpolant is not None and said and not any(_same(given, other) for other, _ in said):
        raise ValueError(
            f"interpolant={interpolant!r}, but this {said[0][1]}: leave interpolant out, or make the Velocity, or train, "
            "with it"
        )
    chosen = said[0][0] if interpolant is None and said else given
    inner = [part for part in speaking if isinstance(part, Velocity) and _same(part.interpolant, chosen)]
    return Understood(chosen, prediction == "noise" or any(part.prediction == "noise" for part in inner))


def _refuse_unadapted(model: Any) -> None:
    """Raise ValueError for a model that is known to be called in another way than `model(x, t, y)`."""
    model = held(getattr(model, "__self__", model))
    if isinstance(model, nn.Module) and type(model).__module__.startswith("diffusers."):
        options = "model" if known(model) else "model, prediction=…"
        raise ValueError(
            f"{type(model).__name__} is not called as model(x, t, y) with t from 0 (data) to 1 (noise), and returns more "
            f"than a tensor: pass sprint.Velocity({options}), which translates, here and wherever a model is called"
        )


def _speaking(module: nn.Module) -> Iterator[Any]:
    """The modules within that say what they predict or are trained with; a Velocity and a SiT speak for what is in them."""
    if isinstance(module, Velocity) or hasattr(type(module), "token_grid"):
        yield module
        return
    if _own(module, "recipe") is not None or _predicts(module) is not None:
        yield module
    for child in module.children():
        yield from _speaking(child)


def _own(module: nn.Module, name: str) -> Any:
    """An attribute of this very module or its class, without a search of its parameters and of what it passes on."""
    return getattr(module, name) if name in vars(module) or hasattr(type(module), name) else None


def _predicts(part: Any) -> str | None:
    if isinstance(part, Velocity):
        return "v"
    said = getattr(_own(part, "config"), "prediction", None)
    return said if said in get_args(Prediction) else None


def _same(one: Interpolant, other: Interpolant) -> bool:
    return one is other or (type(one) is type(other) and repr(one) == repr(other) and repr(vars(one)) == repr(vars(other)))
