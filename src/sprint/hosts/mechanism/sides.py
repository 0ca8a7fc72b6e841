"""Side inputs of blocks that nobody declared: refused before they are broadcast in silence, named when they raise."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sprint.hosts.mechanism.holders import leaves
from sprint.hosts.mechanism.places import Place
from sprint.hosts.mechanism.rows import Rows
from sprint.hosts.mechanism.tables import GatheredModule, kept_in

_COUNTS = re.compile(r"(^|_)((cu_?)?seq_?)?(len|length)s?($|_)|cu_?seq|seq_?len|grid_?size")


def refuse_undeclared(place: Place, named: Mapping[str, Any], num_tokens: int) -> None:
    """Raise ValueError for an argument of the blocks that seems to hold one row per token, or to count tokens."""
    for name, value in named.items():
        if _COUNTS.search(name) and value is not None and name not in (place.image, *place.sides, *place.blocks.others):
            raise ValueError(
                f"argument {name!r} of the blocks tells them how many tokens there are or where, and they would take it "
                "for that of the kept ones: this model cannot drop tokens on its sparse path; if the argument is of "
                f"something else, sprint.Blocks({place.blocks.name!r}, others=({name!r},))"
            )
    batch = len(named[place.image])
    for name, tensor in _tables(place, named, num_tokens):
        blocks = f"sprint.Blocks({place.blocks.name!r}, tables={{{name!r}: {_table(tensor, batch, num_tokens)}}})"
        raise ValueError(
            f"argument {name!r} of the blocks has the shape {tuple(tensor.shape)} and seems to hold one row per token: "
            f"declare it, sprint.wrap(model, host=sprint.Host(({blocks},))), or, if it does not (such as a text of as many "
            f"tokens), others=({name!r},)"
        )


def _table(tensor: Tensor, batch: int, num_tokens: int) -> str:
    """The likely declaration of a table, by its shape."""
    axes = [axis for axis, side in enumerate(tensor.shape) if side == num_tokens]
    if axes[0] == 0 and len(axes) > 1 and batch == num_tokens:
        axes = axes[1:]
    dim = axes[0] if len(axes) == 1 or axes[1] != axes[0] + 1 else (axes[0], axes[1])
    return f"sprint.Table(dim={dim}{'' if axes[0] else ', batched=False'})"


def hint(place: Place, named: Mapping[str, Any], num_tokens: int, *, shared: bool = False) -> str:
    """What to declare, for the error of a middle block on the sparse path; empty if no side input may be its cause."""
    per_sample = has_rows(place, named)
    if per_sample and not shared:
        return (
            f"a middle block failed on kept tokens, and {', '.join(map(repr, per_sample))}, a table without a batch, came "
            "with a row set for each sample: if the block needs it as (N, D), let all samples of a batch keep the same "
            "tokens, StructuredDrop(…, shared=True)"
        )
    names = {f"{name!r} {tuple(tensor.shape)}" for name, tensor in _tensors(place, named) if num_tokens in tensor.shape}
    if not names:
        return ""
    return (
        f"a middle block failed on kept tokens, and {', '.join(sorted(names))} still has an axis of all {num_tokens}: "
        f"declare it, sprint.Blocks({place.blocks.name!r}, tables={{…: sprint.Table(…)}})"
    )


def has_rows(place: Place, named: Mapping[str, Any]) -> list[str]:
    """Tables that have a row set for each sample, by name."""
    per_sample = (Rows, GatheredModule)
    return [name for name in place.blocks.tables if any(isinstance(item, per_sample) for item in leaves(named.get(name)))]


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
        values = kept_in(value).values() if isinstance(value, nn.Module) else leaves(value)
        yield from ((name, tensor) for tensor in values if isinstance(tensor, Tensor))
