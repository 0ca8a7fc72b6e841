"""Weights of linear layers in autocast's dtype, kept beside the float32 ones instead of being cast at every step."""

import torch
from torch import Tensor, nn

from sprint.middle.fusion import SplitLinear


class Shadows:
    """Copies of the weights of linear layers in autocast's dtype, which stand in for them while the model runs.

    Autocast would cast the same weights at every step, and their gradients back: the numbers are the same. Other parameters
    (norms, embeddings) stay as they are, as they do under autocast, and so do weights with hooks and those that anything
    but a linear layer also holds (tied embeddings). After a weight was changed from outside, the copies are made anew.

    Args:
        model: with float32 weights.
        dtype: of the copies.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.copies: dict[Tensor, Tensor] = {}
        self.places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        linear, others = [], set()
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if isinstance(module, nn.Linear | SplitLinear) and name in ("weight", "bias") and not _hooked(parameter):
                    linear.append((module, name, parameter))
                else:
                    others.add(parameter)
        for module, name, parameter in linear:
            if parameter.dtype != torch.float32 or parameter in others:
                continue
            if parameter not in self.copies:
                self.copies[parameter] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            self.places.append((module, name, parameter, self.copies[parameter]))  # pyright: ignore[reportArgumentType]
        self.memory, self.versions = self._places(), self._versions()

    def __enter__(self) -> None:
        for module, name, parameter, copy in self.places:
            if copy.requires_grad != parameter.requires_grad:
                copy.requires_grad_(parameter.requires_grad)
            module._parameters[name] = copy

    def __exit__(self, *error: object) -> None:
        for module, name, parameter, _ in self.places:
            module._parameters[name] = parameter

    def remember(self) -> None:
        """The weights are now what their copies are of."""
        self.versions = self._versions()

    @torch.no_grad()
    def refresh(self, *, always: bool = False) -> None:
        """Copy again if a weight was changed from outside."""
        places = self._places()
        if always or self._versions() != self.versions or places != self.memory:
            for parameter, copy in self.copies.items():
                copy.copy_(parameter)
            self.memory = places
            self.remember()

    def release(self) -> None:
        """Drop the copies' gradients."""
        for copy in self.copies.values():
            copy.grad = None

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.copies]

    def _places(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.copies))


def _hooked(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))
