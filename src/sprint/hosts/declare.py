"""How a model passes its tokens: what `wrap` must know of an architecture, declared in a few lines.

A block takes a stream of tokens. In an image stream all of them are image (or video) tokens, which may be dropped. In a
joint stream text tokens, registers or reference images come first ("text+image") or last ("image+text"); they are never
dropped. Everything else that a block gets and that has one row per token (rotary tables, masks) is a `Table`, gathered
with the tokens.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from sprint.arguments import checked

Stream = Literal["image", "text+image", "image+text"]
Part = Literal["image", "text"]
Arguments = Mapping[str, Any]


@checked
@dataclass(frozen=True)
class Table:
    """A block argument with one row per token: a tensor, a tuple, list or dict of tensors, which are gathered each, or a
    module that keeps its tables (as buffers, parameters or attributes, its own or its parts').

    Args:
        dim: axis of the tokens; several for a mask between tokens, such as (2, 3) of (B, 1, N, N).
        stream: the tokens that its rows belong to.
        batched: whether axis 0 is the batch. A table without one, (N, *), is handed on with a row set for each sample, which
            broadcasts and indexes like the one that it replaces.
        item: of a tuple, only this element; of a dict, only this key.
        ndim: a table only when the tensor has this many axes (modulation per token instead of per sample).
        longer: the table has rows for more tokens than there are; the first N belong to them.
    """

    dim: int | tuple[int, ...] = 1
    stream: Stream = "image"
    batched: bool = True
    item: int | str | None = None
    ndim: int | None = None
    longer: bool = False


@checked
@dataclass(frozen=True)
class Blocks:
    """A run of blocks that the model calls in order.

    Args:
        name: attribute that holds them: a `ModuleList`, a `Sequential` (dots allowed), or one block of the model itself.
        image: parameter of the block with the image tokens, or with the joint stream; by default its first.
        text: parameter with the text tokens, if they are a stream of their own.
        stream: what `image` holds.
        returns: what the block returns, in order.
        tables: by parameter, the arguments with one row per token; several tables for a tuple of different tensors.
        sides: parameters with the rows and columns of the token grid, or one with both, for blocks that unfold it (one kept
            token per group only, and all frames of a video); () if no parameter tells them.
        others: parameters that have no row per token, whatever their shape says (a text of as many tokens as the image);
            any other that seems to have one, or whose name says that it counts tokens, is refused on the sparse path.
        arguments: names for the block's arguments by position, for blocks of `(*args, **kwargs)`.
    """

    name: str
    image: str | None = None
    text: str | None = None
    stream: Stream = "image"
    returns: tuple[Part, ...] = ("image",)
    tables: Mapping[str, Table | tuple[Table, ...]] = field(default_factory=dict)
    sides: tuple[str, ...] | str | None = None
    others: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


@checked
@dataclass(frozen=True)
class Host:
    """An architecture.

    Args:
        blocks: its runs of blocks, in the order in which `forward` calls them.
        width: attribute with the token width C (dots allowed), or a function of the model; None infers it from the blocks.
        grid: function of the model and `forward`'s arguments by name that gives the token grid, (rows, columns) or
            (frames, rows, columns), only (tokens,) where these form no grid, or None where they cannot be told; without one
            it is read off a first argument (B, C, H, W).
        image_tokens: function of the model, `forward`'s arguments by name and the length of the stream that gives the
            number of image tokens, for models whose first block already has a joint stream.
        image_starts: function of the model and `forward`'s arguments by name that gives (B,) where the image begins in each
            sample's joint stream, where captions of different lengths put it in different places, or None where they do not.
        always_kept: at which end of the image stream its other tokens than those of the grid stand, which are never dropped
            (a first frame, reference images, padding).
        refused: parameters of `forward` that cannot be given when tokens are dropped, and why.
        note: what a user should know.
    """

    blocks: tuple[Blocks, ...]
    width: str | Callable[[Any], int] | None = None
    grid: Callable[[Any, Arguments], tuple[int, ...] | None] | None = None
    image_tokens: Callable[[Any, Arguments, int], int] | None = None
    image_starts: Callable[[Any, Arguments], Tensor | None] | None = None
    always_kept: Literal["first", "last"] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


Pattern = Callable[[nn.Module], "Host | None"]
_HOSTS: dict[type[nn.Module] | str, Host] = {}  # by class; "package.Class" for packages that may not be installed
_REFUSED: dict[str, str] = {}  # by class: why its tokens cannot be dropped
_PATTERNS: list[Pattern] = []  # of models that are told by their attributes


@checked
def register(model: type[nn.Module] | str, host: Host) -> None:
    """Declare an architecture for `wrap`; subclasses inherit the declaration.

    Args:
        model: the class, or where it is: "package.module.Class".
        host: its declaration; replaces an earlier one.

    Raises:
        ValueError: there is no such class, or the declaration contradicts itself.
        TypeError: no class of models.

    Examples:
        >>> class MyDiT(nn.Module): ...
        >>> tables = {"rope": Table(dim=0, batched=False)}
        >>> register(MyDiT, Host(blocks=(Blocks("layers", tables=tables),)))
    """
    kind = _located(model) if isinstance(model, str) else model
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register takes a class of models, got {model!r}")
    _HOSTS[kind] = _checked(host, kind.__name__)


def declare(name: str, host: Host) -> None:
    """Declare a class of a package that may not be installed: "package.Class", wherever in the package it is."""
    _HOSTS[name] = _checked(host, name)


def refuse(name: str, reason: str) -> None:
    """Declare that a class cannot be wrapped, and why, in words that follow "since"."""
    _REFUSED[name] = reason


def pattern(function: Pattern) -> Pattern:
    """Declare models by what they have: the function returns a declaration, or None if the model is none of them."""
    _PATTERNS.append(function)
    return function


def _located(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(
            f"{path!r} names no class by itself, since other packages may have one of this name: give the class, "
            'sprint.register(Class, …), or "package.module.Class"'
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no class {path} ({error}): give the class, or where it is") from error
    return found


def _checked(host: Host, name: str) -> Host:
    for blocks in host.blocks:
        if "text" in blocks.returns and blocks.text is None:
            raise ValueError(f"blocks {blocks.name!r} of {name} return text, but have no text parameter: set text=…")
    return host


def registered() -> list[str]:
    """Names of the declared architectures."""
    return sorted(name if isinstance(name, str) else f"{name.__module__}.{name.__qualname__}" for name in _HOSTS)


def is_ours(host: Host) -> bool:
    """Whether a declaration is one of this package, which its tests have tried."""
    return any(host is known for kind, known in _HOSTS.items() if isinstance(kind, str))


def declared(kind: type) -> Host | str | None:
    """What is said of a class of models, or of one that it is made from: its declaration, or why it cannot be wrapped."""
    for base in kind.__mro__:
        package, *_ = base.__module__.split(".")
        name = f"{package}.{base.__name__}"
        if base in _HOSTS or name in _HOSTS:
            return _HOSTS.get(base) or _HOSTS[name]
        if name in _REFUSED:
            return _REFUSED[name]
    return None


def declaration(model: nn.Module) -> tuple[Host, bool]:
    """The declaration of a model, and whether there was one; without, its single list of blocks is taken as it is.

    Raises:
        ValueError: the model cannot be wrapped, or nothing is registered, and there is no list of blocks or more than one.
    """
    said = declared(type(model))
    if isinstance(said, str):
        raise ValueError(f"{type(model).__name__} cannot be wrapped, since {said}")
    if said is not None:
        return said, True
    for told in _PATTERNS:
        if (host := told(model)) is not None:
            return host, True
    lists = [name for name, child in model.named_children() if _is_run(child)]
    if len(lists) == 1:
        return Host(blocks=(Blocks(lists[0]),)), False
    name = type(model).__name__
    if lists:
        raise ValueError(
            f"{name} has {len(lists)} lists of blocks. If one takes and returns the image tokens (B, N, C), and the others "
            f"a text, say: {' or '.join(_line([run]) for run in lists)}. If all of them do, and forward calls them in this "
            f"order: {_line(lists)}"
        )
    inner = [path for path, module in model.named_modules() if path and _is_run(module)]
    if inner:
        raise ValueError(
            f"{name} has no list of equal blocks among its attributes, but in its parts: "
            f"{' or '.join(_line([run]) for run in inner[:4])}, if its blocks take and return the image tokens (B, N, C)"
        )
    raise ValueError(
        f"{name} has no list of equal blocks among its attributes ({_children(model)}), nor in its parts: keep them in a "
        "ModuleList, or declare them one by one, sprint.Host((sprint.Blocks('first'), sprint.Blocks('second'), …))"
    )


def _line(lists: list[str]) -> str:
    blocks = ", ".join(f"sprint.Blocks({name!r})" for name in lists)
    return f"sprint.wrap(model, host=sprint.Host(({blocks}{',' if len(lists) == 1 else ''})))"


def _is_run(child: nn.Module) -> bool:
    """A list of at least two blocks: all of one class, or, in a `ModuleList`, at least half of them."""
    if not isinstance(child, nn.ModuleList | nn.Sequential) or len(child) < 2:
        return False
    (_, most), *_ = Counter(type(block) for block in child).most_common(1)
    return most == len(child) or (most > 1 and 2 * most >= len(child) and isinstance(child, nn.ModuleList))


def _children(model: nn.Module) -> str:
    return ", ".join(name for name, _ in model.named_children()) or "none"
