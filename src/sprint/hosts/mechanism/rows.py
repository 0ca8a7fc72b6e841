"""A table without a batch axis that has a row set for each sample: blocks use it as the table that it replaces.

What a function makes of such tables alone has a row set for each sample again. Beside tensors of the batch it gives what it
gives for each sample by itself, as a batch of one. Both hold for every function of torch: those that work number by number
run at once, the others under `torch.vmap`. What cannot be told raises.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

try:
    from einops._backends import TorchBackend
except ImportError:  # a later einops: it refuses rows, in words
    TorchBackend = object

_PROPERTIES = {"dtype", "device", "layout", "requires_grad", "is_cuda", "is_complex", "is_floating_point", "is_contiguous"}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach"}
_NUMBERS = {  # functions that work number by number, and broadcast
    *(
        "cos",
        "sin",
        "exp",
        "neg",
        "abs",
        "sqrt",
        "rsqrt",
        "square",
        "sigmoid",
        "tanh",
        "logical_not",
        "bitwise_not",
        "invert",
    ),
    *("add", "radd", "sub", "rsub", "mul", "rmul", "div", "truediv", "rdiv", "rtruediv", "pow", "rpow", "where", "addcmul"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "and", "or", "maximum", "minimum", "masked_fill"),
    *("matmul", "rmatmul"),  # over the last two axes, and else like these
    "scaled_dot_product_attention",  # of a mask
}
_NUMBERS |= {f"__{name}__" for name in _NUMBERS}
_OPERATORS = ("add", "sub", "mul", "truediv", "pow", "matmul", "and", "or", "eq", "ne", "lt", "le", "gt", "ge")
_SHARED = (
    "cannot be done with one row set per sample: wrap with a drop sampler that is shared by the batch, "
    "StructuredDrop(…, shared=True)"
)
_WATCHED: ContextVar[tuple[list[Any], Callable[[Tensor], Any]] | None] = ContextVar("watched", default=None)


class Rows:
    """(B, K, *) that stands for a (K, *).

    Args:
        rows: a row set for each sample.
        table: whether axis 0 of what it stands for has all rows, so that it may not be cut.
    """

    def __init__(self, rows: Tensor, *, table: bool = True) -> None:
        self.rows, self.table = rows, table

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _applied(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        first = index[0]
        if self.table and not (first is None or first is Ellipsis or self._is_whole(first)):
            raise TypeError(f"a table was indexed in a way that {_SHARED}")
        if all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index):
            return Rows(self.rows[(slice(None), *index)], table=self.table and self._is_whole(first))
        return _applied(Tensor.__getitem__, (self, index), {})

    def _is_whole(self, index: Any) -> bool:
        """Whether a slice is of all rows, or of as many as there are at most."""
        if not isinstance(index, slice) or index.start or index.step not in (None, 1):
            return False
        return index.stop is None or index.stop >= self.rows.shape[1]

    @property
    def shape(self) -> torch.Size:
        """Of what it stands for."""
        return self.rows.shape[1:]

    @property
    def ndim(self) -> int:
        """Of what it stands for."""
        return self.rows.ndim - 1

    def size(self, dim: int | None = None) -> Any:
        """Of what it stands for."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of axes of what it stands for."""
        return self.ndim

    def unsqueeze(self, dim: int) -> "Rows":
        """As of what it stands for."""
        return Rows(self.rows.unsqueeze(dim + 1 if dim >= 0 else dim), table=False)

    def view(self, *shape: Any) -> "Rows":
        """As of what it stands for."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        return Rows(self.rows.reshape(len(self.rows), *sizes), table=False)

    reshape = view

    def __len__(self) -> int:
        return self.rows.shape[1]

    def __bool__(self) -> bool:
        raise TypeError(f"the truth of a table {_SHARED}")

    def __neg__(self) -> Any:
        return _applied(torch.neg, (self,), {})

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        """Dtype and device, and every method of a tensor."""
        if name in _PROPERTIES:
            return getattr(self.rows, name)
        method = getattr(Tensor, name)
        if callable(method):
            return partial(_method, method, self)
        return _applied(_attribute(name), (self,), {})


class _Einops(TorchBackend):  # pyright: ignore[reportGeneralTypeIssues]
    """Tells einops, which looks for subclasses of its backends, that it may do with rows what it does with tensors."""

    framework_name = __name__

    def is_appropriate_type(self, tensor: Any) -> bool:
        return isinstance(tensor, Rows)


def _operator(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, f"__{name}__")
    return lambda self, other: _applied(method, (self, other), {})


for _name in _OPERATORS:
    setattr(Rows, f"__{_name}__", _operator(_name))
    if _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
        setattr(Rows, f"__r{_name}__", _operator(f"r{_name}"))


def _method(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _applied(method, args, kwargs)


def _attribute(name: str) -> Callable[..., Any]:
    return lambda tensor: getattr(tensor, name)


def _applied(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A function of torch, some of whose arguments are rows."""
    name = getattr(func, "__name__", "")
    if name in _CASTS:
        first, *rest = tree_map(lambda leaf: leaf.rows if isinstance(leaf, Rows) else leaf, args)
        cast = func(first, *rest, **kwargs)
        return Rows(cast, table=args[0].table) if isinstance(args[0], Rows) else cast
    leaves, spec = tree_flatten((args, kwargs))
    tables = [leaf for leaf in leaves if isinstance(leaf, Rows)]
    plain = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    batch, axes = len(tables[0].rows), max(table.ndim for table in tables)
    rank = max((tensor.ndim for tensor in plain), default=0)
    # Tensors of more axes hold the batch, and so do those of as many where the tables leave axis 0 free.
    free = rank > axes or (axes > 0 and all(_is_free(table) for table in tables if table.ndim == axes))
    batched = [free and 0 < x.ndim == max(rank, axes) and (batch == 1 or x.shape[0] != 1) for x in plain]
    for tensor, has_batch in zip(plain, batched, strict=True):
        if has_batch and (tensor.shape[0] != batch or (rank > axes + 2 and 1 < batch == tensor.shape[1])):
            raise untold(tensor, batch)
    if not torch.compiler.is_compiling() and (met := _WATCHED.get()) is not None:
        seen, see = met
        seen.extend(see(tensor) for tensor, has_batch in zip(plain, batched, strict=True) if has_batch)
    if name in _NUMBERS:
        return _at_once(func, leaves, spec, rank=max(rank, axes), mixed=any(batched))
    return _one_by_one(func, leaves, spec, mixed=any(batched), batched=iter(batched))


