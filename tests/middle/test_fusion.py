"""SparseDenseResidual: the plain form's outputs and gradients without its memory, path-drop, ablations, initialisation."""

import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sprint import SparseDenseResidual, StructuredDrop, TokenSubset


def problem(dim: int = 6, **options):
    torch.manual_seed(0)
    fusion = SparseDenseResidual(dim, learnable_mask=True, **options).double()
    torch.nn.init.normal_(fusion.proj.bias)
    subset = StructuredDrop(0.75).sample(3, (4, 4))
    shallow = torch.randn(3, 16, dim, dtype=torch.float64, requires_grad=True)
    deep = torch.randn(3, 4, dim, dtype=torch.float64, requires_grad=True)
    return fusion, shallow, deep, subset


def test_equals_the_plain_form_in_outputs_and_gradients():
    fusion, shallow, deep, subset = problem()
    weights = (fusion.proj.weight, fusion.proj.bias, fusion.mask_token)
    expected = reference.fuse(*weights, shallow, deep=deep, keep=subset.keep)
    actual = fusion(shallow, deep, subset, dropped=torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)  # float64
    direction = torch.randn_like(expected)
    inputs = (*weights, shallow, deep)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        rtol=1e-12,
        atol=1e-12,
    )


def test_all_tokens_and_the_shallow_path_equal_the_plain_form():
    fusion, shallow, _, _ = problem()
    weights = (fusion.proj.weight, fusion.proj.bias, fusion.mask_token)
    every = torch.arange(16).repeat(3, 1)
    deep = torch.randn_like(shallow)
    fusion.eval()
    torch.testing.assert_close(fusion(shallow, deep), reference.fuse(*weights, shallow, deep=deep, keep=every))
    masks = fusion.mask_token.expand_as(shallow)
    torch.testing.assert_close(fusion(shallow), reference.fuse(*weights, shallow, deep=masks, keep=every))


@pytest.mark.parametrize(("sources", "half"), [("deep", slice(0, 6)), ("shallow", slice(6, 12))])
def test_ablations_are_halves_of_the_plain_form(sources, half):
    fusion, shallow, deep, subset = problem(sources=sources)
    weight = torch.zeros(6, 12, dtype=torch.float64)
    weight[:, half] = fusion.proj.weight
    expected = reference.fuse(weight, fusion.proj.bias, fusion.mask_token, shallow, deep=deep, keep=subset.keep)
    torch.testing.assert_close(fusion.eval()(shallow, deep, subset), expected)


def test_a_fill_of_shallow_tokens_equals_the_plain_form():
    """`W [g_pad ; f] + b` with f, not the mask token, wherever g is not: outputs and gradients."""
    torch.manual_seed(0)
    fusion = SparseDenseResidual(6, fill="shallow").double()
    _, shallow, deep, subset = problem()
    weight, bias = fusion.proj.weight, fusion.proj.bias
    dropped = torch.tensor([False, True, False])

    def plain(deep, keep):
        padded = shallow if deep is None else shallow.scatter(1, keep[..., None].expand_as(deep), deep)
        padded = torch.where(dropped.view(-1, 1, 1), shallow, padded)
        return torch.cat([padded, shallow], dim=-1) @ weight.T + bias

    direction = torch.randn_like(shallow)
    for arguments in ((deep, subset.keep), (None, None)):
        expected = plain(*arguments)
        actual = fusion(shallow) if arguments[0] is None else fusion(shallow, deep, subset, dropped=dropped)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        inputs = [weight, bias, shallow] + ([deep] if arguments[0] is not None else [])
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, direction), torch.autograd.grad(expected, inputs, direction),
            rtol=1e-12, atol=1e-12,
        )  # fmt: skip
    every = torch.randn_like(shallow)
    whole = fusion.eval()(shallow, every)
    torch.testing.assert_close(whole, torch.cat([every, shallow], dim=-1) @ weight.T + bias, rtol=1e-12, atol=1e-12)
    identity = SparseDenseResidual(6, init="identity", fill="shallow").eval()
    f, g = torch.randn(2, 2, 16, 6)
    assert identity(f, g).equal(g)
    assert identity(f).equal(f)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_never_builds_the_padded_tensor_forward_or_backward():
    fusion, shallow, deep, subset = problem()
    with LargestTensor() as largest:
        fusion(shallow, deep, subset).sum().backward()
    assert largest.numel == shallow.numel()  # (B, N, C), never (B, N, 2C)
    with LargestTensor() as largest:
        reference.fuse(fusion.proj.weight, fusion.proj.bias, fusion.mask_token, shallow, deep=deep, keep=subset.keep)
    assert largest.numel == 2 * shallow.numel()  # the probe sees it where it is built


def test_path_drop_hides_the_deep_tokens_of_the_dropped_samples_only():
    fusion, shallow, deep, subset = problem()
    dropped = torch.tensor([True, False, True])
    fused = fusion(shallow, deep, subset, dropped=dropped)
    torch.testing.assert_close(fused[dropped], fusion(shallow)[dropped])
    torch.testing.assert_close(fused[~dropped], fusion.eval()(shallow, deep, subset)[~dropped])
    (gradient,) = torch.autograd.grad(fused.sum(), deep)
    assert gradient[dropped].count_nonzero() == 0
    assert gradient[~dropped].count_nonzero() > 0


