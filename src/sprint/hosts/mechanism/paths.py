"""`path`: which way the calls of a wrapped model take."""

from typing import Any, get_args

import torch

from sprint.hosts.mechanism.state import Chosen, state_of
from sprint.middle.drop import Drop
from sprint.middle.sparse import Path
from sprint.middle.tokens import TokenSubset


class path:
    """Choose the path of a wrapped model: from now on, or, in a `with` statement, until its end.

    Args:
        model: wrapped, also behind DistributedDataParallel, torch.compile or a PeftModel.
        name: "full" (all tokens), "sparse" (kept tokens) or "shallow" (the middle never runs).
        drop: drop sampler of the sparse path, instead of the one given to `wrap`.
        subset: kept tokens of the sparse path, instead of drawn ones.
        grid: token grid, where the model's arguments do not tell it.
        generator: for the draws.

    Raises:
        ValueError: the model is not wrapped, an unknown path, a sparse path without a drop sampler, or options that
            contradict each other.
        TypeError: a drop sampler, subset or grid of another type.
    """

    def __init__(
        self,
        model: Any,
        name: Path,
        *,
        drop: Drop | None = None,
        subset: TokenSubset | None = None,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.state = state_of(model)
        if name not in get_args(Path):
            raise ValueError(f"unknown path {name!r}: choose one of {', '.join(get_args(Path))}")
        check_drop(drop)
        if subset is not None and not isinstance(subset, TokenSubset):
            raise TypeError(
                f"subset must be a TokenSubset, got {type(subset).__name__}: TokenSubset.from_keep(indices, num_tokens)"
            )
        if subset is not None and drop is not None:
            raise ValueError("subset names the kept tokens, so that drop would draw none: give one of them")
        if name == "sparse" and subset is None and drop is None and self.state.drop is None:
            raise ValueError(
                "the sparse path needs a drop sampler: sprint.path(model, 'sparse', drop=sprint.StructuredDrop(0.75))"
            )
        if name != "sparse" and (subset is not None or drop is not None):
            raise ValueError(f"path {name!r} drops no tokens: leave drop and subset out")
        drop = None if name != "sparse" or subset is not None else drop or self.state.drop
        self.route: Chosen = (name, subset, drop, generator)
        self.grid = check_grid(grid)
        self.before: list[tuple[Chosen, tuple[int, ...] | None]] = []
        self.entered = False
        self.holding: list[Any] = []
        self._choose()

    def _choose(self) -> None:
        if not torch.compiler.is_compiling():
            self.state.refuse_other_threads()
        self.before.append((self.state.route, self.state.grid))
        self.state.route = self.route
        self.state.grid = self.grid or self.state.grid

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            holding = self.state.held()
            holding.__enter__()
            self.holding.append(holding)
        if self.entered or self.state.route is not self.route:  # a second time, or other paths were chosen in between
            self._choose()
        self.entered = True

    def __exit__(self, *error: object) -> None:
        self.state.route, self.state.grid = self.before.pop()
        if self.holding:
            self.holding.pop().__exit__(None, None, None)


def check_drop(drop: Any) -> None:
    """Raise TypeError for what is no drop sampler."""
    if drop is not None and (isinstance(drop, type) or not callable(getattr(drop, "sample", None))):
        got = drop.__name__ if isinstance(drop, type) else repr(drop)
        raise TypeError(f"drop must be a drop sampler, got {got}: sprint.StructuredDrop(0.75), for example")


def check_grid(grid: Any) -> tuple[int, ...] | None:
    """The grid as a tuple; TypeError for what is none."""
    if grid is None:
        return None
    if not isinstance(grid, (tuple, list)) or not all(isinstance(side, int) and side > 0 for side in grid):
        raise TypeError(f"grid must be the sides of the token grid, (rows, columns), got {grid!r}")
    return tuple(grid)
