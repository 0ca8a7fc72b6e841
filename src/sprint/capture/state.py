"""What CUDA graphs have built in besides the arguments of a call: modes and options, and where weights and states are.

Everything here is looked at before each replay, hundreds of parameters in tens of microseconds, and nothing waits for the
device.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

ROUTES = ("route", "_route", "grid", "weak_half", "bypassed")  # of a SparseMiddle, and of what `wrap` adds
FLAGS = ("recompute", "checkpoint", "gradient_checkpointing", "backend", "kernels", "path_drop")  # set by methods of models
RESTLESS = 16  # changes of an option, before it counts as one that always changes


class Part:
    """Something that a captured call depends on: a part of a `sprint.capture.graphs.State`."""

    def look(self) -> tuple[Hashable, Hashable]:
        """How it is now.

        Returns:
            Modes and options, each combination of which has its own graph; and where the tensors are that a graph reads and
            writes, for when that changes no graph holds.
        """
        return None, None

    def obstacle(self) -> str | None:
        """Why no graph can hold this, if so; asked before a capture."""
        return None

    def restless(self) -> str | None:
        """Which option changes from call to call, if one does."""
        return None

    def generators(self) -> list[torch.Generator]:
        """What it draws from, besides the device's own generator."""
        return []


class Together(Part):
    """Several parts as one."""

    def __init__(self, *parts: Part) -> None:
        self.parts = parts

    def look(self) -> tuple[Hashable, Hashable]:
        """At all."""
        options, memory = zip(*[part.look() for part in self.parts], strict=True)
        return options, memory

    def obstacle(self) -> str | None:
        """The first."""
        return next((reason for part in self.parts if (reason := part.obstacle())), None)

    def restless(self) -> str | None:
        """The first."""
        return next((reason for part in self.parts if (reason := part.restless())), None)

    def generators(self) -> list[torch.Generator]:
        """Of all."""
        return [generator for part in self.parts for generator in part.generators()]


class ModelState(Part):
    """Of a pass through models: the modes of their modules, the path they were told to take, where their weights are."""

    def __init__(self, *models: nn.Module) -> None:
        self.modules = [module for model in models for module in model.modules()]
        routed = [module for module in self.modules if any(hasattr(module, name) for name in ROUTES[:2])]
        self.named = [(module, name) for module in routed for name in ROUTES]
        for module in self.modules:
            for name in FLAGS:
                if isinstance(getattr(module, name, None), bool | int | float | str):
                    self.named.append((module, name))
        # The dictionaries themselves, so that a parameter put in another's place is seen.
        self.tensors = [held for module in self.modules for held in (module._parameters, module._buffers) if held]

    def look(self) -> tuple[Hashable, Hashable]:
        """Modes, path and flags, which weights are trained; where weights and buffers are."""
        tensors = [tensor for held in self.tensors for tensor in held.values() if tensor is not None]
        named = tuple([getattr(module, name, None) for module, name in self.named])
        training = tuple([module.training for module in self.modules])
        return (named, training, tuple([tensor.requires_grad for tensor in tensors])), places(tensors)

    def generators(self) -> list[torch.Generator]:
        """Of the path."""
        values = [getattr(module, name, None) for module, name in self.named]
        values = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
        return [each for each in values if isinstance(each, torch.Generator)]


class OptimizerState(Part):
    """Of an optimizer's step, which it also prepares for captures: rates and step counts become tensors on the device.

    Args:
        optimizer: of torch, or with its interface.
        device: where its parameters are.
        looked_at: parameters whose memory others look at.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, looked_at: Iterable[Tensor] = ()) -> None:
        self.optimizer, self.device, self.looked_at = optimizer, device, {id(parameter) for parameter in looked_at}
        self.rates: list[Tensor] = []
        self.last: list[dict[str, Any]] = []
        self.changes: Counter[str] = Counter()
        # Or torch warns of each plain step before the capture.
        optimizer._warned_capturable_if_run_uncaptured = True  # pyright: ignore[reportAttributeAccessIssue]

    def prepare(self) -> None:
        """At each call, for groups are added, schedules set numbers, and a loaded state brings options of its own."""
        for index, group in enumerate(self.optimizer.param_groups):
            if index == len(self.rates):
                self.rates.append(torch.zeros((), device=self.device))
            rate = self.rates[index]
            if group.get("lr", rate) is not rate:
                rate.fill_(float(group["lr"]))
                group["lr"] = rate
            if group.get("capturable") is False:
                group["capturable"] = True
                for parameter in group["params"]:
                    state = self.optimizer.state.get(parameter, {})
                    if isinstance(count := state.get("step"), Tensor):
                        state["step"] = count.to(self.device)
            if isinstance(self.optimizer, torch.optim.SGD) and not group["fused"] and not group["differentiable"]:
                group["fused"], group["foreach"] = True, False  # its other forms read the rate on the host

    def look(self) -> tuple[Hashable, Hashable]:
        """Options of its groups, all but the rates; which parameters and states it has, for loaded ones are others."""
        now = [{key: value for key, value in g.items() if _is_option(key, value)} for g in self.optimizer.param_groups]
        if now != self.last:
            self.changes.update(
                {key for old, new in zip(self.last, now, strict=False) for key in new if old.get(key) != new[key]}
            )
            self.last = now
        options = tuple([tuple(group.items()) for group in now])
        states: Any = self.optimizer.state.values()
        ends = (next(iter(states), {}), next(reversed(states), {}))
        tensors = [value for state in ends for value in state.values() if isinstance(value, Tensor)]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        ids = tuple(map(id, parameters))
        if not self.looked_at.issuperset(ids):
            tensors += [parameter for parameter in parameters if id(parameter) not in self.looked_at]
        counts = ids, tuple(map(id, states)), tuple(map(len, states))
        return options, (id(self.optimizer.state), counts, places(tensors))

    def obstacle(self) -> str | None:
        """States that a replay would not see change."""
        name = type(self.optimizer).__name__
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items() if isinstance(state, dict) else ():
                if isinstance(value, int | float):
                    return f"{name} keeps state[{key!r}] as a Python number, which no replay changes: use AdamW"
                if isinstance(value, Tensor) and value.device != parameter.device:
                    return f"{name} keeps state[{key!r}] on {value.device}, where a graph cannot change it: use AdamW"
        return None

    def restless(self) -> str | None:
        """Options that a schedule sets anew for each call."""
        names = [name for name, count in self.changes.items() if count >= RESTLESS]
        if not names:
            return None
        return f"the optimizer's {' and '.join(names)} change from call to call (OneCycleLR: cycle_momentum=False)"


def places(tensors: Iterable[Tensor]) -> Hashable:
    """Where tensors are."""
    try:
        return tuple(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # of a subclass that has no memory of its own
        return tuple([id(tensor) for tensor in tensors])


def _is_option(key: str, value: Any) -> bool:
    if key in ("params", "lr") or (isinstance(value, float) and math.isnan(value)):
        return False  # nan is never equal to itself
    return isinstance(value, int | float | str | tuple | bool | type(None))
