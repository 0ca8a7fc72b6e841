"""Blocks and block lists of a wrapped model while its `forward` runs: called, they take their route.

A bound block is its block in all else: attributes are read, set and deleted there, and `isinstance` sees the block's class.
"""

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from sprint.hosts.mechanism.places import Place


class Route(Protocol):
    """Decides what happens at a block."""

    def step(self, stop: "Stop", block: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call the block, or do otherwise, in its place."""
        ...


class Stop(NamedTuple):
    """A block and where it stands on a route."""

    block: nn.Module
    place: Place
    number: int
    route: Route


class Bound:
    """A block on its route; make one with `bind`. It keeps one attribute of its own, whose name no block has."""

    _sprint: Stop

    def __init__(self, stop: Stop) -> None:
        self.__dict__["_sprint"] = stop

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stop = self._sprint
        return stop.route.step(stop, stop.block, args, kwargs)

    def checkpointed(self, recompute: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The step with only the block itself inside the checkpoint; what is drawn and captured stays outside."""
        stop = self._sprint
        return stop.route.step(stop, partial(recompute, stop.block), args, kwargs)

    def __eq__(self, other: object) -> bool:
        return _block_of(self) is _block_of(other)

    def __hash__(self) -> int:
        return hash(_block_of(self))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sprint.block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._sprint.block, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._sprint.block, name)


def _block_of(value: Any) -> Any:
    """The block that something stands for; torch.compile asks this of objects that have nothing in them yet."""
    stop = value.__dict__.get("_sprint") if isinstance(value, Bound) else None
    return value if stop is None and not isinstance(value, Bound) else getattr(stop, "block", None)


_KINDS: dict[type, type[Bound]] = {}  # by the block's class; torch.compile can look them up, but not make them


def kind_of(block: nn.Module) -> type[Bound]:
    """The class of a block's bound self, for which `isinstance` gives what it gives for the block."""
    kind = _KINDS.get(type(block))
    if kind is None and not torch.compiler.is_compiling():
        kind = _KINDS[type(block)] = type("Bound", (Bound,), {"__class__": type(block)})
    return kind or Bound


def bind(block: nn.Module, place: Place, index: int, route: Route) -> Any:
    """The block on its route."""
    return kind_of(block)(Stop(block, place, index, route))


class Binding(NamedTuple):
    """What a list of a wrapped model knows while the model runs."""

    route: Route
    place: Place
    first: int
    bound: dict[int, Bound]
    """By index in the list, so that a block is one and the same however often it is asked for."""

    def bind(self, block: nn.Module, index: int) -> Any:
        """A block of the list on its route."""
        if index not in self.bound:
            self.bound[index] = bind(block, self.place.at(index), self.first + index, self.route)
        return self.bound[index]


class BoundList:
    """Marks a block list of a wrapped model; while the model runs, it yields bound blocks."""

    def __iter__(self) -> Iterator[Any]:
        blocks = super().__iter__()  # pyright: ignore[reportAttributeAccessIssue]
        if (binding := self.__dict__.get("_sprint")) is None:
            return blocks
        return iter([binding.bind(block, i) for i, block in enumerate(blocks)])

    def __getitem__(self, index: Any) -> Any:
        binding = self.__dict__.get("_sprint")
        if isinstance(index, slice) and binding is not None:
            return Slice(list(self)[index]) if isinstance(self, nn.Sequential) else list(self)[index]
        block = super().__getitem__(index)  # pyright: ignore[reportAttributeAccessIssue]
        if binding is None or isinstance(index, slice):
            return block
        return binding.bind(block, operator.index(index) % len(self))  # pyright: ignore[reportArgumentType]

    def __add__(self, other: Any) -> Any:
        if self.__dict__.get("_sprint") is None:
            return super().__add__(other)  # pyright: ignore[reportAttributeAccessIssue]
        return [*self, *other]


class Slice:
    """A slice of a bound `Sequential`, called like one."""

    def __init__(self, blocks: list[Any]) -> None:
        self.blocks = blocks

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x

    def __iter__(self) -> Iterator[Any]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: Any) -> Any:
        return Slice(self.blocks[index]) if isinstance(index, slice) else self.blocks[index]
