"""`wrap`: SPRINT inside a model that you already have, its own `forward` untouched.

The wrapped model is of a subclass with its class's name; parameters, their names, hooks and configuration stay. While
its `forward` runs, its block lists yield blocks that know their route (`sprint.hosts.route`). The only new parameters
are the fusion and the mask token, under `sprint.`.
"""

import functools
import inspect
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from sprint.checkpoint import write_text
from sprint.drop import Drop
from sprint.fusion import Init, MaskRestore, SparseDenseResidual, TokenRouting
from sprint.hosts.declare import Host, declaration
from sprint.hosts.places import Place, by_name, find_places, parameter_of, width_of
from sprint.hosts.route import Bound, Route
from sprint.middle import Path
from sprint.tokens import TokenSubset

Merge = Literal["residual", "routing", "mask"]

OPTIONS_FILE = "sprint.json"  # beside a saved model of diffusers: how it was wrapped


class SprintState(nn.Module):
    """What `wrap` adds to a model, at `model.sprint`: the fusion, and where the model's blocks are."""

    def __init__(self, fusion: nn.Module, *, host: Host, declared: bool, parameters: list[str], path_drop: float) -> None:
        super().__init__()
        self.fusion = fusion
        self.host, self.declared, self.parameters_of_forward, self.path_drop = host, declared, parameters, path_drop
        self.places: list[tuple[Place, int]] = []  # runs of blocks, and the index of the first block of each
        self.first = self.last = 0  # middle blocks
        self.drop: Drop | None = None
        self.checkpoint = False
        self.options: dict[str, Any] = {}  # of wrap, as far as a file can hold them
        self.grid: tuple[int, ...] | None = None
        self.weak_half: Literal["first", "second"] | None = (
            None  # of a batch of both guidance branches: takes the shallow path
        )
        self.split_calls = 0
        self.bypassed = False  # run the host as if it were not wrapped, for `check`
        self.route: tuple[Path, TokenSubset | None, Drop | None, torch.Generator | None] = ("full", None, None, None)

    def arguments(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the model's forward by name."""
        return {**by_name(self.parameters_of_forward, args), **kwargs}


def wrap(
    model: nn.Module,
    *,
    encoder_depth: int = 2,
    decoder_depth: int = 2,
    drop: Drop | None = None,
    path_drop: float = 0.1,
    merge: Merge = "residual",
    init: Init = "identity",
    learnable_mask: bool | None = None,
    grid: tuple[int, ...] | None = None,
    checkpoint: bool = False,
    host: Host | None = None,
) -> Any:
    """Give a model SPRINT's three paths, in place.

    It starts on the full path: nothing is dropped until `sprint.path(model, "sparse")` says so.

    Args:
        model: a registered architecture (`sprint.registered()`), or any model with one list of blocks whose first
            argument and result are the tokens (B, N, C).
        encoder_depth: blocks before the middle, counted over all its lists.
        decoder_depth: blocks after it.
        drop: default drop sampler of the sparse path.
        path_drop: probability of dropping a sample's deep path, in training.
        merge: "residual" (SPRINT), "routing" (TREAD: dropped tokens bypass the middle), or "mask" (mask token only), to
            compare them.
        init: of the residual fusion. "identity" leaves a pretrained model as it is, bit by bit, on the full path;
            "xavier" is the paper's, for training from scratch.
        learnable_mask: train the mask token; by default frozen for "residual", as in the reference, and trained for "mask".
        grid: token grid, where the model's arguments do not tell it (packed latents).
        checkpoint: recompute each block in the backward pass instead of storing its activations, for models without gradient
            checkpointing of their own; drops and fusion stay outside.
        host: declaration to use instead of a registered one.

    Returns:
        The same model.

    Raises:
        ValueError: wrapped twice, too few blocks, no list of blocks, no width, or parameters on several devices.
    """
    if isinstance(getattr(model, "sprint", None), SprintState):
        raise ValueError(f"this {type(model).__name__} is wrapped already: sprint.unwrap(model) first")
    if merge not in get_args(Merge):
        raise ValueError(f"unknown merge {merge!r}: choose one of {', '.join(get_args(Merge))}")
    found, declared = (host, True) if host is not None else declaration(model)
    places, depth = find_places(model, found)
    if min(encoder_depth, decoder_depth) < 0 or encoder_depth + decoder_depth >= depth:
        raise ValueError(
            f"encoder_depth={encoder_depth} and decoder_depth={decoder_depth} leave no middle of the {depth} blocks of "
            f"{type(model).__name__}: choose smaller ones"
        )
    like = parameter_of(model)
    width = width_of(model, found)
    fusions = {
        "residual": lambda: SparseDenseResidual(width, path_drop=path_drop, init=init, learnable_mask=bool(learnable_mask)),
        "routing": lambda: TokenRouting(width, path_drop=path_drop),
        "mask": lambda: MaskRestore(width, path_drop=path_drop, learnable_mask=learnable_mask is not False),
    }
    state = SprintState(
        fusions[merge]().to(device=like.device, dtype=like.dtype),
        host=found,
        declared=declared,
        parameters=list(inspect.signature(model.forward).parameters),
        path_drop=path_drop,
    )
    state.places, state.drop, state.grid, state.checkpoint = places, drop, grid, checkpoint
    state.options = {
        "encoder_depth": encoder_depth,
        "decoder_depth": decoder_depth,
        "path_drop": path_drop,
        "merge": merge,
        "learnable_mask": learnable_mask,
        "grid": grid,
        "checkpoint": checkpoint,
    }
    state.first, state.last = encoder_depth, depth - decoder_depth - 1
    model.sprint = state.train(model.training)
    for place, _ in places:
        run = model.get_submodule(place.blocks.name)
        if isinstance(run, nn.ModuleList | nn.Sequential):
            run.__class__ = _bound_list(type(run))
    model.__class__ = _wrapped(type(model))
    return model


def unwrap(model: nn.Module) -> Any:
    """Undo `wrap`: the model as it was, without its fusion.

    Raises:
        ValueError: the model is not wrapped.
    """
    state = state_of(model)
    for place, _ in state.places:
        run = model.get_submodule(place.blocks.name)
        if isinstance(run, _BoundList):
            run.__dict__.pop("_sprint", None)
            run.__class__ = type(run).__mro__[2]
    del model.sprint
    model.__dict__.pop("_sprint", None)
    model.__class__ = type(model).__mro__[2]
    return model


def state_of(model: Any) -> SprintState:
    """What `wrap` added, also behind DistributedDataParallel or torch.compile."""
    host = model
    while isinstance(host, nn.Module):
        if isinstance(state := host._modules.get("sprint"), SprintState):
            return state
        host = host._modules.get("_orig_mod", host._modules.get("module"))
    raise ValueError(
        f"this {type(model).__name__} is not wrapped: model = sprint.wrap(model, drop=sprint.StructuredDrop(0.75))"
    )


class path:
    """Choose the path of a wrapped model: from now on, or, in a `with` statement, until its end.

    Args:
        model: wrapped, also behind DistributedDataParallel or torch.compile.
        name: "full" (all tokens), "sparse" (kept tokens) or "shallow" (the middle never runs).
        drop: drop sampler of the sparse path, instead of the one given to `wrap`.
        subset: kept tokens of the sparse path, instead of drawn ones.
        grid: token grid, where the model's arguments do not tell it.
        generator: for the draws.

    Raises:
        ValueError: the model is not wrapped, an unknown path, or a sparse path without a drop sampler.
    """

    def __init__(
        self,
        model: Any,
        name: Path,
        *,
        drop: Drop | None = None,
        subset: TokenSubset | None = None,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.state = state_of(model)
        if name not in get_args(Path):
            raise ValueError(f"unknown path {name!r}: choose one of {', '.join(get_args(Path))}")
        if name == "sparse" and subset is None and drop is None and self.state.drop is None:
            raise ValueError(
                "the sparse path needs a drop sampler: sprint.path(model, 'sparse', drop=sprint.StructuredDrop(0.75))"
            )
        if name != "sparse" and (subset is not None or drop is not None):
            raise ValueError(f"path {name!r} drops no tokens: leave drop and subset out")
        drop = None if name != "sparse" or subset is not None else drop or self.state.drop
        self.before = self.state.route, self.state.grid
        self.state.route = (name, subset, drop, generator)
        self.state.grid = grid or self.state.grid

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.state.route, self.state.grid = self.before


class _Wrapped:
    """Marks a wrapped model's class; its methods are made in `_wrapped`."""

    sprint: SprintState

    def routed(self, **route: Any) -> path:
        """`sprint.path` under the name that `SparseMiddle` has, for guidance and losses."""
        return path(self, route.pop("path", "sparse" if route.get("subset") or route.get("drop") else "full"), **route)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # pyright: ignore[reportAttributeAccessIssue]
        route = self.__dict__.get("_sprint")
        if route is not None and name in route.single and isinstance(value, nn.Module):
            place, index = route.single[name]
            return Bound(value, place, index, route)
        return value

    @property
    def _gradient_checkpointing_func(self) -> Any:
        """diffusers' checkpointing of one block, which here leaves the drop and the fusion outside."""
        checkpoint = self.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is None:
            return None

        def run(block: Any, *args: Any, **kwargs: Any) -> Any:
            bound = getattr(block, "__self__", block)
            return (
                bound.checkpointed(checkpoint, args, kwargs)
                if isinstance(bound, Bound)
                else checkpoint(block, *args, **kwargs)
            )

        return run

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint: Any) -> None:
        self.__dict__["_gradient_checkpointing_func"] = checkpoint


class _BoundList:
    """Marks a block list of a wrapped model; while the model runs, it yields bound blocks."""

    def __iter__(self) -> Iterator[Any]:
        blocks = super().__iter__()  # pyright: ignore[reportAttributeAccessIssue]
        if (bind := self.__dict__.get("_sprint")) is None:
            return blocks
        route, place, first = bind
        return iter([Bound(block, place, first + i, route) for i, block in enumerate(blocks)])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and self.__dict__.get("_sprint") is not None:
            return list(self)[index]
        block = super().__getitem__(index)  # pyright: ignore[reportAttributeAccessIssue]
        if (bind := self.__dict__.get("_sprint")) is None or not isinstance(index, int):
            return block
        route, place, first = bind
        return Bound(block, place, first + index % len(self), route)  # pyright: ignore[reportArgumentType]


@functools.cache
def _bound_list(base: type) -> type:
    return type(base.__name__, (_BoundList, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


@functools.cache
def _wrapped(base: type) -> type:
    host_forward = base.forward

    @functools.wraps(host_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.sprint
        if state.bypassed:
            return host_forward(self, *args, **kwargs)
        route = Route(state, self, state.arguments(args, kwargs))
        lists = []
        for place, first in state.places:
            run = self.get_submodule(place.blocks.name)
            if isinstance(run, _BoundList):
                run.__dict__["_sprint"] = (route, place, first)
                lists.append(run)
            else:
                route.single[place.blocks.name] = (place, first)
        self.__dict__["_sprint"] = route
        try:
            output = host_forward(self, *args, **kwargs)
        finally:
            route.finished = True
            self.__dict__["_sprint"] = None
            for run in lists:
                run.__dict__["_sprint"] = None
        if not route.fused:
            raise RuntimeError(
                f"{base.__name__}.forward did not call its blocks through "
                f"{', '.join(p.blocks.name for p, _ in state.places)}, "
                "so nothing was dropped or fused: correct the declaration, or turn off what bypasses the list "
                "(such as checkpoint_seq of timm)"
            )
        return output

    members: dict[str, Any] = {}
    if hasattr(base, "save_pretrained"):

        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            output = base.save_pretrained(self, save_directory, *args, **kwargs)
            write_text(pathlib.Path(save_directory) / OPTIONS_FILE, json.dumps(self.sprint.options, indent=2))
            return output

        members["save_pretrained"] = functools.wraps(base.save_pretrained)(save_pretrained)
    members |= {
        "forward": forward,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (_Wrapped, base), members)
