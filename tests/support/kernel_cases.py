"""Inputs of the fused operations, and what an operation gives for them: outputs and gradients."""

import torch

from sprint.kernels import fused
from sprint.models.layers import axial_rope

TWINS = {
    fused.modulate: fused.plain_modulate,
    fused.gate_and_modulate: fused.plain_gate_and_modulate,
    fused.norm_and_rotate: fused.plain_norm_and_rotate,
}


def _draw(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def modulation(batch, tokens, dim, *, dtype, gated, device="cpu", residual=None):
    """x, branch, gate, shift, scale (or without branch and gate), the last three chunks of one tensor, as in a block."""
    x, branch = (_draw(batch, tokens, dim, dtype=d, seed=s).to(device) for s, d in ((1, residual or dtype), (2, dtype)))
    gate, shift, scale = _draw(batch, 3 * dim, dtype=dtype, seed=3).to(device).chunk(3, dim=-1)
    return (x, branch, gate, shift, scale) if gated else (x, shift, scale)


def rotation(batch, grid, heads, head_dim, *, dtype, device="cpu", per_sample=False, weight=None):
    """qkv, the weights of both norms, and a table: one for all samples, or of other kept tokens in each."""
    tokens = grid[0] * grid[1]
    rope = axial_rope(grid, head_dim)
    if per_sample:
        tokens = tokens // 2 + 1
        orders = [torch.randperm(rope.shape[1], generator=torch.Generator().manual_seed(b))[:tokens] for b in range(batch)]
        rope = rope[0, torch.stack(orders)]
    qkv = _draw(batch, tokens, 3 * heads * head_dim, dtype=dtype, seed=4)
    weights = (1 + 0.3 * _draw(head_dim, dtype=weight or dtype, seed=s) for s in (5, 6))
    return tuple(x.to(device) for x in (qkv, *weights, rope))


def run(operation, inputs, *, strange=False, rounded=None):
    """Outputs, then gradients. Those that come in are not contiguous if `strange`, and of the dtype `rounded` before."""
    inputs = [x.detach().requires_grad_(x.ndim < 4) for x in inputs]  # all but a rotary table
    outputs = operation(*inputs)
    gradients = [_draw(*x.shape, dtype=rounded or x.dtype, seed=7 + i).to(x) for i, x in enumerate(outputs)]
    if strange:
        gradients = [g.transpose(-1, -2).contiguous().transpose(-1, -2) for g in gradients]
        gradients[0] = gradients[0][:1].expand_as(gradients[0])
    return [*outputs, *torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], gradients)]
