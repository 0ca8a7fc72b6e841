"""SparseMiddle: which blocks run on which tokens, and that the mode never decides it."""

import pytest
import torch
from torch import nn

from sprint import RandomDrop, SparseDenseResidual, SparseMiddle, TokenSubset

KEEP = torch.tensor([[5, 0], [2, 3]])


class Mixer(nn.Module):
    """A block that mixes tokens, takes a condition, and a table with one row per token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value, self.seen = nn.Linear(dim, dim), []

    def forward(self, tokens, cond, rope=None):
        self.seen.append((tuple(tokens.shape), None if rope is None else rope.clone()))
        mixed = torch.softmax(tokens @ tokens.transpose(1, 2), dim=-1) @ self.value(tokens) + cond[:, None]
        return tokens + (mixed if rope is None else mixed * rope)


@pytest.fixture
def middle() -> SparseMiddle:
    torch.manual_seed(0)
    return SparseMiddle([Mixer(4) for _ in range(3)], SparseDenseResidual(4, path_drop=0)).double()


@pytest.fixture
def inputs() -> dict:
    torch.manual_seed(1)
    kinds = {"tokens": (2, 6, 4), "cond": (2, 4), "rope": (1, 6, 4)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in kinds.items()}


def plain(middle, tokens, cond, rope, subset):
    """What the middle stands for, written out."""
    deep, table = subset.gather(tokens), subset.gather(rope)
    for block in middle.blocks:
        deep = block(deep, cond, rope=table)
    return middle.fusion(tokens, deep, subset)


def test_sparse_path_equals_the_steps_written_out(middle, inputs):
    subset = TokenSubset.from_keep(KEEP, 6)
    tokens, cond, rope = inputs["tokens"].requires_grad_(), inputs["cond"], inputs["rope"]
    actual, expected = middle(tokens, cond, rope=rope, subset=subset), plain(middle, tokens, cond, rope, subset)
    assert actual.equal(expected)
    assert torch.autograd.grad(actual.sum(), tokens)[0].equal(torch.autograd.grad(expected.sum(), tokens)[0])


@pytest.mark.parametrize(("path", "seen"), [("full", [(2, 6, 4)] * 3), ("sparse", [(2, 2, 4)] * 3), ("shallow", [])])
def test_blocks_see_the_tokens_of_their_path(middle, inputs, path, seen):
    middle(**inputs, path=path, subset=TokenSubset.from_keep(KEEP, 6) if path == "sparse" else None)
    assert [shape for block in middle.blocks for shape, _ in block.seen] == seen


def test_tables_are_gathered_with_the_tokens(middle, inputs):
    middle(**inputs, subset=TokenSubset.from_keep(KEEP, 6))
    ((_, table),) = middle.blocks[0].seen
    assert table.equal(torch.stack([inputs["rope"][0, row] for row in KEEP]))


def test_order_of_kept_tokens_does_not_matter(middle, inputs):
    one = middle(**inputs, subset=TokenSubset.from_keep(KEEP, 6))
    other = middle(**inputs, subset=TokenSubset.from_keep(KEEP.flip(1), 6))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # float64


def test_ratio_zero_is_the_full_path(middle, inputs):
    subset = RandomDrop(0.0).sample(2, (2, 3))
    torch.testing.assert_close(middle(**inputs, subset=subset), middle(**inputs), rtol=1e-12, atol=1e-12)  # float64


def test_shallow_path_ignores_every_middle_weight(middle, inputs):
    before = middle(**inputs, path="shallow")
    for parameter in middle.blocks.parameters():
        nn.init.constant_(parameter, float("nan"))
    assert middle(**inputs, path="shallow").equal(before)
    assert middle(**inputs).isnan().any()


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_decides_nothing_about_tokens(middle, inputs, training):
    middle.train(training)
    subset = TokenSubset.from_keep(KEEP, 6)
    assert middle(**inputs).equal(middle(**inputs, path="full"))
    assert not middle(**inputs).equal(middle(**inputs, subset=subset))
    assert [shape for shape, _ in middle.blocks[0].seen] == [(2, 6, 4)] * 3 + [(2, 2, 4)]


def test_a_route_is_state_for_a_while(middle, inputs):
    subset = TokenSubset.from_keep(KEEP, 6)
    full, sparse, shallow = middle(**inputs), middle(**inputs, subset=subset), middle(**inputs, path="shallow")
    with middle.routed(subset=subset):
        assert middle(**inputs).equal(sparse)
        with middle.routed(path="shallow"):
            assert middle(**inputs).equal(shallow)
            assert middle(**inputs, path="full").equal(full)  # an argument wins over the state
        assert middle(**inputs).equal(sparse)
    assert middle(**inputs).equal(full)


def fail_inside(middle, **route):
    with middle.routed(**route):
        raise KeyError


def test_a_route_ends_with_an_exception(middle, inputs):
    with pytest.raises(KeyError):
        fail_inside(middle, path="shallow")
    middle(**inputs)
    assert len(middle.blocks[0].seen) == 1


def test_stands_in_any_list_of_blocks():
    torch.manual_seed(0)
    middle = SparseMiddle([nn.Linear(8, 8), nn.Linear(8, 8)], SparseDenseResidual(8))
    model = nn.Sequential(nn.Linear(8, 8), middle, nn.Linear(8, 8)).eval()
    tokens, subset = torch.randn(2, 6, 8), TokenSubset.from_keep(KEEP, 6)
    with middle.routed(subset=subset):
        actual = model(tokens)
    encoded = model[0](tokens)
    deep = middle.blocks[1](middle.blocks[0](subset.gather(encoded)))
    assert actual.equal(model[2](middle.fusion(encoded, deep, subset)))


def test_tap_returns_the_tokens_after_that_block(middle, inputs):
    subset = TokenSubset.from_keep(KEEP, 6)
    _, tapped = middle(**inputs, subset=subset, tap=1)
    rope = subset.gather(inputs["rope"])
    assert tapped.equal(middle.blocks[0](subset.gather(inputs["tokens"]), inputs["cond"], rope=rope))


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ({"path": "dense"}, "path of .* must be one of 'full', 'sparse', 'shallow' or None, got the text 'dense'"),
        ({"path": "sparse"}, "path='sparse' needs subset"),
        ({"path": "full", "subset": TokenSubset.from_keep(KEEP, 6)}, "path='full' takes no subset"),
        ({"path": "shallow", "subset": TokenSubset.from_keep(KEEP, 6)}, "path='shallow' takes no subset"),
    ],
)
def test_routes_that_contradict_themselves(middle, inputs, route, message):
    with pytest.raises(ValueError, match=message):
        middle(**inputs, **route)
    with pytest.raises(ValueError, match=message), middle.routed(**route):
        pass


def test_tap_of_a_block_that_does_not_run(middle, inputs):
    with pytest.raises(ValueError, match="no middle block runs"):
        middle(**inputs, path="shallow", tap=1)


def test_grid_of_another_size(middle, inputs):
    with pytest.raises(ValueError, match=r"tokens must have shape \(2, 8, ...\), got \(2, 6, 4\)"):
        middle(**inputs, subset=TokenSubset.from_keep(KEEP, 8))
