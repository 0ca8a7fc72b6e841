"""What is handed over as a model, and what is behind it: modules that hold others, partials, methods and functions."""

import functools
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_PASSING_ON = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "AveragedModel", "CapturedModel"}
_LIBRARIES = {*sys.stdlib_module_names, "diffusers", "einops", "numpy", "peft", "sprint", "torch", "transformers"}


def unwrapped(model: Any) -> Any:
    """The model that is called when this one is: inside DistributedDataParallel, `torch.compile` and the like, a partial
    of named arguments, or behind its own `forward`; else the model itself."""
    while True:
        if isinstance(model, nn.Module):
            inner = model._modules.get("_orig_mod")
            if inner is None and {kind.__name__ for kind in type(model).__mro__} & _PASSING_ON:
                inner = model._modules["module"]
        elif isinstance(model, functools.partial) and not model.args:
            inner = model.func
        elif getattr(model, "__name__", None) in ("forward", "__call__", "_wrapped_call_impl"):
            owner = getattr(model, "__self__", None)
            inner = owner if isinstance(owner, nn.Module) else None
        else:
            inner = None
        if inner is None:
            return model
        model = inner


def held(model: Any) -> Any:
    """The model that others hold, also PEFT."""
    model = unwrapped(model)
    while type(model).__module__.startswith("peft."):  # a PeftModel, and what of a tuner is in it
        inner = model._modules.get("base_model", model._modules.get("model"))
        if inner is None:
            break
        model = unwrapped(inner)
    return model


def called(model: Any) -> list[nn.Module]:
    """The modules that a model is made of or calls, outermost first, as far as can be seen without a call.

    Looked through are partials, bound methods, closures, defaults, and what a function names: of its file, of `self`, and
    in lists and dictionaries there.
    """
    if isinstance(model, nn.Module) and torch.compiler.is_compiling():
        return [model]
    found: list[nn.Module] = []
    seen: dict[int, Any] = {}
    queue: list[tuple[Any, frozenset[str]]] = [(model, frozenset())]
    while queue:
        part, names = queue.pop(0)
        if id(part) in seen and not names - seen[id(part)]:
            continue
        if isinstance(part, nn.Module):
            if id(part) not in seen:
                found.append(part)
            used = _named_by_forward(type(part))  # of what it keeps out of its submodules
            queue += [(value, frozenset()) for name, value in vars(part).items() if name in used]
        else:
            queue += _behind(part, names)
        seen[id(part)] = names | seen.get(id(part), frozenset())
    return found


def _behind(part: Any, names: frozenset[str]) -> Iterator[tuple[Any, frozenset[str]]]:
    """What something that is no module may call, and the names of attributes that matter there."""
    if isinstance(part, functools.partial):
        yield from ((value, names) for value in (part.func, *part.args, *part.keywords.values()))
    elif isinstance(part, types.MethodType):
        yield from ((value, _names(_code(part.__func__))) for value in (part.__self__, part.__func__))
    elif isinstance(part, types.FunctionType):
        used = _names(part.__code__)
        values = [*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values()]
        for cell in part.__closure__ or ():
            try:
                values.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        if str(part.__module__).split(".")[0] not in _LIBRARIES:
            values += [part.__globals__[name] for name in used if name in part.__globals__]
        yield from ((value, used) for value in values)
    elif isinstance(part, list | tuple):
        yield from ((value, names) for value in part)
    elif isinstance(part, Mapping):
        yield from ((value, names) for value in part.values())
    elif isinstance(part, types.ModuleType):
        if part.__name__.split(".")[0] not in _LIBRARIES:
            yield from ((value, names) for name, value in vars(part).items() if name in names)
    elif not isinstance(part, type | torch.Tensor) and hasattr(part, "__dict__"):
        call = getattr(type(part), "__call__", None)  # noqa: B004
        names = names | _names(_code(call))
        yield from ((value, names) for name, value in vars(part).items() if name in names)
        if isinstance(call, types.FunctionType):
            yield call, names


def _code(function: Any) -> types.CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None


@functools.lru_cache(maxsize=1024)
def _named_by_forward(kind: type) -> frozenset[str]:
    return _names(_code(kind.forward))


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType | None) -> frozenset[str]:
    """What a function names: of its file, and attributes."""
    if code is None:
        return frozenset()
    inner = [_names(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return frozenset(code.co_names).union(*inner)
