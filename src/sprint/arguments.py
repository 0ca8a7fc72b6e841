"""One way to check arguments: by the type hints of a public function, at its door.

    @checked
    def sample(model: Callable[..., Any], noise: Tensor, *, steps: int = 50): ...

`sample(model, array)` is a TypeError that names the argument, what it got and what it wants. Hints say the kind; what
values a number may have is the function's own business, but NaN is never one. `bool` is no number, a class is no object, and
text is no sequence. Under torch.compile nothing is checked.
"""

import collections.abc
import contextlib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])  # a class is one too
C = TypeVar("C", bound=type)
FIRST = 100  # items of a long sequence that are looked at
_PLURALS = {"a number": "numbers", "a whole number": "whole numbers", "text": "texts", "a tensor": "tensors"}
_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_UNCHECKED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def checked(target: F) -> F:
    """Check the arguments of a function by their type hints, or of all public methods of a class and of making it.

    Args:
        target: function or class. A method of a subclass that is not decorated is not checked.

    Examples:
        >>> @checked
        ... def half(x: float) -> float:
        ...     return x / 2
        >>> half("1")
        Traceback (most recent call last):
        TypeError: x of half must be a number, got the text '1'
    """
    if inspect.isclass(target):
        for name, member in list(vars(target).items()):
            if name in ("__init__", "__call__") or not name.startswith("_"):
                if inspect.isfunction(member):
                    setattr(target, name, checked(member))
                elif isinstance(member, classmethod | staticmethod):
                    setattr(target, name, type(member)(checked(member.__func__)))
        return typing.cast(F, target)

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _look(target, args, kwargs)
        return target(*args, **kwargs)

    return typing.cast(F, call)


def called(word: str) -> Callable[[C], C]:
    """Decorate a class with what an error calls it, such as "a drop sampler such as StructuredDrop(0.75)"."""

    def note(kind: C) -> C:
        _CALLED[kind] = word
        return kind

    return note


_CALLED: dict[Any, str] = {}
_LOOKS: dict[Any, tuple[list[str], dict[str, "_Look"]]] = {}
"""By function, once it was called: its parameters in order, and what each takes. Not in the closure, which dynamo reads."""


