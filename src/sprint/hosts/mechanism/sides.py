"""Side inputs of blocks that nobody declared: refused before they are broadcast in silence, named when they raise."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sprint.hosts.mechanism.places import Place


def refuse_undeclared(place: Place, named: Mapping[str, Any], num_tokens: int) -> None:
    """Raise ValueError for an argument of the blocks that seems to hold one row per token."""
    for name, tensor in _tables(place, named, num_tokens):
        raise ValueError(
            f"argument {name!r} of the blocks has the shape {tuple(tensor.shape)} and seems to hold one row per token: "
            f"declare it, sprint.wrap(model, …, host=sprint.Host((sprint.Blocks({place.blocks.name!r}, "
            f"tables={{{name!r}: sprint.Table(…)}}),))), or, if it does not (such as a text of as many tokens), "
            f"others=({name!r},)"
        )


def hint(place: Place, named: Mapping[str, Any], num_tokens: int) -> str:
    """What to declare, for the error of a middle block on the sparse path; empty if no side input has N rows."""
    names = {f"{name!r} {tuple(tensor.shape)}" for name, tensor in _tensors(place, named) if num_tokens in tensor.shape}
    if not names:
        return ""
    return (
        f"a middle block failed on kept tokens, and {', '.join(sorted(names))} still has an axis of all {num_tokens}: "
        f"declare it, sprint.Blocks({place.blocks.name!r}, tables={{name: sprint.Table(…)}})"
    )


def _tables(place: Place, named: Mapping[str, Any], num_tokens: int) -> Iterator[tuple[str, Tensor]]:
    tokens = named[place.image]
    batch, width = tokens.shape[0], tokens.shape[-1]
    for name, tensor in _tensors(place, named):
        if tensor.ndim < 2:
            continue
        conditions = tensor.ndim == 2 and len(tensor) == batch and tensor.shape[1] % width == 0  # (B, 6C), (B, C)
        if conditions and tensor.is_floating_point():
            continue
        if tensor.shape[1] == num_tokens or (len(tensor) == num_tokens and len(tensor) != batch):
            yield name, tensor


def _tensors(place: Place, named: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in named.items():
        if name in (place.image, place.blocks.text, *place.blocks.tables, *place.blocks.others):
            continue
        values = value if isinstance(value, (tuple, list)) else (value,)
        if isinstance(value, nn.Module):
            values = (*value.buffers(),)  # rotary tables of LightningDiT
        yield from ((name, tensor) for tensor in values if isinstance(tensor, Tensor))