def untold(tensor: Tensor, batch: int) -> TypeError:
    """The error of a tensor that meets rows, and whose batch is not axis 0."""
    return TypeError(
        f"a table for a batch of {batch} meets a tensor of the shape {tuple(tensor.shape)}, whose axis 0 is not the batch, "
        "or cannot be told from it (heads, say): if it has no batch, give the table an axis for each of batch and heads, "
        f"table[None, None]; else this {_SHARED}"
    )


@contextmanager
def watched(see: Callable[[Tensor], Any]) -> Iterator[list[Any]]:
    """Meanwhile, list what is seen of the tensors that meet rows and are taken to hold the batch along axis 0."""
    seen: list[Any] = []
    token = _WATCHED.set((seen, see))
    try:
        yield seen
    finally:
        _WATCHED.reset(token)


def _is_free(table: Rows) -> bool:
    """Whether axis 0 of what it stands for is for the batch: of length 1, or expanded from that."""
    return len(table) == 1 or table.rows.stride(1) == 0


def _at_once(func: Callable[..., Any], leaves: list[Any], spec: Any, *, rank: int, mixed: bool) -> Any:
    def among(leaf: Any) -> Any:
        if not isinstance(leaf, Rows):
            return leaf
        rows = leaf.rows[:, 0] if mixed and leaf.ndim == rank else leaf.rows  # the batch is axis 0 of all
        return rows.reshape(len(rows), *[1] * (rank - mixed - rows.ndim + 1), *rows.shape[1:])

    args, kwargs = tree_unflatten([among(leaf) for leaf in leaves], spec)
    result = func(*args, **kwargs)
    if mixed or not isinstance(result, Tensor):
        return result
    (first, *others) = [leaf for leaf in leaves if isinstance(leaf, Rows)]
    return Rows(result, table=first.table and not others and rank == first.ndim)


def _one_by_one(func: Callable[..., Any], leaves: list[Any], spec: Any, *, mixed: bool, batched: Any) -> Any:
    values, places, axes = [], [], []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Rows):
            values, places, axes = [*values, leaf.rows], [*places, i], [*axes, 0]
        elif isinstance(leaf, Tensor) and next(batched):
            values, places, axes = [*values, leaf.unsqueeze(1)], [*places, i], [*axes, 0]

    def one(*samples: Tensor) -> Any:
        given = list(leaves)
        for place, sample in zip(places, samples, strict=True):
            given[place] = sample
        args, kwargs = tree_unflatten(given, spec)
        return func(*args, **kwargs)

    result = torch.vmap(one, in_dims=tuple(axes))(*values)
    if not mixed:
        return tree_map(partial(Rows, table=False), result)

    def joined(tensor: Tensor) -> Tensor:
        if tensor.ndim < 2 or tensor.shape[1] != 1:
            raise TypeError(f"{getattr(func, '__name__', func)} of a table and a batch {_SHARED}")
        return tensor.squeeze(1)

    return tree_map(joined, result)
