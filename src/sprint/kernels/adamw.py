"""The update of AdamW in one pass over memory; its twin is `sprint.training.optim.update`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _adamw(  # a launch passes arguments by position
    parameter,
    gradient,
    exp_avg,
    exp_avg_sq,
    shadow,
    average,
    scalars,
    count,
    beta1,
    beta2,
    eps,
    weight_decay,
    average_decay,
    HAS_SHADOW: tl.constexpr,
    HAS_AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    lr, clip, correction1, correction2 = (
        tl.load(scalars),
        tl.load(scalars + 1),
        tl.load(scalars + 2),
        tl.load(scalars + 3),
    )
    p = tl.load(parameter + at, mask=inside)
    g = tl.load(gradient + at, mask=inside).to(tl.float32) * clip
    m = tl.load(exp_avg + at, mask=inside)
    v = tl.load(exp_avg_sq + at, mask=inside)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    p -= lr * weight_decay * p
    p -= lr / correction1 * m / (tl.sqrt(v) / correction2 + eps)
    tl.store(parameter + at, p, mask=inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    if HAS_SHADOW:
        tl.store(shadow + at, p.to(shadow.dtype.element_ty), mask=inside)
    if HAS_AVERAGE:
        a = tl.load(average + at, mask=inside)
        tl.store(average + at, a + (1 - average_decay) * (p - a), mask=inside)


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    shadow: Tensor | None,
    average: Tensor | None,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    average_decay: float,
) -> None:
    """One parameter's update in one pass over memory; arguments as of `sprint.training.optim.update`, dense and alike."""
    count = parameter.numel()
    grid = (triton.cdiv(count, BLOCK),)
    launch: Any = _adamw[grid]
    with torch.cuda.device_of(parameter):  # or Triton launches on the current device
        launch(
            parameter,
            gradient,
            exp_avg,
            exp_avg_sq,
            parameter if shadow is None else shadow,
            parameter if average is None else average,
            scalars,
            count,
            beta1,
            beta2,
            eps,
            weight_decay,
            average_decay,
            HAS_SHADOW=shadow is not None,
            HAS_AVERAGE=average is not None,
            BLOCK=BLOCK,
        )
