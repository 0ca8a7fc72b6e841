"""Gradients of the calls between two updates.

They belong to the step: what someone else's backward pass left in `p.grad` does not count, nor does an exception's half.
A parameter without a gradient has None, and the optimizer leaves it alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Window:
    """The gradients of one update, over one call or several.

    Where calls are captured, each parameter's gradient keeps its memory, because a graph adds to the memory that it was
    captured with.

    Args:
        calls: per update.
        fixed: keep the memory from one window to the next.
    """

    def __init__(self, calls: int, *, fixed: bool) -> None:
        self.calls, self.fixed = calls, fixed and calls > 1
        self.recording = False
        self.held: dict[Tensor, Tensor] = {}
        self.sets: list[frozenset[int]] = [frozenset()]
        self._versions: dict[int, int] = {}

    def open(self, parameters: Sequence[Tensor], filled: int) -> None:
        """Before a forward pass.

        Args:
            parameters: of the optimizer.
            filled: which of them have gradients in this window; what the last `close` returned, 0 at first.
        """
        have, fresh = self.sets[filled], {}
        for index, parameter in enumerate(parameters):
            gradient = self.held.get(parameter) if parameter.requires_grad and self.held else None
            if index not in have and gradient is not None:
                gradient = gradient if self.fixed else None
                if gradient is not None:
                    fresh[index] = gradient
            parameter.grad = gradient
        if fresh:
            torch._foreach_zero_(list(fresh.values()))  # pyright: ignore[reportPrivateImportUsage]
        self._versions = {index: gradient._version for index, gradient in fresh.items()}

    def close(self, parameters: Sequence[Tensor], filled: int) -> int:
        """After a backward pass; returns which parameters have gradients now."""
        if self.calls == 1:
            return 0
        have = set(self.sets[filled])
        for index, parameter in enumerate(parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            if self._versions.get(index) == gradient._version:  # nothing was added
                parameter.grad = None
                continue
            if self.recording and gradient is not self.held.get(parameter):
                raise RuntimeError("a parameter got its first gradient while the call was captured")
            self.held[parameter] = gradient
            have.add(index)
        now = frozenset(have)
        if now not in self.sets:
            self.sets.append(now)
        return self.sets.index(now)

    def clear(self, parameters: Sequence[Tensor]) -> None:
        """The gradients are used up, or void."""
        for parameter in parameters:
            parameter.grad = None
        if not self.fixed:
            self.held.clear()
