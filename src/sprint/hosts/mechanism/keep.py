"""Which tokens a route keeps: the grid they stand on, the draw, those that are always kept."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sprint.hosts.declare import Arguments
from sprint.middle.drop import Drop, StructuredDrop
from sprint.middle.tokens import TokenSubset

if TYPE_CHECKING:
    from sprint.hosts.mechanism.state import SprintState

MAX_PATCH = 64  # largest patch side that is looked for


class Keeper:
    """Draws the kept tokens of one call."""

    def __init__(
        self,
        state: "SprintState",
        model: Any,
        arguments: Arguments,
        *,
        drop: Drop | None,
        generator: torch.Generator | None,
    ) -> None:
        self.state, self.model, self.arguments = state, model, arguments
        self.drop, self.generator = drop, generator
        self._grid: tuple[int, ...] | None = None

    def draw(self, image: Tensor) -> TokenSubset:
        """Draw the kept tokens, and add those that are always kept in front of them or behind."""
        assert self.drop is not None
        num_tokens = image.shape[1]
        grid = self.grid(num_tokens)
        subset = self.drop.sample(len(image), grid, device=image.device, generator=self.generator)
        others = num_tokens - math.prod(grid)
        if not others:
            return subset
        places = torch.arange(num_tokens, device=image.device).expand(len(image), -1)
        if self.state.host.always_kept == "first":
            keep = torch.cat([places[:, :others], subset.keep + others], dim=1)
        else:
            keep = torch.cat([subset.keep, places[:, num_tokens - others :]], dim=1)
        return TokenSubset(keep, num_tokens)

    def grid(self, num_tokens: int) -> tuple[int, ...]:
        """The grid of the tokens that may be dropped, from wherever it is known."""
        if self._grid is None:
            self._grid = self._known_grid(num_tokens)
        return self._grid

    def _known_grid(self, num_tokens: int) -> tuple[int, ...]:
        grid, x, host = self.state.grid, next(iter(self.arguments.values()), None), self.state.host
        sides = tuple(x.shape[2:]) if isinstance(x, Tensor) and x.ndim in (4, 5) else None
        told = None if host.grid is None else host.grid(self.model, self.arguments)
        if grid is not None and told is not None and not _agree(grid, told):
            raise ValueError(
                f"the arguments of {type(self.model).__name__} say that its token grid is {told}, and grid={grid} was "
                "given: leave that out"
            )
        if grid is None:
            grid = patch_grid(sides, num_tokens) if host.grid is None and sides is not None else told
        structured, others = isinstance(self.drop, StructuredDrop), host.always_kept is not None
        length = 0 if grid is None else math.prod(grid)
        fits = length == num_tokens or (others and length < num_tokens)
        if grid is not None and fits and (len(grid) > 1 or not structured):
            return grid
        # Without a grid other samplers can draw, but tokens of which nothing is known may be class tokens or registers.
        packed = isinstance(x, Tensor) and x.ndim == 3 and host.image_tokens is None and x.shape[1] != num_tokens
        doubtful = sides is not None or (packed and host.grid is None)
        if self.state.grid is None and not structured and not doubtful and not others:
            return (num_tokens,)
        name = type(self.model).__name__
        raise ValueError(
            f"the token grid of {name} is {'unknown' if grid is None or len(grid) == 1 else grid} for {num_tokens} tokens: "
            "give it, sprint.wrap(model, grid=(rows, columns)) or sprint.path(model, 'sparse', grid=…)"
            + ("" if others and not length else ", or use RandomDrop" if structured else f", or grid=({num_tokens},)")
            + (_PREFIX.format(name) if doubtful else "")
        )

    def cells(self, num_tokens: int) -> tuple[int, ...]:
        """The sides of a group, for blocks that unfold the tokens into a grid: one token per group."""
        name = type(self.model).__name__
        if not isinstance(self.drop, StructuredDrop):
            raise ValueError(
                f"{name} unfolds its tokens into a grid inside its blocks: "
                "use a drop sampler that keeps one token per group, StructuredDrop(0.75)"
            )
        try:
            group, kept = self.drop.cells(self.grid(num_tokens))
        except ValueError as error:
            raise ValueError(
                f"{name} unfolds its tokens into a grid inside its blocks, so every group keeps one token: {error}"
            ) from error
        if kept != 1 or group[:-2] not in ((), (1,)):
            video = len(group) == 3
            raise ValueError(
                f"{name} unfolds its tokens into a grid inside its blocks, so one token per group can be kept"
                f"{', in every frame' if video else ''}, got {kept} of {group}: use "
                f"{'StructuredDrop(group=(1, 2, 2), keep=1)' if video else 'StructuredDrop(0.75)'}"
            )
        return group

    def in_cells(self, subset: TokenSubset) -> TokenSubset:
        """The same tokens in the order of their groups, so that they form a smaller grid."""
        (*_, rows, columns), (*_, width) = self.cells(subset.num_tokens), self.grid(subset.num_tokens)
        row, column = subset.keep // width, subset.keep % width  # rows of all frames, one below the other
        order = (row // rows * (width // columns) + column // columns).argsort(dim=1)
        return TokenSubset(subset.keep.gather(1, order), subset.num_tokens)


def _agree(given: tuple[int, ...], told: tuple[int, ...]) -> bool:
    """Whether two grids are one, where either may name the single frame of an image, and `told` only its length."""
    if len(told) == 1:
        return math.prod(given) == told[0]
    (given, told) = (grid[1:] if len(grid) == 3 and grid[0] == 1 else grid for grid in (given, told))
    return given == told


_PREFIX = (
    ", if all of them are image tokens; if some are not (class token, registers), declare how many are, "
    "sprint.wrap(model, host=sprint.Host((sprint.Blocks('blocks', stream='text+image'),), "
    "image_tokens=lambda model, arguments, length: length - 1)), for {}"
)


def patch_grid(sides: tuple[int, ...], num_tokens: int) -> tuple[int, ...] | None:
    """The grid of square patches on (H, W) or (T, H, W) that has this many tokens; None without exactly one."""
    *frames, height, width = sides
    found = set()
    for patch in range(1, min(height, width, MAX_PATCH) + 1):
        rows, columns = height // patch, width // patch
        if height % patch or width % patch or num_tokens % (rows * columns):
            continue
        if not frames and rows * columns == num_tokens:
            return rows, columns
        depth = num_tokens // (rows * columns)
        if frames and depth <= frames[0] and frames[0] % depth == 0:
            found.add((depth, rows, columns))
    return found.pop() if len(found) == 1 else None
