"""Launches of our Triton kernels as operations of torch: opaque to the compiler, recorded by a CUDA graph.

    modulate                     x, shift, scale                         -> y, stats
    gate_and_modulate            x, branch, gate, shift, scale           -> r, y, stats
    norm_and_rotate              qkv, q_weight, k_weight, rope, eps      -> q, k

and the backward pass of each, whose gradients of what tokens share are partial sums. `sprint.kernels.fused`
differentiates them and says what they compute. What an operation returns is made by a function that also tells the
compiler its shapes. Inputs of another layout are copied; within a SiT none is. Triton is imported at the first launch.
"""

import torch
from torch import Tensor

EPS = 1e-6  # of LayerNorm
PROGRAMS = 512  # of a backward pass, about four on each multiprocessor of an H100; more would write more partial sums


def wide_dtype(x: Tensor) -> torch.dtype:
    """What a kernel computes in."""
    return torch.promote_types(x.dtype, torch.float32)


def residual_dtype(x: Tensor, branch: Tensor) -> torch.dtype:
    """Of x + gate * branch."""
    return torch.promote_types(x.dtype, branch.dtype)


def _share(batch: int, tokens: int) -> int:
    """Tokens of one sample that a program of the backward pass goes through."""
    return min(tokens, max(4, -(-batch * tokens // PROGRAMS)))


def _rows(vector: Tensor) -> Tensor:
    """(B, C) of any row stride, such as a chunk of adaLN's output."""
    return vector if vector.stride(-1) == 1 else vector.contiguous()


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=scale.dtype), x.new_empty((*x.shape[:2], 2), dtype=wide_dtype(x))


@torch.library.custom_op("sprint::modulate", mutates_args=())
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Modulated tokens; mean and inverse standard deviation of each token, (B, N, 2)."""
    from sprint.kernels import modulation

    y, stats = _modulated(x, shift, scale)
    modulation.forward(
        x.contiguous(), None, None, _rows(shift), _rows(scale), r=None, y=y, stats=stats, eps=EPS
    )  # fmt: skip
    return y, stats


def _gated(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=residual_dtype(x, branch)), *_modulated(x, shift, scale)


@torch.library.custom_op("sprint::gate_and_modulate", mutates_args=())
def gate_and_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated residual, modulated tokens, statistics of the residual."""
    from sprint.kernels import modulation

    r, y, stats = _gated(x, branch, gate, shift, scale)
    modulation.forward(
        x.contiguous(), branch.contiguous(), _rows(gate), _rows(shift), _rows(scale), r=r, y=y, stats=stats, eps=EPS
    )
    return r, y, stats


def _sums(tokens: Tensor, stats: Tensor, count: int) -> Tensor:
    batch, length, dim = tokens.shape
    return stats.new_empty((batch, -(-length // _share(batch, length)), count, dim))


def _modulate_gradients(dr: Tensor, dy: Tensor, x: Tensor, scale: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _sums(x, stats, 2)


@torch.library.custom_op("sprint::modulate_backward", mutates_args=())
def modulate_backward(dr: Tensor, dy: Tensor, x: Tensor, scale: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """dx, given also the gradient that comes along the residual; partial sums of dshift and dscale, (B, parts, 2, C)."""
    from sprint.kernels import modulation

    dx, sums = _modulate_gradients(dr, dy, x, scale, stats)
    modulation.backward(
        dr.contiguous(), dy.contiguous(), x.contiguous(), None, None, _rows(scale), stats, dx=dx, dbranch=None, sums=sums,
        share=_share(*x.shape[:2]),
    )  # fmt: skip
    return dx, sums


def _gated_gradients(
    dr: Tensor, dy: Tensor, r: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return r.new_empty(r.shape), branch.new_empty(r.shape), _sums(r, stats, 3)


@torch.library.custom_op("sprint::gate_and_modulate_backward", mutates_args=())
def gate_and_modulate_backward(
    dr: Tensor, dy: Tensor, r: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dbranch; partial sums of dshift, dscale and dgate, (B, parts, 3, C)."""
    from sprint.kernels import modulation

    dx, dbranch, sums = _gated_gradients(dr, dy, r, branch, gate, scale, stats)
    modulation.backward(
        dr.contiguous(), dy.contiguous(), r.contiguous(), branch.contiguous(), _rows(gate), _rows(scale), stats, dx=dx,
        dbranch=dbranch, sums=sums, share=_share(*r.shape[:2]),
    )  # fmt: skip
    return dx, dbranch, sums


def _rotated(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    shape = batch, tokens, width // 3 // len(q_weight), len(q_weight)
    return qkv.new_empty(shape), qkv.new_empty(shape)


@torch.library.custom_op("sprint::norm_and_rotate", mutates_args=())
def norm_and_rotate(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Queries and keys, (B, N, heads, head_dim)."""
    from sprint.kernels import rotary

    q, k = _rotated(qkv, q_weight, k_weight, rope, eps)
    qkv, q_weight, k_weight, rope = (x.contiguous() for x in (qkv, q_weight, k_weight, rope))
    rotary.forward(qkv, q_weight, k_weight, rope, q=q, k=k, eps=eps)
    return q, k


def _rotated_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, _ = qkv.shape
    parts = -(-batch * tokens // _share(1, batch * tokens))  # samples share the weights, so that a program may cross them
    sums = qkv.new_empty((parts, 2, len(q_weight)), dtype=wide_dtype(qkv))
    return qkv.new_empty(qkv.shape), sums


@torch.library.custom_op("sprint::norm_and_rotate_backward", mutates_args=())
def norm_and_rotate_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """dqkv, of queries, keys and values; partial sums of the gradients of both weights, (parts, 2, head_dim)."""
    from sprint.kernels import rotary

    dqkv, sums = _rotated_gradients(dq, dk, dv, qkv, q_weight, k_weight, rope, eps)
    dq, dk, dv, qkv, q_weight, k_weight, rope = (
        x.contiguous() for x in (dq, dk, dv, qkv, q_weight, k_weight, rope)
    )  # fmt: skip
    share = _share(1, qkv.shape[0] * qkv.shape[1])
    rotary.backward(dq, dk, dv, qkv, q_weight, k_weight, rope, dqkv=dqkv, sums=sums, share=share, eps=eps)
    return dqkv, sums


for operation, shapes in {
    modulate: _modulated,
    gate_and_modulate: _gated,
    modulate_backward: _modulate_gradients,
    gate_and_modulate_backward: _gated_gradients,
    norm_and_rotate: _rotated,
    norm_and_rotate_backward: _rotated_gradients,
}.items():
    operation.register_fake(shapes)
