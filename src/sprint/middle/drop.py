"""Drop samplers: which tokens the middle blocks see.

A drop sampler keeps `K = (1 - r) N` of the `N` tokens of each sample (SPRINT, arXiv 2510.21986, drop samplers).
`RandomDrop` draws the K positions uniformly; `StructuredDrop` cuts the token grid into groups and draws the same number
in each, so that every neighbourhood stays represented (FID 27.5 against 30.1 in the paper's B/2 ablation).

All shapes follow from the grid and the ratio alone: drawing never waits for the device and compiles without graph breaks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch

from sprint.middle.tokens import TokenSubset
from sprint.random import Device, uniform

MAX_GROUP_SIDE = 8  # the largest group side that StructuredDrop(ratio) tries


class Drop(Protocol):
    """What a drop sampler is: anything with this method."""

    def sample(
        self,
        batch: int,
        grid: Sequence[int],
        *,
        device: Device = None,
        generator: torch.Generator | None = None,
    ) -> TokenSubset:
        """Draw the kept tokens.

        Args:
            batch: B.
            grid: token grid, (rows, columns) or (frames, rows, columns).
            device: of the indices.
            generator: on any device; without one the device's global stream is used.

        Returns:
            Subset of K of the N tokens, indices in ascending order.

        Raises:
            ValueError: this sampler cannot drop its share on this grid.
        """
        ...


@dataclass(frozen=True)
class RandomDrop:
    """Keep `(1 - ratio) N` positions, uniformly without replacement (SPRINT, drop sampler "random").

    Args:
        ratio: share of tokens dropped, in [0, 1); `(1 - ratio) N` must be whole.
        shared: one draw for the whole batch instead of one per sample.

    Examples:
        >>> drop = RandomDrop(0.75)
        >>> drop.sample(2, (4, 4), generator=torch.Generator().manual_seed(0)).keep
        tensor([[ 1,  5,  7,  9],
                [ 5,  7, 10, 15]])
    """

    ratio: float
    shared: bool = False

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)

    def sample(
        self,
        batch: int,
        grid: Sequence[int],
        *,
        device: Device = None,
        generator: torch.Generator | None = None,
    ) -> TokenSubset:
        """Draw K = (1 - ratio) N tokens, as [`Drop.sample`][sprint.Drop.sample]; of the grid only its product matters.

        Raises:
            ValueError: the ratio leaves no whole number of tokens on this grid.
        """
        _check_grid(grid)
        num_tokens = math.prod(grid)
        kept = _kept(self.ratio, num_tokens)
        if kept is None:
            raise ValueError(_unreachable(self.ratio, grid, {1 - k / num_tokens for k in range(1, num_tokens + 1)}))
        scores = uniform((1 if self.shared else batch, num_tokens), device=device, generator=generator)
        keep = scores.topk(kept, dim=1).indices.sort(dim=1).values  # (B, K)
        return TokenSubset(keep.expand(batch, kept), num_tokens)


@dataclass(frozen=True, init=False)
class StructuredDrop:
    """Keep the same number of tokens in every group of the grid (SPRINT, "structured with random offset").

    Either give a ratio, and the smallest fitting group is chosen on each grid (equal sides first, as in the paper:
    0.75 is 1 of 2x2, 0.5 is 2 of 2x2, 0.625 is 6 of 4x4, 0.875 is 2 of 4x4, and for video 0.75 is 2 of 2x2x2),
    or the group and the number of tokens kept in it.

    Args:
        ratio: share of tokens dropped, in [0, 1).
        group: sides of a group, one per axis of the grid.
        keep: tokens kept per group, 1 to the group's size.
        shared: one draw for the whole batch instead of one per sample.

    Examples:
        >>> drop = StructuredDrop(0.75)
        >>> drop.sample(2, (4, 4), generator=torch.Generator().manual_seed(0)).keep
        tensor([[ 1,  7,  9, 15],
                [ 1,  3, 12, 15]])
        >>> drop == StructuredDrop(0.75), StructuredDrop(group=(2, 2), keep=1).cells((4, 4))
        (True, ((2, 2), 1))
    """

    ratio: float | None
    group: tuple[int, ...] | None
    keep: int | None
    shared: bool

    def __init__(
        self,
        ratio: float | None = None,
        *,
        group: Sequence[int] | None = None,
        keep: int | None = None,
        shared: bool = False,
    ) -> None:
        if (ratio is None) == (group is None) or (group is None) != (keep is None):
            raise ValueError(
                f"got ratio={ratio}, group={group}, keep={keep}: "
                "give either a ratio, StructuredDrop(0.75), or a group and keep, StructuredDrop(group=(2, 2), keep=1)"
            )
        if ratio is not None:
            _check_ratio(ratio)
        if group is not None and keep is not None:
            _check_grid(group, name="group")
            if isinstance(keep, float) or not 1 <= keep <= math.prod(group):
                raise ValueError(f"keep must be 1 to {math.prod(group)} for a group of {_times(group)}, got {keep}")
        # Frozen: fields are set once, here, because the shape of the arguments is checked before they are stored.
        for name, value in (
            ("ratio", ratio),
            ("group", tuple(group) if group else None),
            ("keep", keep),
            ("shared", shared),
        ):
            object.__setattr__(self, name, value)

    def cells(self, grid: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """The group and the number of tokens kept in each, on this grid.

        Raises:
            ValueError: the grid is not divisible by the group, or no group reaches the ratio (its neighbours are named).
        """
        _check_grid(grid)
        if self.group is not None and self.keep is not None:
            if len(self.group) != len(grid) or any(side % n for side, n in zip(grid, self.group, strict=True)):
                raise ValueError(
                    f"a grid of {_times(grid)} tokens is not divisible into groups of {_times(self.group)}: "
                    "choose a group whose sides divide the grid's, or give a ratio"
                )
            return self.group, self.keep
        assert self.ratio is not None
        groups = _groups(tuple(grid))
        for group in groups:
            kept = _kept(self.ratio, math.prod(group))
            if kept is not None:
                return group, kept
        sizes = {math.prod(group) for group in groups}
        raise ValueError(_unreachable(self.ratio, grid, {1 - k / size for size in sizes for k in range(1, size + 1)}))

    def sample(
        self,
        batch: int,
        grid: Sequence[int],
        *,
        device: Device = None,
        generator: torch.Generator | None = None,
    ) -> TokenSubset:
        """Draw the same number of tokens in each group, as [`Drop.sample`][sprint.Drop.sample].

        Raises:
            ValueError: as `cells`.
        """
        group, kept = self.cells(grid)
        num_tokens, size = math.prod(grid), math.prod(group)
        axes = len(group)
        split = [part for side, n in zip(grid, group, strict=True) for part in (side // n, n)]
        order = (*range(0, 2 * axes, 2), *range(1, 2 * axes, 2))  # which group first, which member of it last
        table = torch.arange(num_tokens, device=device).view(split).permute(order).reshape(-1, size)  # (groups, size)
        rows = 1 if self.shared else batch
        scores = uniform((rows, num_tokens // size, size), device=device, generator=generator)
        chosen = scores.topk(kept, dim=2).indices  # (B, groups, kept)
        keep = table.expand(rows, -1, -1).gather(2, chosen).flatten(1).sort(dim=1).values  # (B, K)
        return TokenSubset(keep.expand(batch, -1), num_tokens)


def _groups(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Groups that divide the grid, equal sides first, then the smallest, then the most compact."""
    sides = [[n for n in range(1, MAX_GROUP_SIDE + 1) if length % n == 0] for length in grid]
    return sorted(product(*sides), key=lambda group: (len(set(group)), math.prod(group), max(group), group))


