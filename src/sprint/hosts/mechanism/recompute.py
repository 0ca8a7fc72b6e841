"""Checkpoints of the host's own that recompute with a backward pass of their own (`use_reentrant=True`).

Such a checkpoint passes gradients to its arguments only. The last middle block fuses with the encoder's tokens, which the
first one captured: in a recomputation they are borrowed as leaves, and what their gradients come to is paid where the
tokens came from, into the argument of the first block, whose recomputation comes later.
"""

from typing import Any

import torch
from torch import Tensor


class Debt:
    """Gradients of the captured tokens that are owed to the first block's arguments, by name."""

    def __init__(self) -> None:
        self.owed: dict[str, Tensor] = {}

    def borrow(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as a leaf, whose gradient is remembered."""
        leaf = tensor.detach().requires_grad_()

        def remember(grad: Tensor) -> None:
            self.owed[name] = grad if name not in self.owed else self.owed[name] + grad

        leaf.register_hook(remember)
        return leaf

    def pay(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, whose gradient has what is owed added."""
        return _Paid.apply(tensor, self, name)  # pyright: ignore[reportReturnType]


class _Paid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, debt: Debt, name: str) -> Tensor:
        ctx.debt, ctx.name = debt, name
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        owed = ctx.debt.owed.pop(ctx.name, None)
        return (grads[0] if owed is None else grads[0] + owed), None, None


def draws(block: Any) -> bool:
    """Whether a block draws random numbers now, such as those of dropout."""
    return any(
        module.training
        and any(
            isinstance(value, float) and value > 0
            for name, value in vars(module).items()
            if "drop" in name or (name == "p" and "Dropout" in type(module).__name__)
        )
        for module in block.modules()
    )