def test_path_drop_is_drawn_in_training_with_its_probability():
    fusion = SparseDenseResidual(2, path_drop=0.3)
    shallow, deep = torch.zeros(20_000, 1, 2), torch.ones(20_000, 1, 2)
    fused = fusion(shallow, deep, generator=torch.Generator().manual_seed(0))
    share = (fused == fusion(shallow)).all(-1).double().mean().item()
    assert share == pytest.approx(0.3, abs=0.016)  # 5 standard deviations
    again = fusion(shallow, deep, generator=torch.Generator().manual_seed(0))
    assert again.equal(fused)
    whole = fusion.eval()(shallow, deep)
    assert not (whole == fusion(shallow)).any()


@pytest.mark.parametrize("path_drop", [0.0, 1.0])
def test_path_drop_at_its_ends(path_drop):
    fusion, shallow, deep, subset = problem(path_drop=path_drop)
    expected = fusion(shallow) if path_drop else fusion.eval()(shallow, deep, subset)
    torch.testing.assert_close(fusion.train()(shallow, deep, subset), expected)


def test_identity_initialisation_returns_the_deep_tokens_bit_by_bit():
    fusion = SparseDenseResidual(6, init="identity").eval()
    shallow, deep = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    assert fusion(shallow, deep).equal(deep)


def test_identity_and_dtype_hold_under_autocast():
    fusion = SparseDenseResidual(6, init="identity", path_drop=0.5)
    tokens = torch.randn(2, 3, 6)
    for dtype in (torch.float32, torch.bfloat16):
        shallow, deep = tokens.to(dtype), tokens.flip(0).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fusion.eval()(shallow, deep).equal(deep)
            assert {fusion.train()(shallow, *rest).dtype for rest in ((), (deep,))} == {dtype}


def test_both_forms_of_the_projection_are_one_map():
    fusion, shallow, deep, subset = problem(init="identity")
    torch.nn.init.normal_(fusion.proj.weight)
    weights = (fusion.proj.weight, fusion.proj.bias, fusion.mask_token)
    expected = reference.fuse(*weights, shallow, deep=deep, keep=subset.keep)
    actual = fusion.eval()(shallow, deep, subset)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)  # float64
    inputs = (*weights, shallow, deep)
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        rtol=1e-10,
        atol=1e-10,
    )


def test_mask_token_is_frozen_unless_asked():
    assert not SparseDenseResidual(512).mask_token.requires_grad
    assert SparseDenseResidual(512, learnable_mask=True).mask_token.requires_grad
    assert SparseDenseResidual(4096).mask_token.std().item() == pytest.approx(0.02, rel=0.1)


def test_state_dict_is_the_plain_form():
    shapes = {name: tuple(tensor.shape) for name, tensor in SparseDenseResidual(6).state_dict().items()}
    assert shapes == {"proj.weight": (6, 12), "proj.bias": (6,), "mask_token": (1, 1, 6)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path_drop": 1.1}, r"probability in \[0, 1\], got 1.1"),
        (
            {"sources": "dense"},
            "sources of SparseDenseResidual must be one of 'both', 'deep', 'shallow', got the text 'dense'",
        ),
        ({"init": "zeros"}, "init of .* must be one of 'xavier', 'identity', got the text 'zeros'"),
        ({"init": "identity", "sources": "shallow"}, "use init='xavier'"),
        ({"fill": "zeros"}, "fill of .* must be one of 'mask', 'shallow', got the text 'zeros'"),
        ({"fill": "shallow", "learnable_mask": True}, "instead of the mask token, and learnable_mask would train no token"),
        ({"fill": "shallow", "sources": "shallow"}, "and sources='shallow' has no deep half: leave it out"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SparseDenseResidual(6, **options)


def test_tokens_that_do_not_fit():
    fusion, shallow, deep, subset = problem()
    with pytest.raises(ValueError, match=r"shallow tokens must be \(B, N, 6\), got \(3, 16, 5\)"):
        fusion(shallow[..., :5], deep, subset)
    with pytest.raises(ValueError, match=r"deep tokens must be \(B, K, 6\), got \(3, 4, 5\)"):
        fusion(shallow, deep[..., :5], subset)
    with pytest.raises(TypeError, match="tokens are torch.float32, the fusion torch.float64: convert"):
        fusion(shallow.float(), deep, subset)
    with pytest.raises(ValueError, match="tokens are on cpu, the fusion on meta: move it"):
        SparseDenseResidual(6).to("meta")(torch.randn(1, 2, 6))
    with pytest.raises(ValueError, match="pass the subset that they were gathered with"):
        fusion(shallow, deep)
    with pytest.raises(ValueError, match=r"sparse must have shape \(3, 4, ...\), got \(3, 5, 6\)"):
        fusion(shallow, shallow[:, :5], subset)
    with pytest.raises(ValueError, match="drawn from 20 tokens, there are 16"):
        fusion(shallow, deep, TokenSubset(subset.keep, 20))


@pytest.mark.parametrize(("fill", "other"), [("mask", "shallow"), ("shallow", "mask")])
def test_weights_of_another_fill_do_not_load(fill, other):
    state = SparseDenseResidual(6, fill=fill).state_dict()
    SparseDenseResidual(6, fill=fill).load_state_dict(state)
    with pytest.raises(RuntimeError, match="mask_token"):
        SparseDenseResidual(6, fill=other).load_state_dict(state)
