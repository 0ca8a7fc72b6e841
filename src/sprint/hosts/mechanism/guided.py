"""Both branches of guidance in one batch: its strong half runs the middle blocks, its weak half takes the shallow path."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sprint.hosts.declare import Arguments
from sprint.hosts.mechanism.holders import held, mapped, rebuilt
from sprint.hosts.mechanism.places import Place

if TYPE_CHECKING:
    from sprint.hosts.mechanism.state import SprintState

HALF_A_BATCH = (
    "one half of the batch takes the shallow path, so the middle blocks run with the other half alone, and this model works "
    "with the whole batch between them: guide it in two calls, without weak_half"
)


def strong_half(state: "SprintState", arguments: Arguments, batch: int) -> slice | None:
    """The rows that run the middle, if this batch holds both branches: the same input twice, in two halves."""
    if state.weak_half is None or batch % 2:
        return None
    x, *_ = *arguments.values(), None
    if not isinstance(x, (Tensor, list)) or len(x) != batch:
        return None
    half = batch // 2
    pairs = [(x[:half], x[half:])] if isinstance(x, Tensor) else zip(x[:half], x[half:], strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        return None
    return slice(half, None) if state.weak_half == "first" else slice(0, half)


def take(place: Place, named: dict[str, Any], rows: slice, *, batch: int, model: nn.Module) -> None:
    """Reduce a block's arguments to these rows of the batch; parameters and buffers have none, however long they are."""
    own: set[int] = set()

    def taken(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or len(value) != batch:
            return value
        own.update({} if own else map(id, own_tensors(model)))
        return value if id(value) in own else value[rows]

    for name, value in named.items():
        tables = place.blocks.tables.get(name, ())
        tables = tables if isinstance(tables, tuple) else (tables,)
        shared = {table.item for table in tables if not table.batched}
        halved = {table.item for table in tables if table.batched}
        inside = held(value) if (shared | halved) - {None} else None
        if inside is not None:  # of other items nobody knows, unless the declared ones are what is not halved
            items = inside.keys() - shared if shared else halved & inside.keys()
            named[name] = rebuilt(value, {key: mapped(taken, x) if key in items else x for key, x in inside.items()})
        elif not shared:
            named[name] = mapped(taken, value)


def own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, which have no row for each sample, however long they are."""
    yield from model.parameters()
    yield from model.buffers()


def all_rows(rows: slice, part: Tensor, captured: Tensor) -> Tensor:
    """The whole batch again, with what these rows have become, and elsewhere what was captured."""
    whole = captured.clone()
    whole[rows] = part
    return whole
