"""How the kernels compute: in which precision, and whether in Triton's interpreter."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _probe():
    pass


def wide(x: Tensor) -> Any:
    """Triton's type to compute in: float32, or float64 for float64, which lets tests differentiate numerically."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, that is, whether TRITON_INTERPRET=1 was set when they were imported."""
    return not isinstance(_probe, triton.JITFunction)
