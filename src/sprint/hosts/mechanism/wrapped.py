"""The class of a wrapped model: the host's, whose calls open a route."""

import functools
import inspect
import json
import pathlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sprint.checkpoint import write_text
from sprint.hosts.mechanism.bound import Binding, Bound, BoundList, bind
from sprint.hosts.mechanism.guided import HALF_A_BATCH
from sprint.hosts.mechanism.paths import path
from sprint.hosts.mechanism.route import Route
from sprint.hosts.mechanism.state import SprintState, own_state, state_of

OPTIONS_FILE = "sprint.json"  # beside a saved model of diffusers: how it was wrapped


class Wrapped:
    """Marks a wrapped model's class; its `forward` is made in `class_of_model`."""

    sprint: SprintState

    def routed(self, **route: Any) -> path:
        """`sprint.path` under the name that `SparseMiddle` has, for guidance and losses; by default, the path of now."""
        if not route.keys() & {"path", "subset", "drop"}:
            name, subset, drop, _ = state_of(self).route
            route |= {"path": name, "subset": subset, "drop": drop}
        return path(self, route.pop("path", "sparse" if route.get("subset") or route.get("drop") else "full"), **route)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """A model may have a `forward` of its own beside its class's, of accelerate or of hooks, that passes ours by."""
        call = super()._call_impl  # pyright: ignore[reportAttributeAccessIssue]
        if "forward" not in self.__dict__ or not _opens(self):
            return call(*args, **kwargs)
        return _routed(self, call, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # pyright: ignore[reportAttributeAccessIssue]
        route = self.__dict__.get("_sprint")
        if route is not None and name in route.single and isinstance(value, nn.Module):
            place, index = route.single[name]
            return bind(value, place, index, route)
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


def _opens(model: Any) -> bool:
    """Whether a call now begins a route: it is wrapped, and no route is waiting for the host's forward to begin.

    A model made from a wrapped one's class, or one that was unwrapped, has no state, and runs as the host.
    """
    state, route = own_state(model), model.__dict__.get("_sprint")
    if state is None or state.bypassed:
        return False
    return route is None or route.opened or (not torch.compiler.is_compiling() and state.held_elsewhere())


def _routed(model: Any, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], *, opened: bool = False) -> Any:
    """Run the host on its route, with other threads kept out."""
    state = own_state(model)
    assert state is not None
    if torch.compiler.is_compiling():
        return _on_route(model, state, call, args, kwargs, opened=opened)
    with state.held():
        return _on_route(model, state, call, args, kwargs, opened=opened)


def _on_route(model: Any, state: SprintState, call: Callable[..., Any], args: tuple, kwargs: dict, *, opened: bool) -> Any:
    """Run the host while its block lists know the route; a call within a call has a route of its own."""
    route = Route(state, model, state.arguments(args, kwargs))
    route.opened = opened
    lists = []
    for place, first in state.places:
        run = model.get_submodule(place.blocks.name)
        if isinstance(run, nn.ModuleList | nn.Sequential) or place.count > 1:
            if not isinstance(run, BoundList) or len(run) != place.count:  # pyright: ignore[reportArgumentType]
                raise RuntimeError(
                    f"{place.blocks.name!r} of {type(model).__name__} was replaced or has another length since it was "
                    "wrapped: sprint.unwrap(model), change its blocks, and wrap it again"
                )
            lists.append((run, run.__dict__.get("_sprint")))
            run.__dict__["_sprint"] = Binding(route, place, first, {})
        else:
            route.single[place.blocks.name] = (place, first)
    outer = model.__dict__.get("_sprint")
    model.__dict__["_sprint"] = route
    try:
        output = call(*args, **kwargs)
    except RuntimeError as error:
        if route.fused or torch.compiler.is_compiling():
            raise
        if route.strong is not None:
            raise ValueError(f"{HALF_A_BATCH} ({error})") from error
        if route.path != "sparse" or not route.between:
            raise
        raise RuntimeError(
            f"{error}\n{type(model).__name__}.forward failed between its middle blocks, where it has {route.length} of "
            f"{route.num_tokens} image tokens: what it adds or joins there must have as many (skips across the edge of the "
            "middle have all: choose as many decoder as encoder blocks; so have tokens kept from before the blocks)"
        ) from error
    finally:
        route.finished = True
        model.__dict__["_sprint"] = outer
        for run, before in lists:
            run.__dict__["_sprint"] = before
    if not route.fused:
        names = ", ".join(place.blocks.name for place, _ in state.places)
        raise RuntimeError(
            f"{type(model).__name__}.forward did not call its blocks through {names}, so nothing was dropped or fused: "
            "correct the declaration, or turn off what bypasses the list (such as checkpoint_seq of timm)"
            if route.reached < 0
            else f"{type(model).__name__}.forward ended after block {route.reached}, before the tokens were fused: the last "
            f"middle block ({state.last}) or a later one must run, so wrap it with a larger decoder_depth"
        )
    return output


