"""The moving average of the weights that a training step keeps: of its own, or of another library."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from sprint.capture.state import Part
from sprint.flow.holders import unwrapped


class Averages(Part):
    """What follows a model's weights.

    Args:
        model: also inside DistributedDataParallel.
        ema: a copy of the model, which follows within the (captured) step; an object with `step(parameters)` or
            `update_parameters(model)`, called after it; or None.
        decay: of a copied model.

    Raises:
        ValueError: not a copy of this model, or one that would save it without its fusion.
        TypeError: none of these.
    """

    def __init__(self, model: nn.Module, ema: Any, decay: float) -> None:
        self.decay = decay
        self.after: Callable[[], None] = lambda: None
        """To be called after each update."""
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self._following: dict[Tensor, Tensor] = {}
        model = unwrapped(model)
        if ema is None:
            return
        if hasattr(ema, "update_parameters"):
            self.after = lambda: ema.update_parameters(model)
        elif isinstance(ema, nn.Module):
            self._pairs = _pairs(model, ema)
        elif hasattr(ema, "step"):
            wrapped = any(hasattr(module, "sprint") for module in model.modules())
            if getattr(ema, "model_cls", None) is not None and wrapped:
                raise ValueError(
                    "this EMAModel would save a plain model, without the fusion of the wrapped one: leave model_cls and "
                    "model_config out, and save its weights with ema.store(model.parameters()), "
                    "ema.copy_to(model.parameters()), model.save_pretrained(folder), ema.restore(model.parameters())"
                )
            self.after = lambda: ema.step(model.parameters())
        else:
            raise TypeError(f"ema must be a copy of the model, or have step or update_parameters, got {type(ema).__name__}")

    def following(self) -> dict[Tensor, Tensor]:
        """By parameter, the averages that follow: of all that are trained, or once were."""
        for parameter, average in self._pairs:
            if parameter.requires_grad:
                self._following.setdefault(parameter, average)
        return self._following

    def look(self) -> tuple[Hashable, Hashable]:
        """How many follow."""
        return len(self.following()), None

    @torch.no_grad()
    def follow(self) -> None:
        """One step towards the weights."""
        if averages := self.following():
            parameters = [parameter.data for parameter in averages]
            torch._foreach_lerp_(list(averages.values()), parameters, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]


def _pairs(model: nn.Module, ema: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    ours, theirs = dict(model.named_parameters()), dict(ema.named_parameters())
    if ema is model or ours.keys() != theirs.keys():
        raise ValueError("ema is not a copy of the model: copy.deepcopy(model), before it is wrapped in DDP")
    for name, parameter in ours.items():
        is_, should = [(tuple(p.shape), p.dtype, p.device) for p in (theirs[name], parameter)]
        if is_ != should:
            described = [" ".join(map(str, each)) for each in (is_, should)]
            raise ValueError(
                f"{name} of ema is {described[0]}, of the model {described[1]}: ema=copy.deepcopy(model), after the model "
                "is on its device and in its dtype"
            )
        if theirs[name] is parameter:
            raise ValueError(f"{name} is the same tensor in ema and model: ema=copy.deepcopy(model)")
    return [(ours[name], theirs[name].data) for name in ours]
