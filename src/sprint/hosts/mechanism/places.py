"""Where a model keeps its blocks and a block its arguments; how wide its tokens are."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sprint.hosts.declare import Blocks, Host
from sprint.hosts.mechanism.holders import rebuilt

_WIDTHS = ("inner_dim", "hidden_size", "embed_dim", "width", "dim")


def by_name(names: Sequence[str], args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments by name, as far as either goes."""
    count = min(len(names), len(args))  # not zip(strict=False), which torch 2.7 compiles as if it were strict
    return dict(zip(names[:count], args[:count], strict=True))


class Place:
    """Where a run of blocks keeps its arguments."""

    def __init__(self, blocks: Blocks, parameters: Sequence[str], *, count: int) -> None:
        self.blocks, self.parameters, self.count = blocks, [*blocks.arguments, *parameters], count
        if not self.parameters:
            raise ValueError(
                f"the forward of blocks {blocks.name!r} names no parameter, so its tokens cannot be told from the "
                f"rest: name them by position, sprint.Blocks({blocks.name!r}, arguments=('x', …))"
            )
        self.sides = (blocks.sides,) if isinstance(blocks.sides, str) else blocks.sides or ()
        self.unfolds = blocks.sides is not None
        self.image = blocks.image or self.parameters[0]
        self.others: dict[int, Place] = {}  # of blocks with other parameters, by their index in the run
        self.container: Any = None  # that holds what a block returns, where that is not told by how many these are

    def at(self, index: int) -> "Place":
        """Of one block of the run."""
        return self.others.get(index, self)

    def verify(self) -> None:
        """Raise ValueError for a declared parameter that no block has."""
        known = {name for place in (self, *self.others.values()) for name in place.parameters}
        for name in (self.image, self.blocks.text, *self.blocks.tables, *self.sides):
            if name is not None and name not in known:
                raise ValueError(
                    f"blocks {self.blocks.name!r} have no parameter {name!r}, they take {', '.join(self.parameters)}: "
                    "correct the declaration"
                )

    def named(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """The arguments by name; positional ones beyond the named parameters keep their number."""
        named = by_name(self.parameters, args)
        rest = {str(i): value for i, value in enumerate(args) if i >= len(self.parameters)}
        return {**named, **rest, **kwargs}

    def parts(self, output: Any) -> dict[str, Any]:
        """What a block returned, by the declared names."""
        returns = self.blocks.returns
        returned = output if isinstance(output, (tuple, list)) else (output,)
        if len(returned) != len(returns):
            raise ValueError(
                f"blocks {self.blocks.name!r} return {len(returned)} values, declared are {returns}: "
                "declare what they return, sprint.Blocks(…, returns=…), if these are image and text; anything else, such as "
                "a loss, is not there where the middle blocks do not run, so keep it in the block"
            )
        if isinstance(output, (tuple, list)) and (len(returns) == 1 or type(output) is not tuple):
            self.container = output
        return dict(zip(returns, returned, strict=True))

    def packed(self, parts: dict[str, Any]) -> Any:
        """What the blocks return, in what they return it in."""
        values = tuple(parts.values())
        if self.container is not None:
            return rebuilt(self.container, dict(enumerate(values)))
        return values if len(values) > 1 else parts["image"]

    def argument(self, part: str) -> str:
        """The parameter that takes the image or the text."""
        return self.image if part == "image" else str(self.blocks.text)

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
        if isinstance(run, nn.ModuleDict):
            raise ValueError(
                f"{blocks.name!r} is a ModuleDict, which has no order to rely on: keep the blocks in a ModuleList "
                "(the names of their parameters change with its keys)"
            )
        is_list = isinstance(run, nn.ModuleList | nn.Sequential)
        if not is_list and "." in blocks.name:
            raise ValueError(
                f"{blocks.name!r} is one block inside a submodule, whose call cannot be seen: declare the list that "
                "holds it, or keep it as an attribute of the model itself"
            )
        members = list(run) if is_list else [run]
        if not members:
            continue
        (names, any_name), *rest = [_parameters(block) for block in members]
        place = Place(blocks, names, count=len(members))
        place.others = {i: Place(blocks, own, count=len(members)) for i, (own, _) in enumerate(rest, 1) if own != names}
        if not any_name and not any(any_name for _, any_name in rest):
            place.verify()
        places.append((place, count))
        count += len(members)
    return places, count


def _parameters(block: Any) -> tuple[list[str], bool]:
    """Names of the parameters of a block's forward, and whether it takes others too."""
    for wrapper in ("_checkpoint_wrapped_module", "_orig_mod"):
        block = getattr(block, wrapper, block)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(block.forward).parameters
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return [name for name, p in parameters.items() if p.kind in kinds], any_name


def placed_as(model: nn.Module, places: Sequence[tuple[Place, int]]) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that the fusion gets: those of most of the blocks' matrices.

    Other parameters tell less: some models keep small ones in float32, and storage may be of 8 bits.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ValueError(
            f"the model's parameters are on {sorted(map(str, devices)) or 'no device'}: move it to one device first"
        )
    within = [p for place, _ in places for p in model.get_submodule(place.blocks.name).parameters() if p.ndim > 1]
    for parameters in (within, model.parameters()):
        dtypes = Counter(p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1)
        if dtypes:
            return devices.pop(), dtypes.most_common(1)[0][0]
    return devices.pop(), torch.get_default_dtype()


def width_of(model: Any, host: Host) -> int:
    """The token width C: declared, or an attribute of a usual name that the blocks bear out, or what the blocks say.

    Raises:
        ValueError: neither says it.
    """
    if callable(host.width):
        return host.width(model)
    if host.width:
        if (declared := _attribute(model, host.width)) is None:
            raise ValueError(f"{type(model).__name__} has no attribute {host.width!r}, as declared: correct its width")
        return declared
    sizes = _sizes(model.get_submodule(host.blocks[0].name))
    for name in _WIDTHS:
        if (named := _attribute(model, name)) is not None and (named in sizes or not sizes):
            return named
    (width, most), *rest = sizes.most_common(2) or [(0, 0)]
    if most and (not rest or rest[0][1] < most):
        return width
    likely = ", ".join(map(str, sorted(size for size, count in sizes.items() if count == most))) or "unknown"
    raise ValueError(
        f"the token width of {type(model).__name__} is ambiguous ({likely}): declare it, "
        f"sprint.wrap(model, host=sprint.Host((sprint.Blocks({host.blocks[0].name!r}),), width=lambda model: …))"
    )


def _attribute(model: Any, path: str) -> int | None:
    """A whole number of the model or its configuration, by its name with dots."""
    for source in (model, getattr(model, "config", None)):
        first, *_ = path.split(".")
        # Looked up only where it is defined: diffusers' models pass their configuration on, with a warning.
        if (
            first in getattr(source, "__dict__", ())
            or first in getattr(source, "_modules", ())
            or hasattr(type(source), first)
        ):
            value = functools.reduce(lambda owner, part: getattr(owner, part, None), path.split("."), source)
            if isinstance(value, int):
                return value
    return None


def _sizes(run: nn.Module) -> Counter[int]:
    """How often a block's layers begin or end with so many channels: the residual stream's width is met most often."""
    block = next(iter(run), run) if isinstance(run, nn.ModuleList | nn.Sequential) else run
    sizes: Counter[int] = Counter()
    for layer in block.modules():
        if isinstance(layer, nn.LayerNorm):
            sizes[layer.normalized_shape[-1]] += 1
        elif isinstance(weight := getattr(layer, "weight", None), torch.Tensor) and weight.ndim == 2:
            sizes.update(weight.shape)
    return sizes
