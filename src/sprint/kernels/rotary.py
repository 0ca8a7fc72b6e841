"""Triton kernels of q/k-norm and rotary positions, from the packed product of a block's qkv layer to attention's inputs.

    forward     n = u / sqrt(mean(u^2) + eps),  q = R (n w)             (u: one head of one token; R turns pairs of channels)
    backward    g = R^-1 dq,  dw = sum g n
                du = (g w - n mean(g w n)) / sqrt(mean(u^2) + eps)

and so for k. Queries and keys are read where the product left them, heads of a token one after another, and written in
the order (B, N, heads, head_dim), in which attention also returns its output: no copy before `proj`. Values need no work, so
that they stay where they are; the backward pass collects dq, dk and dv in one packed gradient. Importing this module
needs Triton; `sprint.kernels.fused` does so where it launches.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprint.kernels.mode import wide

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false


@triton.jit
def _angles(rope, token, tokens, stride, channel, D: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Cosines and sines of one token, (1, WIDTH / 2) each; the table of a sample is `stride` after the one before."""
    at = rope + token // tokens * stride + token % tokens * D + channel
    return tl.split(tl.reshape(tl.load(at, mask=channel < D, other=0.0).to(WIDE), (1, WIDTH // 2, 2)))


@triton.jit
def _turn(x, cos, sin, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Pairs (2i, 2i+1) of (HEADS, WIDTH) by angles (1, WIDTH / 2); neighbours sit in one thread, so nothing is shuffled."""
    even, odd = tl.split(tl.reshape(x, (HEADS, WIDTH // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, WIDTH))


@triton.jit
def _forward(
    qkv,
    q_weight,
    k_weight,
    rope,
    q,
    k,
    tokens,
    rope_stride,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # of the batch
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    at, inside = head * D + channel, (head < H) & (channel < D)
    cos, sin = _angles(rope, token, tokens, rope_stride, channel, D, WIDTH, WIDE)
    for which in tl.static_range(2):
        to, weight = (q, q_weight) if which == 0 else (k, k_weight)
        u = tl.load(qkv + (3 * token + which) * (H * D) + at, mask=inside, other=0.0).to(WIDE)
        w = tl.load(weight + channel, mask=channel < D, other=0.0).to(WIDE)
        inverse = 1.0 / tl.sqrt(tl.sum(u * u, axis=1, keep_dims=True) / D + eps)
        turned = _turn(u * inverse * w, cos, sin, HEADS, WIDTH)
        tl.store(to + token * (H * D) + at, turned.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dq,
    dk,
    dv,
    qkv,
    q_weight,
    k_weight,
    rope,
    dqkv,
    sums,
    count,
    tokens,
    share,
    rope_stride,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    at, inside = head * D + channel, (head < H) & (channel < D)
    dq_weight = tl.zeros((HEADS, WIDTH), dtype=WIDE)
    dk_weight = tl.zeros((HEADS, WIDTH), dtype=WIDE)
    for token in range(program * share, tl.minimum((program + 1) * share, count)):
        cos, sin = _angles(rope, token, tokens, rope_stride, channel, D, WIDTH, WIDE)
        for which in tl.static_range(3):
            grad, weight = (dq, q_weight) if which == 0 else (dk, k_weight) if which == 1 else (dv, k_weight)
            g = tl.load(grad + token * (H * D) + at, mask=inside, other=0.0)
            to = (3 * token + which) * (H * D) + at
            if which < 2:
                u = tl.load(qkv + to, mask=inside, other=0.0).to(WIDE)
                w = tl.load(weight + channel, mask=channel < D, other=0.0).to(WIDE)
                inverse = 1.0 / tl.sqrt(tl.sum(u * u, axis=1, keep_dims=True) / D + eps)
                normed = u * inverse
                g = _turn(g.to(WIDE), cos, -sin, HEADS, WIDTH)
                if which == 0:
                    dq_weight += g * normed
                else:
                    dk_weight += g * normed
                g *= w
                g = (g - normed * (tl.sum(g * normed, axis=1, keep_dims=True) / D)) * inverse
            tl.store(dqkv + to, g.to(dqkv.dtype.element_ty), mask=inside)
    out, kept = sums + program * 2 * D + tl.arange(0, WIDTH), tl.arange(0, WIDTH) < D
    tl.store(out, tl.sum(dq_weight, axis=0), mask=kept)
    tl.store(out + D, tl.sum(dk_weight, axis=0), mask=kept)


def _sizes(qkv: Tensor, heads: int) -> dict[str, Any]:
    """Constants of both kernels: sizes, and the powers of two above them that Triton needs."""
    head_dim = qkv.shape[-1] // 3 // heads
    padded = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim)
    warps = max(1, min(padded[0] * padded[1] // 256, 8))  # eight channels, a vector of 16 bytes in bfloat16, per thread
    return {"H": heads, "D": head_dim, "HEADS": padded[0], "WIDTH": padded[1], "WIDE": wide(qkv), "num_warps": warps}


def forward(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, *, q: Tensor, k: Tensor, eps: float) -> None:
    """Fill q and k; every tensor is contiguous.

    Args:
        qkv: (B, N, 3 heads head_dim).
        q_weight: of the norm of queries, (head_dim).
        k_weight: of the norm of keys.
        rope: cosines and sines, (B or 1, N, head_dim / 2, 2).
        q: (B, N, heads, head_dim).
        k: like q.
        eps: added to the mean square.
    """
    batch, tokens, _ = qkv.shape
    launch: Any = _forward[(batch * tokens,)]
    stride = 0 if len(rope) == 1 else rope.stride(0)
    with torch.cuda.device_of(qkv):
        launch(qkv, q_weight, k_weight, rope, q, k, tokens, stride, eps, **_sizes(qkv, q.shape[2]))


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    *,
    dqkv: Tensor,
    sums: Tensor,
    share: int,
    eps: float,
) -> None:
    """Fill dqkv and the partial sums; arguments beside these as of `forward`, contiguous too.

    Args:
        dq: gradient of q, (B, N, heads, head_dim).
        dk: gradient of k.
        dv: gradient of the values.
        qkv: as in the forward pass.
        q_weight: (head_dim).
        k_weight: (head_dim).
        rope: (B or 1, N, head_dim / 2, 2).
        dqkv: gradient of qkv.
        sums: (programs, 2, head_dim), float32: of q_weight and k_weight.
        share: tokens of each program.
        eps: as in the forward pass.
    """
    batch, tokens, _ = qkv.shape
    launch: Any = _backward[(len(sums),)]
    stride = 0 if len(rope) == 1 else rope.stride(0)
    with torch.cuda.device_of(qkv):
        launch(
            dq, dk, dv, qkv, q_weight, k_weight, rope, dqkv, sums, batch * tokens, tokens, share, stride, eps,
            **_sizes(qkv, dq.shape[2]),
        )  # fmt: skip