def _kept(ratio: float, size: int) -> int | None:
    """How many of `size` tokens the ratio keeps, if that is a whole number (to the six digits that errors print)."""
    kept = round((1 - ratio) * size)
    return kept if kept >= 1 and abs(1 - kept / size - ratio) < 1e-6 else None


def _unreachable(ratio: float, grid: Sequence[int], reachable: set[float]) -> str:
    below = max((r for r in reachable if r < ratio), default=None)
    above = min((r for r in reachable if r > ratio), default=None)
    neighbours = " and ".join(f"{r:.6g}" for r in (below, above) if r is not None)
    return f"no group of a {_times(grid)} token grid drops a share of {ratio}: the nearest that can be reached: {neighbours}"


def _check_ratio(ratio: float) -> None:
    if not isinstance(ratio, float | int):
        raise TypeError(f"ratio must be a number, the share of tokens dropped, got {type(ratio).__name__}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is the share of tokens dropped, in [0, 1), got {ratio}: 0.75 keeps a quarter")


def _check_grid(grid: Sequence[int], *, name: str = "grid") -> None:
    if not 1 <= len(grid) <= 3 or any(isinstance(side, float) or side < 1 for side in grid):
        raise ValueError(
            f"{name} must be 1 to 3 positive whole sides, (rows, columns) or (frames, rows, columns), got {tuple(grid)}"
        )


def _times(sides: Sequence[int]) -> str:
    return "x".join(str(side) for side in sides)
