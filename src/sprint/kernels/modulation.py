"""Triton kernels of adaLN: a LayerNorm, shifted and scaled per sample, with or without the gated residual before it.

    forward     r = x + gate branch                                     (with a gate; else r = x)
                n = (r - mean(r)) / sqrt(var(r) + eps),  y = n (1 + scale) + shift
    backward    e = dy (1 + scale)
                d = dr + (e - mean(e) - n mean(e n)) / sqrt(var(r) + eps)
                dx = d,  dbranch = gate d
                dshift = sum dy,  dscale = sum dy n,  dgate = sum branch d          (sums over the tokens of a sample)

Each tensor of tokens is read once and written once. A program of the backward pass goes through some tokens of one
sample with the three sums in registers and writes them as partial sums: no atomics, so that equal inputs give equal bits.
Importing this module needs Triton; `sprint.kernels.fused` does so where it launches.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprint.kernels.mode import wide

# pyright: reportPossiblyUnboundVariable=false


@triton.jit
def _forward(
    x,
    branch,
    gate,
    shift,
    scale,
    r,
    y,
    stats,
    tokens,
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # of the batch; times C it may not fit into 32 bits
    sample = token // tokens
    at = tl.arange(0, BLOCK)
    inside = at < C
    value = tl.load(x + token * C + at, mask=inside, other=0.0).to(WIDE)
    if GATED:
        opening = tl.load(gate + sample * gate_stride + at, mask=inside, other=0.0).to(WIDE)
        value += opening * tl.load(branch + token * C + at, mask=inside, other=0.0).to(WIDE)
        rounded = value.to(r.dtype.element_ty)
        tl.store(r + token * C + at, rounded, mask=inside)
        value = rounded.to(WIDE)  # the backward pass reads what was stored, so its statistics must be those
    mean = tl.sum(value, axis=0) / C
    centred = tl.where(inside, value - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
    factor = 1.0 + tl.load(scale + sample * scale_stride + at, mask=inside, other=0.0).to(WIDE)
    offset = tl.load(shift + sample * shift_stride + at, mask=inside, other=0.0).to(WIDE)
    tl.store(y + token * C + at, (centred * inverse * factor + offset).to(y.dtype.element_ty), mask=inside)
    tl.store(stats + token * 2, mean)
    tl.store(stats + token * 2 + 1, inverse)


@triton.jit
def _backward(
    dr,
    dy,
    r,
    branch,
    gate,
    scale,
    stats,
    dx,
    dbranch,
    sums,
    tokens,
    share,
    gate_stride,
    scale_stride,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
):
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < C
    factor = 1.0 + tl.load(scale + sample * scale_stride + at, mask=inside, other=0.0).to(WIDE)
    dshift = tl.zeros((BLOCK,), dtype=WIDE)
    dscale = tl.zeros((BLOCK,), dtype=WIDE)
    if GATED:
        opening = tl.load(gate + sample * gate_stride + at, mask=inside, other=0.0).to(WIDE)
        dgate = tl.zeros((BLOCK,), dtype=WIDE)
    for index in range(part * share, tl.minimum((part + 1) * share, tokens)):
        token = sample * tokens + index
        mean, inverse = tl.load(stats + token * 2), tl.load(stats + token * 2 + 1)
        grad = tl.load(dy + token * C + at, mask=inside, other=0.0).to(WIDE)
        # Beyond C this is not zero, but all that it is multiplied with is, and `tl.store` leaves those lanes out.
        normed = (tl.load(r + token * C + at, mask=inside, other=0.0).to(WIDE) - mean) * inverse
        dshift += grad
        dscale += grad * normed
        e = grad * factor
        through = e - tl.sum(e, axis=0) / C - normed * (tl.sum(e * normed, axis=0) / C)
        d = tl.load(dr + token * C + at, mask=inside, other=0.0).to(WIDE) + through * inverse
        tl.store(dx + token * C + at, d.to(dx.dtype.element_ty), mask=inside)
        if GATED:
            dgate += tl.load(branch + token * C + at, mask=inside, other=0.0).to(WIDE) * d
            tl.store(dbranch + token * C + at, (opening * d).to(dbranch.dtype.element_ty), mask=inside)
    if GATED:
        to = sums + (sample * tl.num_programs(1) + part) * 3 * C + at
        tl.store(to + 2 * C, dgate, mask=inside)
    else:
        to = sums + (sample * tl.num_programs(1) + part) * 2 * C + at
    tl.store(to, dshift, mask=inside)
    tl.store(to + C, dscale, mask=inside)


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    r: Tensor | None,
    y: Tensor,
    stats: Tensor,
    eps: float,
) -> None:
    """Fill r, y and stats.

    Args:
        x: contiguous, (B, N, C), as are branch, r and y, each of any dtype.
        branch: with gate; None leaves both and r out.
        gate: (B, C), the last dimension contiguous, as are shift and scale.
        shift: added.
        scale: its 1 + scale is multiplied with.
        r: gated residual.
        y: modulated tokens.
        stats: mean and inverse standard deviation, (B, N, 2), float32.
        eps: added to the variance.
    """
    assert (branch is None) == (gate is None) == (r is None)
    batch, tokens, dim = x.shape
    block = triton.next_power_of_2(dim)
    launch: Any = _forward[(batch * tokens,)]
    with torch.cuda.device_of(scale):
        launch(
            x,
            x if branch is None else branch,
            shift if gate is None else gate,
            shift,
            scale,
            x if r is None else r,
            y,
            stats,
            tokens,
            0 if gate is None else gate.stride(0),
            shift.stride(0),
            scale.stride(0),
            eps,
            C=dim,
            BLOCK=block,
            GATED=gate is not None,
            WIDE=wide(x),
            num_warps=max(1, min(block // 512, 8)),
        )


def backward(
    dr: Tensor,
    dy: Tensor,
    r: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    *,
    dx: Tensor,
    dbranch: Tensor | None,
    sums: Tensor,
    share: int,
) -> None:
    """Fill dx, dbranch and the partial sums; arguments beside these as of `forward`.

    Args:
        dr: gradient of r that comes along the residual, (B, N, C), contiguous, as are dy, dx and dbranch.
        dy: gradient of y.
        r: as stored; x without a gate.
        branch: None leaves gate and dbranch out too.
        gate: (B, C).
        scale: (B, C).
        stats: of the forward pass.
        dx: gradient of x.
        dbranch: gradient of branch.
        sums: (B, programs per sample, 3, C), float32: of shift, scale and gate; (.., 2, C) without a gate.
        share: tokens of each program.
    """
    assert (branch is None) == (gate is None) == (dbranch is None)
    batch, tokens, dim = r.shape
    block = triton.next_power_of_2(dim)
    launch: Any = _backward[(batch, sums.shape[1])]
    with torch.cuda.device_of(scale):
        launch(
            dr,
            dy,
            r,
            r if branch is None else branch,
            scale if gate is None else gate,
            scale,
            stats,
            dx,
            dx if dbranch is None else dbranch,
            sums,
            tokens,
            share,
            0 if gate is None else gate.stride(0),
            scale.stride(0),
            C=dim,
            BLOCK=block,
            GATED=gate is not None,
            WIDE=wide(r),
            num_warps=max(1, min(block // 256, 8)),
        )
