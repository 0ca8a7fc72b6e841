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

    def draw(self, image: Tensor) -> TokenSubset:
        """Draw the kept tokens, and add those that are always kept in front of them and behind."""
        assert self.drop is not None
        num_tokens = image.shape[1]
        subset = self.drop.sample(len(image), self.grid(num_tokens), device=image.device, generator=self.generator)
        first, last = self._always()
        if not first + last:
            return subset
        places = torch.arange(num_tokens, device=image.device).expand(len(image), -1)
        keep = [places[:, :first], subset.keep + first, places[:, num_tokens - last :]]
        return TokenSubset(torch.cat(keep, dim=1), num_tokens)

    def _always(self) -> tuple[int, int]:
        kept = self.state.host.always_kept
        return (0, 0) if kept is None else kept(self.model, self.arguments)

    def grid(self, num_tokens: int) -> tuple[int, ...]:
        """The token grid of the image, from wherever it is known."""
        num_tokens -= sum(self._always())
        grid, x = self.state.grid, next(iter(self.arguments.values()), None)
        sides = tuple(x.shape[2:]) if isinstance(x, Tensor) and x.ndim in (4, 5) else None
        if grid is None and self.state.host.grid is not None:
            grid = self.state.host.grid(self.model, self.arguments)
        elif grid is None and sides is not None:
            grid = patch_grid(sides, num_tokens)
        if grid is not None and math.prod(grid) == num_tokens:
            return grid
        # Without a grid other samplers can draw, but tokens of which nothing is known may be class tokens or registers.
        doubtful = sides is not None and not self.state.declared
        if self.state.grid is None and not isinstance(self.drop, StructuredDrop) and not doubtful:
            return (num_tokens,)
        name = type(self.model).__name__
        raise ValueError(
            f"the token grid of {name} is {'unknown' if grid is None else grid} for {num_tokens} tokens: "
            "give it, sprint.wrap(…, grid=(rows, columns)) or sprint.path(model, 'sparse', grid=…), or use RandomDrop"
            + ("" if not doubtful else _PREFIX.format(name))
        )

    def cells(self, num_tokens: int) -> tuple[int, ...]:
        """The sides of a group, for blocks that unfold the tokens into a grid: one token per group."""
        name = type(self.model).__name__
        if not isinstance(self.drop, StructuredDrop):
            raise ValueError(
                f"{name} unfolds its tokens into a grid inside its blocks: "
                "use a drop sampler that keeps one token per group, StructuredDrop(0.75)"
            )
        group, kept = self.drop.cells(self.grid(num_tokens))
        if kept != 1:
            raise ValueError(
                f"{name} unfolds its tokens into a grid inside its blocks, so one token per group can be kept, "
                f"got {kept} of {group}: use StructuredDrop(0.75)"
            )
        return group

    def in_cells(self, subset: TokenSubset) -> TokenSubset:
        """The same tokens in the order of their groups, so that they form a smaller grid."""
        (rows, columns), (_, width) = self.cells(subset.num_tokens), self.grid(subset.num_tokens)
        row, column = subset.keep // width, subset.keep % width
        order = (row // rows * (width // columns) + column // columns).argsort(dim=1)
        return TokenSubset(subset.keep.gather(1, order), subset.num_tokens)


_PREFIX = (
    " with a declared model; if some of them are no image tokens (class token, registers), declare how many are, "
    "sprint.wrap(…, host=sprint.Host((sprint.Blocks('blocks', stream='text+image'),), "
    "image_tokens=lambda model, arguments, length: length - 1)) for {}"
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
