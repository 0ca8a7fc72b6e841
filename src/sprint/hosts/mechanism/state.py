"""What `wrap` adds to a model, and how it is found behind what holds the model."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from sprint.hosts.declare import Host, is_ours
from sprint.hosts.mechanism.masked import Masked
from sprint.hosts.mechanism.places import Place, by_name
from sprint.middle.drop import Drop
from sprint.middle.sparse import Path
from sprint.middle.tokens import TokenSubset

Chosen = tuple[Path, TokenSubset | None, Drop | None, torch.Generator | None]
FULL: Chosen = ("full", None, None, None)


class SprintState(nn.Module):
    """What `wrap` adds to a model, at `model.sprint`: the fusion, and where the model's blocks are."""

    def __init__(self, fusion: nn.Module, *, host: Host, declared: bool, parameters: list[str], path_drop: float) -> None:
        super().__init__()
        self.fusion = fusion
        self.host, self.declared, self.parameters_of_forward, self.path_drop = host, declared, parameters, path_drop
        self.places: list[tuple[Place, int]] = []  # runs of blocks, and the index of the first block of each
        self.first = self.last = 0  # middle blocks
        self.drop: Drop | None = None
        self.checkpoint = False
        self.options: dict[str, Any] = {}  # of wrap, as far as a file can hold them
        self.grid: tuple[int, ...] | None = None
        self.weak_half: Literal["first", "second"] | None = (
            None  # of a batch of both guidance branches: takes the shallow path
        )
        self.weak_ran = False  # a call has taken the shallow path; no count, for which torch.compile would compile each call
        self.guider_path: Any = None  # the path that a guider of diffusers chose for the call that it prepared
        self.bypassed = False  # run the host as if it were not wrapped, for `check`
        self.idle: Literal["middle", "encoder", "fusion"] | None = None  # what returns what it gets, for `check`
        self.masked: Masked | None = None  # nothing is gathered, and attention masked instead, for `check`
        self.doubts = not is_ours(host)  # whether it is to be tried what meets the rows of tables
        self.proved: set[tuple[str, type]] = set()  # blocks of which that is known
        self.route: Chosen = FULL
        self.latest: Chosen = self.route  # of the last forward pass
        self.held_by: list[int] = []  # the thread, as often as it is within a call or a `with path(...)`

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other threads out, which would take this one's path or run through its blocks.

        Raises:
            RuntimeError: another thread holds the model.
        """
        if torch._C._current_graph_task_id() != -1:  # autograd's thread, which recomputes for the one that waits
            yield
            return
        self.refuse_other_threads()
        self.held_by.append(threading.get_ident())
        try:
            yield
        finally:
            self.held_by.pop()

    def refuse_other_threads(self) -> None:
        """Raise RuntimeError where another thread is at work."""
        if self.held_elsewhere():
            raise RuntimeError(
                "this wrapped model is at work in another thread, and it runs one call and has one path at a time: use a "
                "lock, or a copy of the model (sharing its parameters, if need be) for each thread"
            )

    def held_elsewhere(self) -> bool:
        """Whether another thread is at work."""
        return bool(self.held_by) and self.held_by[-1] != threading.get_ident()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is held by nobody, so that nothing would lead it back from a path that is chosen for a while."""
        return {**self.__dict__, "held_by": [], "route": FULL if self.held_by else self.route}

    def arguments(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the model's forward by name, in the order of its signature."""
        given = {**by_name(self.parameters_of_forward, args), **kwargs}
        return {name: given[name] for name in self.parameters_of_forward if name in given} | given


def own_state(model: nn.Module) -> SprintState | None:
    """The state of this very model, also where PEFT has put its own module around it (modules_to_save)."""
    state = model._modules.get("sprint")
    if state is not None and not isinstance(state, SprintState):
        state = state._modules.get("original_module")
    return state if isinstance(state, SprintState) else None


def find_wrapped(model: Any) -> tuple[Any, SprintState]:
    """The wrapped model and its state: the model itself, or the one inside of what holds it.

    Raises:
        ValueError: there is none, or more than one.
    """
    host = model
    while isinstance(host, nn.Module):  # without a walk through all modules for what is common
        if (state := own_state(host)) is not None:
            return host, state
        host = host._modules.get("_orig_mod", host._modules.get("module"))
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [(module, state) for module in modules if (state := own_state(module)) is not None]
    if len(found) > 1:
        raise ValueError(f"this {type(model).__name__} holds {len(found)} wrapped models: pass the one that is meant")
    if not found:
        raise ValueError(
            f"this {type(model).__name__} is not wrapped: model = sprint.wrap(model, drop=sprint.StructuredDrop(0.75))"
        )
    return found[0]


def state_of(model: Any) -> SprintState:
    """What `wrap` added, also behind DistributedDataParallel, torch.compile or a PeftModel."""
    return find_wrapped(model)[1]
