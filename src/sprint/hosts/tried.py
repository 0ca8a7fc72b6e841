"""What the trials of `check` share: a wrapped model, the inputs that it is tried with, and ways to change these."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sprint.hosts.mechanism.places import Place
from sprint.hosts.mechanism.state import SprintState
from sprint.hosts.outputs import difference
from sprint.middle.drop import Drop
from sprint.middle.tokens import TokenSubset

Inputs = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    name: str
    ok: bool | None
    """None: does not apply to this model, or was not proved."""
    detail: str


class Draws:
    """A drop sampler like another one, that notes what was drawn, or draws what was noted.

    Args:
        drop: the other one; a copy of it is used, since a route asks for more than `sample`.
        fixed: what is drawn.
    """

    def __init__(self, drop: Drop, fixed: TokenSubset | None = None) -> None:
        self.drop, self.subset = copy.copy(drop), fixed
        self.grid: tuple[int, ...] = ()

        def sample(batch: int, grid: Sequence[int], **options: Any) -> TokenSubset:
            self.grid = tuple(grid)
            self.subset = fixed if fixed is not None else drop.sample(batch, grid, **options)
            return self.subset

        object.__setattr__(self.drop, "sample", sample)


@dataclass
class Tried:
    """A wrapped model, and the inputs that it is tried with.

    Args:
        model: as the user has it.
        host: the wrapped model inside.
        state: what `wrap` added.
        call: of the model, on the path that is chosen.
        output: takes the prediction out of what it returns.
        args: its arguments by position.
        kwargs: and by name.
        tolerance: largest difference relative to the largest output.
        blind: the output does not depend on what the middle blocks do.
        oracle: how attention had to be masked for the trial of fewer tokens, once it is proved.
    """

    model: nn.Module
    host: nn.Module
    state: SprintState
    call: Callable[..., Any]
    output: Callable[[Any], Tensor]
    args: tuple
    kwargs: dict[str, Any]
    tolerance: float
    blind: bool = False
    oracle: "dict[str, Any] | None" = None

    def run(self, name: str, inputs: "Inputs | None" = None, **route: Any) -> Tensor:
        """The prediction on a path, with the user's inputs or others."""
        args, kwargs = inputs or (self.args, self.kwargs)
        return self.output(self.call(name, args, kwargs, **route))

    def _set(self, name: str, value: Any, path: str, inputs: "Inputs | None" = None) -> Tensor:
        """The prediction with one attribute of the state set meanwhile."""
        before = getattr(self.state, name)
        setattr(self.state, name, value)
        try:
            return self.run(path, inputs)
        finally:
            setattr(self.state, name, before)

    def _blocks(self) -> list[tuple[Place, nn.Module]]:
        """All blocks in order, and where they are called."""
        found = []
        for place, _ in self.state.places:
            run = self.host.get_submodule(place.blocks.name)
            blocks = list(run) if isinstance(run, nn.ModuleList | nn.Sequential) else [run]
            found += [(place.at(i), block) for i, block in enumerate(blocks)]
        return found

    def _met(self, path: str = "full", inputs: "Inputs | None" = None) -> list[tuple[Place, dict[str, Any]]]:
        """What each middle block gets that runs, by name."""
        met: list[tuple[Place, dict[str, Any]]] = []

        def meet(place: Place, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            met.append((place, place.named(args, kwargs)))

        middle = self._blocks()[self.state.first : self.state.last + 1]
        hooks = [block.register_forward_pre_hook(partial(meet, place), with_kwargs=True) for place, block in middle]
        try:
            self.run(path, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return met

    def _same(self, one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape and difference(one, other) < self.tolerance

    def _compared(self, name: str, one: Tensor, other: Tensor) -> Finding:
        apart = difference(one, other)
        return Finding(name, apart < self.tolerance, f"relative difference {apart:.1e}, at most {self.tolerance:.0e}")

    def _named(self) -> dict[str, Any]:
        return self.state.arguments(self.args, self.kwargs)

    def _first(self) -> Any:
        """The image: the first argument by the signature of forward."""
        return next(iter(self._named().values()), None)

    def _batch(self) -> int:
        return _length(self._first())

    def _rows(self, count: int, *, start: int = 0) -> "Inputs":
        """The inputs of so many samples, from one on, and again from the first."""
        batch = max(self._batch(), 1)
        places = [(start + i) % batch for i in range(count)]
        if places == [*range(batch)]:
            return self.args, self.kwargs
        return self._inputs(lambda x: x[places] if isinstance(x, Tensor) else [x[i] for i in places])

    def _inputs(
        self, change: Callable[..., Any], *, image: bool = True, others: "Inputs | None" = None, of: "Inputs | None" = None
    ) -> "Inputs":
        """The inputs, or those given, with a change of whatever has a row for each sample, of the image too or not; or a
        change of these and of `others`."""
        inputs = of or (self.args, self.kwargs)
        first = next(iter(self.state.arguments(*inputs).values()), None)
        batch = _length(first)

        def rows(value: Any) -> bool:
            return (
                isinstance(value, (Tensor, list))
                and not (isinstance(value, Tensor) and not value.ndim)
                and len(value) == batch
            )

        def changed(value: Any, *other: Any) -> Any:
            return change(value, *other) if rows(value) and (image or value is not first) else value

        return tree_map(changed, inputs, *([] if others is None else [others]), is_leaf=rows)


def _length(x: Any) -> int:
    return len(x) if isinstance(x, (list, tuple)) or (isinstance(x, Tensor) and x.ndim) else 0


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator(4)).to(like)


def text_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