@functools.cache
def class_of_list(base: type) -> type:
    """The class of a block list in a wrapped model."""
    return type(base.__name__, (BoundList, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


@functools.cache
def class_of_model(base: type, names: tuple[str, ...]) -> type:
    """The class of a wrapped model whose block lists have these names."""
    host_forward = base.forward

    @functools.wraps(host_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _opens(self):
            return _routed(self, functools.partial(host_forward, self), args, kwargs, opened=True)
        if (route := self.__dict__.get("_sprint")) is not None:
            route.opened = True
        return host_forward(self, *args, **kwargs)

    members: dict[str, Any] = {name: _guarded(name, method) for name, method in _other_ways(base, names).items()}
    if hasattr(base, "save_pretrained"):

        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            output = base.save_pretrained(self, save_directory, *args, **kwargs)
            if (state := own_state(self)) is not None:
                write_text(pathlib.Path(save_directory) / OPTIONS_FILE, json.dumps(state.options, indent=2))
            return output

        members["save_pretrained"] = functools.wraps(base.save_pretrained)(save_pretrained)
    members |= {
        "forward": forward,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (Wrapped, base), members)


def unwrapped_class(kind: type, mark: type) -> type:
    """The class that a wrapped model or list was of.

    Raises:
        ValueError: it was changed once more since.
    """
    if kind.__mro__[1] is not mark:
        raise ValueError(
            f"the class of this {kind.__name__} was changed after it was wrapped (by fully_shard or a parametrization): "
            "undo that first, or load the weights into a model that is not wrapped"
        )
    return kind.__mro__[2]


def _other_ways(base: type, names: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """The methods beside `forward` that run the blocks, such as timm's `forward_features`: those that name a list, or did
    before a subclass overrode them. Taken from the class as it is, so that what overrides them stays."""
    lists = {name.split(".")[0] for name in names}
    found = set()
    for kind in base.__mro__:
        if kind is nn.Module or not issubclass(kind, nn.Module):
            continue
        for name, method in vars(kind).items():
            code = getattr(inspect.unwrap(method), "__code__", None) if isinstance(method, types.FunctionType) else None
            if code is not None and lists & {*code.co_names} and not name.startswith("__") and name != "forward":
                found.add(name)
    methods = {name: inspect.getattr_static(base, name) for name in sorted(found)}
    return {name: method for name, method in methods.items() if isinstance(method, types.FunctionType)}


def _guarded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, refused where it would run all tokens in silence: outside of a call, on another path than the full one."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__.get("_sprint") is None:
            state = own_state(self)
            takes_tensors = any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
            if state is not None and takes_tensors and state.route[0] != "full" and not state.bypassed:
                raise RuntimeError(
                    f"{type(self).__name__}.{name} runs the blocks outside of forward, where the {state.route[0]} path is "
                    "not taken: call the model itself, or choose sprint.path(model, 'full')"
                )
        return method(self, *args, **kwargs)

    return guarded
