"""Drop samplers: which tokens the middle blocks see.

A drop sampler keeps `K = (1 - r) N` of the `N` tokens of each sample (SPRINT, arXiv 2510.21986, drop samplers).
`RandomDrop` draws the K positions uniformly; `StructuredDrop` cuts the token grid into groups and draws the same number
in each, so that every neighbourhood stays represented (FID 27.5 against 30.1 in the paper's B/2 ablation).

Any grid can be dropped from: K is the nearest number of tokens, and `strict=True` refuses where it is not exact. All shapes
follow from the grid and the ratio alone: drawing never waits for the device and compiles without graph breaks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from sprint.arguments import called, checked
from sprint.middle.groups import groups_of, same_in_each, same_share_in_each, times
from sprint.middle.tokens import TokenSubset
from sprint.random import Device, uniform


@called("a drop sampler such as StructuredDrop(0.75)")
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
            ValueError: the grid is none, or this sampler cannot drop its share on it.
        """
        ...


@checked
@dataclass(frozen=True, repr=False)
class RandomDrop:
    """Keep `(1 - ratio) N` positions, uniformly without replacement (SPRINT, drop sampler "random").

    Args:
        ratio: share of tokens dropped, in [0, 1).
        shared: one draw for the whole batch instead of one per sample.
        multiple_of: keep a multiple of it, such as 8 or 16, for aligned matrix products.
        strict: raise where K is not exactly `(1 - ratio) N`, instead of keeping the nearest number.

    Examples:
        >>> drop = RandomDrop(0.75)
        >>> drop.sample(2, (4, 4), generator=torch.Generator().manual_seed(0)).keep
        tensor([[ 1,  5,  7,  9],
                [ 5,  7, 10, 15]])
        >>> drop.num_kept((13, 17)), RandomDrop(0.75, multiple_of=8).num_kept((13, 17))  # of 221
        (55, 56)
    """

    ratio: float
    shared: bool = False
    multiple_of: int = 1
    strict: bool = False

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        _check_multiple(self.multiple_of)

    def __repr__(self) -> str:
        return _written(self)

    def num_kept(self, grid: Sequence[int]) -> int:
        """K, how many tokens of each sample are kept on this grid.

        Raises:
            ValueError: with `strict`, the ratio leaves no whole number of tokens, or no multiple of `multiple_of`.
        """
        _check_grid(grid)
        num_tokens = math.prod(grid)
        kept = _nearest(1 - self.ratio, num_tokens, self.multiple_of)
        if self.strict and kept != _kept(self.ratio, num_tokens):
            reachable = {1 - k / num_tokens for k in range(1, num_tokens + 1) if k % self.multiple_of == 0}
            raise ValueError(_unreachable(self.ratio, grid, reachable))
        return kept

    def sample(
        self,
        batch: int,
        grid: Sequence[int],
        *,
        device: Device = None,
        generator: torch.Generator | None = None,
    ) -> TokenSubset:
        """Draw K tokens, as [`Drop.sample`][sprint.Drop.sample]; of the grid only its product matters.

        Raises:
            ValueError: as `num_kept`.
        """
        kept, num_tokens = self.num_kept(grid), math.prod(grid)
        scores = uniform((1 if self.shared else batch, num_tokens), device=device, generator=generator)
        keep = scores.topk(kept, dim=1).indices.sort(dim=1).values  # (B, K)
        return TokenSubset(keep.expand(batch, kept), num_tokens)


