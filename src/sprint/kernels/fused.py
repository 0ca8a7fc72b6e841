"""The element-wise part of a block in few passes over memory: our Triton kernels as differentiable operations.

    r, y = x, LayerNorm(x) (1 + scale) + shift                                          `modulate`
    r, y = x + gate branch, LayerNorm(r) (1 + scale) + shift                           `gate_and_modulate`
    q, k, v = R RMSNorm(q) w_q, R RMSNorm(k) w_k, v            (R: rotary positions)   `norm_and_rotate`

Each computes in float32 whatever the dtype of its tensors, and rounds once, where it writes. Each has a twin in plain torch
here, `plain_*`, that says what it means, and that its tests compare it with, outputs and gradients.

Each launch is an operation of torch (`kernels.launches`). What differentiates it is an `autograd.Function` rather than the
operation's own formula, since an operation may not return a view of its input: x passes through `modulate`, so that its
gradient along the residual is added where the other one is computed, and the values pass through `norm_and_rotate`, so that
dq, dk and dv go into one packed gradient. Both save a pass over the tokens.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sprint.kernels import launches
from sprint.kernels.launches import EPS, residual_dtype, wide_dtype

Kernels = Literal["torch", "triton"]


def check_kernels(kernels: str, device: torch.device) -> None:
    """Raise ValueError for an unknown choice or a device without kernels, ImportError where Triton is not installed."""
    if kernels not in get_args(Kernels):
        raise ValueError(f"unknown kernels {kernels!r}: choose one of {', '.join(get_args(Kernels))}")
    if kernels == "triton":
        try:
            from sprint.kernels.mode import interpreted
        except ImportError as error:
            raise ImportError(
                f"kernels 'triton' cannot be imported ({error}): pip install triton, or use 'torch'"
            ) from error
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            raise ValueError(
                f"kernels 'triton' run on CUDA devices, and this model is on {device}: move it there first, or use 'torch' "
                "(a CPU runs them in Triton's interpreter only, with TRITON_INTERPRET=1 in the environment)"
            )


def plain_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `modulate`."""
    wide = wide_dtype(x)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=EPS)
    y = normed * (1 + scale.to(wide).unsqueeze(1)) + shift.to(wide).unsqueeze(1)
    return x, y.to(scale.dtype)


def plain_gate_and_modulate(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `gate_and_modulate`."""
    r = (x.to(wide_dtype(x)) + gate.to(wide_dtype(x)).unsqueeze(1) * branch).to(residual_dtype(x, branch))
    return plain_modulate(r, shift, scale)


def plain_norm_and_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, *, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `norm_and_rotate`."""
    q, k, v = qkv.unflatten(-1, (3, -1, q_weight.shape[0])).unbind(2)
    cos, sin = rope.unsqueeze(2).unbind(-1)  # (B or 1, N, 1, head_dim / 2)

    def turned(u: Tensor, weight: Tensor) -> Tensor:
        u = u.to(wide_dtype(u))
        normed = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps) * weight
        even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return pairs.flatten(-2).to(qkv.dtype)

    q, k, v = (u.transpose(1, 2) for u in (turned(q, q_weight), turned(k, k_weight), v))
    return q, k, v


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """adaLN before a branch: `LayerNorm(x) * (1 + scale) + shift`, and x itself for the residual beside it.

    Args:
        x: tokens, (B, N, C).
        shift: one for each sample, (B, C).
        scale: like shift.

    Returns:
        x, to be used in place of the argument (one pass less in the backward pass), and the modulated tokens, in the dtype
        of scale: a linear layer made it, so that under autocast this is the dtype in which the next layer wants them.
    """
    return _Modulate.apply(x, shift, scale)  # pyright: ignore[reportReturnType]


def gate_and_modulate(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A branch's gated residual, and adaLN before the next branch.

    Args:
        x: tokens, (B, N, C).
        branch: output of attention, like x.
        gate: one for each sample, (B, C).
        shift: like gate.
        scale: like gate.

    Returns:
        `r = x + gate * branch`, in the wider dtype of x and branch, and `modulate(r, shift, scale)`.
    """
    return _GateAndModulate.apply(x, branch, gate, shift, scale)  # pyright: ignore[reportReturnType]


def norm_and_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, *, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for attention from the packed product: RMSNorm and rotary positions on the first two.

    Args:
        qkv: (B, N, 3 heads head_dim).
        q_weight: of the norm of queries, (head_dim).
        k_weight: of the norm of keys, (head_dim).
        rope: cosines and sines, (B or 1, N, head_dim / 2, 2); gets no gradient.
        eps: added to the mean square.

    Returns:
        q, k and v, (B, heads, N, head_dim); in memory tokens come before heads, and v is a view of qkv.
    """
    q, k, v = (u.transpose(1, 2) for u in _NormAndRotate.apply(qkv, q_weight, k_weight, rope, eps))  # pyright: ignore
    return q, k, v


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        y, stats = launches.modulate(x, shift, scale)
        ctx.save_for_backward(x, scale, stats)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx: Any, dr: Tensor, dy: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        x, scale, stats = ctx.saved_tensors
        dx, sums = launches.modulate_backward(dr, dy, x, scale, stats)
        return dx, *_totals(sums, scale)


class _GateAndModulate(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        r, y, stats = launches.gate_and_modulate(x, branch, gate, shift, scale)
        ctx.save_for_backward(r, branch, gate, scale, stats)
        ctx.dtype = x.dtype
        return r, y

    @staticmethod
    def backward(ctx: Any, dr: Tensor, dy: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        r, branch, gate, scale, stats = ctx.saved_tensors
        dx, dbranch, sums = launches.gate_and_modulate_backward(dr, dy, r, branch, gate, scale, stats)
        dshift, dscale, dgate = _totals(sums, scale)
        return dx.to(ctx.dtype), dbranch, dgate, dshift, dscale


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k = launches.norm_and_rotate(qkv, q_weight, k_weight, rope, eps)
        ctx.save_for_backward(qkv, q_weight, k_weight, rope)
        ctx.eps = eps
        return q, k, qkv.unflatten(-1, (3, -1, q_weight.shape[0]))[:, :, 2]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        qkv, q_weight, k_weight, rope = ctx.saved_tensors
        dqkv, sums = launches.norm_and_rotate_backward(dq, dk, dv, qkv, q_weight, k_weight, rope, ctx.eps)
        dq_weight, dk_weight = sums.sum(0).unbind()
        return dqkv, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype), None, None


def _totals(sums: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Of the partial sums (B, parts, 2 or 3, C): plain torch, so that the compiler joins it with what follows."""
    return sums.sum(1).to(like.dtype).unbind(1)
