"""Groups of the token grid, and how tokens are drawn in each: the same number, or the same share."""

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

Draw = Callable[[tuple[int, ...]], Tensor]  # uniform on [0, 1), of a shape

MAX_GROUP_SIDE = 8  # the largest that is tried


def groups_of(grid: Sequence[int], *, divide: bool = True) -> list[tuple[int, ...]]:
    """Groups that divide the grid, or only fit into it: equal sides first, then the smallest, then the most compact."""
    sides = [[n for n in range(1, MAX_GROUP_SIDE + 1) if (length % n == 0 if divide else n <= length)] for length in grid]
    return sorted(product(*sides), key=lambda group: (len(set(group)), math.prod(group), max(group), group))


def same_in_each(group: tuple[int, ...], kept: int, grid: Sequence[int], *, rows: int, draw: Draw) -> Tensor:
    """`kept` tokens of every group, (rows, K), for groups that divide the grid."""
    num_tokens, size, axes = math.prod(grid), math.prod(group), len(group)
    split = [part for side, n in zip(grid, group, strict=True) for part in (side // n, n)]
    order = (*range(0, 2 * axes, 2), *range(1, 2 * axes, 2))  # which group first, which member of it last
    scores = draw((rows, num_tokens // size, size))
    table = torch.arange(num_tokens, device=scores.device).view(split).permute(order).reshape(-1, size)  # (groups, size)
    chosen = scores.topk(kept, dim=2).indices  # (rows, groups, kept)
    return table.expand(rows, -1, -1).gather(2, chosen).flatten(1)


def same_share_in_each(group: tuple[int, ...], kept: int, grid: Sequence[int], *, rows: int, draw: Draw) -> Tensor:
    """K tokens, (rows, K), each with probability K / N; a group of n tokens keeps n K / N of them, rounded down or up.

    Systematic sampling: all tokens in a line, group after group and shuffled within each, of which every (N / K)-th is taken
    from a random start on. Positions are whole numbers, (u + i N) // K for u in 0 … N − 1, so that none is rounded. The one
    start makes all roundings of a sample depend on one another.
    """
    num_tokens = math.prod(grid)
    shuffled = draw((rows, num_tokens)).argsort(dim=1)
    device = shuffled.device
    place = torch.zeros(tuple(grid), dtype=torch.int64, device=device)
    for axis, (side, n) in enumerate(zip(grid, group, strict=True)):
        along = torch.arange(side, device=device) // n
        place = place * -(-side // n) + along.view(-1, *[1] * (len(grid) - 1 - axis))
    line = shuffled.gather(1, place.flatten()[shuffled].argsort(dim=1, stable=True))
    start = (draw((rows, 1)) * num_tokens).long().clamp(max=num_tokens - 1)
    return line.gather(1, (start + torch.arange(kept, device=device) * num_tokens) // kept)


def times(sides: Sequence[int]) -> str:
    """Sides as errors write them: 16x16."""
    return "x".join(str(side) for side in sides)