def _look(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if function not in _LOOKS:
        _LOOKS[function] = _prepared(function)
    names, looks = _LOOKS[function]
    for name, value in zip(names, args, strict=False):
        if name in looks and type(value) not in looks[name].plain:
            looks[name](value)
    for name, value in kwargs.items():
        if name in looks and type(value) not in looks[name].plain:
            looks[name](value)


class _Look:
    """At one parameter: what it takes."""

    def __init__(self, where: str, name: str, hint: Any, default: Any) -> None:
        self.where, self.name, self.default = where, name, default
        self.kinds = [_kind(choice) for choice in _choices(hint)]
        self.plain = frozenset(kind for each in self.kinds for kind in each.plain)
        """Types that need no further look."""

    def __call__(self, value: Any) -> None:
        if value is self.default or any(kind.takes(value) for kind in self.kinds):
            return
        wanted = " or ".join(dict.fromkeys(kind.word for kind in self.kinds))
        error = ValueError if any(kind.near(value) for kind in self.kinds) else TypeError
        advice = _advice(value, self.default, tensor=Tensor in self.plain)
        raise error(f"{self.name} of {self.where} must be {wanted}, got {described(value)}{advice}")


class _Kind(typing.NamedTuple):
    word: str
    takes: Callable[[Any], bool]
    plain: tuple[type, ...] = ()
    near: Callable[[Any], bool] = lambda value: False
    """Of the right type: what is wrong is its value."""


def _prepared(function: Callable[..., Any]) -> tuple[list[str], dict[str, _Look]]:
    where, hints, looks = function.__qualname__.removesuffix(".__init__"), _hints(function), dict[str, _Look]()
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        if name in hints and hints[name] is not Any and parameter.kind not in _UNCHECKED:
            looks[name] = _Look(where, name, hints[name], parameter.default)
    places = [name for name, parameter in parameters.items() if parameter.kind in _BY_PLACE]
    return places, looks


def _choices(hint: Any) -> list[Any]:
    """What a hint lets choose from; all its literals as one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        found = [choice for each in typing.get_args(hint) for choice in _choices(each)]
        literals = tuple(value for each in found if typing.get_origin(each) is Literal for value in typing.get_args(each))
        others = [each for each in found if typing.get_origin(each) is not Literal]
        return [Literal[literals], *others] if literals else others
    if isinstance(hint, TypeVar):
        return _choices(hint.__bound__) if hint.__bound__ is not None else [Any]
    return [hint]


def _kind(hint: Any) -> _Kind:  # noqa: PLR0911, one line for each kind of hint
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return _Kind("anything", lambda value: True)
    if hint in (None, type(None)):
        return _Kind("None", lambda value: value is None, (type(None),))
    if hint is bool:
        return _Kind("True or False", lambda value: isinstance(value, bool), (bool,))
    if hint is int:
        return _Kind("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool), (int,))
    if hint is float:
        return _Kind("a number", _is_number, near=lambda value: isinstance(value, float))
    if hint is str:
        return _Kind("text", _is_text, (str,))
    if origin is Literal:
        return _Kind(f"one of {', '.join(map(repr, inner))}", lambda value: _is_one_of(value, inner), near=_is_text)
    if origin is type:
        return _Kind(f"a class of {_name(inner[0])}", lambda value: isinstance(value, type) and issubclass(value, inner))
    if origin is tuple or (origin is not None and issubclass(origin, collections.abc.Sequence)):
        return _sequence(origin, inner)
    if origin is collections.abc.Callable or hint is Callable:
        makes = inner[:1] == ([],)  # an object of no arguments, which a class does
        return _Kind("a function", lambda value: callable(value) and (makes or not isinstance(value, type)))
    kind = origin or hint
    if getattr(kind, "_is_protocol", False):
        wanted = [name for name in dir(kind) if not name.startswith("_")]
        wanted += ["__call__"] if any("__call__" in vars(base) for base in kind.__mro__) else []
        return _Kind(_article(kind), lambda value: not isinstance(value, type) and all(hasattr(value, n) for n in wanted))
    if not isinstance(kind, type):
        return _Kind("anything", lambda value: True)
    return _Kind(_article(kind), lambda value: isinstance(value, kind), (kind,))


def _sequence(origin: Any, inner: tuple[Any, ...]) -> _Kind:
    """Of elements of one kind, or of as many as are named; a list may stand for a tuple."""
    fixed = origin is tuple and len(inner) > 1 and inner[1] is not Ellipsis
    each = [[_kind(choice) for choice in _choices(hint)] for hint in (inner if fixed else inner[:1])]
    words = [" or ".join(dict.fromkeys(_PLURALS.get(kind.word, kind.word) for kind in one)) for one in each]
    word = " and ".join(dict.fromkeys(words)) or "anything"

    def fits(value: Any, *, near: bool = True) -> bool:
        if not isinstance(value, collections.abc.Sequence) or isinstance(value, str | bytes):
            return False
        kinds = each if fixed else each * min(len(value), FIRST)
        pairs = zip(kinds, value, strict=False) if each else ()
        return all(any(kind.takes(item) or (near and kind.near(item)) for kind in one) for one, item in pairs)

    def takes(value: Any) -> bool:
        return fits(value, near=False) and (not fixed or len(value) == len(each))

    return _Kind(f"{len(each)} {word}, in a tuple" if fixed else f"a sequence of {word}", takes, near=fits)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """By name; one that only a type checker can read is left out."""
    found: dict[str, Any] = {}
    for name, hint in function.__annotations__.items():
        one: Any = types.SimpleNamespace(__annotations__={name: hint})
        with contextlib.suppress(NameError):
            found |= typing.get_type_hints(one, function.__globals__)
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _article(kind: type) -> str:
    if kind in _CALLED:
        return _CALLED[kind]
    if kind is Tensor:
        return "a tensor"
    if kind is nn.Module:
        return "a torch.nn.Module"
    if kind is torch.dtype:
        return "a dtype such as torch.bfloat16"
    return f"{'an' if _name(kind)[0] in 'AEIOU' else 'a'} {_name(kind)}"


def described(value: Any) -> str:
    """A value in an error: short, and never the content of an array."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, list | tuple):
        text = repr(value)
        return text if len(text) < 60 else f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _advice(value: Any, default: Any, *, tensor: bool) -> str:
    if value is None:
        return "" if default is inspect.Parameter.empty else f": leave it out for {described(default)}"
    if isinstance(value, type):
        return f": an object of it, {value.__name__}(...)"
    if tensor and isinstance(value, list | tuple):
        return ": torch.tensor(...)"
    if tensor and type(value).__module__ == "numpy":
        return ": torch.from_numpy(...)"
    return ""
