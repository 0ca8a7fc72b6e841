"""What holds a block's side inputs: tuples, lists, dicts and dataclasses, of any class, rebuilt as what they were."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def held(value: Any) -> dict[Any, Any] | None:
    """What a holder holds, by place, key or field; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def rebuilt(value: Any, items: dict[Any, Any]) -> Any:
    """A holder like another one, with other items in it."""
    if type(value) is dict:
        return items
    if isinstance(value, (tuple, list)):
        kind: Any = type(value)
        return kind(*items.values()) if hasattr(value, "_fields") else kind(items.values())
    again = copy.copy(value)
    for key, item in items.items():
        if isinstance(value, Mapping):
            again[key] = item
        else:
            object.__setattr__(again, key, item)  # frozen ones too
    return again


def leaves(value: Any) -> Iterator[Any]:
    """Everything in a holder, and in those that it holds, or the value itself."""
    items = held(value)
    if items is None:
        yield value
    else:
        for item in items.values():
            yield from leaves(item)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The function of everything in a holder, and in those that it holds, or of the value itself."""
    items = held(value)
    if items is None:
        return function(value)
    return rebuilt(value, {key: mapped(function, item) for key, item in items.items()})
