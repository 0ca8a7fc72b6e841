"""Drop samplers: exact counts, uniform marginals, the paper's groups, any grid, own random stream."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint import RandomDrop, StructuredDrop

grids = st.lists(st.integers(1, 8), min_size=2, max_size=3).map(tuple)


@st.composite
def groups_and_grids(draw) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    group = draw(st.lists(st.integers(1, 3), min_size=2, max_size=3).map(tuple))
    cells = [draw(st.integers(1, 3)) for _ in group]
    return group, draw(st.integers(1, math.prod(group))), tuple(n * c for n, c in zip(group, cells, strict=True))


def is_valid(keep: torch.Tensor, num_tokens: int) -> bool:
    """Distinct, ascending, in range."""
    return bool((keep[:, 1:] > keep[:, :-1]).all() and keep.min() >= 0 and keep.max() < num_tokens)


@given(grids, st.data())
@settings(deadline=None)
def test_random_drop_keeps_exactly_k(grid, data):
    num_tokens = math.prod(grid)
    kept = data.draw(st.integers(1, num_tokens))
    subset = RandomDrop(1 - kept / num_tokens).sample(3, grid)
    assert subset.keep.shape == (3, kept)
    assert is_valid(subset.keep, num_tokens)


@given(groups_and_grids())
@settings(deadline=None)
def test_structured_drop_keeps_exactly_k_in_every_group(case):
    group, kept, grid = case
    subset = StructuredDrop(group=group, keep=kept).sample(2, grid)
    assert is_valid(subset.keep, math.prod(grid))
    mask = subset.mask.reshape(2, *grid)
    for axis, n in enumerate(group, start=1):  # sum over each group, axis by axis
        mask = mask.unflatten(axis, (-1, n)).sum(axis + 1)
    assert mask.eq(kept).all()


@given(grids, st.integers(1, 63))
@settings(deadline=None)
def test_a_strict_ratio_is_met_exactly_or_refused_with_its_neighbours(grid, kept_of_64):
    ratio = 1 - kept_of_64 / 64
    try:
        subset = StructuredDrop(ratio, strict=True).sample(1, grid)
    except ValueError as error:
        nearest = [float(word) for word in str(error).split("reached: ")[1].split(" and ")]
        assert min(nearest) < ratio or max(nearest) > ratio
        for neighbour in nearest:  # what the message proposes works as it is printed
            kept = StructuredDrop(neighbour, strict=True).sample(1, grid).num_kept
            assert kept == round((1 - neighbour) * math.prod(grid))
    else:
        assert subset.num_kept == (1 - ratio) * math.prod(grid)


@pytest.mark.parametrize(
    ("ratio", "grid", "expected"),
    [
        (0.75, (16, 16), ((2, 2), 1)),  # the paper's
        (0.5, (16, 16), ((2, 2), 2)),
        (0.25, (16, 16), ((2, 2), 3)),
        (0.625, (16, 16), ((4, 4), 6)),
        (0.875, (16, 16), ((4, 4), 2)),
        (0.75, (32, 32), ((2, 2), 1)),
        (0.75, (4, 8, 8), ((2, 2, 2), 2)),  # video
        (0.75, (1, 8, 8), ((1, 2, 2), 1)),
        (0.75, (4, 6), ((2, 2), 1)),
        (0.75, (15, 8), ((1, 4), 1)),  # an odd side: the group lies along the other
        (0.0, (3, 5), ((1, 1), 1)),
        (0.0, (11, 13), ((1, 1), 1)),
    ],
)
def test_groups_that_a_ratio_chooses(ratio, grid, expected):
    drop = StructuredDrop(ratio)
    assert drop.cells(grid) == expected
    assert drop.sample(1, grid).num_kept == round((1 - ratio) * math.prod(grid))


@pytest.mark.parametrize(
    "drop", [RandomDrop(0.75), StructuredDrop(0.75), StructuredDrop(group=(4, 2), keep=2), StructuredDrop(0.625)]
)
def test_every_token_is_kept_equally_often(drop):
    batch, grid = 20_000, (4, 4)
    subset = drop.sample(batch, grid, generator=torch.Generator().manual_seed(0))
    share = subset.num_kept / 16
    frequency = subset.mask.double().mean(0)
    deviation = math.sqrt(share * (1 - share) / batch)
    assert (frequency - share).abs().max() < 5 * deviation


RAGGED = [
    (StructuredDrop(0.75), (13, 17), (2, 2)),
    (StructuredDrop(0.75), (1, 11), (1, 4)),
    (StructuredDrop(0.75), (3, 5, 7), (2, 2, 2)),
    (StructuredDrop(0.7), (4, 4), (2, 2)),
    (StructuredDrop(0.625), (5, 6), (2, 2)),
    (StructuredDrop(group=(3, 2), keep=2), (4, 5), (3, 2)),
    (StructuredDrop(0.75, multiple_of=8), (6, 10), (2, 2)),
    (StructuredDrop(0.98), (5, 4), (5, 4)),
    (RandomDrop(0.75), (13, 17), None),
    (RandomDrop(0.75, multiple_of=16), (5, 14), None),
]


@pytest.mark.parametrize(("drop", "grid", "group"), RAGGED)
def test_any_grid_keeps_the_nearest_number_and_every_token_equally_often(drop, grid, group):
    batch, num_tokens = 40_000, math.prod(grid)
    subset = drop.sample(batch, grid, generator=torch.Generator().manual_seed(0))
    asked = 1 - drop.ratio if drop.ratio is not None else drop.keep / math.prod(drop.group)
    reachable = range(drop.multiple_of, num_tokens + 1, drop.multiple_of)
    assert subset.num_kept == drop.num_kept(grid) == min(reachable, key=lambda kept: abs(kept - asked * num_tokens))
    assert is_valid(subset.keep, num_tokens)
    share = subset.num_kept / num_tokens
    deviation = math.sqrt(share * (1 - share) / batch)
    assert (subset.mask.double().mean(0) - share).abs().max() < 5 * deviation
    if group is None:
        return
    cells = torch.stack(
        torch.meshgrid(*[torch.arange(side) // n for side, n in zip(grid, group, strict=True)], indexing="ij")
    ).flatten(1)
    in_group = torch.zeros(batch, num_tokens)
    for cell in cells.unique(dim=1).T:  # a group cut off by the border keeps its share, rounded down or up
        inside = (cells == cell.view(-1, 1)).all(0)
        kept = subset.mask[:, inside].sum(1)
        fair = share * int(inside.sum())
        assert kept.min() >= math.floor(fair + 1e-9)
        assert kept.max() <= math.ceil(fair - 1e-9)
        assert kept.double().mean().item() == pytest.approx(fair, abs=0.02)
        in_group[:, inside] = kept.view(-1, 1).float()
    chosen = in_group == 1  # where one is kept, each member of the group is it equally often
    frequency = (subset.mask & chosen).sum(0) / chosen.sum(0)
    for cell in cells.unique(dim=1).T:
        inside = (cells == cell.view(-1, 1)).all(0)
        if chosen[:, inside].any():
            assert (frequency[inside] - 1 / int(inside.sum())).abs().max() < 0.03


def test_every_bucket_of_aspect_ratios_can_be_dropped_from():
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_256_BIN

    grids = [(int(height) // 16, int(width) // 16) for height, width in ASPECT_RATIO_256_BIN.values()]
    grids += [(55, 73), (13, 17)]  # of Flux at 880x1168
    for drop in (StructuredDrop(0.75), RandomDrop(0.75)):
        kept = [drop.sample(1, grid).num_kept / math.prod(grid) for grid in grids]
        assert all(share == pytest.approx(0.25, abs=0.5 / 144) for share in kept)
    aligned = StructuredDrop(0.75, multiple_of=8)
    assert all(aligned.sample(1, grid).num_kept % 8 == 0 for grid in grids)


def test_alignment_gives_way_where_it_would_change_what_was_asked():
    assert RandomDrop(0.0, multiple_of=8).num_kept((13, 17)) == 221  # nothing is dropped
    assert StructuredDrop(0.75, multiple_of=16).num_kept((3, 5)) == 4  # fewer tokens than a multiple
    exact = StructuredDrop(0.75, multiple_of=16)
    generators = (torch.Generator().manual_seed(0) for _ in range(2))
    plain, aligned = (drop.sample(2, (8, 8), generator=next(generators)) for drop in (StructuredDrop(0.75), exact))
    assert plain.keep.equal(aligned.keep)  # 16 of 64 are a multiple already


def test_drops_print_as_they_are_made():
    assert repr(StructuredDrop(0.75)) == "StructuredDrop(0.75)"
    assert repr(RandomDrop(0.5, shared=True, multiple_of=8)) == "RandomDrop(0.5, shared=True, multiple_of=8)"
    assert repr(StructuredDrop(group=(2, 2), keep=1, strict=True)) == "StructuredDrop(group=(2, 2), keep=1, strict=True)"


def test_pairs_are_independent_across_groups_and_exclusive_within():
    mask = StructuredDrop(0.75).sample(20_000, (2, 4), generator=torch.Generator().manual_seed(0)).mask.double()
    together = mask.T @ mask / len(mask)
    assert together[0, 1] == 0  # both in the first group, which keeps one
    assert together[0, 2].item() == pytest.approx(1 / 16, abs=0.01)


@pytest.mark.parametrize("drop", [RandomDrop, StructuredDrop])
def test_per_sample_by_default_and_shared_as_an_option(drop):
    generator = torch.Generator().manual_seed(0)
    own = drop(0.75).sample(8, (8, 8), generator=generator).keep
    shared = drop(0.75, shared=True).sample(8, (8, 8), generator=generator).keep
    assert len(own.unique(dim=0)) == 8
    assert shared.shape == own.shape
    assert len(shared.unique(dim=0)) == 1


@pytest.mark.parametrize("drop", [RandomDrop(0.75), StructuredDrop(0.75)])
def test_a_generator_decides_and_leaves_the_global_stream_alone(drop):
    before = torch.get_rng_state()
    first, second = (drop.sample(2, (8, 8), generator=torch.Generator().manual_seed(3)).keep for _ in range(2))
    assert first.equal(second)
    assert torch.get_rng_state().equal(before)
    assert not drop.sample(2, (8, 8)).keep.equal(drop.sample(2, (8, 8)).keep)


@pytest.mark.parametrize("drop", [RandomDrop(0.75), StructuredDrop(0.75), StructuredDrop(0.75, shared=True)])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_compiles_without_graph_breaks(drop, grid):
    compiled = torch.compile(lambda: drop.sample(3, grid).keep, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        keep = compiled()
        assert keep.shape == (3, 4)
        assert is_valid(keep, math.prod(grid))


@pytest.mark.parametrize("drop", [RandomDrop, StructuredDrop])
@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_out_of_range(drop, ratio):
    with pytest.raises(ValueError, match=r"in \[0, 1\), got .*: 0.75 keeps a quarter|ratio of .* must be a number.*got nan"):
        drop(ratio)


@pytest.mark.parametrize("drop", [RandomDrop, StructuredDrop])
def test_ratio_of_another_type(drop):
    with pytest.raises(TypeError, match="ratio of .* must be a number.*got the text '0.75'"):
        drop("0.75")


def test_unreachable_ratios_name_their_neighbours():
    with pytest.raises(ValueError, match=r"share of 0.7: the nearest that can be reached: 0.6875 and 0.75"):
        StructuredDrop(0.7, strict=True).sample(1, (4, 4))
    with pytest.raises(ValueError, match=r"share of 0.75: the nearest that can be reached: 0.742857 and 0.771429"):
        RandomDrop(0.75, strict=True).sample(1, (5, 7))
    with pytest.raises(ValueError, match=r"share of 0.75: the nearest that can be reached: 0.666667 and 0.777778"):
        StructuredDrop(0.75).cells((9, 9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (StructuredDrop, "give either a ratio"),
        (lambda: StructuredDrop(0.75, group=(2, 2), keep=1), "give either a ratio"),
        (lambda: StructuredDrop(group=(2, 2)), "give either a ratio"),
        (lambda: StructuredDrop(0.5, keep=2), "give either a ratio"),
        (lambda: StructuredDrop(group=(2, 2), keep=5), "keep must be 1 to 4 for a group of 2x2, got 5"),
        (lambda: StructuredDrop(group=(2, 0), keep=1), r"group must be 1 to 3 positive whole sides.*got \(2, 0\)"),
        (lambda: StructuredDrop(group=(2, 2), keep=1, strict=True).sample(1, (4, 5)), "4x5 tokens is not divisible .* 2x2"),
        (
            lambda: StructuredDrop(group=(2, 2), keep=1).sample(1, (2, 4, 4)),
            "2x4x4 .* of 2x2: give one side per axis",
        ),
        (lambda: StructuredDrop(0.75, multiple_of=8).cells((10, 10)), "are 25 tokens, no multiple of 8: leave multiple_of"),
        (lambda: StructuredDrop(0.75, multiple_of=8, strict=True).num_kept((10, 10)), "are 25 tokens, no multiple of 8"),
        (lambda: RandomDrop(0.75, multiple_of=8, strict=True).num_kept((10, 10)), "reached: 0.68 and 0.76"),
        (lambda: StructuredDrop(0.75, multiple_of=0), "multiple_of must be at least 1.*got 0"),
        (lambda: StructuredDrop(0.75).sample(1, ()), r"grid must be 1 to 3 positive whole sides.*got \(\)"),
        (lambda: RandomDrop(0.75).sample(1, (0, 4)), r"grid must be 1 to 3 positive whole sides.*got \(0, 4\)"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
