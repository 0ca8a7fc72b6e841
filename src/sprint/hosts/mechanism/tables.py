"""Side inputs with one row per token, gathered with the tokens."""

import types
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sprint.hosts.declare import Stream, Table
from sprint.hosts.mechanism.holders import held, leaves, rebuilt
from sprint.hosts.mechanism.rows import Rows
from sprint.middle.tokens import TokenSubset


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


class Tables:
    """The tables of one call, by argument: gathered once for as long as the host passes the same ones, unchanged."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[Any, list[int] | None, Any]] = {}  # what was passed, its versions, and its rows

    def of(self, name: str, value: Any, table: Table | tuple[Table, ...], subset: TokenSubset, **options: Any) -> Any:
        """The rows of the kept tokens, as `gather_rows`."""
        before, told, rows = self.rows.get(name, (None, None, None))
        versions = None if torch.compiler.is_compiling() else versions_of(value)  # what is gathered twice there, runs once
        if before is value and told is not None and told == versions:
            return rows
        if before is not None:
            value = _uncut(name, value, table, subset)
        rows = gather_rows(value, table, subset, name=name, **options)
        self.rows[name] = (value, versions, rows)
        return rows


def versions_of(value: Any) -> list[int]:
    """How often each tensor was written."""
    return [leaf._version for leaf in leaves(value) if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _uncut(name: str, value: Any, table: Table | tuple[Table, ...], subset: TokenSubset) -> Any:
    """The whole of a table that a host cuts between its blocks to as many rows as there are tokens, `table[: x.shape[1]]`.

    Raises:
        ValueError: it is no part of a larger table.
    """
    axis = table.dim if isinstance(table, Table) and isinstance(table.dim, int) else None
    if axis is None or not isinstance(value, Tensor) or not -value.ndim <= axis < value.ndim:
        return value
    if value.shape[axis] != subset.num_kept or subset.num_kept == subset.num_tokens:
        return value
    base, shape = value._base, list(value.shape)
    shape[axis] = subset.num_tokens
    if base is not None and base.is_contiguous():
        if torch.compiler.is_compiling():  # where a cut begins cannot be seen: at the first row, as without a start
            along = [*value.shape]
            along[axis] = base.shape[axis] if base.ndim == value.ndim else 0
            if base.shape == torch.Size(along) and along[axis] >= subset.num_tokens:
                return base.narrow(axis, 0, subset.num_tokens)
        else:
            begin, strides = value.storage_offset(), value.stride()
            reach = begin + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
            if reach < base.storage_offset() + base.numel():
                return base.as_strided(shape, strides, begin)
    raise ValueError(
        f"argument {name!r} of a middle block has the rows of {subset.num_kept} tokens, the first ones by their number, "
        "while the kept tokens are others: make the whole table once, before the blocks, or cut it there"
    )


@dataclass(frozen=True)
class _Gathering:
    subset: TokenSubset
    name: str
    shared: bool
    order: Tensor | None

    def of(self, value: Any, table: Table) -> Any:
        """The kept rows of whatever holds them."""
        if (items := held(value)) is not None:
            plain = replace(table, item=None)
            return rebuilt(value, {key: self.of(x, plain) if table.item in (None, key) else x for key, x in items.items()})
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
