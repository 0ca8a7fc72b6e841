"""Side inputs with one row per token, gathered with the tokens."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sprint.hosts.declare import Stream, Table
from sprint.middle.tokens import TokenSubset

_PROPERTIES = {"dtype", "device", "layout", "requires_grad", "is_complex", "is_floating_point"}
_ELEMENTWISE = {
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "type",
    "contiguous",
    "clone",
    "detach",
    "cos",
    "sin",
    "exp",
    "neg",
}


class Rows:
    """A table without a batch axis, gathered for each sample: (B, K, *) that indexes and broadcasts like the (K, *) it
    replaces.

    Models lift such a table over the batch themselves, with `table[None, :, None]` or `table.unsqueeze(1)`; here the
    leading axis that they add is the batch, which is already there. A slice of at least K rows is the whole table. In a
    function of torch beside tensors of more axes, the batch comes first and the others stay the last ones.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        plain = [value.ndim for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]

        def among(value: Any) -> Any:
            if not isinstance(value, Rows):
                return value
            between = max(plain, default=0) - value.rows.ndim
            return value.rows.reshape(len(value.rows), *[1] * between, *value.shape)

        args, kwargs = tree_map(among, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return result if plain or not isinstance(result, Tensor) else Rows(result)

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        if index[0] is None:
            return self.rows[(slice(None), *index[1:])]
        first = index[0]
        whole = isinstance(first, slice) and not first.start and first.step in (None, 1)
        if whole and (first.stop is None or first.stop >= self.rows.shape[1]):
            return Rows(self.rows[(slice(None), slice(None), *index[1:])])
        raise TypeError(
            "a rotary table was indexed in a way that cannot be done with one row set per sample: wrap with a drop sampler "
            "that is shared by the batch, StructuredDrop(…, shared=True)"
        )

    @property
    def shape(self) -> torch.Size:
        """Of the (K, *) table."""
        return self.rows.shape[1:]

    def unsqueeze(self, dim: int) -> Tensor:
        """As of the (K, *) table, with the batch in front; dim 0 adds the batch itself."""
        return self.rows if dim == 0 else self.rows.unsqueeze(dim + 1 if dim > 0 else dim)

    def view(self, *shape: Any) -> Any:
        """As of the (K, *) table: where its first axis becomes 1, the batch takes that place."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        batch = len(self.rows)
        if sizes[0] == 1:
            return self.rows.reshape(batch, *sizes[1:])
        return Rows(self.rows.reshape(batch, *sizes))

    reshape = view

    @property
    def ndim(self) -> int:
        """Of the (K, *) table."""
        return self.rows.ndim - 1

    def __len__(self) -> int:
        return self.rows.shape[1]

    def __getattr__(self, name: str) -> Any:
        """Dtype and device, and the methods that change each number by itself."""
        if name in _PROPERTIES:
            return getattr(self.rows, name)
        if name not in _ELEMENTWISE:
            raise AttributeError(f"a table with a row set for each sample has no {name!r}")
        return lambda *args, **kwargs: Rows(getattr(self.rows, name)(*args, **kwargs))


class GatheredModule:
    """A module whose tables are gathered: its own `forward` and methods, which see the kept rows."""

    def __init__(self, module: nn.Module, tables: dict[str, Any]) -> None:
        self.module, self.tables = module, tables

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("tables", {}):
            return self.tables[name]
        method = getattr(type(self.module), name, None)
        return types.MethodType(method, self) if isinstance(method, types.FunctionType) else getattr(self.module, name)


def kept_in(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a module itself keeps: buffers, parameters and plain attributes."""
    own = {**module._buffers, **module._parameters, **vars(module)}
    return {name: value for name, value in own.items() if isinstance(value, Tensor)}


def gather_rows(
    value: Any,
    tables: Table | tuple[Table, ...],
    subset: TokenSubset,
    *,
    name: str,
    shared: bool,
    order: Tensor | None = None,
) -> Any:
    """The rows of the kept image tokens and of all text tokens.

    Args:
        value: a tensor, a tuple, list or dict of them, or a module that keeps its tables; axes of length 1, and tensors with
            another number of axes than the declaration says, are returned as they are.
        tables: its declaration; of several, each takes the tensors that it fits.
        subset: kept tokens of the image.
        name: what errors call the argument.
        shared: all samples keep the same tokens, so that a table without a batch stays without one.
        order: (B, L), for a joint stream whose image is not in one place, the rows of all text and then of the image.

    Raises:
        ValueError: the rows are fewer than the tokens, or more than an image has.
        TypeError: neither tensors nor a module.
    """
    gathering = _Gathering(subset, name, shared, order)
    for table in tables if isinstance(tables, tuple) else (tables,):
        value = gathering.of(value, table)
    return value


def cut_to(value: Any, table: Table | tuple[Table, ...], kept: int, num_tokens: int) -> bool:
    """Whether a table has the rows of the kept tokens alone, as where a host cuts `table[: x.shape[1]]` between blocks."""
    if kept == num_tokens or not isinstance(value, Tensor) or isinstance(table, tuple) or not isinstance(table.dim, int):
        return False
    return -value.ndim <= table.dim < value.ndim and value.shape[table.dim] == kept


@dataclass(frozen=True)
class _Gathering:
    subset: TokenSubset
    name: str
    shared: bool
    order: Tensor | None

    def of(self, value: Any, table: Table) -> Any:
        """The kept rows of whatever holds them."""
        if isinstance(value, (tuple, list, Mapping)):
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            plain = replace(table, item=None)
            rows = {key: self.of(x, plain) if table.item in (None, key) else x for key, x in pairs}
            return rows if isinstance(value, Mapping) else type(value)(rows.values())
        if isinstance(value, nn.Module):
            return self._of_module(value, table)
        if value is None or isinstance(value, Rows):
            return value
        if not isinstance(value, Tensor):
            raise TypeError(
                f"argument {self.name!r} is a {type(value).__name__}, and a Table is of a tensor, a tuple, list or dict of "
                "them, or a module that keeps its tables: pass it to the blocks as one of these"
            )
        return value if table.ndim not in (None, value.ndim) else self._of_tensor(value, table)

    def _of_tensor(self, value: Tensor, table: Table) -> Any:
        axes = [axis % value.ndim for axis in (table.dim if isinstance(table.dim, tuple) else (table.dim,))]
        if all(value.shape[axis] == 1 for axis in axes):
            return value
        if table.batched or self.shared:
            for axis in axes:
                value = self._along(value, axis, table, axis)
            return value
        value = value[None]  # a row set for each sample
        for axis in axes:
            value = self._along(value, axis + 1, table, axis)
        return Rows(value)

    def _along(self, value: Tensor, axis: int, table: Table, declared_axis: int) -> Tensor:
        subset = self.subset
        if table.longer and value.shape[axis] > subset.num_tokens:
            value = value.narrow(axis, 0, subset.num_tokens)
        rows = value.shape[axis]
        if rows == 1:
            return value
        if rows < subset.num_tokens or (table.stream == "image" and rows != subset.num_tokens):
            raise ValueError(
                f"argument {self.name!r} has {rows} rows along axis {declared_axis}, expected {subset.num_tokens} "
                f"({table.stream}): correct its Table in the declaration"
            )
        if table.stream != "image":
            subset = _with_text(subset, rows, table.stream)
            if self.order is not None:
                subset = TokenSubset(self.order.gather(1, subset.keep), rows)
        if self.shared and not table.batched:
            return value.index_select(axis, subset.keep[0])
        return subset.gather(value.movedim(axis, 1)).movedim(1, axis)

    def _of_module(self, module: nn.Module, table: Table) -> GatheredModule:
        tables: dict[str, Any] = {key: self.of(value, table) for key, value in self._rows_of(module, table)}
        inner = {name: child for name, child in module.named_children() if any(self._all_rows_of(child, table))}
        tables |= {name: self._of_module(child, table) for name, child in inner.items()}
        if not tables:
            raise ValueError(
                f"argument {self.name!r} is a {type(module).__name__}, none of whose tensors has {self.subset.num_tokens} "
                f"rows along axis {table.dim}: correct its Table in the declaration"
            )
        return GatheredModule(module, tables)

    def _rows_of(self, module: nn.Module, table: Table) -> list[tuple[str, Tensor]]:
        """The module's own tensors with one row per token, and per text token before or behind them."""
        axis, num_tokens = table.dim if isinstance(table.dim, int) else table.dim[0], self.subset.num_tokens
        more = table.stream != "image" or table.longer

        def fits(value: Tensor) -> bool:
            rows = value.shape[axis] if -value.ndim <= axis < value.ndim else 0
            return rows == num_tokens or (more and rows > num_tokens)

        return [(name, value) for name, value in kept_in(module).items() if fits(value)]

    def _all_rows_of(self, module: nn.Module, table: Table) -> list[tuple[str, Tensor]]:
        return [found for inner in module.modules() for found in self._rows_of(inner, table)]


def _with_text(subset: TokenSubset, rows: int, stream: Stream) -> TokenSubset:
    """The subset of a joint stream that keeps all text."""
    texts, batch = rows - subset.num_tokens, len(subset.keep)
    text = torch.arange(texts, device=subset.keep.device)
    if stream == "text+image":
        return TokenSubset(torch.cat([text.expand(batch, -1), subset.keep + texts], dim=1), rows)
    return TokenSubset(torch.cat([subset.keep, (text + subset.num_tokens).expand(batch, -1)], dim=1), rows)
