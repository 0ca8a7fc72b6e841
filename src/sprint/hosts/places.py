"""Where a model keeps its blocks and a block its arguments; how wide its tokens are."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sprint.hosts.declare import Blocks, Host

_WIDTHS = ("inner_dim", "hidden_size", "embed_dim", "width", "dim")


def by_name(names: Sequence[str], args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments by name, as far as either goes."""
    count = min(len(names), len(args))  # not zip(strict=False), which torch 2.7 compiles as if it were strict
    return dict(zip(names[:count], args[:count], strict=True))


class Place:
    """Where a run of blocks keeps its arguments."""

    def __init__(self, blocks: Blocks, parameters: Sequence[str]) -> None:
        self.blocks, self.parameters = blocks, list(parameters)
        if not self.parameters:
            raise ValueError(
                f"the forward of blocks {blocks.name!r} names no parameter, so its tokens cannot be told from the "
                "rest: give it named parameters"
            )
        self.image = blocks.image or self.parameters[0]
        for name in (self.image, blocks.text, *blocks.tables, *(blocks.sides or ())):
            if name is not None and name not in self.parameters:
                raise ValueError(
                    f"blocks {blocks.name!r} have no parameter {name!r}, they take {', '.join(self.parameters)}: "
                    "correct the declaration"
                )

    def named(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """The arguments by name; positional ones beyond the named parameters keep their number."""
        named = by_name(self.parameters, args)
        rest = {str(i): value for i, value in enumerate(args) if i >= len(self.parameters)}
        return {**named, **rest, **kwargs}

    def call(self, block: Callable[..., Any], named: dict[str, Any], args: tuple, kwargs: dict) -> Any:
        """Call with changed arguments, each passed as it came: by position or by name."""
        names = [self.parameters[i] if i < len(self.parameters) else str(i) for i in range(len(args))]
        return block(*[named[name] for name in names], **{name: named[name] for name in kwargs})


def find_places(model: nn.Module, host: Host) -> tuple[list[tuple[Place, int]], int]:
    """The runs of blocks with the index of the first of each, and the number of all blocks."""
    places, count = [], 0
    for blocks in host.blocks:
        try:
            run = model.get_submodule(blocks.name)
        except AttributeError as error:
            raise ValueError(
                f"{type(model).__name__} has no blocks at {blocks.name!r}, as its declaration says: correct the declaration"
            ) from error
        members = list(run) if isinstance(run, nn.ModuleList | nn.Sequential) else [run]
        if not members:
            continue
        block = members[0]
        for wrapper in ("_checkpoint_wrapped_module", "_orig_mod"):
            block = getattr(block, wrapper, block)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names = [name for name, p in inspect.signature(block.forward).parameters.items() if p.kind in kinds]
        places.append((Place(blocks, names), count))
        count += len(members)
    return places, count


def parameter_of(model: nn.Module) -> torch.Tensor:
    """A parameter whose device and dtype the fusion gets."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ValueError(
            f"the model's parameters are on {sorted(map(str, devices)) or 'no device'}: move it to one device first"
        )
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())


def width_of(model: Any, host: Host) -> int:
    """The token width C."""
    if callable(host.width):
        return host.width(model)
    names = (host.width,) if host.width else _WIDTHS
    for source in (model, getattr(model, "config", None)):
        for name in names:
            first, *_ = name.split(".")
            # Looked up only where it is defined: diffusers' models pass their configuration on, with a warning.
            if (
                first in getattr(source, "__dict__", ())
                or first in getattr(source, "_modules", ())
                or hasattr(type(source), first)
            ):
                value = functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), source)
                if isinstance(value, int):
                    return value
    heads, head = (
        getattr(getattr(model, "config", None), name, None) for name in ("num_attention_heads", "attention_head_dim")
    )
    if isinstance(heads, int) and isinstance(head, int):
        return heads * head
    raise ValueError(f"the token width of {type(model).__name__} is unknown: declare it, sprint.Host(…, width='attribute')")
