"""Side inputs with one row per token, gathered with the tokens."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sprint.hosts.declare import Stream, Table
from sprint.tokens import TokenSubset


class Rows:
    """A table without a batch axis, gathered for each sample: (B, K, *) that indexes and broadcasts like the (K, *) it
    replaces.

    Models lift such a table over the batch themselves, with `table[None, :, None]` or `table.unsqueeze(1)`; here the
    leading axis that they add is the batch, which is already there.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, index: Any) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        if index[0] is not None:
            raise TypeError(
                "a rotary table was indexed in a way that cannot be done with one row set per sample: "
                "wrap with a drop sampler "
                "that is shared by the batch, StructuredDrop(…, shared=True)"
            )
        return self.rows[(slice(None), *index[1:])]

    def unsqueeze(self, dim: int) -> Tensor:
        """As of the (K, *) table, with the batch in front; dim 0 adds the batch itself."""
        return self.rows if dim == 0 else self.rows.unsqueeze(dim + 1 if dim > 0 else dim)

    def to(self, *args: Any, **kwargs: Any) -> "Rows":
        """As `Tensor.to`."""
        return Rows(self.rows.to(*args, **kwargs))


def gather_rows(
    value: Any, table: Table, subset: TokenSubset, *, name: str, shared: bool, order: Tensor | None = None
) -> Any:
    """The rows of the kept image tokens and of all text tokens.

    Args:
        value: a tensor, or a tuple or list of tensors; anything else, and axes of length 1, are returned as they are.
        table: its declaration.
        subset: kept tokens of the image.
        name: what errors call the argument.
        shared: all samples keep the same tokens, so that a table without a batch stays without one.
        order: (B, L), for a joint stream whose image is not in one place, the rows of all text and then of the image.

    Raises:
        ValueError: the rows are fewer than the tokens, or more than an image has.
    """
    if isinstance(value, (tuple, list)):
        chosen = range(len(value)) if table.item is None else (table.item,)
        plain = replace(table, item=None)
        return type(value)(
            gather_rows(x, plain, subset, name=name, shared=shared, order=order) if i in chosen else x
            for i, x in enumerate(value)
        )
    if not isinstance(value, Tensor) or (table.ndim is not None and value.ndim != table.ndim):
        return value
    rows = value.shape[table.dim]
    if rows == 1:
        return value
    if rows < subset.num_tokens or (table.stream == "image" and rows != subset.num_tokens):
        raise ValueError(
            f"argument {name!r} has {rows} rows along axis {table.dim}, expected {subset.num_tokens} ({table.stream}): "
            "correct its Table in the declaration"
        )
    if table.stream != "image":
        subset = _with_text(subset, rows, table.stream)
        if order is not None:
            subset = TokenSubset(order.gather(1, subset.keep), rows)
    if table.batched:
        return subset.gather(value.movedim(table.dim, 1)).movedim(1, table.dim)
    if shared:
        return value.index_select(table.dim, subset.keep[0])
    each = subset.gather(value.movedim(table.dim, 0)[None]).movedim(1, table.dim + 1)  # (B, K, *)
    return each if table.broadcast else Rows(each)


def _with_text(subset: TokenSubset, rows: int, stream: Stream) -> TokenSubset:
    """The subset of a joint stream that keeps all text."""
    texts, batch = rows - subset.num_tokens, len(subset.keep)
    text = torch.arange(texts, device=subset.keep.device)
    if stream == "text+image":
        return TokenSubset(torch.cat([text.expand(batch, -1), subset.keep + texts], dim=1), rows)
    return TokenSubset(torch.cat([subset.keep, (text + subset.num_tokens).expand(batch, -1)], dim=1), rows)
