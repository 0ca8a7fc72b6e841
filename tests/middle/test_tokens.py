"""TokenSubset: gather and restore undo each other, carry gradients, and refuse what does not fit."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint import TokenSubset


@st.composite
def subsets(draw) -> TokenSubset:
    batch, num_tokens = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    kept = draw(st.integers(1, num_tokens))
    rows = [draw(st.permutations(range(num_tokens)))[:kept] for _ in range(batch)]
    return TokenSubset.from_keep(torch.tensor(rows), num_tokens)


@given(subsets(), st.integers(0, 2**31))
@settings(deadline=None)
def test_gather_and_restore_equal_the_loops_and_undo_each_other(subset, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(subset.keep), subset.num_tokens, 3, generator=generator)
    sparse = subset.gather(tokens)
    assert sparse.equal(reference.gather(tokens, subset.keep))
    fill = torch.randn(1, 1, 3, generator=generator)
    restored = subset.restore(sparse, fill)
    assert restored.equal(reference.restore(sparse, subset.keep, fill.flatten(), subset.num_tokens))
    assert subset.gather(restored).equal(sparse)  # restore after gather is the identity on kept tokens
    assert restored[~subset.mask].equal(fill.expand_as(tokens)[~subset.mask])
    assert subset.mask.sum(1).eq(subset.num_kept).all()


def test_gradients_equal_those_of_the_loops():
    torch.manual_seed(0)
    subset = TokenSubset.from_keep(torch.tensor([[2, 0], [3, 1]]), 4)
    gradients = []
    for pair in (
        (subset.gather, subset.restore),
        (
            lambda tokens: reference.gather(tokens, subset.keep),
            lambda sparse, fill: reference.restore(sparse, subset.keep, fill.flatten(), 4),
        ),
    ):
        tokens = torch.arange(24.0).reshape(2, 4, 3).requires_grad_()
        fill = torch.ones(1, 1, 3, requires_grad=True)
        restored = pair[1](pair[0](tokens).sin(), fill)
        (restored * torch.arange(24.0).reshape(2, 4, 3).cos()).sum().backward()
        gradients.append((tokens.grad, fill.grad))
    torch.testing.assert_close(gradients[0], gradients[1])  # float32
    assert gradients[0][0][~subset.mask].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 4, 3, 5), (1, 4, 3)])
def test_any_trailing_shape_and_a_table_shared_by_the_batch(shape):
    subset = TokenSubset.from_keep(torch.tensor([[2, 0], [3, 1]]), 4)
    tokens = torch.randn(shape)
    assert subset.gather(tokens).equal(reference.gather(tokens.expand(2, *shape[1:]), subset.keep))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.complex64])
def test_dtypes_are_kept(dtype):
    subset = TokenSubset.from_keep(torch.tensor([[1]]), 2)
    sparse = subset.gather(torch.ones(1, 2, 3, dtype=dtype))
    assert subset.restore(sparse, torch.zeros(1, 1, 3)).dtype == dtype


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ([[0, 1]], TypeError, r"keep of TokenSubset.from_keep must be a tensor, got \[\[0, 1\]\]"),
        (torch.tensor([0, 1]), ValueError, r"shape \(B, K\), got \(2,\)"),
        (torch.tensor([[0, 1]], dtype=torch.int32), TypeError, "must be int64, got torch.int32"),
        (torch.tensor([[0, 4]]), ValueError, "indices from 0 to 4, expected 0 to 3"),
        (torch.tensor([[-1, 2]]), ValueError, "indices from -1 to 2, expected 0 to 3"),
        (torch.tensor([[0, 1], [2, 2]]), ValueError, "repeats an index in row 1"),
        (torch.empty(1, 0, dtype=torch.int64), ValueError, "1 to 4 .* got 0"),
        (torch.tensor([[0, 1, 2, 3, 0]]), ValueError, "1 to 4 .* got 5"),
    ],
)
def test_bad_indices(keep, error, message):
    with pytest.raises(error, match=message):
        TokenSubset.from_keep(keep, 4)


def test_tokens_that_do_not_fit():
    subset = TokenSubset.from_keep(torch.tensor([[2, 0], [3, 1]]), 4)
    with pytest.raises(ValueError, match=r"tokens must have shape \(2, 4, ...\), got \(2, 5, 3\)"):
        subset.gather(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"got \(3, 4, 3\).* for 2 samples"):
        subset.gather(torch.zeros(3, 4, 3))
    with pytest.raises(ValueError, match=r"sparse must have shape \(2, 2, ...\), got \(1, 2, 3\)"):
        subset.restore(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="tokens is on meta, the subset on cpu"):
        subset.gather(torch.zeros(2, 4, 3, device="meta"))


def test_compiles_without_graph_breaks():
    subset = TokenSubset.from_keep(torch.tensor([[2, 0], [3, 1]]), 4)

    def there_and_back(tokens, keep):
        subset = TokenSubset(keep, 4)
        return subset.restore(subset.gather(tokens) * 2, torch.zeros(1, 1, 3)), subset.mask

    tokens = torch.randn(2, 4, 3)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, subset.keep), there_and_back(tokens, subset.keep))
