"""What a `SiT` accepts: each misfit gives one clear error, before anything is computed."""

import torch
from torch import Tensor

from sprint.flow.inputs import check_class_ids, check_times
from sprint.models.config import SiTConfig


def check_inputs(config: SiTConfig, x: Tensor, t: Tensor, y: Tensor | None, *, like: Tensor) -> None:
    """Raise unless x, t and y fit a model of this configuration.

    Values are looked at on the CPU only, outside compiled code: reading them elsewhere would stall the device.

    Args:
        config: the model's.
        x: noisy input, (B, in_channels, H, W).
        t: times, (B,).
        y: condition.
        like: a parameter, whose device and dtype the inputs must have.

    Raises:
        ValueError: ranks, sizes, devices, times or class ids that do not fit.
        TypeError: dtypes that do not fit.
    """
    batch = x.shape[0] if x.ndim else 0
    p = config.patch_size
    if x.ndim != 4 or x.shape[1] != config.in_channels or x.shape[2] % p or x.shape[3] % p:
        raise ValueError(
            f"x must be (B, {config.in_channels}, H, W) with H and W divisible by the patch size {p}, got {tuple(x.shape)}"
        )
    if t.shape != (batch,) or not t.is_floating_point():
        raise ValueError(f"t must be ({batch},) and floating point, got {tuple(t.shape)} {t.dtype}: one time per sample")
    _check_condition(config, y, batch)
    for name, tensor in (("x", x), ("t", t), ("y", y)):
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, the model on {like.device}: move one with .to(device)")
    if not x.is_meta and not torch.is_autocast_enabled(x.device.type):
        for name, tensor in (("x", x), ("y", y)):
            if tensor is not None and tensor.is_floating_point() and tensor.dtype != like.dtype:
                raise TypeError(
                    f"{name} is {tensor.dtype}, the model {like.dtype}: convert one with .to(dtype), or use torch.autocast"
                )
    check_times(t)
    if y is not None:
        check_classes(config, y, wait=False)


def check_classes(config: SiTConfig, y: Tensor, *, wait: bool = True) -> None:
    """Raise ValueError for class ids out of range, on any device (this waits for the device), or only on the CPU."""
    if config.num_classes is not None:
        check_class_ids(y, config.num_classes, wait=wait)


def _check_condition(config: SiTConfig, y: Tensor | None, batch: int) -> None:
    if config.num_classes is None and config.cond_dim is None:
        if y is not None:
            raise ValueError("this model has no condition: leave y out")
        return
    if y is None:
        raise ValueError("y is missing: pass class ids or vectors, or model.null_condition(batch)")
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor, got {type(y).__name__}: torch.tensor(y)")
    if config.num_classes is not None and (y.shape != (batch,) or y.dtype != torch.int64):
        raise ValueError(f"y must be ({batch},) int64 class ids, got {tuple(y.shape)} {y.dtype}")
    if config.cond_dim is not None and (y.shape != (batch, config.cond_dim) or not y.is_floating_point()):
        raise ValueError(f"y must be ({batch}, {config.cond_dim}) floating point, got {tuple(y.shape)} {y.dtype}")