@checked
@dataclass(frozen=True, init=False, repr=False)
class StructuredDrop:
    """Keep as many tokens in every group of the grid (SPRINT, "structured with random offset").

    Either give a ratio, and the smallest fitting group is chosen on each grid (equal sides first, as in the paper:
    0.75 is 1 of 2x2, 0.5 is 2 of 2x2, 0.625 is 6 of 4x4, 0.875 is 2 of 4x4, and for video 0.75 is 2 of 2x2x2),
    or the group and the number of tokens kept in it.

    On a grid where nothing fits (13x17, a share of 0.7), K is the nearest number, and a group, whole or cut off by the
    border, keeps its share rounded down or up at random: every token is kept with probability K / N exactly.

    Args:
        ratio: share of tokens dropped, in [0, 1).
        group: sides of a group, one per axis of the grid.
        keep: tokens kept per group, 1 to the group's size.
        shared: one draw for the whole batch instead of one per sample.
        multiple_of: keep a multiple of it, such as 8 or 16, for aligned matrix products.
        strict: raise where not every group keeps the same number of tokens.

    Examples:
        >>> drop = StructuredDrop(0.75)
        >>> drop.sample(2, (4, 4), generator=torch.Generator().manual_seed(0)).keep
        tensor([[ 1,  7,  9, 15],
                [ 1,  3, 12, 15]])
        >>> drop == StructuredDrop(0.75), StructuredDrop(group=(2, 2), keep=1).cells((4, 4))
        (True, ((2, 2), 1))
        >>> drop.num_kept((13, 17)), StructuredDrop(0.75, multiple_of=8).num_kept((13, 17))  # of 221
        (55, 56)
    """

    ratio: float | None
    group: tuple[int, ...] | None
    keep: int | None
    shared: bool
    multiple_of: int
    strict: bool

    def __init__(
        self,
        ratio: float | None = None,
        *,
        group: Sequence[int] | None = None,
        keep: int | None = None,
        shared: bool = False,
        multiple_of: int = 1,
        strict: bool = False,
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
                raise ValueError(f"keep must be 1 to {math.prod(group)} for a group of {times(group)}, got {keep}")
        _check_multiple(multiple_of)
        # Frozen: fields are set once, here, because the shape of the arguments is checked before they are stored.
        for name, value in (
            ("ratio", ratio),
            ("group", tuple(group) if group else None),
            ("keep", keep),
            ("shared", shared),
            ("multiple_of", multiple_of),
            ("strict", strict),
        ):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return _written(self)

    def cells(self, grid: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """The group and the number of tokens kept in each, on a grid where all keep as many.

        Raises:
            ValueError: the grid is not divisible by the group, or no group reaches the ratio (its neighbours are named).
        """
        self._check_axes(grid)
        found = self._cells(grid)
        if found is None and self.group is not None:
            raise ValueError(
                f"a grid of {times(grid)} tokens is not divisible into groups of {times(self.group)}: "
                "choose a group whose sides divide the grid's, or give a ratio"
            )
        if found is None:
            sizes = {math.prod(group) for group in groups_of(grid)}
            reachable = {1 - k / size for size in sizes for k in range(1, size + 1)}
            raise ValueError(_unreachable(1 - self._share, grid, reachable))
        group, kept = found
        if (total := math.prod(grid) // math.prod(group) * kept) % self.multiple_of:
            raise ValueError(
                f"{kept} of {times(group)} on a grid of {times(grid)} are {total} tokens, no multiple of "
                f"{self.multiple_of}: leave multiple_of out"
            )
        return group, kept

    def num_kept(self, grid: Sequence[int]) -> int:
        """K, how many tokens of each sample are kept on this grid.

        Raises:
            ValueError: as `cells`, with `strict`; or the group has not one side per axis of the grid.
        """
        self._check_axes(grid)
        if self.strict:
            self.cells(grid)
        return _nearest(self._share, math.prod(grid), self.multiple_of)

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
            ValueError: as `num_kept`.
        """
        kept, num_tokens = self.num_kept(grid), math.prod(grid)
        found, rows = self._cells(grid), 1 if self.shared else batch
        draw = partial(uniform, device=device, generator=generator)
        if found is not None and num_tokens // math.prod(found[0]) * found[1] == kept:
            keep = same_in_each(*found, grid, rows=rows, draw=draw)
        else:
            keep = same_share_in_each(self._ragged(grid), kept, grid, rows=rows, draw=draw)
        return TokenSubset(keep.sort(dim=1).values.expand(batch, -1), num_tokens)

    @property
    def _share(self) -> float:
        """The share that is kept."""
        if self.group is not None and self.keep is not None:
            return self.keep / math.prod(self.group)
        assert self.ratio is not None
        return 1 - self.ratio

    def _cells(self, grid: Sequence[int]) -> tuple[tuple[int, ...], int] | None:
        """The group that divides the grid and keeps a whole number, and that number."""
        if self.group is not None and self.keep is not None:
            divides = not any(side % n for side, n in zip(grid, self.group, strict=True))
            return (self.group, self.keep) if divides else None
        assert self.ratio is not None
        for group in groups_of(grid):
            kept = _kept(self.ratio, math.prod(group))
            if kept is not None:
                return group, kept
        return None

    def _ragged(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The group for a grid that it does not divide: the smallest that keeps a token on average."""
        if self.group is not None:
            return self.group
        groups = groups_of(grid, divide=False)
        return next((group for group in groups if math.prod(group) * self._share > 1 - 1e-6), groups[-1])

    def _check_axes(self, grid: Sequence[int]) -> None:
        _check_grid(grid)
        if self.group is not None and len(self.group) != len(grid):
            raise ValueError(
                f"a grid of {times(grid)} tokens is not divisible into groups of {times(self.group)}: give one side per axis"
            )


def _kept(ratio: float, size: int) -> int | None:
    """How many of `size` tokens the ratio keeps, if that is a whole number (to the six digits that errors print)."""
    kept = round((1 - ratio) * size)
    return kept if kept >= 1 and abs(1 - kept / size - ratio) < 1e-6 else None


def _nearest(share: float, num_tokens: int, multiple_of: int) -> int:
    """How many tokens come nearest to this share, at least one; all of them if nothing is dropped, or they are too few for a
    multiple."""
    if share == 1 or num_tokens < multiple_of:
        multiple_of = 1
    return min(max(round(share * num_tokens / multiple_of), 1), num_tokens // multiple_of) * multiple_of


def _unreachable(ratio: float, grid: Sequence[int], reachable: set[float]) -> str:
    below = max((r for r in reachable if r < ratio), default=None)
    above = min((r for r in reachable if r > ratio), default=None)
    neighbours = " and ".join(f"{r:.6g}" for r in (below, above) if r is not None)
    return f"no group of a {times(grid)} token grid drops a share of {ratio}: the nearest that can be reached: {neighbours}"


def _written(drop: "RandomDrop | StructuredDrop") -> str:
    """As it is made: StructuredDrop(0.75, shared=True)."""
    usual = {"shared": False, "multiple_of": 1, "strict": False, "ratio": None, "group": None, "keep": None}
    options = [f"{name}={value!r}" for name, value in vars(drop).items() if value != usual[name]]
    return f"{type(drop).__name__}({', '.join(options).removeprefix('ratio=')})"


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is the share of tokens dropped, in [0, 1), got {ratio}: 0.75 keeps a quarter")


def _check_multiple(multiple_of: int) -> None:
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, 8 or 16 for aligned products, got {multiple_of!r}")


def _check_grid(grid: Sequence[int], *, name: str = "grid") -> None:
    if not 1 <= len(grid) <= 3 or any(isinstance(side, float) or side < 1 for side in grid):
        raise ValueError(
            f"{name} must be 1 to 3 positive whole sides, (rows, columns) or (frames, rows, columns), got {tuple(grid)}"
        )
