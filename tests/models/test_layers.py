"""Layers against their written-out twins, and the attention back ends."""

import sys
import types

import pytest
import reference
import torch
import torch.nn.functional as F
from models import TINY

from sprint import SiT, SiTConfig
from sprint.models.layers import Block, LabelEmbedder, PatchEmbedder, RMSNorm, VectorEmbedder, attention, axial_rope, rotate

CONFIG = SiTConfig(**TINY)


def test_rotary_positions_equal_the_loops():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    actual = rotate(x, axial_rope((3, 4), 8))
    torch.testing.assert_close(actual, reference.rope(x, 4), rtol=0, atol=1e-6)  # float32 angles


def test_attention_depends_on_relative_positions_only():
    """Rows and columns shifted together leave the products of queries and keys as they are."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 2, 8, dtype=torch.float64)
    table = axial_rope((8, 8), 8).double()
    at = lambda a, b: rotate(torch.cat([q[..., :1, :], k[..., :1, :]], 2), table[:, [a, b]])  # noqa: E731
    near, shifted, other = at(9, 20), at(9 + 17, 20 + 17), at(9, 21)
    product = lambda pair: (pair[0, 0, 0] * pair[0, 0, 1]).sum()  # noqa: E731
    torch.testing.assert_close(product(near), product(shifted), rtol=1e-5, atol=1e-5)  # float32 angles
    assert (product(near) - product(other)).abs() > 1e-3


def test_block_equals_the_plain_formulas_in_outputs_and_gradients():
    torch.manual_seed(0)
    block = Block(16, 2).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, cond = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 6, 16), (2, 16)))
    actual = block(tokens, cond, axial_rope((2, 3), 8))
    weights = {f"b.{name}": parameter for name, parameter in block.named_parameters()}
    table = reference.positions(2, 3, 8).expand(2, -1, -1)
    expected = reference.block(weights, "b", tokens, cond, heads=2, table=table)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # float32 angles
    inputs, direction = (tokens, cond, *block.parameters()), torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        rtol=1e-4,
        atol=1e-4,
    )


def test_block_starts_as_the_identity():
    model = SiT(CONFIG)
    tokens = torch.randn(2, 4, 16)
    assert model.encoder[0](tokens, torch.randn(2, 16), axial_rope((2, 2), 8)).equal(tokens)


def test_rms_norm_computes_in_float32_and_keeps_the_dtype():
    norm = RMSNorm(64)
    torch.nn.init.normal_(norm.weight)
    x = 300 * torch.randn(2, 64)
    expected = reference.rms_norm(x.half().double(), norm.weight.double())
    actual = norm(x.half())  # the square of 300 overflows float16
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-3)  # float16


def test_patches_are_ordered_channel_row_column():
    embed = PatchEmbedder(2, 3, 12)
    with torch.no_grad():
        embed.proj.weight.copy_(torch.eye(12))
        embed.proj.bias.zero_()
    x = torch.arange(3 * 4 * 6.0).reshape(1, 3, 4, 6)
    tokens = embed(x)
    assert tokens.shape == (1, 6, 12)
    assert tokens[0, 4].equal(x[0, :, 2:4, 2:4].flatten())  # second row, second column


def test_label_drop_is_drawn_in_training_with_its_probability():
    embed = LabelEmbedder(10, 4, label_drop=0.2)
    y = torch.zeros(20_000, dtype=torch.int64)
    null = embed.embedding_table.weight[10]
    share = (embed(y, generator=torch.Generator().manual_seed(0)) == null).all(-1).double().mean().item()
    assert share == pytest.approx(0.2, abs=0.015)  # 5 standard deviations
    assert not (embed.eval()(y) == null).all(-1).any()
    assert embed(embed.null(2)).equal(null.expand(2, -1))


def test_vector_condition_is_dropped_to_the_learned_null_vector():
    embed = VectorEmbedder(3, 4, label_drop=0.2)
    y = torch.randn(20_000, 3)
    null = embed.eval()(embed.null(1))
    kept = embed(y)
    drawn = embed.train()(y, generator=torch.Generator().manual_seed(0))
    dropped = torch.isclose(drawn, null).all(-1)
    assert dropped.double().mean().item() == pytest.approx(0.2, abs=0.015)
    torch.testing.assert_close(drawn[~dropped], kept[~dropped])


def test_xformers_gets_its_own_layout(monkeypatch):
    """xformers wants (B, N, heads, D); a stand-in that checks it stands where the package would."""
    calls = []

    def memory_efficient_attention(q, k, v):
        calls.append(tuple(q.shape))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    package = types.ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    torch.testing.assert_close(attention(q, k, v, backend="xformers"), attention(q, k, v))
    assert calls == [(2, 5, 4, 8)]

    model, arguments = SiT(CONFIG).eval(), (torch.randn(1, 4, 4, 4), torch.rand(1), torch.tensor([1]))
    expected = model(*arguments)
    torch.testing.assert_close(model.set_attention("xformers")(*arguments), expected)
    assert len(calls) == 5  # each of the four blocks went through it


def test_attention_back_ends_that_are_not_there(monkeypatch):
    model = SiT(CONFIG)
    with pytest.raises(
        ValueError, match="backend of SiT.set_attention must be one of 'sdpa', 'xformers', got the text 'flash'"
    ):
        model.set_attention("flash")
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ImportError, match=r"pip install 'sprint-diffusion\[xformers\]', or use 'sdpa'"):
        model.set_attention("xformers")
    assert model.encoder[0].attn.backend == "sdpa"
