"""What callers hand to losses, samplers and models: each misfit gives one clear error, before anything is computed.

Values are looked at on the CPU only, outside compiled code: reading them elsewhere would stall the device.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def readable(tensor: Tensor) -> bool:
    """Whether its values may be looked at."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_times(t: Tensor) -> None:
    """Raise ValueError for times outside of [0, 1]."""
    if readable(t) and not ((t.detach() >= 0) & (t.detach() <= 1)).all():
        raise ValueError(
            f"t holds times from {t.min():g} to {t.max():g}, expected 0 (data) to 1 (noise): divide steps by their count"
        )


def check_class_ids(y: Tensor, count: int, *, wait: bool) -> None:
    """Raise ValueError for class ids outside of 0 to count, the last being the null class; on other devices than the CPU
    only with `wait`, since it waits for them."""
    if y.numel() == 0 or not (wait or readable(y)):
        return
    low, high = int(y.min()), int(y.max())
    if low < 0 or high > count:
        raise ValueError(f"y holds class ids from {low} to {high}, expected 0 to {count - 1} (or {count}, the null class)")


def check_conditions(y: Any, batch: int) -> None:
    """Raise ValueError for a tensor of conditions of another batch, or for one in a dictionary that would be repeated.

    Tensors of a dictionary need not be one per sample (`img_ids` of Flux are one per token), so that only a single one for
    several samples is refused.
    """
    if isinstance(y, Tensor) and (y.ndim == 0 or len(y) != batch):
        raise ValueError(f"y holds {len(y) if y.ndim else 'one number'} conditions for {batch} samples: give one per sample")
    if isinstance(y, Mapping) and batch > 1:
        for name, value in y.items():
            if isinstance(value, Mapping):
                check_conditions(value, batch)
            elif isinstance(value, Tensor) and value.ndim and len(value) == 1:
                raise ValueError(
                    f"{name} of y is {tuple(value.shape)}, one condition for {batch} samples: give one per sample, such as "
                    f"{name}.expand({batch}, {', '.join(['-1'] * (value.ndim - 1)) or '…'})"
                )


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless it is a whole number, at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Raise ValueError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if positive and not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}")
